"""The table of model families in docs/models.md: `python -m tests.make_table` writes it.

It lists what the conformance suite is parametrised over, so a family stands there only while it is tested: as exact, or
as refused for the reason that the error gives.
"""

from __future__ import annotations

from pathlib import Path

from tests.conformance.table import EXACT, REFUSED
from tests.families import Family

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
START, END = "<!-- FAMILIES -->", "<!-- /FAMILIES -->"

_TRAITS = {
    "has_mrope": "multi-axis rotary positions",
    "has_deepstack": "DeepStack features",
    "has_newlines": "newline embeddings",
    "has_sliding_layers": "sliding-window layers",
    "has_bidirectional_images": "bidirectional image tokens",
    "has_bidirectional_prefix": "bidirectional prompt",
    "has_states": "recurrent or convolutional layers",
    "replays_from": "layers that read earlier keys and values",
    "is_parallel": "parallel attention and MLP",
}


def _checked(family: Family) -> str:
    first = "videos" if family.images_are_videos else "images"
    kinds = [name for name, takes in ((first, family.image), ("videos", family.video)) if takes is not None]
    return ", ".join([*kinds, *(text for flag, text in _TRAITS.items() if getattr(family, flag))])


def _decoder(family: Family) -> str:
    return type(family.config().get_text_config(decoder=True)).__name__


def supported_models_table() -> str:
    """Markdown: one line per multimodal family, the text-only classes, and a line per refused family."""
    multimodal = [family for family in EXACT.values() if not family.is_text_only]
    text_only = sorted({family.model_class.__name__ for family in EXACT.values() if family.is_text_only})
    lines = ["| family | model class | text decoder of | checked with |", "| --- | --- | --- | --- |"]
    for family in multimodal:
        lines.append(f"| {family.name} | `{family.model_class.__name__}` | `{_decoder(family)}` | {_checked(family)} |")
    lines += ["", f"Text-only classes, with `token_groups`: {', '.join(f'`{name}`' for name in text_only)}.", ""]
    lines += ["Refused when they are compiled, by an error that names the layer:", ""]
    lines += ["| model class | because of |", "| --- | --- |"]
    lines += [f"| `{r.family.model_class.__name__}` | {r.reason} |" for r in REFUSED.values()]
    return "\n".join(lines)


def table_in_docs() -> str:
    """The text between the page's markers."""
    text = PAGE.read_text(encoding="utf-8")
    return text.split(START)[1].split(END)[0].strip()


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2] if END in rest else rest
    PAGE.write_text(f"{before}{START}\n\n{supported_models_table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
