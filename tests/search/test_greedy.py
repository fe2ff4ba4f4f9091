"""GSOP: the sorting against a plain re-statement of its rules, then on a small LLaVA, interrupted and distributed.

The re-statement works on sets of (group, layer, module) and knows no bisection, no memory of losses and no closure in
one pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dop_compile import Policy, dop_compile
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.operations import MODULES, SPLIT_VISUAL_GROUPS
from dop_compile.search import OperationOrder, greedy, greedy_order, measure_policies
from dop_compile.search.greedy_sort import GreedyRules, GreedySort, default_danger, greedy_sort
from dop_compile.search.meter import SampleMeter
from tests.drawing import examples
from tests.families import FAMILIES
from tests.reference import reference_logits

Op = tuple[str, int, str]
Ops = frozenset[Op]
Loss = Callable[[Ops], float]
SALIENT, REST = SPLIT_VISUAL_GROUPS

# The rules, restated.


def all_operations(layers: int, groups: tuple[str, ...]) -> list[Op]:
    return [(group, layer, module) for group in groups for layer in range(layers) for module in MODULES]


def closed(pruned: Ops, layers: int, groups: tuple[str, ...]) -> Ops:
    """Add what is implied, one operation at a time, until nothing is."""
    found = set(pruned)
    while True:
        for operation in all_operations(layers, groups):
            group, layer, module = operation
            as_salient = group == REST and (SALIENT, layer, module) in found
            useless = module != "mha_key_value" and all(
                (group, later, "mha_key_value") in found for later in range(layer, layers)
            )
            if operation not in found and (as_salient or useless):
                found.add(operation)
                break
        else:
            return frozenset(found)


@dataclasses.dataclass
class Restated:
    """GSOP in the words of its rules."""

    layers: int
    groups: tuple[str, ...]
    danger: Ops
    free_layer: int
    tolerance: float
    max_loss: float
    steps: int
    loss: Loss

    def after(self, pruned: Ops, *more: Op) -> Ops | None:
        """None where something dangerous would be pruned."""
        found = closed(pruned | set(more), self.layers, self.groups)
        return None if found & self.danger else found

    def free(self) -> Ops:
        pruned: Ops = frozenset()
        for group in self.groups:
            for modules in (set(MODULES), {"mha_query", "mlp"}, {"mha_query"}):
                for first in range(self.free_layer, self.layers):
                    own = {o for o in all_operations(self.layers, (group,)) if o[1] >= first and o[2] in modules}
                    found = self.after(pruned, *(own - self.danger))
                    if found is not None and self.loss(found) <= self.tolerance:
                        pruned = found
                        break
        return pruned

    def rank(self, pruned: Ops) -> list[Op]:
        scored = []
        for operation in all_operations(self.layers, self.groups):
            found = self.after(pruned, operation)
            if operation not in pruned and found is not None:
                group, layer, module = operation
                modules = ("mha_key_value", "mlp", "mha_query")
                scored.append((self.loss(found), -layer, group == SALIENT, modules.index(module), operation))
        return [entry[-1] for entry in sorted(scored)]

    def order(self) -> tuple[Ops, list[tuple[Op, float]]]:
        pruned = free = self.free()
        ranking, taken, order = self.rank(pruned), 0, []
        while taken < self.steps:
            ranking = [o for o in ranking if o not in pruned and self.after(pruned, o) is not None]
            if not ranking:
                break
            found = self.after(pruned, ranking[0])
            assert found is not None
            loss = self.loss(found)
            if loss > self.max_loss * (taken + 1) / self.steps:
                taken += 1
                ranking = self.rank(pruned)
            else:
                pruned = found
                order.append((ranking[0], loss))
        return free, order


# Losses that are made up.


def additive(seed: int, layers: int, groups: tuple[str, ...], zeros: float = 0.3) -> Loss:
    """More pruned, more lost; some operations cost nothing, and pairs cost more than their parts."""
    draw = random.Random(seed)
    every = all_operations(layers, groups)
    weight = {o: 0.0 if draw.random() < zeros else draw.random() for o in every}
    pairs = [(draw.choice(every), draw.choice(every), draw.random()) for _ in range(len(every) // 2)]
    return lambda pruned: (
        sum(weight[o] for o in every if o in pruned) + sum(w for a, b, w in pairs if a in pruned and b in pruned)
    )


def erratic(seed: int) -> Loss:
    """Any loss for any set, now and then the same."""

    def loss(pruned: Ops) -> float:
        draw = random.Random(f"{seed}{sorted(map(tuple, pruned))}")
        return round(draw.random() * len(pruned) / 6, draw.choice((1, 6)))

    return loss


def rules(layers: int, split: bool = True, **changes: Any) -> GreedyRules:
    base = Policy(layers, salient_fraction=0.25 if split else None)
    values: dict[str, Any] = {"base": base, "danger": frozenset(), "free_layer": 0, "tolerance": 0.0, "max_loss": 5.0}
    return GreedyRules(**values | changes)


def restated(given: GreedyRules, loss: Loss) -> Restated:
    groups = SPLIT_VISUAL_GROUPS if given.base.salient_fraction else ("visual",)
    danger = frozenset(tuple(o) for o in given.danger)
    numbers = (given.free_layer, given.tolerance, given.max_loss, given.steps)
    return Restated(given.base.num_layers, groups, danger, *numbers, loss)


def plain(found: GreedySort | OperationOrder) -> tuple[Ops, list[tuple[Op, float]]]:
    return found.free, [(tuple(step.operation), step.divergence) for step in found.steps]


@st.composite
def some_rules(draw: st.DrawFn, free: bool) -> GreedyRules:
    layers, split = draw(st.integers(1, 4)), draw(st.booleans())
    every = all_operations(layers, SPLIT_VISUAL_GROUPS if split else ("visual",))
    return rules(
        layers,
        split,
        danger=draw(st.frozensets(st.sampled_from(every), max_size=4)),
        free_layer=draw(st.integers(0, layers)) if free else layers,
        tolerance=draw(st.sampled_from((0.0, 0.2, 1.0))),
        max_loss=draw(st.floats(1.0, 20.0)),
        steps=draw(st.integers(1, 6)),
    )


@examples(60)
@given(rules=some_rules(free=True), seed=st.integers(0, 10**6))
def test_order_is_that_of_the_restated_rules_and_bisection_that_of_a_scan(rules: GreedyRules, seed: int) -> None:
    groups = SPLIT_VISUAL_GROUPS if rules.base.salient_fraction else ("visual",)
    loss = additive(seed, rules.base.num_layers, groups)
    assert plain(greedy_sort(rules, lambda policy: loss(policy.pruned))) == restated(rules, loss).order()


@examples(60)
@given(rules=some_rules(free=False), seed=st.integers(0, 10**6))
def test_order_is_that_of_the_restated_rules_for_any_loss(rules: GreedyRules, seed: int) -> None:
    loss = erratic(seed)
    assert plain(greedy_sort(rules, lambda policy: loss(policy.pruned))) == restated(rules, loss).order()


@examples(40)
@given(rules=some_rules(free=True), seed=st.integers(0, 10**6))
def test_every_prefix_holds_its_implications_and_keeps_what_is_dangerous(rules: GreedyRules, seed: int) -> None:
    loss, asked = erratic(seed), []

    def measure(policy: Policy) -> float:
        asked.append(policy)
        return loss(policy.pruned)

    found = greedy_sort(rules, measure)
    assert len({policy.pruned for policy in asked}) == len(asked) == found.evaluations  # none is measured twice
    order = an_order(rules, found)
    layers = rules.base.num_layers
    groups = SPLIT_VISUAL_GROUPS if rules.base.salient_fraction else ("visual",)
    pruned = [policy.pruned for policy in order.policies()]
    assert all(before < after for before, after in itertools.pairwise(pruned))
    for prefix in pruned:
        assert closed(prefix, layers, groups) == prefix
        assert not prefix & rules.danger
    assert all(after < before for before, after in itertools.pairwise(order.flops))
    assert all(step.divergence <= rules.max_loss for step in found.steps)
    assert OperationOrder.from_json(order.to_json()) == order


def an_order(rules: GreedyRules, found: GreedySort) -> OperationOrder:
    layers = rules.base.num_layers
    return OperationOrder(
        model_fingerprint="f",
        dims=DecoderDims(layers, 64, 4, 16, 2, (96,) * layers),
        metric="kl",
        metric_options=(),
        base=rules.base,
        counts=((4, 9, 3), (3, 1, 3)),
        digests=("a", "b"),
        danger=rules.danger,
        free=found.free,
        free_divergence=found.free_divergence,
        steps=found.steps,
        evaluations=found.evaluations,
    )


def test_bisection_asks_for_few_layers() -> None:
    asked = []

    def measure(policy: Policy) -> float:
        asked.append(policy)
        return float(any(op.layer < 21 for op in policy.pruned))

    found = greedy_sort(rules(32, free_layer=0, max_loss=1e-9), measure)
    assert {op.layer for op in found.free} == set(range(21, 32))
    assert len(found.free) == 11 * 6
    # One bisection finds all; the others meet sets that are known; then one ranking
    assert len(asked) <= 5 * 6 + 21 * 6


def test_old_ranking_is_used_until_an_operation_is_undone() -> None:
    """One layer, one group: losses 1, 2 and 3; two of them together cost ten more."""
    weight = {"mha_query": 1.0, "mlp": 2.0, "mha_key_value": 3.0}
    asked: list[list[str]] = []

    def measure(policy: Policy) -> float:
        names = sorted(op.module for op in policy.pruned)
        asked.append(names)
        return sum(weight[name] for name in names) + (10.0 if len(names) == 2 else 0.0)

    given = rules(1, split=False, free_layer=1, max_loss=12.0, steps=4)  # 3, 6, 9, 12
    found = greedy_sort(given, measure)
    # Keys and values imply the other two, at a loss of 6; query and MLP together lose 13
    assert asked == [["mha_key_value", "mha_query", "mlp"], ["mlp"], ["mha_query"], ["mha_query", "mlp"]] or asked == [
        ["mha_query"],
        ["mlp"],
        ["mha_key_value", "mha_query", "mlp"],
        ["mha_query", "mlp"],
    ]
    assert [(step.operation.module, step.divergence) for step in found.steps] == [
        ("mha_query", 1.0),
        ("mha_key_value", 6.0),
    ]


def test_equally_good_operations_are_taken_from_the_deepest_layer_on() -> None:
    danger = frozenset((SALIENT, layer, "mha_key_value") for layer in range(2))
    found = greedy_sort(rules(2, danger=danger, free_layer=2), lambda policy: 0.0)
    assert [tuple(step.operation) for step in found.steps] == [
        (REST, 1, "mha_key_value"),
        (SALIENT, 1, "mlp"),
        (SALIENT, 1, "mha_query"),
        (REST, 0, "mha_key_value"),
        (SALIENT, 0, "mlp"),
        (SALIENT, 0, "mha_query"),
    ]


def test_default_danger_is_the_published_one_scaled() -> None:
    salient_keys = {(SALIENT, layer, "mha_key_value") for layer in range(32)}
    early = {(SALIENT, layer, module) for layer in range(6) for module in MODULES}
    assert default_danger(Policy(32, salient_fraction=0.25)) == salient_keys | early
    assert {op.layer for op in default_danger(Policy(40, salient_fraction=0.25)) if op.module == "mlp"} == set(range(8))
    assert default_danger(Policy(32)) == frozenset()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_loss": 0}, "max_loss: expected a loss > 0"),
        ({"max_loss": float("inf")}, "max_loss: expected a finite"),
        ({"max_loss": True}, "max_loss: expected a number"),
        ({"tolerance": -0.1}, "tolerance: expected"),
        ({"tolerance": 6.0}, "tolerance: expected"),
        ({"steps": 0}, "steps: expected"),
        ({"steps": 1.5}, "steps: expected"),
        ({"free_layer": 5}, "free_layer: expected"),
        ({"danger": [("text", 0, "mlp")]}, "danger: only operations of visual"),
        ({"danger": [("visual_rest", 9, "mlp")]}, "danger: .*layer"),
        ({"danger": [("visual_rest", 0)]}, "danger: .*expected a"),
        ({"danger": "all"}, "danger: "),
        ({"base": Policy(4, visual_tokens=3)}, "base: "),
    ],
)
def test_wrong_rules_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        rules(4, **changes)


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"divergence with \d operations pruned is nan"):
        greedy_sort(rules(2), lambda policy: float("nan"))


# On a model.

LAYERS = 2


def two_layers() -> Any:
    config = FAMILIES["llava"].config()
    config.text_config.num_hidden_layers = LAYERS
    return config


FAMILY = dataclasses.replace(FAMILIES["llava"], config=two_layers, num_layers=LAYERS)
SETTINGS: dict[str, Any] = {"max_loss": 0.5, "steps": 3, "tolerance": 1e-6}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return FAMILY.build()


@pytest.fixture(scope="module")
def samples(model: Any) -> list[dict[str, Tensor]]:
    rows = ([("text", 4), ("image",), ("text", 3)], [("text", 2), ("image",), ("text", 5)])
    return [FAMILY.make_inputs(model, [row], seed=seed) for seed, row in enumerate(rows)]


Recorded = dict[tuple[tuple[int, int, int], Ops], float]


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    """The loss of each sample, by its token counts, and policy that the search of `order` has measured."""
    return {}


@pytest.fixture(scope="module")
def order(model: Any, samples: list[dict[str, Tensor]], recorded: Recorded) -> OperationOrder:
    measured = SampleMeter.divergence

    def divergence(self: SampleMeter, policy: Policy) -> float:
        key = self.counts, policy.pruned
        assert key not in recorded
        recorded[key] = measured(self, policy)
        return recorded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleMeter, "divergence", divergence)
        return greedy_order(model, samples, **SETTINGS)


def test_order_of_a_model_is_that_of_the_restated_rules(
    model: Any, samples: list[dict[str, Tensor]], order: OperationOrder, recorded: Recorded
) -> None:
    compiled = dop_compile(model, Policy(LAYERS, salient_fraction=0.25), backend="eager")
    meters = [SampleMeter(compiled, sample) for sample in samples]
    known: dict[Ops, float] = {}

    def loss(pruned: Ops) -> float:
        if pruned not in known:
            policy = Policy.from_operations(LAYERS, pruned, salient_fraction=0.25)
            known[pruned] = round(sum(meter.divergence(policy) for meter in meters) / len(meters), 6)
        return known[pruned]

    base = Policy(LAYERS, salient_fraction=0.25)
    given = GreedyRules(base, default_danger(base), free_layer=0, **SETTINGS)
    free, steps = restated(given, loss).order()
    assert order.free == free
    assert [step.operation for step in order.steps] == [operation for operation, _ in steps]
    assert [step.divergence for step in order.steps] == pytest.approx([value for _, value in steps], abs=3e-6)
    assert order.evaluations == len(recorded) / 2 <= len(known)
    assert order.danger == given.danger
    assert order.free  # the queries and MLP of the last layer reach nothing
    assert len(steps) > 3
    assert order.counts == ((4, 9, 3), (2, 9, 5))


def test_losses_are_those_of_the_masked_original(
    model: Any, samples: list[dict[str, Tensor]], order: OperationOrder
) -> None:
    """Top-10 KL of the oracle's last row; the salient tokens are evenly spaced (reducer "uniform")."""
    policy = order.policies()[-1]
    losses = []
    for sample in samples:
        p, q = (
            reference_logits(model, sample, at, salient=[[0, 8]])[0][-1].double().softmax(-1)
            for at in (policy.replace(pruned=frozenset()), policy)
        )
        top = p.topk(10).indices
        p, q = ((x[top] + 1e-8) / (x[top] + 1e-8).sum() for x in (p, q))
        losses.append(float((p * (p / q).log()).sum()))
    assert order.steps[-1].divergence == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_interrupted_and_resumed_is_uninterrupted(
    model: Any,
    samples: list[dict[str, Tensor]],
    order: OperationOrder,
    recorded: Recorded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = 0

    def divergence(self: SampleMeter, policy: Policy) -> float:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return recorded[self.counts, policy.pruned]

    monkeypatch.setattr(SampleMeter, "divergence", divergence)
    path, progress = tmp_path / "order.json", tmp_path / "order.json.progress-0"
    finished = 0
    for stop in (0, 1, 4, 5, 16):  # samples; an odd one is lost with its evaluation
        left = stop
        with pytest.raises(KeyboardInterrupt):
            greedy_order(model, samples, resume=path, **SETTINGS)
        finished += stop // len(samples)
        assert progress.exists() == bool(finished)
        if finished:
            assert len(progress.read_text().splitlines()) == 1 + finished  # the header, then every evaluation
            with progress.open("a") as file:
                file.write('{"number": 99, "diver')  # what a kill leaves of a line
    left = enough = 10**6
    found = greedy_order(model, samples, resume=path, **SETTINGS)
    assert enough - left == (order.evaluations - finished) * len(samples)
    assert found == order == OperationOrder.load(path)
    assert list(tmp_path.iterdir()) == [path]
    left = 0
    assert greedy_order(model, samples, resume=path, **SETTINGS) == order


def run_process(rank: int, world: int, folder: Path, search: Callable[[Path], OperationOrder]) -> None:
    """One of several processes; all but the first see another disk. Its result, or its error, goes to a file."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    own = folder if rank == 0 else folder / "elsewhere"
    try:
        search(own / "order.json").save(folder / f"result-{rank}")
    except ValueError as error:
        (folder / f"error-{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


def in_processes(world: int, folder: Path, search: Callable[[Path], OperationOrder]) -> None:
    context = multiprocessing.get_context("fork")  # nothing is imported again
    processes = [context.Process(target=run_process, args=(rank, world, folder, search)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0] * world


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked")
def test_several_processes_share_the_samples_and_agree(
    model: Any,
    samples: list[dict[str, Tensor]],
    order: OperationOrder,
    recorded: Recorded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of three processes one has no sample; the first goes on with what one process has left."""
    left = 7

    def divergence(self: SampleMeter, policy: Policy) -> float:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return recorded[self.counts, policy.pruned]

    def search(path: Path) -> OperationOrder:
        nonlocal left
        left = order.evaluations - 3  # of one sample each
        return greedy_order(model, samples, resume=path, **SETTINGS)

    monkeypatch.setattr(SampleMeter, "divergence", divergence)
    with pytest.raises(KeyboardInterrupt):
        greedy_order(model, samples, resume=tmp_path / "order.json", **SETTINGS)
    in_processes(3, tmp_path, search)
    assert [OperationOrder.load(tmp_path / f"result-{rank}") for rank in range(3)] == [order] * 3
    assert OperationOrder.load(tmp_path / "order.json") == order
    assert not (tmp_path / "elsewhere").exists()
    assert not list(tmp_path.glob("*progress*"))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked")
def test_all_processes_refuse_what_the_first_one_finds(
    model: Any, samples: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    (tmp_path / "order.json.progress-0").write_text('{"samples": []}\n')
    in_processes(2, tmp_path, lambda path: greedy_order(model, samples, resume=path, **SETTINGS))
    errors = [(tmp_path / f"error-{rank}").read_text() for rank in range(2)]
    assert "belongs to another measurement" in errors[0]
    assert errors[0] == errors[1]


def refuses_other_searches(model: Any, samples: list[dict[str, Tensor]], path: Path) -> None:
    for other, name in (
        ({"samples": samples[:1]}, "samples"),
        ({"samples": samples[::-1]}, "samples"),
        ({"max_loss": 0.6}, "settings"),
        ({"metric": "kl"}, "metric"),
        ({"metric": "forced_kl", "tokens": 2}, "metric"),
        ({"salient_fraction": 0.5}, "base"),
        ({"danger": []}, "danger"),
        ({"model": FAMILY.build(seed=1)}, "fingerprint"),
    ):
        arguments = {"model": model, "samples": samples, "resume": path, **SETTINGS, **other}
        with pytest.raises(ValueError, match=rf"another measurement \({name} differ\)"):
            greedy_order(**arguments)


def test_result_of_another_search_is_refused(
    model: Any, samples: list[dict[str, Tensor]], order: OperationOrder, tmp_path: Path
) -> None:
    path = tmp_path / "order.json"
    order.save(path)
    refuses_other_searches(model, samples, path)
    assert OperationOrder.load(path) == order
    path.write_text("{}")
    with pytest.raises(ValueError, match="not the file of an operation order"):
        greedy_order(model, samples, resume=path, **SETTINGS)


def test_progress_of_another_search_is_refused(
    model: Any, samples: list[dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "order.json"
    calls = 0

    def divergence(self: SampleMeter, policy: Policy) -> float:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt
        return 0.1 * len(policy.pruned)

    monkeypatch.setattr(SampleMeter, "divergence", divergence)
    with pytest.raises(KeyboardInterrupt):
        greedy_order(model, samples, resume=path, **SETTINGS)
    refuses_other_searches(model, samples, path)
    progress = tmp_path / "order.json.progress-0"
    lines = [json.loads(line) for line in progress.read_text().splitlines()]
    lines[2]["pruned"] = "0" * 16
    progress.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="number 1 differs"):
        greedy_order(model, samples, resume=path, **SETTINGS)


def test_without_a_split_it_goes_on_from_stored_streams(
    model: Any, samples: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And keeps few programs."""
    entered, held = set(), set()

    def divergence(self: SampleMeter, policy: Policy) -> float:
        found = measured(self, policy)
        entered.add(self.replay.first_layer(policy))
        held.add(len(self._compiled.dop.programs))
        return found

    measured = SampleMeter.divergence
    with monkeypatch.context() as patch:
        patch.setattr(SampleMeter, "divergence", divergence)
        patch.setattr(greedy, "PROGRAMS", 4)
        danger = [("visual", 0, "mha")]
        found = greedy_order(model, samples[:1], salient_fraction=None, danger=danger, **SETTINGS)
    assert entered == {0, 1}
    assert max(held) == 5
    assert found.danger == {("visual", 0, "mha_query"), ("visual", 0, "mha_key_value")}
    assert {op.group for policy in found.policies() for op in policy.pruned} == {"visual"}
    assert dict(found.settings) == {"free_layer": 0, **SETTINGS}
    joint = measure_policies(model, samples[:1], [policy.replace(provenance=None) for policy in found.policies()])
    assert [step.divergence for step in found.steps] == pytest.approx(joint[-len(found.steps) :, 0], abs=3e-6)


def test_driven_by_accuracy(model: Any, samples: list[dict[str, Tensor]]) -> None:
    """Both samples are answered right by the original: every loss is a share of them."""

    def decode(ids: Tensor) -> str:
        return " ".join(map(str, ids.tolist()))

    with torch.no_grad():
        answered = [{**sample, "answers": [decode(model(**sample).logits[0, -1:].argmax(-1))]} for sample in samples]
    generation, model.generation_config.max_new_tokens = model.generation_config.max_new_tokens, 1
    danger = [("visual", 0, "mha"), ("visual", 0, "mlp")]
    try:
        found = greedy_order(model, answered, metric="accuracy_drop", decode=decode, danger=danger, steps=1)
    finally:
        model.generation_config.max_new_tokens = generation
    assert {step.divergence for step in found.steps} <= {0.0, -0.5, 0.5}
    assert dict(found.settings)["max_loss"] == 0.3
    assert found.free_divergence == 0.0
    with pytest.raises(ValueError, match="accuracy_drop: expected samples with answers"):
        greedy_order(model, samples, metric="accuracy_drop")


def test_bad_input(model: Any, samples: list[dict[str, Tensor]]) -> None:
    with pytest.raises(ValueError, match="samples: expected at least one, got none"):
        greedy_order(model, [])
    with pytest.raises(ValueError, match=r"metric: .*did you mean 'top_k_kl'"):
        greedy_order(model, samples, metric="topk_kl")
    with pytest.raises(ValueError, match="salient_fraction: expected 0 < fraction < 1"):
        greedy_order(model, samples, salient_fraction=1)
    with pytest.raises(ValueError, match="no sample has tokens of the group visual_salient"):
        greedy_order(model, samples, salient_fraction=0.01)
    text = FAMILY.make_inputs(model, [[("text", 6)]])
    with pytest.raises(ValueError, match="sample 1: it has no visual tokens"):
        greedy_order(model, [samples[0], text])
