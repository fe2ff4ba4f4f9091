"""The vectorised costs against the cost functions of every single policy."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dop_compile import Policy
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.costs import kv_cache_bytes, policy_tokens, prefill_flops
from dop_compile.search.costs import FlopsModel, KvModel
from tests.drawing import examples

LAYERS = 2


@st.composite
def decoder_dims(draw: st.DrawFn) -> DecoderDims:
    """Grouped KV heads, plain and gated MLPs, mixtures with shared experts, layers of unlike widths."""
    kv_heads = draw(st.integers(1, 4))
    per_layer = {"min_size": LAYERS, "max_size": LAYERS}
    return DecoderDims(
        num_layers=LAYERS,
        hidden_size=draw(st.integers(1, 64)),
        num_heads=kv_heads * draw(st.integers(1, 4)),
        head_dim=draw(st.integers(1, 16)),
        num_key_value_heads=kv_heads,
        intermediate_sizes=tuple(draw(st.lists(st.integers(0, 64), **per_layer))),
        gated=draw(st.booleans()),
        active_experts=tuple(draw(st.lists(st.integers(1, 3), **per_layer))),
        shared_sizes=tuple(draw(st.lists(st.integers(0, 64), **per_layer))),
        attends=tuple(draw(st.lists(st.booleans(), **per_layer))),
        mixer_flops=tuple(draw(st.lists(st.integers(0, 90), **per_layer))),
        window_numbers=tuple(draw(st.lists(st.integers(0, 9), **per_layer))),
        state_numbers=tuple(draw(st.lists(st.integers(0, 9), **per_layer))),
        gated_attention=draw(st.booleans()),
        query_widths=tuple(draw(st.just([]) | st.lists(st.integers(1, 64), **per_layer))),
        key_value_widths=tuple(draw(st.just([]) | st.lists(st.integers(0, 16), **per_layer))),
        side_sizes=tuple(draw(st.lists(st.integers(0, 16), **per_layer))),
    )


COUNTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=3)
EVERY_DEPTH = list(itertools.product(range(LAYERS + 1), repeat=3))


def every_policy(full: int) -> list[tuple[tuple[int, int, int, int], Policy]]:
    """(query, keys, mlp, tokens) and its policy, for the whole space."""
    return [
        (
            (query, keys, mlp, tokens),
            Policy.depthwise(
                LAYERS, mha_query_depth=query, mha_key_value_depth=keys, mlp_depth=mlp, visual_tokens=tokens
            ),
        )
        for query, keys, mlp in EVERY_DEPTH
        for tokens in range(full + 1)
    ]


@examples(15)
@given(decoder_dims(), COUNTS, st.integers(0, 2))
def test_flops_are_the_mean_of_the_samples(dims: DecoderDims, counts: list[tuple[int, int, int]], extra: int) -> None:
    full = max(visual for _, visual, _ in counts) + extra
    model = FlopsModel(dims, counts, full)
    places, policies = zip(*every_policy(full), strict=True)
    expected = [np.mean([prefill_flops(dims, policy, *sample) for sample in counts]) for policy in policies]
    np.testing.assert_allclose(model(*np.array(places).T), expected, rtol=1e-12)
    np.testing.assert_allclose(
        model.original, np.mean([prefill_flops(dims, Policy.full(LAYERS), *sample) for sample in counts]), rtol=1e-12
    )


@examples(15)
@given(decoder_dims(), COUNTS, st.sampled_from([1, 2, 4]))
def test_kv_bytes_are_the_mean_of_the_samples(
    dims: DecoderDims, counts: list[tuple[int, int, int]], dtype_bytes: int
) -> None:
    full = max(visual for _, visual, _ in counts)
    model = KvModel(dims, counts, full, dtype_bytes)
    places, policies = zip(*every_policy(full), strict=True)

    def stored(policy: Policy) -> float:
        return float(np.mean([kv_cache_bytes(dims, policy_tokens(policy, *sample), dtype_bytes) for sample in counts]))

    np.testing.assert_allclose(model(*np.array(places).T), [stored(policy) for policy in policies], rtol=1e-12)
    np.testing.assert_allclose(model.original, stored(Policy.full(LAYERS)), rtol=1e-12)


def test_arguments_broadcast() -> None:
    dims = DecoderDims(LAYERS, 8, 2, 4, 1, (16, 24))
    counts = [(1, 4, 2)]
    depths, tokens = np.arange(LAYERS + 1)[:, None], np.arange(5)
    for model in (FlopsModel(dims, counts, 4), KvModel(dims, counts, 4, 2)):
        grid = model(np.array(1), depths, np.array(2), tokens)
        assert grid.shape == (LAYERS + 1, 5)
        assert grid[2, 3] == model(*(np.array(value) for value in (1, 2, 2, 3)))
