"""What the command line's subcommands do; `dop_compile.cli` parses and reports errors."""

from __future__ import annotations

import functools
import json
import sys
import time
from argparse import Namespace
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dop_compile.commands.inputs import (
    UsageError,
    check_backend,
    compile_model,
    load_model_on_meta,
    load_processor,
    load_vision_config,
    load_vision_model,
    one_line,
    read_images,
    resized_processor,
    write_file,
)
from dop_compile.commands.outputs import check_new, output_directory, output_file
from dop_compile.commands.policies import NO_POLICY, read_policies
from dop_compile.commands.prompt_tokens import prompt_tokens
from dop_compile.demo.picture import draw
from dop_compile.demo.run import compose, demo_policies, open_checkpoint, require_packages, run_demo
from dop_compile.hf.prompts import prompt_inputs
from dop_compile.policy.policy import Policy
from dop_compile.reports.explain import explain
from dop_compile.reports.picture import explain_figure

__all__ = ["UsageError", "demo_command", "explain_command", "run_command"]

PICTURES = (".svg", ".png", ".pdf")
PLOT_DPI = 120


def explain_command(arguments: Namespace) -> None:
    """Print what policies cost on a model, of which no weights are read."""
    plot = _picture(arguments.plot)
    for option, name in (("--plot", arguments.plot), ("--save-policy", arguments.save_policy)):
        if name:
            check_new([output_file(name, option)], arguments.force, option)
    model = load_model_on_meta(arguments.model, arguments.dtype)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    tiers = read_policies(arguments, layers) or {"full": Policy.full(layers)}
    # A fingerprint covers weights, and there are none here
    compiled = compile_model(model, {name: p.replace(provenance=None) for name, p in tiers.items()}, "eager")
    tokens = prompt_tokens(arguments, model.config, tiers)
    counts = {"system": tokens.system, "visual": tokens.visual, "text": tokens.text, "rows": arguments.rows}
    try:
        result = replace(explain(compiled, arguments.tier, **counts), counts=tokens.why)
        figure = explain_figure(compiled, **counts) if arguments.plot else None
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    if figure is not None:
        save = functools.partial(figure.savefig, format=plot.suffix[1:], dpi=PLOT_DPI)
        write_file(plot, save, "--plot")
        print(f"saved picture {plot}", file=sys.stderr)
    if arguments.save_policy:
        write_file(Path(arguments.save_policy).expanduser(), tiers[result.tier].to_json() + "\n", "--save-policy")
        print(f"saved policy {result.tier!r} to {arguments.save_policy}", file=sys.stderr)
    print(json.dumps(result.to_dict(), indent=1) if arguments.json else result)


def _picture(name: str | None) -> Path:
    """The path of a picture that can be drawn here."""
    path = Path(name or "").expanduser()
    if name and path.suffix not in PICTURES:
        raise UsageError(f"--plot {name!r}: expected a name that ends in {', '.join(PICTURES)}")
    if name and find_spec("matplotlib") is None:
        raise UsageError("--plot: matplotlib is not installed; pip install 'dop_compile[search]'")
    return path


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


@torch.no_grad()
def run_command(arguments: Namespace) -> None:
    """Answer a prompt about images with a pruned model."""
    images = read_images(arguments.image)
    config = load_vision_config(arguments.model)
    tiers = read_policies(arguments, config.get_text_config(decoder=True).num_hidden_layers)
    if not tiers:
        raise UsageError(NO_POLICY)
    processor = load_processor(arguments.model)
    model = load_vision_model(arguments.model, arguments.device, arguments.dtype)
    compiled = compile_model(model, tiers, arguments.backend)
    tier = arguments.tier or next(iter(tiers))

    def read(given: Any) -> Any:
        try:
            return prompt_inputs(given, arguments.prompt, images).to(model.device, model.dtype)
        except ValueError as error:
            raise UsageError(f"--prompt: {one_line(error)}") from error

    inputs, small = read(processor), resized_processor(processor, tiers[tier], len(images))
    reduced = inputs if small is processor else read(small)
    print(_answer(compiled, processor, reduced, tier, arguments.max_new_tokens, tier=tier))
    if arguments.compare:
        original = _answer(model, processor, inputs, "original", arguments.max_new_tokens)
        print(f"original: {original}")
        whole, pruned = _seconds(model, inputs), _seconds(compiled, reduced, tier=tier)
        print(
            f"first token: {1000 * pruned:.0f} ms, original {1000 * whole:.0f} ms ({pruned / whole:.2f} of it, "
            "vision tower included)"
        )


def demo_command(arguments: Namespace) -> None:
    """Run the demo: compose a picture, ask about it, print the tables and draw them."""
    require_packages()
    check_backend(arguments.backend)
    own = read_images([arguments.image])[0] if arguments.image is not None else None
    out = output_directory(arguments.out)
    checkpoint = None if arguments.checkpoint is None else Path(arguments.checkpoint).expanduser()
    try:
        model, reader = open_checkpoint(checkpoint)
    except (OSError, ValueError) as error:
        raise UsageError(one_line(error)) from error
    image, questions = compose(arguments.number, arguments.seed, own)
    compiled = compile_model(model, demo_policies(), arguments.backend)
    exact = arguments.backend == "eager"
    result = run_demo(model, compiled, reader, image, questions, exact=exact, repeats=arguments.repeats)
    write_file(out / "demo-input.png", lambda file: image.save(file, format="png"))
    with tqdm(desc="drawing", total=1, leave=False, file=sys.stderr) as bar:
        figure = draw(result)
        write_file(out / "demo.png", lambda file: figure.savefig(file, format="png", dpi=100))
        bar.update()
    print(result)
    print(
        f"\nSaved {out / 'demo.png'} (answers, and the operations that each tier keeps) and {out / 'demo-input.png'}."
    )
