"""`dop-compile run`: answer a prompt about images with a pruned model."""

from __future__ import annotations

import functools
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dop_compile.commands.inputs import (
    compile_model,
    load_processor,
    load_vision_config,
    load_vision_model,
    read_images,
    read_prompt,
    resized_processor,
    write_file,
)
from dop_compile.commands.outputs import PLOT_DPI, check_new, picture_file
from dop_compile.commands.policies import NO_POLICY, read_policies
from dop_compile.commands.usage import UsageError, usage_errors
from dop_compile.reports.kept_patches import kept_figure, kept_patches

__all__ = ["run_command"]


class _TokenBar:
    """Progress of `generate`, which hands each new token to its streamer."""

    def __init__(self, description: str, total: int):
        self._bar = tqdm(desc=description, total=total, unit="token", leave=False, file=sys.stderr)
        self._prompt = True

    def put(self, tokens: Any) -> None:
        self._bar.update(0 if self._prompt else 1)
        self._prompt = False

    def end(self) -> None:
        self._bar.close()


def _answer(model: Any, processor: Any, inputs: Any, name: str, tokens: int, **settings: Any) -> str:
    bar = _TokenBar(name, tokens)
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=bar, **settings)
    text: str = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def _seconds(model: Any, inputs: Any, **settings: Any) -> float:
    """Time to the first token, the second time that it is asked for."""
    for _ in range(2):
        started = time.perf_counter()
        model.generate(**inputs, max_new_tokens=1, do_sample=False, **settings)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return seconds


def _seen(processor: Any, inputs: Any, images: Sequence[Any]) -> list[Any]:
    """The pictures as the vision tower is given them, cut and scaled; where it is given patches, the user's own."""
    pixels = inputs.get("pixel_values")
    image_processor = getattr(processor, "image_processor", None)
    mean, deviation = (getattr(image_processor, name, None) for name in ("image_mean", "image_std"))
    if pixels is None or pixels.ndim != 4 or len(pixels) != len(images) or mean is None or deviation is None:
        return [np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in images]
    channels = pixels.double().cpu().permute(0, 2, 3, 1).numpy()
    return list((channels * deviation + mean).clip(0, 1))


@torch.no_grad()
def run_command(arguments: Namespace) -> None:
    """Answer a prompt about images with a pruned model."""
    images = read_images(arguments.image)
    shown = picture_file("--show-kept", arguments.show_kept)
    if shown is not None:
        check_new([shown], arguments.force, "--show-kept")
    config = load_vision_config(arguments.model)
    tiers = read_policies(arguments, config.get_text_config(decoder=True).num_hidden_layers)
    if not tiers:
        raise UsageError(NO_POLICY)
    processor = load_processor(arguments.model)
    model = load_vision_model(arguments.model, arguments.device, arguments.dtype)
    compiled = compile_model(model, tiers, arguments.backend)
    tier = arguments.tier or next(iter(tiers))

    inputs = read_prompt(processor, model, arguments.prompt, images)
    small = resized_processor(processor, tiers[tier], len(images))
    reduced = inputs if small is processor else read_prompt(small, model, arguments.prompt, images)
    if shown is not None:
        with usage_errors():
            kept = kept_patches(compiled, reduced, tier)
            figure = kept_figure(_seen(small, reduced, images), kept, tiers[tier])
    print(_answer(compiled, processor, reduced, tier, arguments.max_new_tokens, tier=tier))
    if shown is not None:
        write_file(shown, functools.partial(figure.savefig, format=shown.suffix[1:], dpi=PLOT_DPI), "--show-kept")
        print(f"saved picture {shown}", file=sys.stderr)
    if arguments.compare:
        original = _answer(model, processor, inputs, "original", arguments.max_new_tokens)
        print(f"original: {original}")
        whole, pruned = _seconds(model, inputs), _seconds(compiled, reduced, tier=tier)
        print(
            f"first token: {1000 * pruned:.0f} ms, original {1000 * whole:.0f} ms ({pruned / whole:.2f} of it, "
            "vision tower included)"
        )
