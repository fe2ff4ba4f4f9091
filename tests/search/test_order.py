"""`OperationOrder`: prefixes, their FLOPs, budgets, and what its JSON refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.costs import prefill_flops
from dop_compile.policy.operations import MODULES, Operation
from dop_compile.policy.policy import Policy
from dop_compile.search.greedy_sort import Step, implied
from dop_compile.search.optimize import InfeasibleBudgetError
from dop_compile.search.order import OperationOrder

LAYERS = 4
DIMS = DecoderDims(LAYERS, 64, 4, 16, 2, (96,) * LAYERS)
COUNTS = ((4, 9, 3), (0, 1, 7), (5, 30, 12))


def an_order(**changes: Any) -> OperationOrder:
    free = implied([Operation("visual_rest", layer, "mha_key_value") for layer in (2, 3)], LAYERS)
    steps = (
        Step(Operation("visual_salient", 3, "mlp"), 0.01),
        Step(Operation("visual_rest", 1, "mha_key_value"), 0.03),
        Step(Operation("visual_salient", 0, "mha_query"), 0.2),
        Step(Operation("visual_rest", 0, "mlp"), 0.15),
    )
    values: dict[str, Any] = {
        "model_fingerprint": "f" * 64,
        "dims": DIMS,
        "metric": "top_k_kl",
        "metric_options": (),
        "base": Policy(LAYERS, salient_fraction=0.25),
        "counts": COUNTS,
        "digests": ("a", "b", "c"),
        "danger": frozenset({Operation("visual_salient", 0, "mlp")}),
        "free": free,
        "free_divergence": 1e-4,
        "steps": steps,
        "evaluations": 31,
        "settings": (("max_loss", 1.0), ("steps", 15)),
        "versions": (("torch", "2.13.0"),),
    }
    return OperationOrder(**values | changes)


def fraction(policy: Policy, counts: tuple[tuple[int, int, int], ...] = COUNTS) -> float:
    """Eq. 11, one sample at a time."""
    full = Policy.full(LAYERS)
    return sum(prefill_flops(DIMS, policy, *row) for row in counts) / sum(
        prefill_flops(DIMS, full, *row) for row in counts
    )


def test_prefixes_are_nothing_then_the_free_set_then_one_step_more_each() -> None:
    order = an_order()
    pruned = [policy.pruned for policy in order.policies()]
    assert pruned[0] == frozenset()
    assert pruned[1] == order.free
    assert len(pruned) == 2 + len(order.steps)
    # What the salient tokens go without, the rest goes without
    assert pruned[2] == pruned[1] | {("visual_salient", 3, "mlp")}
    assert ("visual_rest", 3, "mlp") in pruned[1]
    # Keys and values are pruned from layer 1 to the last with the second step
    assert pruned[3] - pruned[2] == {("visual_rest", 1, module) for module in MODULES}
    assert pruned[4] - pruned[3] == {(group, 0, "mha_query") for group in ("visual_salient", "visual_rest")}
    assert [policy.provenance.measured_divergence for policy in order.policies()] == [0.0, 1e-4, 0.01, 0.03, 0.2, 0.15]


def test_an_order_without_a_free_set_begins_with_nothing_once() -> None:
    order = an_order(free=frozenset(), steps=(Step(Operation("visual_rest", 0, "mlp"), 0.15),))
    assert [len(policy.pruned) for policy in order.policies()] == [0, 1]


def test_flops_are_those_of_the_policies_and_fall_strictly() -> None:
    order = an_order()
    assert order.flops == pytest.approx([fraction(policy) for policy in order.policies()], rel=1e-12)
    assert all(after < before for before, after in itertools.pairwise(order.flops))
    assert order.flops[0] == 1.0


@given(budget=st.floats(0, 1, exclude_min=True))
def test_the_first_prefix_within_the_budget_is_taken(budget: float) -> None:
    order = an_order()
    fitting = [policy for policy in order.policies() if fraction(policy) <= budget * (1 + 1e-9)]
    if not fitting:
        with pytest.raises(InfeasibleBudgetError, match=f"{order.flops[-1]:.4g} is the least"):
            order.policy(budget)
        return
    found = order.policy(budget)
    assert found.pruned == fitting[0].pruned
    assert found.provenance.budget == budget
    assert found.provenance.model_fingerprint == order.model_fingerprint
    assert found.provenance.samples == len(COUNTS)
    assert found.salient_fraction == 0.25


def test_each_prefix_meets_its_own_budget_and_one_prunes_nothing() -> None:
    order = an_order()
    for policy in order.policies():
        assert order.policy(policy.provenance.budget).pruned == policy.pruned
    assert order.policy(1).is_full


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, float("nan"), "0.5", True, None])
def test_a_budget_is_a_fraction(budget: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="budget: expected"):
        an_order().policy(budget)


def test_json_round_trip_and_file(tmp_path: Path) -> None:
    order = an_order(metric="forced_kl", metric_options=(("tokens", 4),))
    assert OperationOrder.from_json(order.to_json()) == order
    order.save(tmp_path / "order.json")
    assert OperationOrder.load(tmp_path / "order.json") == order
    assert [path.name for path in tmp_path.iterdir()] == ["order.json"]
    assert hash(order) == hash(OperationOrder.load(tmp_path / "order.json"))


def _changed(field: str, value: Any) -> Any:
    def change(document: dict[str, Any]) -> None:
        document[field] = value

    return change


_STEP = ["visual_rest", 0, "mlp", 0.5]
_WRONG: dict[str, tuple[Any, str]] = {
    "other file": (_changed("format", "dop_compile.policy"), "not the file of an operation order"),
    "other version": (_changed("version", 2), "version: .*version 1"),
    "version as a bool": (_changed("version", True), "version: .*version 1"),
    "unknown field": (_changed("extra", 1), "extra: unknown or missing"),
    "missing field": (lambda document: document.pop("steps"), "steps: unknown or missing"),
    "metric": (_changed("metric", "kll"), "metric: .*did you mean"),
    "no samples": (_changed("counts", []), "counts: expected at least one"),
    "negative count": (_changed("counts", [[1, -2, 3]]), "counts: expected an integer"),
    "two counts": (_changed("counts", [[1, 2]]), "counts: expected .system, visual, text."),
    "counts a number": (_changed("counts", 3), "counts: expected a list"),
    "no salient token": (_changed("counts", [[4, 1, 3]]), "counts: no sample has tokens of the group visual_salient"),
    "digests": (_changed("digests", ["a", "b"]), "digests: expected 3 strings"),
    "evaluations": (_changed("evaluations", 1.5), "evaluations: expected an integer"),
    "free incomplete": (_changed("free", [["visual_salient", 3, "mlp"]]), "free: it lacks operations"),
    "free shorthand": (_changed("free", [["visual", 3, "mlp"]]), "free: .*full names"),
    "free text": (_changed("free", [["text", 3, "mlp"]]), "free: expected operations of visual tokens"),
    "danger layer": (_changed("danger", [["visual_rest", 4, "mlp"]]), "danger: .*layer: expected"),
    "danger pruned": (_changed("danger", [["visual_rest", 0, "mlp"]]), "danger: the order prunes"),
    "step twice": (_changed("steps", [_STEP, _STEP]), r"steps\[1\]: .*pruned before it"),
    "step in the free set": (_changed("steps", [["visual_rest", 3, "mlp", 0.5]]), r"steps\[0\]: .*pruned before it"),
    "step short": (_changed("steps", [["visual_rest", 0, "mlp"]]), r"steps\[0\]: expected .group"),
    "step shorthand": (_changed("steps", [["visual_rest", 0, "mha", 0.5]]), r"steps\[0\]: .*full names"),
    "step divergence": (_changed("steps", [["visual_rest", 0, "mlp", "0.5"]]), r"steps\[0\].divergence: expected"),
    "free divergence": (_changed("free_divergence", None), "free_divergence: expected a number"),
    "dims": (_changed("dims", {"num_layers": 4}), "hidden_size"),
    "dims list": (_changed("dims", [4]), "dims: expected a JSON object"),
    "base": (_changed("base", {"num_layers": 4}), "policy JSON: format"),
    "base pruned": (_changed("base", json.loads(Policy(4, visual_tokens=3).to_json())), "base: .*prunes nothing"),
    "base of another depth": (_changed("base", json.loads(Policy(5).to_json())), "base: it is for 5 layers"),
    "setting": (_changed("settings", {"a": [1]}), r"settings\['a'\]: expected a JSON scalar"),
    "package version": (_changed("versions", {"torch": 2}), r"versions\['torch'\]"),
    "fingerprint": (_changed("model_fingerprint", ""), "model_fingerprint: expected"),
}


@pytest.mark.parametrize("name", _WRONG)
def test_files_that_are_refused(name: str, tmp_path: Path) -> None:
    change, message = _WRONG[name]
    document = json.loads(an_order().to_json())
    change(document)
    path = tmp_path / "order.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        OperationOrder.load(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"3", b'{"format": NaN}', b'{"a": 1, "a": 1}', b"\xff\xfe", b"[" * 10000]
)
def test_what_is_not_json_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "order.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"order\.json"):
        OperationOrder.load(path)


def test_an_order_is_a_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        an_order().metric = "kl"
    assert an_order() == an_order()
    assert an_order() != an_order(evaluations=3)
