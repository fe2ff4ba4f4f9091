"""The records that a manifest is made of; `dop_compile.onnx.contract.manifest` says what they mean together."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dop_compile.policy.policy import Policy

__all__ = [
    "DataFile",
    "Graph",
    "InputSpec",
    "ModelInfo",
    "OutputSpec",
    "PastClass",
    "ReducerInfo",
    "SectionInfo",
    "Tier",
    "TierCheck",
    "Verification",
    "VisionGraph",
    "file_sha256",
]


@dataclass(frozen=True)
class DataFile:
    """A file of the directory: its name, size in bytes and SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class InputSpec:
    """A graph's input: `shape` has names for dynamic sizes; `min`, `opt` and `max` are its TensorRT profile."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class OutputSpec:
    """A graph's output; a dynamic size is a name or a sum such as "visual + text"."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX file."""

    data: DataFile
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]


@dataclass(frozen=True)
class ModelInfo:
    """The exported model. `head_dims` and `kv_heads` are per layer; `dtype` is that of embeddings, keys and values.

    `source`: where it was loaded from, a path or a hub id; "" where it was not.
    """

    class_name: str
    source: str
    model_type: str
    fingerprint: str
    dtype: str
    num_layers: int
    hidden_size: int
    vocabulary: int
    kv_heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    pad_token_id: int


@dataclass(frozen=True)
class VisionGraph:
    """Pixels of one image, tile or video to its features.

    `modality` is "image" or "video"; `pixels` names the graph's input, of shape `example`. `constants` are the
    processor's integer tensors that the graph was made for (image sizes, patch grids): it takes pixels with exactly
    these. Without constants it takes one item of the first dimension at a time. `tokens` is its number of features, of
    which those numbered in `newlines` are row separators.
    """

    graph: str
    modality: str
    pixels: str
    example: tuple[int, ...]
    constants: dict[str, tuple[tuple[int, ...], ...]]
    tokens: int
    newlines: tuple[int, ...]


@dataclass(frozen=True)
class SectionInfo:
    """A section: the token groups that it holds, and its static length (None: dynamic)."""

    name: str
    groups: tuple[str, ...]
    length: int | None


@dataclass(frozen=True)
class PastClass:
    """Layers whose entries have the same slots in every tier; `tiers`: the sections that they hold after prefill."""

    layers: tuple[int, ...]
    tiers: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class ReducerInfo:
    """Who keeps visual tokens. `graph` None: the runtime does, by `name` and the options in the tier's policy (`reason`
    says why). Otherwise a graph stands for prompts with one image of `tokens` features:

        features (tokens, hidden) -> indices (kept,) int64 in ascending order, kept (kept, hidden)
    """

    name: str
    graph: str | None
    tokens: int | None
    reason: str


@dataclass(frozen=True)
class TierCheck:
    """One tier against PyTorch, over all samples, with ONNX Runtime's graph optimisations on and off.

    `logit_difference`: largest |difference| of first-token logits; `logit_scale` the largest |logit|. `kl`: largest
    KL(PyTorch || ONNX) of the first token, in nats. `same_text`: samples whose greedy text is the same.
    """

    tier: str
    optimized: bool
    samples: int
    logit_difference: float
    logit_scale: float
    kl: float
    same_text: int
    passed: bool


@dataclass(frozen=True)
class Verification:
    """`runnable` False: the provider does not run the graphs (`reason`), and nothing was compared."""

    runnable: bool
    reason: str
    provider: str
    samples_sha256: str
    new_tokens: int
    tolerance: float
    passed: bool
    checks: tuple[TierCheck, ...]
    versions: dict[str, str]


@dataclass(frozen=True)
class Tier:
    """One budget.

    `counts`: system, visual and text tokens, before reduction, that the costs are for. `eq11_flops` is the policy as
    written, `executed_flops` what the graph does; None where the model's sizes are not known.
    """

    policy: Policy
    prefill: str
    decode: str
    sections: tuple[SectionInfo, ...]
    reducer: ReducerInfo | None
    counts: tuple[int, int, int]
    eq11_flops: int | None
    eq11_fraction: float | None
    executed_flops: int | None
    kv_bytes: int | None

    @property
    def graphs(self) -> frozenset[str]:
        """Its own: prefill, decode, and its reducer where that is a graph."""
        reducer = () if self.reducer is None or self.reducer.graph is None else (self.reducer.graph,)
        return frozenset((self.prefill, self.decode, *reducer))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
