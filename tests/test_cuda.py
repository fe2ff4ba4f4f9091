"""On an NVIDIA GPU: nothing pruned is bitwise the original, and pruned models are the masked original on that GPU.

Skipped without one. `DOP_COMPILE_TEST_DEVICE=cpu` runs the same on the processor, to try the tests themselves.
TF32 is off, or a convolution over other batch sizes would differ in the fourth digit.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dop_compile import Policy, dop_compile
from dop_compile.reducers import VisualContext, create, known, select_batch
from tests.families import FAMILIES
from tests.reference import reference_generate, reference_logits
from tests.support import (
    ONE_IMAGE,
    Batch,
    assert_rows_match,
    compile_eagerly,
    fixed_policies,
    make_batch,
    padded,
    shared_model,
    without,
)

DEVICE = torch.device(os.environ.get("DOP_COMPILE_TEST_DEVICE", "cuda"))

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NAMES = ("llava", "qwen2_5_vl", "gemma3")
POLICIES = ("joint_depth", "query_and_key_value_apart", "uniform", "given_scattered")
SPLIT = Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@functools.lru_cache(4)
def on_device(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    return FAMILIES[name].build(attn=attn, dtype=dtype).to(DEVICE)


def moved(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def batches(name: str, **settings: Any) -> tuple[Batch, dict[str, Tensor]]:
    """A batch on the processor, for what the tests look up in it, and its inputs on the device."""
    batch = make_batch(name, model=shared_model(name), **settings)
    return batch, {key: moved(value) for key, value in batch.inputs.items()}


def expected_rows(batch: Batch, model: nn.Module, inputs: dict[str, Tensor], policy: Policy, kept: Any) -> Tensor:
    """(batch, tokens, vocab) of the oracle on the device, brought back."""
    rows = reference_logits(model, inputs, policy, kept)
    return padded([row.cpu() for row in rows], batch.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_everything_kept_is_bitwise_the_original(name: str, attn: str, dtype: torch.dtype) -> None:
    model = on_device(name, attn, dtype)
    compiled = compile_eagerly(model, Policy.full(FAMILIES[name].num_layers))
    for rows in (ONE_IMAGE, None):  # unpadded and alone; padded
        _, inputs = batches(name, rows=rows)
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("policy_name", POLICIES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_pruned_is_the_masked_original(name: str, policy_name: str) -> None:
    batch, inputs = batches(name)
    policy, kept = fixed_policies(batch)[policy_name]
    model = on_device(name)
    compiled = compile_eagerly(model, policy)
    expected = expected_rows(batch, model, inputs, policy, kept)
    given = {"visual_indices": kept} if policy.reducer == "given" else {}
    for settings in ({"use_cache": True}, {"use_cache": False}, {"logits_to_keep": 3}):
        logits = compiled(**inputs, **given, **settings).logits
        assert logits.device.type == DEVICE.type
        assert_rows_match(logits.cpu(), expected, batch.mask)


@pytest.mark.parametrize("policy_name", ["query_and_key_value_apart", "uniform"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_generates_what_the_masked_original_does(name: str, policy_name: str) -> None:
    batch, inputs = batches(name)
    policy, kept = fixed_policies(batch)[policy_name]
    model = on_device(name)
    compiled = compile_eagerly(model, policy)
    found = compiled.generate(**without(inputs, "position_ids"), max_new_tokens=4, do_sample=False)
    expected = reference_generate(model, inputs, policy, 4, kept)
    assert found[:, inputs["input_ids"].shape[1] :].tolist() == expected


def context(device: torch.device) -> VisualContext:
    """Two tiles of 32 tokens without ties, every field filled in; the same numbers on every device."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=draw)
    features = torch.randn(64, 24, generator=draw)
    made = VisualContext(
        projected=features @ weight,
        text=torch.randn(9, 16, generator=draw),
        segments=torch.zeros(64, dtype=torch.long),
        sample_index=0,
        features=features,
        cls_attention=torch.rand(64, generator=draw) / 64,
        keys=torch.randn(64, 8, generator=draw),
        tiles=torch.arange(64) // 32,
        instruction_start=2,
    )
    names = ("projected", "text", "segments", "features", "cls_attention", "keys")
    tensors = {name: getattr(made, name).to(device) for name in names}
    return replace(made, **tensors, project=lambda rows: rows @ weight.to(device))


@pytest.mark.parametrize("name", [name for name in known() if name not in ("given", "resize")])
def test_reducers_choose_what_they_choose_on_the_processor(name: str) -> None:
    (here,), (there,) = (select_batch(create(name), [context(torch.device(d))], [12]) for d in ("cpu", DEVICE))
    assert there.indices.tolist() == here.indices.tolist()
    assert (there.features is None) == (here.features is None)
    if here.features is not None and there.features is not None:
        assert there.features.device.type == DEVICE.type
        torch.testing.assert_close(there.features.cpu(), here.features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reducer", ["cdpruner", "divprune", "vispruner", "visionzip", "prumerge_plus", "trim"])
@torch.no_grad()
def test_models_with_a_reducer_answer_as_on_the_processor(reducer: str) -> None:
    batch, inputs = batches("llava")
    policy = SPLIT.replace(visual_tokens=4, reducer=reducer)
    found = compile_eagerly(on_device("llava"), policy)(**inputs).logits
    expected = compile_eagerly(batch.model, policy)(**batch.inputs).logits
    assert_rows_match(found.cpu(), expected, batch.mask, 1e-4)


@pytest.mark.inductor
@torch.no_grad()
def test_inductor_equals_eager() -> None:
    _, inputs = batches("llava", rows=ONE_IMAGE)
    model = on_device("llava")
    found, expected = (
        dop_compile(model, SPLIT, backend=backend).generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        for backend in ("inductor", "eager")
    )
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_prefill_of_a_prompt_alone_runs_in_torchs_flash_kernel() -> None:
    """In bfloat16, without padding, also where tokens are gone: no mask stands in the kernel's way."""
    if DEVICE.type != "cuda":
        pytest.skip("the processor has no such kernel")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = on_device("llama", dtype=torch.bfloat16)
    ids = torch.arange(16, 36, device=DEVICE)[None]
    groups = torch.zeros_like(ids)
    groups[:, 2:10] = 1
    policy = Policy.depthwise(4, mha_depth=2, mlp_depth=1, visual_tokens=4)
    compiled = compile_eagerly(model, policy)
    plain = compiled(input_ids=ids, token_groups=groups).logits
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model(input_ids=ids)
        torch.testing.assert_close(compiled(input_ids=ids, token_groups=groups).logits, plain, rtol=0.1, atol=0.1)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="captures CUDA graphs")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_captured_prefills_are_those_without(name: str, backend: str) -> None:
    model = on_device(name)
    policies = {"split": SPLIT, "uniform": replace(SPLIT, reducer="uniform", visual_tokens=3)}
    with_graphs = dop_compile(model, policies, backend=backend, cuda_graphs=True)
    without = dop_compile(model, policies, backend=backend)
    for tier in policies:
        for seed in range(4):
            _, inputs = batches(name, rows=ONE_IMAGE, seed=seed)
            expected = without(**inputs, tier=tier)
            found = with_graphs(**inputs, tier=tier)
            assert torch.equal(found.logits, expected.logits)
            for own, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
                assert torch.equal(own.keys, other.keys)
                assert torch.equal(own.values, other.values)
            settings = {"tier": tier, "max_new_tokens": 4, "do_sample": False}
            assert torch.equal(with_graphs.generate(**inputs, **settings), without.generate(**inputs, **settings))
    assert with_graphs.dop.graphs.replayed >= 12
