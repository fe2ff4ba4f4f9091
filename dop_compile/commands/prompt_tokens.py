"""The tokens of the prompt that `dop-compile explain` is asked about.

1. `--system`, `--visual` and `--text` say how many there are.
2. Else they are counted in what the model's processor makes of `--image` and `--prompt`, or of `--samples` (the mean).
3. Else visual tokens are those of one picture, by the model's configuration, or by its processor where pictures of all
   sizes have as many. The rest is what its processor makes of a short question; without a processor it is assumed
   (`dop_compile.reports.counts`).
(refused) Models whose number of visual tokens depends on the picture, and numbers that no picture of the model has.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dop_compile.commands.inputs import load_processor, read_images
from dop_compile.commands.usage import UsageError, one_line
from dop_compile.hf.names import PLACEHOLDER_IDS
from dop_compile.hf.pictures import PictureTokens, is_text_only, picture_tokens
from dop_compile.hf.prompts import prompt_inputs
from dop_compile.policy.policy import Policy
from dop_compile.reports.counts import PromptCounts, assumed_counts
from dop_compile.search.samples import Samples, read_jsonl

__all__ = ["prompt_tokens"]

ASK = "give --image FILE (and --prompt), --samples FILE, or --visual N"
ASK_TEXT_ONLY = "give --visual N (and --system, --text)"
QUESTION = "Describe the picture."
SIZES = ((336, 336), (224, 448), (1024, 768), (96, 96))
"""(height, width) of pictures that have as many tokens only if all pictures have."""
BLANK = Image.new("RGB", SIZES[0])


@dataclass(frozen=True)
class Counted:
    """System, visual and text tokens of a prompt, and what was counted."""

    system: int
    visual: int
    text: int
    what: str


def prompt_tokens(arguments: Namespace, config: Any, tiers: Mapping[str, Policy]) -> PromptCounts:
    """The counts that the command line asks for, and how they are known.

    Raises:
        UsageError: they cannot be known, or no picture of this model has so many.
    """
    counts = _known(arguments, config, tiers)
    whole = [tier for tier, policy in tiers.items() if (policy.visual_tokens or 0) > counts.visual]
    note = f"tiers that keep more than {counts.visual} visual tokens: {', '.join(whole)}" if whole else ""
    return replace(counts, why="; ".join(filter(None, (counts.why, note))))


def _known(arguments: Namespace, config: Any, tiers: Mapping[str, Policy]) -> PromptCounts:
    given = (arguments.system, arguments.visual, arguments.text)
    fixed = picture_tokens(config)
    if arguments.samples is not None and (arguments.image or arguments.prompt is not None):
        raise UsageError("--samples: give either samples or --image and --prompt")
    try:
        if arguments.samples is not None or arguments.image or arguments.prompt is not None:
            return _filled(given, _counted(arguments, config, fixed))
        if arguments.visual is None and fixed is None and not is_text_only(config):
            fixed = _by_processor(arguments.model)
        ask = ASK_TEXT_ONLY if is_text_only(config) else ASK
        counts = assumed_counts(config, tiers, *given, picture=fixed, ask=ask)
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    if fixed is not None and counts.visual % fixed.count:
        raise UsageError(
            f"--visual {counts.visual}: a picture of this model has {fixed.count} visual tokens by {fixed.why}; "
            f"expected {fixed.count} for each picture"
        )
    if is_text_only(config) or None not in (arguments.system, arguments.text):
        return counts
    return _with_own_text(arguments, config, counts)


def _with_own_text(arguments: Namespace, config: Any, counts: PromptCounts) -> PromptCounts:
    """System and text tokens as the model's processor writes a short question, where there is a processor."""
    try:
        inputs = prompt_inputs(load_processor(_directory(arguments.model)), QUESTION, [BLANK])
        system, _, text = _groups(inputs, _visual_ids(config))
    except Exception:  # no processor, or not for a blank picture: what was assumed is said
        return counts
    known = counts.why.rpartition("; ")[0]
    names = [name for name in ("system", "text") if getattr(arguments, name) is None]
    return PromptCounts(
        system if arguments.system is None else arguments.system,
        counts.visual,
        text if arguments.text is None else arguments.text,
        "; ".join(filter(None, (known, f"{' and '.join(names)} tokens of the prompt {QUESTION!r}"))),
    )


def _directory(model: str) -> str:
    """Where the processor is: beside a configuration that is named alone."""
    path = Path(model).expanduser()
    return str(path.parent) if path.is_file() else model


def _visual_ids(config: Any) -> set[int]:
    ids = {value for name in PLACEHOLDER_IDS if isinstance(value := getattr(config, name, None), int)}
    if not ids:
        raise UsageError(
            f"{type(config).__name__} names no image token, and visual tokens cannot be counted; give --visual N"
        )
    return ids


def _filled(given: tuple[int | None, int | None, int | None], counted: Counted) -> PromptCounts:
    """What is given, and what was counted of the rest."""
    names = [name for name, value in zip(("system", "visual", "text"), given, strict=True) if value is None]
    rest = (counted.system, counted.visual, counted.text)
    system, visual, text = (own if value is None else value for value, own in zip(given, rest, strict=True))
    return PromptCounts(system, visual, text, f"{', '.join(names)} tokens of {counted.what}" if names else "")


def _counted(arguments: Namespace, config: Any, fixed: PictureTokens | None) -> Counted:
    ids = _visual_ids(config)
    found = [_groups(row, ids) for row in _inputs(arguments, fixed)]
    system, visual, text = (round(sum(column) / len(found)) for column in zip(*found, strict=True))
    if arguments.samples is not None:
        return Counted(system, visual, text, f"the mean of {len(found)} samples")
    return Counted(system, visual, text, "--image and --prompt" if arguments.image else "--prompt and one picture")


def _groups(inputs: Mapping[str, Any], visual: set[int]) -> tuple[int, int, int]:
    """System, visual and text tokens of a prompt of one row."""
    ids: Tensor = inputs["input_ids"]
    places = [number for number, token in enumerate(ids[0].tolist()) if token in visual]
    if not places:
        return 0, 0, ids.shape[1]
    return places[0], len(places), ids.shape[1] - places[0] - len(places)


def _inputs(arguments: Namespace, fixed: PictureTokens | None) -> Iterator[Mapping[str, Any]]:
    if arguments.samples is not None:
        path = Path(arguments.samples).expanduser()
        try:
            rows = read_jsonl(path)
        except OSError as error:
            raise UsageError(f"--samples {arguments.samples!r}: {error.strerror or one_line(error)}") from error
        yield from Samples(rows, load_processor(_directory(arguments.model)))
        return
    images = read_images(arguments.image)
    if not images:
        if fixed is None:
            raise UsageError(f"--prompt: how many visual tokens a picture has depends on the picture; {ASK}")
        images = [BLANK]
    yield prompt_inputs(load_processor(_directory(arguments.model)), arguments.prompt or QUESTION, images)


def _by_processor(model: str) -> PictureTokens | None:
    """Visual tokens of a picture, if the model's processor makes as many of all pictures."""
    try:
        counts = load_processor(_directory(model))._get_num_multimodal_tokens(image_sizes=SIZES).num_image_tokens
    except Exception:  # processors without such a method, or that want to know more
        return None
    return PictureTokens(counts[0], "the processor") if counts and len(set(counts)) == 1 else None
