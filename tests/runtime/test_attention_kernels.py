"""Models under FlexAttention and FlashAttention: 100 % equals the original, policies equal the masked reference.

FlexAttention runs unfused, as torch runs it where nothing is compiled; one slow test compiles it. FlashAttention's
kernel is a plain one with its documented semantics; the last test runs the real one, where there is a GPU for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from dop_compile import Policy
from dop_compile.errors import UnsupportedModelError, UnsupportedUsageError
from dop_compile.runtime.flash import _stretches
from tests.families import FAMILIES
from tests.flash_stand_in import install
from tests.support import (
    Batch,
    assert_close,
    assert_forward_matches,
    assert_generates_reference,
    compile_eagerly,
    make_batch,
    random_operations,
    reference,
)

GROUPS = ("text", "visual", "system")
HUB = "kernels-community/flash-attn2"
NEEDS_FLASH = pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn and a GPU")


@pytest.fixture
def unfused() -> Iterator[None]:
    """What Hugging Face compiles for FlexAttention runs as written: minutes become seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def with_kernel(name: str, implementation: str) -> tuple[Batch, Any]:
    """A batch with the sdpa model, for the reference, and the same model whose decoder has another kernel."""
    model = FAMILIES[name].build()
    model.get_decoder().config._attn_implementation = implementation
    return make_batch(name), model


def policies(batch: Batch) -> dict[str, tuple[Policy, list[list[int]] | None]]:
    layers = batch.family.num_layers
    kept = batch.random_kept(5)
    drawn = Policy.from_operations(layers, random_operations(layers, 5), visual_tokens=5, reducer="given")
    return {
        "apart": (Policy.depthwise(layers, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2), None),
        "queries that are no keys": (Policy.depthwise(layers, mha_query_depth=4, mha_key_value_depth=1), None),
        "drawn": (drawn, kept),
    }


def check(name: str, implementation: str, *, briefly: bool = False) -> None:
    """Briefly: one policy, one forward call."""
    batch, model = with_kernel(name, implementation)
    full = compile_eagerly(model, Policy.full(batch.family.num_layers))
    with torch.no_grad():
        expected, logits = (m(**batch.inputs).logits for m in (model, full))
        given = batch.call_arguments()
        assert torch.equal(full(**batch.inputs, **given).logits, logits)
    assert torch.equal(logits, expected)
    for name, (policy, kept) in policies(batch).items():
        if briefly and name != "drawn":
            continue
        compiled = compile_eagerly(model, policy)
        if briefly:
            with torch.no_grad():
                logits = compiled(**batch.inputs, **batch.call_arguments(kept)).logits
            assert_close(logits[batch.mask], reference(batch, policy, kept)[batch.mask])
            continue
        assert_forward_matches(compiled, batch, policy, kept)
        assert_generates_reference(compiled, batch, policy, kept, tokens=3)


# FlexAttention.


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize(
    "name", ["llama", "qwen2_5_vl", "gemma3", pytest.param("llava", marks=pytest.mark.conformance)]
)
def test_flex_attention(name: str) -> None:
    check(name, "flex_attention", briefly=name != "llava")


@pytest.mark.usefixtures("unfused")
def test_flex_attention_is_given_the_models_function_over_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = with_kernel("llava", "flex_attention")
    sizes: list[tuple[int, ...]] = []
    kernel = ALL_ATTENTION_FUNCTIONS["flex_attention"]

    def noting(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        assert isinstance(mask, BlockMask)
        assert mask.shape[-2:] == (query.shape[2], key.shape[2])
        sizes.append(tuple(mask.shape[-2:]))
        return kernel(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", noting)
    compiled = compile_eagerly(model, Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2))
    with torch.no_grad():
        compiled(**batch.inputs)
    assert len(set(sizes)) == 3
    assert sizes[1] == sizes[2]


@pytest.mark.inductor
@pytest.mark.skipif(not torch.cuda.is_available(), reason="inductor's C++ of masks that read tensors does not compile")
def test_flex_attention_compiled() -> None:
    """A prefill."""
    batch, model = with_kernel("llama", "flex_attention")
    policy = Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)
    compiled = compile_eagerly(model, {"100%": Policy.full(4), "pruned": policy})
    with torch.no_grad():
        logits = compiled(**batch.inputs, **batch.call_arguments()).logits
        assert torch.equal(logits[batch.mask], model(**batch.inputs).logits[batch.mask])
    assert_forward_matches(compiled.tier("pruned"), batch, policy)


# FlashAttention.


@pytest.mark.parametrize(
    "name",
    ["llava", "cohere2_vision", *(pytest.param(n, marks=pytest.mark.conformance) for n in ("llama", "qwen2_5_vl"))],
)
def test_flash_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attention_2")
    check(name, "flash_attention_2")


def test_flash_attention_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, HUB)
    with pytest.raises(UnsupportedModelError, match=f"'{HUB}' is not supported"):
        compile_eagerly(with_kernel("llava", HUB)[1], Policy.full(4))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, HUB, flash_attention_forward)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, HUB, flash_attention_mask)
    check("llava", HUB)
    assert calls


@torch.no_grad()
def test_one_call_for_all_runs_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """System and text queries see 9 visual keys that are no queries: two runs, each with its keys, in one call."""
    calls = install(monkeypatch, "flash_attention_2")
    _, model = with_kernel("llava", "flash_attention_2")
    batch = make_batch("llava", [[("text", 4), ("image",), ("text", 3)]])
    compiled = compile_eagerly(model, Policy.depthwise(4, mha_query_depth=0, mlp_depth=0))
    cache = compiled(**batch.inputs).past_key_values
    total = batch.inputs["input_ids"].shape[1]
    assert calls == [(total - 9, (total - 12) + total)] * 4
    calls.clear()
    compiled(input_ids=torch.tensor([[20]]), past_key_values=cache)
    assert calls == [(1, total + 1)] * 4


