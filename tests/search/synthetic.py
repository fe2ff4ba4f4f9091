"""Divergences without a model: given curves, and random ones for Hypothesis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from dop_compile import Policy
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.search import Divergences

Counts = tuple[int, int, int]
DEPTHS = ("mha_depth", "mlp_depth", "mha_query_depth")


def dims_of(num_layers: int, **changes: Any) -> DecoderDims:
    sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 4, "num_key_value_heads": 2}
    return DecoderDims(num_layers=num_layers, intermediate_sizes=(24,) * num_layers, **{**sizes, **changes})


def divergences_of(
    points: Mapping[str, Sequence[int | float]],
    values: Mapping[str, Sequence[Sequence[float]]],
    counts: Sequence[Counts],
    dims: DecoderDims,
    **changes: Any,
) -> Divergences:
    """Divergences of `values` (points, samples) per axis."""
    fields: dict[str, Any] = {
        "model_fingerprint": "f" * 64,
        "model_type": "llava",
        "dims": dims,
        "dtype_bytes": 2,
        "metric": "top_k_kl",
        "metric_options": (),
        "base": Policy.full(dims.num_layers),
        "counts": tuple(counts),
        "points": {axis: tuple(own) for axis, own in points.items()},
        "values": {axis: tuple(map(tuple, rows)) for axis, rows in values.items()},
        "digests": tuple(f"{number:064x}" for number in range(len(counts))),
        "prefills": 5.5,
        "seed": 3,
        "versions": (("torch", "2"), ("transformers", "5")),
    }
    return Divergences(**fields | changes)


@st.composite
def random_divergences(
    draw: st.DrawFn, *, max_layers: int = 4, max_tokens: int = 7, from_zero: bool = False, low: float = 0.0
) -> Divergences:
    """Any curves of all axes of the split space; lowest points at 0 if `from_zero`; no value below `low`."""
    layers = draw(st.integers(1, max_layers))
    kv_heads = draw(st.integers(1, 3))
    dims = DecoderDims(
        num_layers=layers,
        hidden_size=draw(st.integers(1, 24)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 8)),
        num_key_value_heads=kv_heads,
        intermediate_sizes=tuple(draw(st.lists(st.integers(1, 40), min_size=layers, max_size=layers))),
        gated=draw(st.booleans()),
    )
    count = st.tuples(st.integers(0, 5), st.integers(1, max_tokens), st.integers(1, 5))
    counts = draw(st.lists(count, min_size=1, max_size=3))
    fractions = st.sets(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4)
    points: dict[str, tuple[int | float, ...]] = {}
    for axis in (*DEPTHS, "visual_tokens"):
        chosen = draw(fractions if axis == "visual_tokens" else st.sets(st.integers(0, layers - 1), min_size=1))
        points[axis] = tuple(sorted(chosen | {0} if from_zero else chosen, reverse=True))
    value = st.floats(low, 4, allow_subnormal=False)
    samples = {"min_size": len(counts), "max_size": len(counts)}
    values = {axis: [draw(st.lists(value, **samples)) for _ in own] for axis, own in points.items()}
    model_type = draw(st.sampled_from(["llava", "llava_next", "qwen2_5_vl"]))
    return divergences_of(points, values, counts, dims, model_type=model_type)


def make_divergences(layers: int, visual: int) -> Divergences:
    """Three samples whose divergence falls to zero along every axis, measured at every value."""
    counts = [(2, visual, 3), (2, visual, 4), (2, visual, 6)]
    points: dict[str, list[int | float]] = {axis: list(range(layers - 1, -1, -1)) for axis in DEPTHS}
    points["visual_tokens"] = [number / visual for number in range(visual - 1, -1, -1)]
    values = {
        axis: [[(1 + sample) * 0.5 ** (len(own) - rank) for sample in range(3)] for rank in range(len(own))]
        for axis, own in points.items()
    }
    return divergences_of(points, values, counts, dims_of(layers))
