"""The oracle is right where the answer is known without it: whole models, short prompts, layers by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from tests.families import FAMILIES, IMAGE, VIDEO, Family
from tests.reference import reference_generate, reference_logits, split_rows

MODULES = ("mha_query", "mha_key_value", "mlp")
MULTIMODAL = [name for name, family in FAMILIES.items() if not family.is_text_only]
ONE_IMAGE = [("text", 4), ("image",), ("text", 3)]


@dataclass(frozen=True)
class StubPolicy:
    """The part of `Policy` that the oracle reads, so that these tests do not need the package."""

    num_layers: int
    pruned: frozenset[tuple[str, int, str]] = frozenset()
    visual_tokens: int | None = None
    positions: str = "original"
    salient_fraction: float | None = None

    def keeps(self, group: str, layer: int, module: str) -> bool:
        return (group, layer, module) not in self.pruned


def stub(family: Family, pruned: Iterable[tuple[str, int, str]] = (), **settings: object) -> StubPolicy:
    return StubPolicy(family.num_layers, frozenset(pruned), **settings)  # type: ignore[arg-type]


def everywhere(family: Family, groups: Iterable[str], modules: Iterable[str]) -> list[tuple[str, int, str]]:
    return [(g, layer, m) for g in groups for layer in range(family.num_layers) for m in modules]


def rows_for(family: Family) -> list[list[tuple[object, ...]]]:
    rows: list[list[tuple[object, ...]]] = [[("text", 5)], [("text", 3), ("text", 9)]]
    if not family.is_text_only:
        rows += [
            [("text", 5), ("image",), ("text", 4), ("image", 1), ("text", 3)],
            [("image", 2), ("text", 6)],
        ]
    if family.has_video:
        rows += [[("text", 2), ("video",), ("text", 3), ("image",), ("text", 2)], [("video", 1), ("text", 3)]]
    return rows


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.1e}"


def changed(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() > 1e-3 * expected.abs().max())


def visual_positions(inputs: dict[str, Tensor]) -> Tensor:
    return torch.isin(inputs["input_ids"][0], torch.tensor([IMAGE, VIDEO]))


@torch.no_grad()
def head_of(model: nn.Module, embeds: Tensor) -> Tensor:
    """Logits (tokens, vocab) of embeddings (1, tokens, hidden) that go past every layer."""
    return model.get_output_embeddings()(model.get_decoder().norm(embeds))[0]


def state(model: nn.Module) -> list[object]:
    """Everything that a forgotten hook or patch would change. The first forward adds hooks of HF's own."""
    modules = [(sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [modules, id(getattr(model.base_model, "rope_deltas", None))]


# Nothing pruned.


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_full_policy_is_the_untouched_model(name: str, attn: str) -> None:
    family = FAMILIES[name]
    model = family.build(attn=attn)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for padding in ("left", "right"):
        inputs = family.make_inputs(model, rows_for(family), padding=padding)
        with torch.no_grad():
            batch = model(**inputs).logits
            alone = [model(**row.inputs).logits[0] for row in split_rows(model, inputs)]
        before = state(model)
        reference = reference_logits(model, inputs, stub(family))
        assert state(model) == before
        for index, logits in enumerate(reference):
            assert_close(logits, alone[index])
            assert_close(logits, batch[index, inputs["attention_mask"][index].bool()])
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_full_policy_generates_the_same_tokens(name: str) -> None:
    family = FAMILIES[name]
    model = family.build(seed=1)
    inputs = family.make_inputs(model, rows_for(family), seed=1)
    expected = model.generate(**inputs, max_new_tokens=10, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert reference_generate(model, inputs, stub(family), 10) == expected.tolist()
    assert len(expected.unique()) > 5, "a model that repeats itself would hide errors"


def test_generation_ends_with_the_end_of_sequence_id() -> None:
    family = FAMILIES["llama"]
    model = family.build()
    inputs = family.make_inputs(model, [[("text", 6)]])
    (tokens,) = reference_generate(model, inputs, stub(family), 8)
    model.generation_config.eos_token_id = tokens[3]
    assert reference_generate(model, inputs, stub(family), 8) == [tokens[: tokens.index(tokens[3]) + 1]]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_deterministic_and_cover_batches_without_images(name: str) -> None:
    family = FAMILIES[name]
    model, again = family.build(seed=3), family.build(seed=3)
    inputs, same = (family.make_inputs(m, rows_for(family), seed=5) for m in (model, again))
    assert inputs.keys() == same.keys()
    assert all(torch.equal(inputs[key], same[key]) for key in inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(logits, again(**inputs).logits)
        assert logits.std() > 1
        text_only = family.make_inputs(model, rows_for(family)[:2])
        assert not any(key.startswith("pixel_values") for key in text_only)
        model(**text_only)


# Tokens removed.


@pytest.mark.parametrize("name", [n for n in MULTIMODAL if not FAMILIES[n].has_newlines])
def test_no_visual_token_kept_is_the_prompt_without_them(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    inputs = family.make_inputs(model, [ONE_IMAGE])
    entering = ~visual_positions(inputs)
    ids = inputs["input_ids"][:, entering]
    positions = torch.arange(len(entering))[None]
    if family.has_mrope:
        own = {k: inputs[k] for k in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
        positions = model.base_model.get_rope_index(**own)[0]
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        original = model(**text, position_ids=positions[..., entering]).logits[0]
        compact = model(**text).logits[0]
    policy = stub(family, visual_tokens=0)
    (logits,) = reference_logits(model, inputs, policy, kept=[[]])
    assert len(logits) == len(entering)
    assert_close(logits[entering], original)
    policy = replace(policy, positions="compact")
    if family.has_mrope:
        with pytest.raises(NotImplementedError, match="position axes"):
            reference_logits(model, inputs, policy, kept=[[]])
        return
    assert_close(reference_logits(model, inputs, policy, kept=[[]])[0][entering], compact)
    expected = model.generate(**text, max_new_tokens=8, do_sample=False)[:, ids.shape[1] :]
    assert reference_generate(model, inputs, policy, 8, kept=[[]]) == expected.tolist()


@pytest.mark.parametrize("name", MULTIMODAL)
def test_kept_tokens_are_a_shorter_sequence_and_removed_ones_bypass_it(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    inputs = family.make_inputs(model, [ONE_IMAGE])
    given: list[dict[str, Tensor]] = []
    decoder = model.get_decoder()
    handle = decoder.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        full = model(**inputs).logits[0]
    handle.remove()

    kept = [1, 3, 4, 7]
    visual = visual_positions(inputs).nonzero()[:, 0]
    counted = visual[[0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]] if family.has_newlines else visual
    removed = counted[[ordinal for ordinal in range(len(counted)) if ordinal not in kept]]
    entering = torch.ones(len(full), dtype=torch.bool)
    entering[removed] = False

    embeds, positions = given[0]["inputs_embeds"], given[0].get("position_ids")
    positions = torch.arange(len(full))[None] if positions is None else positions
    reduced = {"inputs_embeds": embeds[:, entering], "position_ids": positions[..., entering]}
    reduced["attention_mask"] = torch.ones(reduced["inputs_embeds"].shape[:2], dtype=torch.long)
    with torch.no_grad():
        if family.has_deepstack:
            reduced["visual_pos_masks"] = visual_positions(inputs)[None, entering]
            reduced["deepstack_visual_embeds"] = [level[kept] for level in given[0]["deepstack_visual_embeds"]]
            expected = model.lm_head(decoder(**reduced).last_hidden_state)[0]
        else:
            if family.has_bidirectional_images:
                reduced["token_type_ids"] = inputs["token_type_ids"][:, entering]
            expected = model(**reduced).logits[0]

    (logits,) = reference_logits(model, inputs, stub(family, visual_tokens=len(kept)), kept=[kept])
    assert_close(logits[entering], expected)
    assert_close(logits[removed], head_of(model, embeds)[removed])
    assert changed(logits[-1], full[-1])
    with pytest.raises(ValueError, match="needs `kept`"):
        reference_logits(model, inputs, stub(family, visual_tokens=len(kept)))


@pytest.mark.parametrize("name", [n for n in MULTIMODAL if not FAMILIES[n].has_sliding_layers])
def test_tokens_that_nobody_reads_might_as_well_be_removed(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    inputs = family.make_inputs(model, rows_for(family)[2:3])
    text = ~visual_positions(inputs)
    policy = stub(family, everywhere(family, ["visual"], ["mha_key_value"]))
    present, removed = (reference_logits(model, inputs, policy, kept=kept)[0] for kept in (None, [[]]))
    assert_close(removed[text], present[text])


# Operations pruned.


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", MULTIMODAL)
def test_pruning_reaches_later_tokens_only(name: str, module: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    inputs = family.make_inputs(model, [ONE_IMAGE])
    visual = visual_positions(inputs)
    first = int(visual.nonzero()[0])
    (full,) = reference_logits(model, inputs, stub(family))
    for group, start in (("system", 0), ("visual", first)):
        (logits,) = reference_logits(model, inputs, stub(family, [(group, 0, module)]))
        assert torch.equal(logits[:start], full[:start])
        assert changed(logits[-1], full[-1])
    last = family.num_layers - 1
    (logits,) = reference_logits(model, inputs, stub(family, [("visual", last, module)]))
    assert changed(logits[visual], full[visual])
    assert changed(logits[-1], full[-1]) == (module == "mha_key_value")
    assert reference_generate(model, inputs, stub(family, [("text", 0, module)]), 2) != []


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_query_without_keys_gets_exactly_the_bypass(name: str, attn: str) -> None:
    family = FAMILIES[name]
    model = family.build(attn=attn)
    inputs = family.make_inputs(model, rows_for(family))
    groups = ("system", "visual", "text")
    keyless, bypass = (
        reference_logits(model, inputs, stub(family, everywhere(family, groups, [module])))
        for module in ("mha_key_value", "mha_query")
    )
    assert all(torch.equal(a, b) for a, b in zip(keyless, bypass, strict=True))
    nothing = reference_logits(model, inputs, stub(family, everywhere(family, groups, MODULES)))
    for logits, row in zip(nothing, split_rows(model, inputs), strict=True):
        text = ~visual_positions(row.inputs)
        assert_close(logits[text], head_of(model, model.get_input_embeddings()(row.inputs["input_ids"]))[text])


def test_against_hand_written_layers() -> None:
    """A Llama that gathers tokens per operation instead of masking them, over random policies and groups."""
    family = FAMILIES["llama"]
    model = family.build()
    decoder = model.model
    generator = torch.Generator().manual_seed(0)
    names = ("text", "visual", "system")

    def rotate(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat([-x[..., half:], x[..., :half]], -1)

    @torch.no_grad()
    def by_hand(ids: Tensor, groups: list[str], policy: StubPolicy) -> Tensor:
        hidden = decoder.embed_tokens(ids)
        cos, sin = (t[0] for t in decoder.rotary_emb(hidden[None], torch.arange(len(ids))[None]))
        for number, layer in enumerate(decoder.layers):
            takes = {m: [i for i, g in enumerate(groups) if policy.keeps(g, number, m)] for m in MODULES}
            normed, attention, update = (
                layer.input_layernorm(hidden),
                layer.self_attn,
                torch.zeros_like(hidden),
            )
            for i in takes["mha_query"]:
                keys = [k for k in takes["mha_key_value"] if k <= i]
                query = attention.q_proj(normed[i]).view(4, 16)
                query = query * cos[i] + rotate(query) * sin[i]
                key = attention.k_proj(normed[keys]).view(len(keys), 2, 16).repeat_interleave(2, 1)
                key = key * cos[keys][:, None] + rotate(key) * sin[keys][:, None]
                value = attention.v_proj(normed[keys]).view(len(keys), 2, 16).repeat_interleave(2, 1)
                scores = torch.einsum("hd,khd->hk", query, key) / 4
                update[i] = attention.o_proj(torch.einsum("hk,khd->hd", scores.softmax(-1), value).reshape(-1))
            hidden = hidden + update
            mlp = torch.tensor(takes["mlp"], dtype=torch.long)
            hidden = hidden.index_add(0, mlp, layer.mlp(layer.post_attention_layernorm(hidden[mlp])))
        return model.lm_head(decoder.norm(hidden))

    for seed in range(6):
        inputs = family.make_inputs(model, [[("text", 12)], [("text", 7)]], seed=seed)
        groups = torch.randint(0, 3, inputs["input_ids"].shape, generator=generator)
        operations = everywhere(family, names, MODULES)
        policy = stub(family, [o for o in operations if torch.rand((), generator=generator) < 0.4])
        reference = reference_logits(model, inputs, policy, token_groups=groups)
        for row, logits in enumerate(reference):
            mask = inputs["attention_mask"][row].bool()
            codes = groups[row, mask].tolist()
            own = [names[g] if 1 in codes else "text" for g in codes]  # a prompt without visual tokens is all text
            assert_close(logits, by_hand(inputs["input_ids"][row, mask], own, policy))


def test_prompt_of_removed_tokens_alone() -> None:
    family = FAMILIES["llava"]
    model = family.build()
    inputs = family.make_inputs(model, [[("image",)]])
    policy = stub(family, visual_tokens=0)
    (logits,) = reference_logits(model, inputs, policy, kept=[[]])
    assert logits.shape == (9, 128)
    assert reference_generate(model, inputs, policy, 3, kept=[[]])[0][0] == int(logits[-1].argmax())


def test_salient_tokens_are_a_group_of_their_own() -> None:
    family = FAMILIES["llava"]
    model = family.build()
    inputs = family.make_inputs(model, [ONE_IMAGE])
    operation = ("visual_rest", 0, "mlp")
    policy = stub(family, [operation], salient_fraction=0.5)
    full = reference_logits(model, inputs, stub(family), kept=[[1, 2, 5]])[0]
    all_salient = reference_logits(model, inputs, policy, kept=[[1, 2, 5]], salient=[[1, 2, 5]])[0]
    none_salient = reference_logits(model, inputs, policy, kept=[[1, 2, 5]], salient=[[]])[0]
    visual = reference_logits(model, inputs, stub(family, [("visual", 0, "mlp")]), kept=[[1, 2, 5]])[0]
    assert torch.equal(all_salient, full)
    assert torch.equal(none_salient, visual)
    with pytest.raises(ValueError, match="needs `salient`"):
        reference_logits(model, inputs, policy)
    with pytest.raises(ValueError, match="subset"):
        reference_logits(model, inputs, policy, kept=[[1]], salient=[[2]])


def test_rows_of_a_batch_have_their_own_kept_tokens() -> None:
    family = FAMILIES["llava"]
    model = family.build()
    inputs = family.make_inputs(model, [ONE_IMAGE, [("text", 6)], [("image",), ("image",), ("text", 2)]])
    kept = [[0, 8], [], [2, 9, 17]]
    policy = stub(family, [("visual", 1, "mha_key_value")], visual_tokens=3, positions="compact")
    together = reference_logits(model, inputs, policy, kept=kept)
    for index, row in enumerate(split_rows(model, inputs)):
        assert torch.equal(reference_logits(model, row.inputs, policy, kept=[kept[index]])[0], together[index])
    with pytest.raises(ValueError, match="increasing ordinals below 9"):
        reference_logits(model, inputs, policy, kept=[[3, 2], [], []])


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_model_is_restored_when_something_raises(name: str) -> None:
    class Broken(StubPolicy):
        def keeps(self, group: str, layer: int, module: str) -> bool:
            if layer == 2:
                raise RuntimeError("broken policy")
            return True

    family = FAMILIES[name]
    model = family.build()
    inputs = family.make_inputs(model, [ONE_IMAGE])
    model(**inputs)
    before = state(model)
    with pytest.raises(RuntimeError, match="broken policy"):
        reference_logits(model, inputs, Broken(family.num_layers))
    model.lm_head.forward = None  # raises after the decoder
    with pytest.raises(TypeError):
        reference_logits(model, inputs, stub(family))
    del model.lm_head.forward
    assert state(model) == before
