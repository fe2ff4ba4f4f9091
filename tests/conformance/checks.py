"""What a family has to pass to be called exact: 100 % bit by bit, and every policy equal to the masked reference.

The batches have images at different places and of different counts, two in one sample, a video where the class takes
one, and a row without images.
"""

from __future__ import annotations

import torch

from dop_compile import Policy
from dop_compile.replay import Replay
from tests.families import Family
from tests.reference import split_rows
from tests.support import (
    Batch,
    assert_close,
    assert_forward_matches,
    assert_generates_reference,
    assert_rows_match,
    compile_eagerly,
    fixed_policies,
    make_batch,
    original_decoder_forbidden,
    reference,
    shared_model,
    without,
)

__all__ = ["POLICIES", "check_full", "check_policy", "check_prepared", "check_row_alone"]

POLICIES = ("joint_depth", "query_and_key_value_apart", "uniform", "given_scattered")
GENERATED = ("query_and_key_value_apart", "given_scattered")


def _full_policies(batch: Batch) -> dict[str, Policy]:
    """Three ways to say 100 %; none of them may fall back to the original forward."""
    layers = batch.family.num_layers
    return {
        "full": Policy.full(layers),
        "no operation": Policy.from_operations(layers, []),
        "every visual token": Policy.depthwise(layers, visual_tokens=max(batch.counts)),
    }


@torch.no_grad()
def check_full(family: Family, attn: str) -> None:
    """100 % is the untouched model bit by bit, with either padding, and generates its tokens."""
    left = make_batch(family, model=shared_model(family, attn))
    right = make_batch(family, model=left.model, padding="right", seed=1)
    compiled = compile_eagerly(left.model, _full_policies(left))
    for batch in (left, right):
        expected = batch.model(**batch.inputs).logits
        for tier in compiled.dop.tiers:
            arguments = batch.inputs | batch.call_arguments() | {"tier": tier}
            compiled(**arguments)
            with original_decoder_forbidden(batch.model):
                logits = compiled(**arguments).logits
            assert torch.equal(logits, expected), tier
            if family.has_logits_to_keep:
                assert_rows_match(compiled(**arguments, logits_to_keep=1).logits, expected, batch.mask)
    assert compiled.dop.programs
    inputs = without(left.inputs, "position_ids")
    generated = compiled.generate(**inputs, **left.call_arguments(), max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, left.model.generate(**inputs, max_new_tokens=6, do_sample=False))


def check_policy(family: Family, policy_name: str) -> None:
    """A policy is the masked reference, in logits and in the tokens that it generates."""
    # Left padding is how generate wants it; a plain forward may also be padded on the right
    generates = policy_name in GENERATED
    batch = make_batch(family, padding="left" if generates else "right")
    policy, kept = fixed_policies(batch)[policy_name]
    compiled = compile_eagerly(batch.model, policy)
    assert_forward_matches(compiled, batch, policy, kept)
    if generates:
        assert_generates_reference(compiled, batch, policy, kept)
    assert compiled.dop.programs


@torch.no_grad()
def check_row_alone(family: Family) -> None:
    """A row of a left-padded batch is as if alone."""
    batch = make_batch(family)
    policy, kept = fixed_policies(batch)["given_scattered"]
    assert kept is not None
    compiled = compile_eagerly(batch.model, policy, debug=False)
    together = compiled(**batch.inputs, **batch.call_arguments(kept)).logits
    rows = split_rows(batch.model, batch.inputs, kept, batch.groups, towers=batch.towers)
    for index, row in enumerate(rows):
        own = {} if row.groups is None else {"token_groups": row.groups[None]}
        alone = compiled(**row.inputs, **own, visual_indices=[kept[index]]).logits[0]
        assert_close(together[index, batch.mask[index]], alone)


def check_prepared(family: Family) -> None:
    """A prompt prepared once gives the reference's logits under every policy, wherever a run begins."""
    batch, layers = make_batch(family), family.num_layers
    compiled = compile_eagerly(batch.model, Policy.full(layers))
    replay = Replay(compiled, batch.inputs | batch.call_arguments(), depths=range(1, layers))
    for policy, first in (
        (Policy.depthwise(layers, mlp_depth=layers - 1), layers - 1),
        (Policy.depthwise(layers, mha_query_depth=1, mha_key_value_depth=layers - 1, mlp_depth=1), 1),
        (Policy.depthwise(layers, mha_depth=0), 0),
    ):
        assert replay.first_layer(policy) == min(first, first if family.replays_from is None else family.replays_from)
        assert_close(replay.logits(policy), reference(batch, policy)[:, -1:])
