"""A directory that `vllm serve DIR` serves under a policy: a checkpoint, and what its configuration adds.

    config.json          the checkpoint's, with the architecture's served name, the policy, and its positions
    everything else      links to the checkpoint's own files, or copies where the file system has no links

Written beside its final place and moved there whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dop_compile.documents import parse, read_text
from dop_compile.plugins.vllm.families import PREFIX, family_of
from dop_compile.plugins.vllm.policies import check_policy
from dop_compile.plugins.vllm.section import KEY, Section
from dop_compile.policy.policy import Policy

__all__ = ["CONFIG", "served_config", "write_served"]

CONFIG = "config.json"
LEFT_OUT = ("dop_compile.json",)
"""Files of a checkpoint that say something else about policies than the written directory does."""


def write_served(source: Path, target: Path, tier: str, policy: Policy, *, force: bool = False) -> list[str]:
    """Write the directory; returns the names of files that had to be copied.

    Args:
        source: a checkpoint's directory.
        target: where to write; replaced with `force` if `write_served` wrote it.
        tier: the policy's name.

    Raises:
        FileNotFoundError: no checkpoint. FileExistsError: the target is there already.
        UnsupportedModelError, UnsupportedUsageError, ValueError: vLLM cannot run this policy or this model.
    """
    config = parse(read_text(source / CONFIG))
    if not isinstance(config, dict):
        raise ValueError(f"{source / CONFIG}: expected an object")
    written = json.dumps(served_config(config, tier, policy), indent=2) + "\n"
    _check_target(source, target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        copied = [path.name for path in sorted(source.iterdir()) if _takes(path) and not _link(path, scratch)]
        (scratch / CONFIG).write_text(written, encoding="utf-8")
        scratch.chmod(0o777 & ~_umask())  # mkdtemp's is for its owner alone
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return copied


def served_config(config: dict[str, Any], tier: str, policy: Policy) -> dict[str, Any]:
    """A checkpoint's configuration, with which vLLM serves it under a policy.

    Raises:
        UnsupportedModelError, UnsupportedUsageError, ValueError: as `write_served`.
    """
    family = family_of(config)
    text = config.get("text_config", config)
    check_policy(policy, family, text["num_hidden_layers"])
    architecture = config["architectures"][0].removeprefix(PREFIX)
    added = {
        "architectures": [PREFIX + architecture],
        KEY: Section(tier, policy, architecture).to_dict(),
        "is_mm_prefix_lm": True,  # has vLLM's runner say where pictures are; attention stays causal
    }
    if policy.visual_tokens is not None and family.axes == "line":
        added["text_config"] = {**text, "rope_parameters": _three_axes(text)}
    return {**config, **added}


def _three_axes(text: dict[str, Any]) -> dict[str, Any]:
    """A rotary embedding of one axis as one of three: their angles are the same wherever the three are equal."""
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    if "rope_theta" not in rope:
        rope["rope_theta"] = text.get("rope_theta", 10000.0)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    if rope["rope_type"] != "default":
        raise ValueError(
            f"text_config.rope_parameters: rope_type {rope['rope_type']!r} has not been tried with reduced pictures in "
            "vLLM; serve a policy without visual_tokens"
        )
    half = (text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]) // 2
    third = half // 3
    return {**rope, "mrope_section": [half - 2 * third, third, third]}


def _check_target(source: Path, target: Path, force: bool) -> None:
    if target.resolve() == source.resolve():
        raise FileExistsError(f"{target} is the model itself; name another directory")
    if not target.exists():
        return
    if not force:
        raise FileExistsError(f"{target} is there already; name another directory, or replace it with --force")
    try:
        Section.from_config(json.loads((target / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise FileExistsError(f"{target} is not a directory that `dop-compile vllm` wrote; name another") from error


def _takes(path: Path) -> bool:
    return path.is_file() and path.name not in (CONFIG, *LEFT_OUT) and not path.name.startswith(".")


def _link(path: Path, folder: Path) -> bool:
    """Hard links keep the weights where the model goes; copies take their room where there can be no links."""
    original = path.resolve()  # the hub's caches are links themselves
    try:
        os.link(original, folder / path.name)
    except OSError:
        try:
            (folder / path.name).symlink_to(original)
        except OSError:
            shutil.copyfile(original, folder / path.name)
            return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
