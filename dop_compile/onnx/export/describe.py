"""What a manifest says of the model, its files and its pixels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dop_compile.errors import UnsupportedModelError
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.hf.model_path import decoder_path
from dop_compile.onnx.contract.manifest import MANIFEST
from dop_compile.onnx.contract.parts import DataFile, ModelInfo, ReducerInfo, VisionGraph, file_sha256
from dop_compile.onnx.export.capture import Capture, VisionCall
from dop_compile.policy.policy import Policy
from dop_compile.reducers import create, needs
from dop_compile.tracing.trace import trace_decoder

__all__ = [
    "cache_sizes",
    "model_info",
    "nested",
    "newlines",
    "position_rows",
    "reducer_info",
    "save_files",
    "slugs",
    "why_runtime_reduces",
]


def position_rows(captures: Sequence[Capture]) -> int | None:
    positions = captures[0].positions
    return None if positions is None or positions.dim() == 2 else int(positions.shape[0])


def newlines(call: VisionCall, newline: Tensor | None) -> list[int]:
    if newline is None or call.modality != "image":
        return []
    same = (call.features == newline.to(call.features)).all(dim=-1)
    found: list[int] = same.nonzero().flatten().tolist()
    return found


def nested(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {name: tuple(tuple(row) for row in t.reshape(t.shape[0], -1).tolist()) for name, t in tensors.items()}


def slugs(tiers: Iterable[str]) -> dict[str, str]:
    """A file name for each tier, unlike all others on any file system."""
    plain = {n: re.sub(r"[^A-Za-z0-9_.-]+", "-", n.replace("%", "")).strip("-.") or "tier" for n in tiers}
    taken = Counter(name.lower() for name in plain.values())
    found: dict[str, str] = {}
    for number, (tier, name) in enumerate(plain.items()):
        while taken[name.lower()] > 1:
            name = f"{name}-{number}"
        taken[name.lower()] = 2
        found[tier] = name
    return found


def reducer_info(policy: Policy) -> ReducerInfo | None:
    """The reducer of a policy, done by the runtime; None where every visual token is kept and none is ranked.

    Raises:
        UnsupportedModelError: it needs what the vision graphs do not return.
    """
    if policy.ranking is not None:
        raise UnsupportedModelError(
            "a policy that ranks visual tokens inside the decoder cannot be exported: which tokens a layer keeps is "
            "known only at run time"
        )
    if policy.reducer == "given":
        return ReducerInfo("given", None, None, "the caller names the tokens")
    if policy.visual_tokens is None and policy.salient_fraction is None:
        return None
    if wanted := needs(create(policy.reducer, policy.options)):
        raise UnsupportedModelError(
            f"reducer {policy.reducer!r} needs {', '.join(sorted(wanted))}, which the exported vision graphs do not "
            "return; use another reducer for ONNX"
        )
    return ReducerInfo(policy.reducer, None, None, "")


def why_runtime_reduces(policy: Policy, vision: Sequence[VisionGraph]) -> str:
    """Why a tier's reducer is no graph; "" where it can be one."""
    if policy.salient_fraction is not None:
        return "the policy splits visual tokens by their rank"
    if len(vision) != 1:
        return f"images have {len(vision)} layouts"
    if vision[0].newlines or vision[0].modality != "image":
        return "features hold row separators, or are a video's"
    if not policy.visual_tokens or policy.visual_tokens >= vision[0].tokens:
        return "an image keeps all of its tokens, or none"
    return ""


def cache_sizes(model: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """KV heads and head dimension of each layer, as an unpruned decoder's graph has them."""
    traced = trace_decoder(model.get_submodule(decoder_path(model)))
    sizes: dict[int, tuple[int, int]] = {}
    for node in traced.graph.nodes:
        layer = traced.layer_of(node)
        if node.meta.get("effect") and layer is not None:
            keys = node.args[1].meta["val"]
            sizes[layer] = int(keys.shape[1]), int(keys.shape[3])
    if sorted(sizes) != list(range(traced.num_layers)):
        raise UnsupportedModelError(
            f"{type(model).__name__} stores keys and values in {len(sizes)} of {traced.num_layers} layers; export to "
            "ONNX supports decoders that store them in every layer"
        )
    return tuple(sizes[n][0] for n in sorted(sizes)), tuple(sizes[n][1] for n in sorted(sizes))


def model_info(model: Any, hidden: int, kv_heads: tuple[int, ...], head_dims: tuple[int, ...]) -> ModelInfo:
    settings = model.generation_config
    end = settings.eos_token_id
    ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)
    pad = settings.pad_token_id
    return ModelInfo(
        class_name=type(model).__name__,
        source=str(model.config._name_or_path or ""),
        model_type=str(model.config.model_type),
        fingerprint=model_fingerprint(model),
        dtype=str(model.dtype).removeprefix("torch."),
        num_layers=len(kv_heads),
        hidden_size=int(hidden),
        vocabulary=int(model.get_output_embeddings().weight.shape[0]),
        kv_heads=kv_heads,
        head_dims=head_dims,
        eos_token_ids=ends,
        pad_token_id=pad if isinstance(pad, int) else (ends[0] if ends else 0),
    )


def save_files(model: Any, processor: Any, folder: Path) -> tuple[DataFile, ...]:
    before = {path.name for path in folder.iterdir()} | {MANIFEST}
    model.config.save_pretrained(folder)
    # Not save_pretrained, which refuses settings that transformers itself loads
    (folder / "generation_config.json").write_text(model.generation_config.to_json_string(), encoding="utf-8")
    if processor is not None:
        processor.save_pretrained(folder)
    paths = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] not in before
    )
    return tuple(
        DataFile(path.relative_to(folder).as_posix(), path.stat().st_size, file_sha256(path)) for path in paths
    )
