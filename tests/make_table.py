"""The README's table of model families: `python -m tests.make_table` writes it.

It lists what `tests/test_conformance.py` is parametrised over, so a family stands there only while it is tested.
"""

from __future__ import annotations

from pathlib import Path

from tests.families import FAMILIES, Family

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- FAMILIES -->", "<!-- /FAMILIES -->"

_TRAITS = {
    "has_mrope": "multi-axis rotary positions",
    "has_deepstack": "DeepStack features",
    "has_newlines": "newline embeddings",
    "has_sliding_layers": "sliding-window layers",
    "has_bidirectional_images": "bidirectional image tokens",
    "is_parallel": "parallel attention and MLP",
}


def _checked(family: Family) -> str:
    kinds = [name for name, takes in (("images", family.image), ("videos", family.video)) if takes is not None]
    return ", ".join(
        [*(kinds or ["`token_groups`"]), *(text for flag, text in _TRAITS.items() if getattr(family, flag))]
    )


def supported_models_table() -> str:
    """Markdown: one line per family of the conformance test."""
    lines = ["| family | model class | text decoder | checked with |", "| --- | --- | --- | --- |"]
    for family in FAMILIES.values():
        model = family.build()
        decoder = type(model.get_decoder()).__name__
        lines.append(f"| {family.name} | `{family.model_class.__name__}` | `{decoder}` | {_checked(family)} |")
    return "\n".join(lines)


def table_in_readme() -> str:
    """The text between the README's markers."""
    text = README.read_text(encoding="utf-8")
    return text.split(START)[1].split(END)[0].strip()


def main() -> None:
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2] if END in rest else rest
    README.write_text(f"{before}{START}\n\n{supported_models_table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
