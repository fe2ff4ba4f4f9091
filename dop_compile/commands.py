"""What the command line's subcommands do; `dop_compile.cli` parses and reports errors."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from dop_compile.compiler import dop_compile
from dop_compile.demo import run_demo
from dop_compile.explain import explain
from dop_compile.policy import Policy

# Typed loosely: transformers annotates only a part of what is used here
hf: Any = transformers

__all__ = ["UsageError", "demo_command", "explain_command", "run_command"]

DEPTHS = ("mha_depth", "mha_query_depth", "mha_key_value_depth", "mlp_depth", "system_mha_depth", "system_mlp_depth")
POLICY_OPTIONS = (*DEPTHS, "visual_tokens", "reducer", "positions")


class UsageError(Exception):
    """The command was given something wrong; the message says what, in one line."""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- what the user names: models, policies, images


def _located(model: str) -> str:
    """The model as `from_pretrained` takes it; a path has to exist, anything else is a hub id."""
    path = Path(model).expanduser()
    if path.exists():
        return str(path)
    if model.startswith(("/", ".", "~")) or model.count("/") != 1 or model.endswith(".json"):
        raise UsageError(f"model {model!r}: no such directory or file, and not a hub id (owner/name)")
    return model


def _load(kind: Any, model: str, **settings: Any) -> Any:
    try:
        return kind.from_pretrained(model, **settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"model {model!r}: {_one_line(error)}") from error


def _model_on_meta(model: str, dtype: str) -> Any:
    """The model without its weights, from its configuration alone."""
    config = _load(hf.AutoConfig, _located(model))
    for kind in (hf.AutoModelForImageTextToText, hf.AutoModelForCausalLM):
        if type(config) in kind._model_mapping:
            with torch.device("meta"):
                settings = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
                return kind.from_config(config, **settings).eval()
    raise UsageError(f"model {model!r}: {type(config).__name__} is not of a language or vision-language model")


def _depthwise(arguments: Namespace, layers: int) -> Policy | None:
    given = {name: value for name in POLICY_OPTIONS if (value := getattr(arguments, name)) is not None}
    if not given:
        return None
    if arguments.policy:
        raise UsageError("give either --policy or options such as --mha-depth, not both")
    try:
        return Policy.depthwise(layers, **given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"policy: {_one_line(error)}") from error


def _policies(arguments: Namespace, layers: int) -> dict[str, Policy]:
    """The tiers that the command line describes; empty if it says nothing of a policy."""
    if (policy := _depthwise(arguments, layers)) is not None:
        return {"policy": policy}
    tiers: dict[str, Policy] = {}
    for text in arguments.policy:
        name, separator, file = text.partition("=")
        if not separator or Path(text).exists():
            name, file = Path(text).stem, text
        if name in tiers:
            raise UsageError(f"--policy: the name {name!r} is given twice; name policies apart with NAME=FILE")
        try:
            tiers[name] = Policy.load(file)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"policy {file!r}: {_one_line(error)}") from error
    if arguments.tier is not None and arguments.tier not in tiers:
        raise UsageError(f"--tier: {arguments.tier!r} is not one of the policies given ({', '.join(tiers) or 'none'})")
    return tiers


def _images(paths: list[str]) -> list[Image.Image]:
    images = []
    for path in paths:
        try:
            images.append(Image.open(path).convert("RGB"))
        except UnidentifiedImageError as error:
            raise UsageError(f"image {path!r}: not an image that can be decoded") from error
        except OSError as error:
            raise UsageError(f"image {path!r}: {error.strerror or _one_line(error)}") from error
    return images


def _compile(model: Any, tiers: Mapping[str, Policy], backend: str) -> Any:
    try:
        return dop_compile(model, tiers, backend=backend)
    except (TypeError, ValueError) as error:  # another depth, another model, a class that cannot be pruned
        raise UsageError(_one_line(error)) from error


# --- the commands


def explain_command(arguments: Namespace) -> None:
    """Print what policies cost on a model, of which only the configuration is read."""
    model = _model_on_meta(arguments.model, arguments.dtype)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    tiers = _policies(arguments, layers) or {"full": Policy.full(layers)}
    # A fingerprint covers weights, and there are none here
    compiled = _compile(model, {name: p.replace(provenance=None) for name, p in tiers.items()}, "eager")
    counts = {"system": arguments.system, "visual": arguments.visual, "text": arguments.text, "rows": arguments.rows}
    try:
        result = explain(compiled, arguments.tier, **counts)
    except ValueError as error:
        raise UsageError(_one_line(error)) from error
    if arguments.save_policy:
        try:
            tiers[result.tier].save(arguments.save_policy)
        except OSError as error:
            raise UsageError(f"--save-policy {arguments.save_policy!r}: {error.strerror}") from error
        print(f"saved policy {result.tier!r} to {arguments.save_policy}", file=sys.stderr)
    print(json.dumps(result.to_dict(), indent=1) if arguments.json else result)


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


def _prompt_inputs(processor: Any, prompt: str, images: list[Image.Image]) -> Any:
    """The processor's inputs: through the chat template where there is one, else the prompt with image tokens."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": prompt}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    token = getattr(processor, "image_token", None) or "<image>"
    missing = len(images) - prompt.count(token)
    if missing < 0:
        raise UsageError(f"--prompt: holds {prompt.count(token)} {token}, but {len(images)} --image are given")
    text = f"{token}\n" * missing + prompt
    return processor(images=images or None, text=text, return_tensors="pt")


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
    images = _images(arguments.image)
    location = _located(arguments.model)
    config = _load(hf.AutoConfig, location)
    kind = hf.AutoModelForImageTextToText
    if type(config) not in kind._model_mapping:
        raise UsageError(f"model {arguments.model!r}: {type(config).__name__} is not of a vision-language model")
    tiers = _policies(arguments, config.get_text_config(decoder=True).num_hidden_layers)
    if not tiers:
        raise UsageError("no policy: give --policy FILE, or options such as --mha-depth and --visual-tokens")
    processor = _load(hf.AutoProcessor, location)
    try:
        device = torch.device(arguments.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {arguments.device!r}: {_one_line(error)}") from error
    dtype = "auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    model = _load(kind, location, dtype=dtype).to(device).eval()
    compiled = _compile(model, tiers, arguments.backend)
    inputs = _prompt_inputs(processor, arguments.prompt, images).to(device, model.dtype)
    tier = arguments.tier or next(iter(tiers))
    print(_answer(compiled, processor, inputs, tier, arguments.max_new_tokens, tier=tier))
    if arguments.compare:
        original = _answer(model, processor, inputs, "original", arguments.max_new_tokens)
        print(f"original: {original}")
        whole, pruned = _seconds(model, inputs), _seconds(compiled, inputs, tier=tier)
        print(
            f"first token: {1000 * pruned:.0f} ms, original {1000 * whole:.0f} ms ({pruned / whole:.2f} of it, "
            "vision tower included)"
        )


def demo_command(arguments: Namespace) -> None:
    """Run the demo."""
    image = None
    if arguments.image is not None:
        _images([arguments.image])
        image = Path(arguments.image)
    run_demo(backend=arguments.backend, repeats=arguments.repeats, image=image)
