"""Which policies are compared, and what the tables say of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from dop_compile import Policy
from dop_compile.search.validation import consecutive_operations, swapped_operations

LAYERS = 6
MODULES = ("mha_query", "mha_key_value", "mlp")


def loss(policy: Policy) -> float:
    """Deeper layers are missed less."""
    return sum(2.0**-layer * (1 + MODULES.index(module)) for _, layer, module in policy.pruned)


def losses(policies: Sequence[Policy]) -> list[float]:
    return [loss(policy) for policy in policies]


def test_consecutive_operations_are_pruned_at_every_depth() -> None:
    study = consecutive_operations(Policy.full(LAYERS), losses, lengths=(1, 3), modules=("mha", "mlp"))
    expected = []
    for module, parts in (("mha", ("mha_query", "mha_key_value")), ("mlp", ("mlp",))):
        for length in (1, 3):
            for first in range(LAYERS - length + 1):
                pruned = [("visual", first + i, part) for i in range(length) for part in parts]
                expected.append((module, length, first, loss(Policy.from_operations(LAYERS, pruned))))
    assert list(study.rows) == expected


def test_a_base_policy_and_chosen_layers_are_kept() -> None:
    base = Policy.depthwise(LAYERS, mlp_depth=4, visual_tokens=7)
    seen: list[Policy] = []

    def measure(policies: Sequence[Policy]) -> list[float]:
        seen.extend(policies)
        return losses(policies)

    study = consecutive_operations(base, measure, lengths=(2,), modules=("mha_query",), layers=(0, 3))
    assert study.column("first layer") == [0, 3]
    for policy, first in zip(seen, (0, 3), strict=True):
        assert policy.visual_tokens == 7
        assert policy.pruned_layers("visual", "mlp") == (4, 5)
        assert policy.pruned_layers("visual", "mha_query") == (first, first + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": (7,)}, "lengths"),
        ({"layers": (5,), "lengths": (2,)}, "layers"),
        ({"modules": ("attention",)}, "modules"),
        ({"modules": ()}, "at least one"),
    ],
)
def test_runs_outside_the_model_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        consecutive_operations(Policy.full(LAYERS), losses, **settings)


@pytest.mark.parametrize(
    "policy",
    [
        Policy.depthwise(LAYERS, mha_depth=3, mlp_depth=3, visual_tokens=5),
        Policy.depthwise(LAYERS, mha_query_depth=3, mha_key_value_depth=6, mlp_depth=2),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_swap_exchanges_operations_of_one_module(policy: Policy, count: int) -> None:
    seen: list[Policy] = []

    def measure(policies: Sequence[Policy]) -> list[float]:
        seen.extend(policies)
        return losses(policies)

    study = swapped_operations(policy, measure, swaps=(count,), draws=20, seed=3)
    assert seen[0] == policy
    assert len(set(seen)) == len(seen) > 3, "each is measured once"
    for other in seen[1:]:
        assert other.visual_tokens == policy.visual_tokens
        assert Counter(op.module for op in other.pruned) == Counter(op.module for op in policy.pruned)
        changed = {op.module for op in other.pruned ^ policy.pruned}
        assert changed in ({"mlp"}, {"mha_query"}, {"mha_query", "mha_key_value"})
        if "mha_key_value" in changed:
            assert other.pruned_layers("visual", "mha_query") == other.pruned_layers("visual", "mha_key_value")
        for module in changed:
            before, after = (set(p.pruned_layers("visual", module)) for p in (policy, other))
            assert len(before - after) == len(after - before) == count
    own, row = study.rows
    assert own[2] == loss(policy)
    assert row[:2] == (count, 20)
    assert row[6] == 1.0, "deeper layers are missed less, so that every exchange loses more"
    assert own[2] < row[2] <= row[3] <= row[4]


def test_the_share_of_worse_draws_counts_better_ones() -> None:
    """Where shallow layers are missed less, or all layers alike, no exchange is worse."""
    policy = Policy.depthwise(LAYERS, mlp_depth=3)
    for measure in (lambda policies: [-loss(p) for p in policies], lambda policies: [1.0] * len(policies)):
        study = swapped_operations(policy, measure, swaps=(1, 3))
        assert study.column("worse than the policy")[1:] == [0.0, 0.0]


def test_the_seed_decides_the_draws() -> None:
    policy = Policy.depthwise(LAYERS, mha_depth=3, mlp_depth=3)
    rows = [swapped_operations(policy, losses, seed=seed).rows for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]


def test_too_many_swaps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"swaps: no module .* keeps 3 layers and prunes 3"):
        swapped_operations(Policy.depthwise(LAYERS, mlp_depth=4), losses, swaps=(3,))
