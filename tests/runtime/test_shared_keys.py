"""Layers that read the keys and values of earlier ones: whatever a policy keeps in a source and in each of its readers.

Layers 3 and 5 of the families here read layer 1, layer 4 reads layer 2, a sliding one (`tests.conformance.text_only`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import peft
import pytest
import torch
from transformers import GenerationConfig

from dop_compile import Policy, dop_compile
from dop_compile.errors import UnsupportedUsageError
from dop_compile.runtime.cache import PrunedCache
from tests.conformance.text_only import TEXT_ONLY
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
    shared_model,
)

LAYERS = 6
FAMILY = TEXT_ONLY["gemma4_unified_shared_text"]
SIDE_INPUTS = TEXT_ONLY["gemma4_shared_text"]
READERS_ALONE = [("visual", layer, "mha_key_value") for layer in (1, 2, 3)]
"""Sources that do not see visual keys themselves, but store them for layers 4 and 5."""
SOURCES_ALONE = [("visual", layer, "mha_key_value") for layer in (3, 4, 5)]
FROZEN = [*READERS_ALONE, ("system", 5, "mha_key_value"), ("visual", 2, "mha_query"), ("visual", 1, "mlp")]
NARROW = [("system", layer, "mha_key_value") for layer in (1, 3, 5)] + [("visual", 3, "mha_key_value")]
"""What layer 1 stores has padding in some rows, and layer 3 sees a part of it."""
POLICIES = {"readers alone": READERS_ALONE, "sources alone": SOURCES_ALONE, "frozen": FROZEN, "narrow": NARROW}


def batch_of(attn: str | None = None) -> Batch:
    rows = [[("text", 14)], [("text", 14)], [("text", 11)]]
    return make_batch(FAMILY, rows, model=shared_model(FAMILY, attn))


@pytest.mark.parametrize(("name", "attn"), [*((name, "sdpa") for name in POLICIES), ("frozen", "eager")])
def test_readers_and_sources_see_what_their_own_policy_keeps(name: str, attn: str) -> None:
    batch = batch_of(attn)
    policy = Policy.from_operations(LAYERS, POLICIES[name])
    compiled = compile_eagerly(batch.model, policy)
    assert_forward_matches(compiled, batch, policy)
    assert_generates_reference(compiled, batch, policy, tokens=3)


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_of_all_groups(seed: int) -> None:
    batch = make_batch(SIDE_INPUTS if seed == 0 else FAMILY)
    policy = Policy.from_operations(LAYERS, random_operations(LAYERS, seed), visual_tokens=4, reducer="given")
    assert_forward_matches(compile_eagerly(batch.model, policy), batch, policy, batch.random_kept(4))


@torch.no_grad()
def test_full_policy_is_the_original_bit_by_bit() -> None:
    batch = batch_of()
    compiled = compile_eagerly(batch.model, Policy.full(LAYERS))
    given = batch.call_arguments()
    assert torch.equal(compiled(**batch.inputs, **given).logits, batch.model(**batch.inputs).logits)
    settings = GenerationConfig(max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)
    found = compiled.generate(**batch.inputs, **given, generation_config=settings)
    assert torch.equal(found, batch.model.generate(**batch.inputs, generation_config=settings))


@pytest.fixture(scope="module")
def pruned() -> tuple[Batch, Policy, Callable[..., object]]:
    batch, policy = batch_of(), Policy.from_operations(LAYERS, FROZEN)
    return batch, policy, compile_eagerly(batch.model, policy)


@torch.no_grad()
def test_readers_store_nothing(pruned: tuple[Batch, Policy, Callable[..., object]]) -> None:
    batch, _, compiled = pruned
    cache: PrunedCache = compiled(**batch.inputs, **batch.call_arguments()).past_key_values  # type: ignore[attr-defined]
    assert len(cache.layers) == 3
    assert [layer.keys.shape[-2] for layer in cache.layers] == [14, 14, 14]
    seen = {layer: entries.visible for layer, entries in cache.entries.items()}
    visual = batch.groups == 1
    assert torch.equal(seen[1], ~visual & batch.mask)  # type: ignore[arg-type]
    assert seen[1] is seen[2] is seen[3]
    assert seen[4] is None
    assert torch.equal(seen[5], (batch.groups != 2) & batch.mask)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [3, 6, 8, 14])
@torch.no_grad()
def test_a_cropped_cache_goes_on(keep: int, pruned: tuple[Batch, Policy, Callable[..., object]]) -> None:
    """14: nothing is cropped, a later turn."""
    batch, policy, compiled = pruned
    assert batch.groups is not None
    cache: PrunedCache = compiled(**batch.inputs, **batch.call_arguments()).past_key_values  # type: ignore[attr-defined]
    cache.crop(keep)
    new = torch.randint(16, 128, (3, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.cat([batch.inputs["attention_mask"][:, :keep], torch.ones(3, 4, dtype=torch.long)], 1)
    groups = torch.cat([batch.groups[:, :keep], torch.zeros_like(new)], 1)
    ids = torch.cat([batch.inputs["input_ids"][:, :keep], new], 1)
    given = {"input_ids": new, "attention_mask": mask, "token_groups": torch.zeros_like(new)}
    logits = compiled(**given, past_key_values=cache).logits  # type: ignore[attr-defined]
    whole = replace(batch, inputs={"input_ids": ids, "attention_mask": mask}, groups=groups)
    assert_close(logits, reference(whole, policy)[:, keep:])


@torch.no_grad()
def test_selected_and_repeated_rows_go_on_as_themselves(pruned: tuple[Batch, Policy, Callable[..., object]]) -> None:
    batch, _, compiled = pruned
    new = torch.tensor([[20], [40], [60]])
    mask = torch.cat([batch.inputs["attention_mask"], torch.ones_like(new)], 1)

    def go_on(change: Callable[[PrunedCache], None], order: list[int]) -> torch.Tensor:
        cache = compiled(**batch.inputs, **batch.call_arguments()).past_key_values  # type: ignore[attr-defined]
        change(cache)
        result: torch.Tensor = compiled(  # type: ignore[attr-defined]
            input_ids=new[order], attention_mask=mask[order], past_key_values=cache
        ).logits
        return result

    expected = go_on(lambda cache: None, [0, 1, 2])
    for change, order in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        assert_close(go_on(change, order), expected[order])


def test_handing_the_keys_and_values_out_is_refused(pruned: tuple[Batch, Policy, Callable[..., object]]) -> None:
    batch, _, compiled = pruned
    with pytest.raises(UnsupportedUsageError, match="return_shared_kv_states=True is not supported"):
        compiled(**batch.inputs, **batch.call_arguments(), return_shared_kv_states=True)


@torch.no_grad()
def test_half_precision() -> None:
    model = SIDE_INPUTS.build(dtype=torch.bfloat16)
    batch = make_batch(SIDE_INPUTS, model=model)
    compiled = compile_eagerly(model, Policy.full(LAYERS))
    assert torch.equal(compiled(**batch.inputs, **batch.call_arguments()).logits, model(**batch.inputs).logits)


@pytest.mark.conformance
@torch.no_grad()
def test_compiled_pieces() -> None:
    batch, policy = make_batch(SIDE_INPUTS), Policy.from_operations(LAYERS, FROZEN)
    given = batch.inputs | batch.call_arguments()
    eager, compiled = (dop_compile(batch.model, policy, backend=backend) for backend in ("eager", "aot_eager"))
    assert_close(compiled(**given).logits, eager(**given).logits)


@torch.no_grad()
def test_adapters() -> None:
    targets = r".*layers.*(q_proj|k_proj|v_proj|o_proj|gate_proj)"
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(SIDE_INPUTS.build(), config).eval()
    batch = make_batch(SIDE_INPUTS, model=model.base_model.model)
    policy = Policy.from_operations(LAYERS, FROZEN)
    compiled = compile_eagerly(batch.model, {"100%": Policy.full(LAYERS), "frozen": policy})
    given = batch.inputs | batch.call_arguments()
    assert torch.equal(compiled(**given).logits, model(**batch.inputs).logits)
    logits = compiled(**given, tier="frozen").logits
    assert_close(logits[batch.mask], reference(batch, policy)[batch.mask], tolerance=3e-5)


@pytest.fixture
def unfused() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attention_2"])
def test_other_kernels_mask_what_a_layer_does_not_see(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "flash_attention_2":
        install(monkeypatch, kernel)
    batch, model = batch_of(), FAMILY.build()
    model.get_decoder().config._attn_implementation = kernel
    policy = Policy.from_operations(LAYERS, FROZEN)
    compiled = compile_eagerly(model, policy)
    with torch.no_grad():
        logits = compiled(**batch.inputs, **batch.call_arguments()).logits
    assert_close(logits[batch.mask], reference(batch, policy)[batch.mask])
    assert_generates_reference(compiled, batch, policy, tokens=2)