@pytest.mark.parametrize("groups", [[2, 1, 1, 1, 0, 0, 0], [2, 2, 1, 0, 0, 0, 0], [2, 2, 1, 1, 0, 0, 0]])
@torch.no_grad()
def test_a_single_query_that_is_not_the_last_token(groups: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a group of one token, where the other groups' queries are pruned: it does not see what comes after it."""
    install(monkeypatch, "flash_attention_2")
    _, model = with_kernel("llama", "flash_attention_2")
    asking = 2 if groups.count(2) == 1 else 1
    policy = Policy.from_operations(4, [(name, 2, "mha_query") for code, name in enumerate(GROUPS) if code != asking])
    given = {"input_ids": torch.arange(20, 27)[None], "token_groups": torch.tensor([groups])}
    expected = compile_eagerly(FAMILIES["llama"].build(), policy)(**given).logits
    assert_close(compile_eagerly(model, policy)(**given).logits, expected)


@torch.no_grad()
def test_a_window_over_stored_keys_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row without padding: a generated token's window counts slots, not what its layer stores."""
    install(monkeypatch, "flash_attention_2")
    _, model = with_kernel("cohere2_vision", "flash_attention_2")
    batch = make_batch("cohere2_vision", [[("text", 4), ("image",), ("text", 3)]])
    policy = Policy.depthwise(batch.family.num_layers, mha_depth=1, mlp_depth=1)
    assert_generates_reference(compile_eagerly(model, policy), batch, policy, tokens=6)


@st.composite
def seen_ranges(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    keys = sorted(draw(st.sets(st.integers(0, 14), min_size=1)))
    queries = sorted(draw(st.sets(st.integers(0, 14), min_size=1)))
    window = draw(st.none() | st.integers(1, 6))
    end = [sum(key <= query for key in keys) for query in queries]
    begin = [0 if window is None else sum(key <= query - window for key in keys) for query in queries]
    both = [(b, e) for b, e in zip(begin, end, strict=True) if e > b]
    return [b for b, _ in both], [e for _, e in both]


@given(seen_ranges())
def test_runs_say_what_each_query_sees(ranges: tuple[list[int], list[int]]) -> None:
    begin, end = ranges
    told: list[tuple[int, int]] = []
    for first, last, step in _stretches(np.array(begin, dtype=int), np.array(end, dtype=int)):
        assert first == len(told)
        for query in range(first, last + 1):
            causal = end[last] - (last - query)
            told.append(
                {
                    0: (begin[first], end[last]),
                    1: (begin[first], causal),
                    2: (causal - (end[first] - begin[first]), causal),
                    3: (begin[first], end[first]),
                }[step]
            )
    assert told == list(zip(begin, end, strict=True))


@torch.no_grad()
def test_what_flash_attention_is_refused_for(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attention_2")
    batch, model = with_kernel("llama", "flash_attention_2")
    compiled = compile_eagerly(model, Policy.depthwise(4, mha_depth=2, mlp_depth=2), token_groups=lambda ids: ids % 2)
    ids = batch.inputs["input_ids"][-1:, :8]
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    as_rows = compiled(input_ids=ids.view(2, 4), use_cache=False).logits
    assert_close(compiled(input_ids=ids, position_ids=packed, use_cache=False).logits, as_rows.view(1, 8, -1))
    full = compile_eagerly(model, Policy.full(4))
    with pytest.raises(UnsupportedUsageError, match="several sequences in one row"):
        full(input_ids=ids, position_ids=packed, use_cache=False, logits_to_keep=2)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UnsupportedUsageError, match="not causal"):
        compiled(input_ids=ids)
    monkeypatch.setattr("dop_compile.hf.kernels.flash_attn_supports_top_left_mask", lambda: True)
    with pytest.raises(UnsupportedModelError, match=r"at the top left here.*'sdpa'"):
        compile_eagerly(model, Policy.full(4))


@NEEDS_FLASH
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "llava", "cohere2_vision"])
@torch.no_grad()
def test_the_real_flash_attention(name: str) -> None:
    """In bfloat16, which the kernel needs: as near to the sdpa model in float32 as the kernel's original is."""
    batch, model = with_kernel(name, "flash_attention_2")
    model.to("cuda", torch.bfloat16)
    inputs = {n: v.to("cuda", torch.bfloat16 if v.is_floating_point() else v.dtype) for n, v in batch.inputs.items()}
    layers = batch.family.num_layers
    policy = Policy.depthwise(layers, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)
    tiers = compile_eagerly(model, {"100%": Policy.full(layers), "pruned": policy})
    given = {n: v.cuda() for n, v in batch.call_arguments().items()}
    plain = model(**inputs).logits
    assert torch.equal(tiers(**inputs, **given).logits[batch.mask], plain[batch.mask])
    expected = compile_eagerly(batch.model, policy)(**batch.inputs, **batch.call_arguments()).logits
    unpruned = batch.model(**batch.inputs).logits
    error = (plain.cpu().float() - unpruned)[batch.mask].abs().max() / unpruned.abs().max()
    pruned = tiers(**inputs, **given, tier="pruned").logits
    assert_close(pruned.cpu()[batch.mask], expected[batch.mask], 2 * error.item())
