"""What `--model_args` says of the model: which checkpoint, which policy, on which device."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers

from dop_compile.checks import choice
from dop_compile.compiler import dop_compile
from dop_compile.documents import parse
from dop_compile.policy.policy import Policy
from dop_compile.policy.tiers import TIERS_FILE, load_policies
from dop_compile.reducers import create

__all__ = ["batch_size_of", "check_names", "device_of", "dtype_of", "load_compiled", "policy_of"]

FULL, ORIGINAL = "full", "original"
POLICIES = ("policy", "tiers", "tier")
INLINE = (
    "mha_depth",
    "mha_query_depth",
    "mha_key_value_depth",
    "mlp_depth",
    "system_mha_depth",
    "system_mlp_depth",
    "visual_tokens",
    "reducer",
    "reducer_options",
    "positions",
)
"""Arguments of `Policy.depthwise`."""

hf: Any = transformers


def check_names(given: Iterable[str], settings: Iterable[str]) -> None:
    """TypeError, with the nearest, for names that neither describe a policy nor are among the other `settings`."""
    names = [*settings, *POLICIES, *INLINE]
    for name in given:
        if name not in names:
            nearest = get_close_matches(name, names, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise TypeError(f"model_args: unknown argument {name!r}; {hint}Known are {', '.join(names)}")


def policy_of(pretrained: str, layers: int, arguments: Mapping[str, Any]) -> Policy | None:
    """The policy that the arguments name; None for the untouched model (`policy=original`).

    Args:
        pretrained: where tiers are looked for if nothing else is given.
        layers: of the model's decoder.
        arguments: by name: `policy`, a policy's file, "full" or "original"; or `tiers`, a directory or hub repository
            with `dop_compile.json`, and `tier`, one of its tiers (its first unless given); or arguments of
            `Policy.depthwise`. Those that are None do not count.

    Raises:
        ValueError: more than one of these, none, an unreadable file, no such tier, another number of layers.
    """
    policy, tiers, tier = (arguments.get(name) for name in POLICIES)
    given = {name: arguments[name] for name in INLINE if arguments.get(name) is not None}
    sources = [name for name, value in (("policy", policy), ("tiers", tiers), (", ".join(given), given)) if value]
    if len(sources) > 1:
        raise ValueError(f"model_args: {' and '.join(sources)} are given; name the policy in one way")
    if tier is not None and (policy or given):
        raise ValueError(f"model_args: tier={tier!r} names one of several tiers; give tiers=DIRECTORY with it")
    if policy == ORIGINAL:
        return None
    if policy == FULL:
        return Policy.full(layers)
    try:
        if given:
            return _inline(layers, given)
        found = _read(policy) if policy else _tier(tiers or pretrained, tier)
    except OSError as error:
        if not sources:
            raise ValueError(
                f"model_args: {pretrained} holds no {TIERS_FILE}, and no policy is named; give policy=FILE, "
                f"tiers=DIRECTORY, depths such as mha_depth=26, or policy={ORIGINAL} for the untouched model"
            ) from error
        raise ValueError(f"model_args: {sources[0]}: {' '.join(str(error).split())}") from error
    found.check_layers(layers)
    return found


def _inline(layers: int, given: Mapping[str, Any]) -> Policy:
    options = given.get("reducer_options")
    try:
        if isinstance(options, str):  # a string of arguments holds it as JSON
            given = {**given, "reducer_options": parse(options)}
        found = Policy.depthwise(layers, **given)
        create(found.reducer, found.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model_args: {error}") from error
    return found


def _read(file: str) -> Policy:
    path = Path(file).expanduser()
    if path.is_dir():
        raise ValueError(f"model_args: policy={file} is a directory; give tiers={file}, or a policy's file")
    return Policy.load(path)


def _tier(directory: str, tier: str | None) -> Policy:
    tiers = load_policies(Path(directory).expanduser() if Path(directory).expanduser().is_dir() else directory)
    return tiers[next(iter(tiers)) if tier is None else choice("model_args: tier", tier, tiers)]


def device_of(device: str | None, device_map: str | None, local_rank: int, processes: int) -> torch.device:
    """Where the whole model goes: one device per process.

    Raises:
        ValueError: `device_map` that spreads one model over several devices, or contradicts `device`.
    """
    for name in (device_map, device):
        if name in ("auto", "balanced", "balanced_low_0", "sequential") or isinstance(name, dict):
            raise ValueError(
                f"device_map={name!r}: a compiled decoder is on one device; give device=cuda:0, or start one process "
                "per GPU with `accelerate launch` or `torchrun`"
            )
    if device and device_map and device != device_map:
        raise ValueError(f"device={device!r} and device_map={device_map!r} name two devices; give one of them")
    name = device or device_map or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r}: expected a device of torch, such as cuda:0 or cpu") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: torch {torch.__version__} finds no CUDA device; give device=cpu")
    if found.type == "cuda" and processes > 1:
        return torch.device("cuda", local_rank)
    return found


def dtype_of(name: str | torch.dtype) -> Any:
    """What `from_pretrained` takes as `dtype`; ValueError for anything but "auto" or a floating type of torch."""
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if name == "auto":
        return name
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={name!r}: expected auto, float32, bfloat16 or float16")
    return found


def batch_size_of(value: int | str) -> int:
    """A number of at least 1; ValueError for anything else, also for lmms-eval's "auto"."""
    try:
        found = int(value)
    except ValueError:
        found = 0
    if found < 1:
        raise ValueError(f"batch_size={value!r}: expected a number of at least 1; it is not found automatically")
    return found


def load_compiled(pretrained: str, policy: Policy | None, backend: str, device: torch.device, **settings: Any) -> Any:
    """The model in eval mode, compiled unless `policy` is None. `settings` are of `from_pretrained`."""
    config = hf.AutoConfig.from_pretrained(pretrained, **{k: v for k, v in settings.items() if k == "revision"})
    auto = next(
        (a for a in (hf.AutoModelForImageTextToText, hf.AutoModelForCausalLM) if type(config) in a._model_mapping), None
    )
    if auto is None:
        raise ValueError(
            f"pretrained={os.fspath(pretrained)}: {type(config).__name__} is not of a model that generates text"
        )
    model = auto.from_pretrained(pretrained, **settings).to(device).eval()
    return model if policy is None else dop_compile(model, policy, backend=backend)
