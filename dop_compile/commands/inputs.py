"""What users name on the command line, turned into values, or into an error of one line that says what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers
from PIL import Image, UnidentifiedImageError

from dop_compile.commands.usage import UsageError, one_line
from dop_compile.compiler import dop_compile
from dop_compile.hf import processors
from dop_compile.hf.images import load_image
from dop_compile.hf.prompts import prompt_inputs
from dop_compile.policy.policy import Policy
from dop_compile.reducers import ResizeReducer, resize_processor
from dop_compile.runtime import pieces

# Typed loosely: transformers annotates only a part of what is used here
hf: Any = transformers

__all__ = [
    "check_backend",
    "compile_model",
    "load_config",
    "load_model_on_meta",
    "load_processor",
    "load_vision_config",
    "load_vision_model",
    "located",
    "noise_picture",
    "read_images",
    "read_prompt",
    "resized_processor",
    "write_file",
]


SIDE = 336


def located(model: str) -> str:
    """The model as `from_pretrained` takes it; a path has to exist, anything else is a hub id."""
    path = Path(model).expanduser()
    if path.exists():
        return str(path)
    if model.startswith(("/", ".", "~")) or model.count("/") != 1 or model.endswith(".json"):
        raise UsageError(f"model {model!r}: no such directory or file, and not a hub id (owner/name)")
    return model


def load(kind: Any, model: str, **settings: Any) -> Any:
    try:
        return kind.from_pretrained(model, **settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"model {model!r}: {one_line(error)}") from error


def load_config(model: str) -> Any:
    """The model's configuration."""
    return load(hf.AutoConfig, located(model))


def load_model_on_meta(model: str, dtype: str) -> Any:
    """The model without its weights, from its configuration alone."""
    config = load_config(model)
    for kind in (hf.AutoModelForImageTextToText, hf.AutoModelForCausalLM):
        if type(config) in kind._model_mapping:
            with torch.device("meta"):
                settings = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
                return kind.from_config(config, **settings).eval()
    raise UsageError(f"model {model!r}: {type(config).__name__} is not of a language or vision-language model")


def read_images(paths: list[str]) -> list[Image.Image]:
    images = []
    for path in paths:
        try:
            images.append(load_image(path))
        except UnidentifiedImageError as error:
            raise UsageError(f"image {path!r}: not an image that can be decoded") from error
        except OSError as error:
            reason = error.strerror or one_line(error).removeprefix(f"{path}: ")
            raise UsageError(f"image {path!r}: {reason}") from error
    return images


def noise_picture() -> Image.Image:
    """A picture of noise, always the same."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def check_backend(name: str) -> None:
    try:
        pieces.check_backend(name)
    except ValueError as error:
        raise UsageError(f"--backend {name!r}: not a backend of torch.compile; {one_line(error)}") from error


def compile_model(model: Any, tiers: Mapping[str, Policy], backend: str) -> Any:
    check_backend(backend)
    try:
        return dop_compile(model, tiers, backend=backend)
    except (TypeError, ValueError) as error:  # another depth, another model, a class that cannot be pruned
        raise UsageError(one_line(error)) from error


def load_device(name: str) -> torch.device:
    """The device of that name, if there is one."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name!r}: {one_line(error)}") from error
    return device


def load_vision_config(model: str) -> Any:
    """The configuration of a vision-language model."""
    config = load_config(model)
    if type(config) not in hf.AutoModelForImageTextToText._model_mapping:
        raise UsageError(f"model {model!r}: {type(config).__name__} is not of a vision-language model")
    return config


def load_processor(model: str) -> Any:
    name = located(model)
    try:
        return processors.load_processor(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"model {model!r}: {one_line(error)}") from error


def load_vision_model(model: str, device: str, dtype: str, *, tensor_parallel: bool = False) -> Any:
    """A vision-language model in eval mode; `dtype` a name in torch, or "auto".

    `tensor_parallel`: shared by the processes of the process group, each with its part on its own device.
    """
    load_vision_config(model)
    where = load_device(device)
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    if tensor_parallel:
        plan = hf.distributed.DistributedConfig(tp_plan="auto", tp_size=torch.distributed.get_world_size())
        return load(hf.AutoModelForImageTextToText, located(model), dtype=kind, distributed_config=plan).eval()
    return load(hf.AutoModelForImageTextToText, located(model), dtype=kind).to(where).eval()


def read_prompt(processor: Any, model: Any, prompt: str, images: list[Image.Image]) -> Any:
    """What a processor makes of a prompt, where the model is and in its dtype."""
    try:
        return prompt_inputs(processor, prompt, images).to(model.device, model.dtype)
    except ValueError as error:
        raise UsageError(f"--prompt: {one_line(error)}") from error


def resized_processor(processor: Any, policy: Policy, images: int) -> Any:
    """The processor, with smaller pictures if the policy's reducer is `resize`."""
    if policy.reducer != ResizeReducer.name or policy.visual_tokens is None or not images:
        return processor
    try:
        return resize_processor(processor, policy.visual_tokens // images)
    except (TypeError, ValueError) as error:
        raise UsageError(one_line(error)) from error


def write_file(path: Path, content: str | Callable[[BinaryIO], object], option: str = "--out") -> None:
    """Write a text, or what a function writes, in one step: a failure leaves the previous file as it was.

    `option` is the one that named the path.
    """
    scratch = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("wb") as file:
                if isinstance(content, str):
                    file.write(content.encode())
                else:
                    content(file)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"{option} {str(path.parent)!r}: cannot write {path.name}: {error.strerror or error}"
        ) from error
