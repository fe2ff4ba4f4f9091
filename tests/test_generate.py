"""What users of `generate` do, on a pruned model: it is the masked reference, and at 100 % the original.

Greedy decoding of every family is in `test_conformance.py`, conversations are in `test_conversation.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from dop_compile import Policy
from tests.families import FAMILIES
from tests.reference import reference_generate
from tests.support import (
    Batch,
    assert_close,
    assert_generates_reference,
    compile_eagerly,
    extended,
    fixed_policies,
    make_batch,
    operations,
    reference,
)

NAMES = ("llava", "qwen2_5_vl", "gemma3")
ROWS = [[("text", 5), ("image",), ("text", 4)], [("image", 1), ("text", 3)]]


def pruned(name: str) -> Policy:
    """Visual tokens supply keys longer than they are updated; text takes part in everything."""
    return Policy.depthwise(FAMILIES[name].num_layers, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)


def text_pruned(name: str) -> Policy:
    """Prunes the prompt's text too, so that taking a generated token for one of the prompt shows."""
    layers = FAMILIES[name].num_layers
    return Policy.from_operations(layers, operations(layers, ("text",), ("mlp", "mha_query"), start=1))


def new_tokens(batch: Batch, sequences: Tensor) -> list[list[int]]:
    return sequences[:, batch.inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_sampling_with_a_seed(name: str) -> None:
    batch = make_batch(name, ROWS)
    full, some = Policy.full(batch.family.num_layers), pruned(name)
    compiled = compile_eagerly(batch.model, {"full": full, "pruned": some})

    def sample(model: Any, seed: int, **arguments: Any) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(**batch.inputs, **arguments, max_new_tokens=6, do_sample=True, temperature=2.0)

    assert torch.equal(sample(compiled, 1), sample(batch.model, 1))
    first = sample(compiled, 1, tier="pruned")
    assert torch.equal(first, sample(compiled, 1, tier="pruned"))
    assert not torch.equal(first, sample(compiled, 2, tier="pruned"))


@pytest.mark.parametrize("name", NAMES)
def test_beam_search(name: str) -> None:
    batch = make_batch(name, ROWS)
    full, some = Policy.full(batch.family.num_layers), pruned(name)
    compiled = compile_eagerly(batch.model, {"full": full, "pruned": some})
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    expected = batch.model.generate(**batch.inputs, **settings)
    found = compiled.generate(**batch.inputs, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(found.sequences_scores, expected.sequences_scores)

    found = compiled.generate(**batch.inputs, **settings, tier="pruned")
    new = found.sequences[:, -4:]
    assert_close(found.sequences_scores, mean_log_probability(batch, some, new), 1e-4)
    greedy = torch.tensor(reference_generate(batch.model, batch.inputs, some, 4))
    assert (found.sequences_scores >= mean_log_probability(batch, some, greedy) - 1e-4).all()


def mean_log_probability(batch: Batch, policy: Policy, new: Tensor) -> Tensor:
    """(batch,) of new tokens (batch, count), from the oracle over prompt and new tokens. Needs unpruned text."""
    count = new.shape[1]
    logits = reference(extended(batch, new), policy)[:, -count - 1 : -1]
    return logits.log_softmax(-1).gather(-1, new[..., None]).squeeze(-1).mean(1)


@pytest.mark.parametrize("name", [*NAMES, "llama"])
def test_prompt_lookup_is_greedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(name, [[("text", 12)]] if name == "llama" else ROWS[:1])
    ids = batch.inputs["input_ids"]
    ids[0, 1] = ids[0, -1]  # the prompt's last token stands in it before: there are candidates at once
    looked_up = record_candidates(monkeypatch)
    policy = text_pruned(name)
    compiled = compile_eagerly(batch.model, policy)
    settings = {"max_new_tokens": 6, "do_sample": False, "prompt_lookup_num_tokens": 3}
    found = compiled.generate(**batch.inputs, **batch.call_arguments(), **settings)
    assert looked_up[0] > 0
    assert new_tokens(batch, found) == reference_generate(batch.model, batch.inputs, policy, 6, None, batch.groups)


@pytest.mark.parametrize("name", NAMES)
def test_looked_up_tokens_that_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is put into the prompt's end, so candidates are accepted and the cache is cropped inside them."""
    batch = make_batch(name, ROWS[:1])
    policy = pruned(name)
    answer = torch.tensor(reference_generate(batch.model, batch.inputs, policy, 4))
    start = batch.inputs["input_ids"][:, -1:]
    batch = extended(batch, torch.cat([answer, start, answer[:, :1]], 1))
    looked_up = record_candidates(monkeypatch)
    compiled = compile_eagerly(batch.model, policy)
    found = compiled.generate(**batch.inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=2)
    assert new_tokens(batch, found) == reference_generate(batch.model, batch.inputs, policy, 8)
    assert max(looked_up) > 0


def record_candidates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    original = PromptLookupCandidateGenerator.get_candidates

    def get_candidates(self: Any, input_ids: Tensor, *args: Any) -> Any:
        result = original(self, input_ids, *args)
        counts.append(result[0].shape[1] - input_ids.shape[1])
        return result

    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", get_candidates)
    return counts


@pytest.mark.parametrize("make_policy", [pruned, text_pruned])
@pytest.mark.parametrize("name", [*NAMES, "llama"])
def test_without_a_cache(name: str, make_policy: Any) -> None:
    batch = make_batch(name, None if name == "llama" else ROWS)
    policy = make_policy(name)
    compiled = compile_eagerly(batch.model, policy)
    settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": False}
    found = compiled.generate(**batch.inputs, **batch.call_arguments(), **settings)
    assert new_tokens(batch, found) == reference_generate(batch.model, batch.inputs, policy, 4, None, batch.groups)


def test_reduced_prompts_in_beam_search_and_without_a_cache() -> None:
    batch = make_batch("llava", ROWS)
    policy, kept = fixed_policies(batch)["given_scattered"]
    compiled = compile_eagerly(batch.model, policy)
    expected = reference_generate(batch.model, batch.inputs, policy, 4, kept)
    for settings in ({"use_cache": False}, {"num_beams": 1, "num_return_sequences": 1}):
        found = compiled.generate(**batch.inputs, visual_indices=kept, max_new_tokens=4, do_sample=False, **settings)
        assert new_tokens(batch, found) == expected
    # Beams repeat the rows, and with them what was given per sample
    beams = compiled.generate(**batch.inputs, visual_indices=kept, max_new_tokens=4, num_beams=2, do_sample=False)
    assert beams.shape == (2, batch.inputs["input_ids"].shape[1] + 4)


def test_inputs_embeds_of_a_text_only_model() -> None:
    batch = make_batch("llama")
    policy, kept = fixed_policies(batch)["given_scattered"]
    compiled = compile_eagerly(batch.model, policy)
    embeds = batch.model.get_input_embeddings()(batch.inputs["input_ids"]).detach()
    mask = batch.inputs["attention_mask"]
    arguments = {"inputs_embeds": embeds, "attention_mask": mask} | batch.call_arguments(kept)
    found = compiled.generate(**arguments, max_new_tokens=4, do_sample=False)
    assert found.tolist() == reference_generate(batch.model, batch.inputs, policy, 4, kept, batch.groups)


@torch.no_grad()
def test_inputs_embeds_with_image_features_of_their_own() -> None:
    """Embeddings alone do not tell which positions are visual; `token_groups` does."""
    batch = make_batch("llava", ROWS)
    policy = pruned("llava")
    compiled = compile_eagerly(batch.model, policy)
    given: list[Tensor] = []
    hook = batch.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    batch.model(**batch.inputs)
    hook.remove()
    groups = batch.visual.long()
    before = (groups.cumsum(1) == 0) & batch.mask
    groups = torch.where(before, 2, groups)
    logits = compiled(inputs_embeds=given[0], attention_mask=batch.inputs["attention_mask"], token_groups=groups).logits
    expected = reference(batch, policy)
    assert_close(logits[batch.mask], expected[batch.mask])


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", ["llava", "gemma3", "cohere2_vision"])
def test_positions_of_later_tokens(name: str, positions: Any) -> None:
    batch = make_batch(name, [*ROWS, [("text", 4)]])
    kept = batch.random_kept(3)
    policy = Policy.full(batch.family.num_layers).replace(visual_tokens=3, reducer="given", positions=positions)
    compiled = compile_eagerly(batch.model, policy)
    assert_generates_reference(compiled, batch, policy, kept, tokens=6)


def test_the_two_conventions_of_positions_differ() -> None:
    batch = make_batch("llava", ROWS)
    kept = batch.random_kept(3)
    policy = Policy.full(4).replace(visual_tokens=3, reducer="given")
    compiled = compile_eagerly(batch.model, {"original": policy, "compact": policy.replace(positions="compact")})
    original, compact = (
        compiled(**batch.inputs, visual_indices=kept, tier=tier, logits_to_keep=1).logits for tier in compiled.dop.tiers
    )
    assert (original - compact).abs().max() > 0.1


def test_video_and_image_in_one_prompt() -> None:
    batch = make_batch("qwen2_5_vl", [[("text", 2), ("video", 1), ("text", 2), ("image",), ("text", 3)], [("text", 6)]])
    policy, kept = fixed_policies(batch)["uniform"]
    compiled = compile_eagerly(batch.model, policy)
    assert_generates_reference(compiled, batch, policy, kept)
