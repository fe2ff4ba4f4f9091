"""Answers, accuracies and costs against plain loops over the untouched model's own generate; interruption; refusals."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dop_compile import Policy, dop_compile, explain, prefill_flops
from dop_compile.evaluation import Evaluation, Method, Planner, count_tokens, evaluate, measuring
from dop_compile.evaluation.comparison import Comparison
from dop_compile.evaluation.report import markdown
from dop_compile.reducers import Selection, VisualContext, register
from dop_compile.reducers import registry as reducers
from tests.evaluation import worker
from tests.families import IMAGE
from tests.search.worker import prompts
from tests.support import make_batch, shared_model

TIMES = ("vision_ms", "selection_ms", "prefill_ms", "decode_ms", "memory_bytes")


@pytest.fixture(scope="module")
def found() -> Evaluation:
    return worker.compare(worker.questions(), None)


def same(text: str, other: str) -> bool:
    return text.strip(" .").lower() == other.strip(" .").lower()


def test_answers_are_those_of_generate(found: Evaluation) -> None:
    assert found.labels == ("original", "small 40%", "full")
    for number, (sample, (original, small)) in enumerate(zip(worker.questions(), worker.said(), strict=True)):
        runs = [method.runs[number] for method in found.methods]
        assert [run.answer for run in runs] == [original, small, original]
        assert [run.changed for run in runs] == [False, small != original, False]
        assert [run.right for run in runs] == [any(same(run.answer, r) for r in sample["answers"]) for run in runs]
        assert [run.tokens for run in runs] == [len(run.answer.split()) for run in runs]
    small_right = found.right("small 40%").tolist()
    assert True in small_right
    assert False in small_right
    assert found.row("small 40%").changed > 0


def test_accuracies_by_task_and_the_relative_average(found: Evaluation) -> None:
    by_task: dict[str, dict[str, list[bool]]] = {label: {"read": [], "count": []} for label in found.labels}
    for number, (sample, answers) in enumerate(zip(worker.questions(), worker.said(), strict=True)):
        for label, answer in zip(found.labels, (*answers, answers[0]), strict=True):
            by_task[label][worker.TASKS[number]].append(any(same(answer, right) for right in sample["answers"]))
    shares = {label: {task: sum(own) / len(own) for task, own in tasks.items()} for label, tasks in by_task.items()}
    for label in found.labels:
        assert found.accuracy(label) == pytest.approx(shares[label])
        row = found.row(label)
        mean = sum(shares[label].values()) / 2
        assert row.mean_accuracy == pytest.approx(mean)
        assert row.difference.value == pytest.approx(mean - sum(shares["original"].values()) / 2)
        ratios = [shares[label][task] / shares["original"][task] for task in ("read", "count")]
        assert row.relative_average == pytest.approx(sum(ratios) / 2)
    read = [task == "read" for task in worker.TASKS]
    apart = found.right("small 40%")[read].mean() - found.right("full")[read].mean()
    assert found.difference("small 40%", "full", task="read").value == pytest.approx(apart)


def test_costs_are_those_of_explain(found: Evaluation) -> None:
    compiled = dop_compile(shared_model("llava"), worker.SMALL, backend="eager")
    for number, sample in enumerate(worker.questions()):
        ids = sample["input_ids"][0]
        system = int((ids == IMAGE).int().argmax())
        visual = int((ids == IMAGE).sum())
        assert found.counts[number] == (system, visual, len(ids) - system - visual)
        cost = explain(compiled, system=system, visual=visual, text=len(ids) - system - visual).summary
        original, small, full = (method.runs[number] for method in found.methods)
        assert (small.flops, small.executed_flops, small.kv_bytes) == (
            cost.eq11_flops,
            cost.executed_flops,
            cost.kv_bytes,
        )
        assert (original.flops, original.kv_bytes) == (cost.original_flops, cost.original_kv_bytes)
        assert original.executed_flops == original.flops == full.flops > full.executed_flops
    row = found.row("small 40%")
    spent, whole = (sum(run.flops for run in method.runs) for method in (found.methods[1], found.methods[0]))
    assert row.flops == pytest.approx(spent / whole)
    assert row.flops > row.executed_flops
    assert found.row("original").flops == found.row("full").kv_bytes == 1


def test_a_reducer_that_keeps_fewer_than_it_may_is_charged_for_what_it_keeps() -> None:
    """Of each sample as many tokens enter as the reducer says, by a plain count."""
    kept = []

    class Fewer:
        name, requires, at_most, whole_sample = "fewer-for-the-test", frozenset[str](), True, True

        def __call__(self, context: VisualContext, count: int) -> Selection:
            kept.append(min(count, 1 + len(context.text) % 3))
            return Selection(torch.arange(kept[-1]))

    register("fewer-for-the-test", Fewer)
    try:
        policy = Policy.depthwise(4, mlp_depth=2, visual_tokens=3, reducer="fewer-for-the-test")
        model, samples = shared_model("llava"), worker.questions()
        found = evaluate(model, samples, [Method("fewer", None, policy)], worker.decode, max_new_tokens=worker.TOKENS)
    finally:
        del reducers._factories["fewer-for-the-test"]
    own = kept[1:]  # the first sample is asked twice: once to warm up
    assert len(own) == len(samples)
    assert len(set(own)) > 1
    for count, run, (system, visual, text) in zip(own, found.methods[1].runs, found.counts, strict=True):
        plain = dop_compile(model, policy.replace(reducer="uniform", visual_tokens=count), backend="eager")
        cost = explain(plain, system=system, visual=count + 2, text=text).summary
        assert (run.executed_flops, run.kv_bytes) == (cost.executed_flops, cost.kv_bytes)
        assert cost.eq11_flops is not None
        written = prefill_flops(model.config, policy, system=system, visual=visual, text=text)
        assert run.flops == written >= cost.eq11_flops, "policy FLOPs are those that every command prints"


def test_times_and_memory_are_there(found: Evaluation) -> None:
    for method in found.methods:
        for run in method.runs:
            assert min(run.vision_ms, run.prefill_ms, run.decode_ms or 0) > 0
            assert run.selection_ms >= 0
            assert run.memory_bytes is None or run.memory_bytes > 2**20
    assert found.environment["packages"]["torch"] == torch.__version__
    assert found.environment["memory"]
    assert found.header["fingerprint"]


def test_the_untouched_model_has_no_hooks_afterwards(found: Evaluation) -> None:
    model: Any = shared_model("llava")
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [hook for hook in hooks if hook.__module__.startswith("dop_compile")]  # there are transformers' own


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "llama", "llava"])
def test_tokens_are_counted_before_reduction(family: str) -> None:
    """LLaVA's prompt ends with its image."""
    images = [("text", 3), ("image",), ("text", 4), ("image", 1)]
    rows: Any = [[("text", 14)]] if family == "llama" else [images if family == "llava" else [*images, ("text", 3)]]
    batch = make_batch(family, rows)
    sample = dict(batch.inputs)
    if batch.groups is not None:
        groups = torch.tensor([[2, 2, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0]])
        sample["token_groups"] = groups
        expected = (2, 5, 7)
    else:
        image = sample["input_ids"][0] == IMAGE
        system, visual = int(image.int().argmax()), int(batch.visual.sum())
        expected = (system, visual, len(image) - system - visual)
    assert count_tokens(batch.model, [sample]) == (expected,)


def test_a_text_only_model_is_compared_by_its_groups() -> None:
    batch = make_batch("llama", [[("text", 14)]])
    sample = {
        **batch.inputs,
        "token_groups": torch.tensor([[2, 2, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0]]),
        "answers": ["x"],
    }
    planner = Planner.of(batch.model, count_tokens(batch.model, [sample]))
    method = planner.named("uniform", 0.8)
    found = evaluate(batch.model, [sample], [method], worker.decode, max_new_tokens=worker.TOKENS)
    compiled = dop_compile(batch.model, method.policy, backend="eager")
    inputs = {name: value for name, value in sample.items() if name != "answers"}
    assert found.methods[1].runs[0].answer == worker.plain_answer(compiled, inputs)
    assert 0.5 < found.row(method.label).flops <= 0.8
    assert found.tasks == ("all",)
    assert found.row("original").relative_average is None  # nothing is right


class Slow:
    """A reducer that takes its time."""

    name = "slow"
    requires: frozenset[str] = frozenset()

    def __call__(self, context: VisualContext, count: int) -> Selection:
        time.sleep(0.2)
        return Selection(torch.arange(count))


def test_selection_is_told_apart_from_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reducers, "_factories", dict(reducers._factories))
    register("slow", Slow)
    policy = Policy.full(4).replace(visual_tokens=2, reducer="slow")
    found = worker.compare(worker.questions()[:1], None, methods=[Method("slow", None, policy)])
    original, slow = (method.runs[0] for method in found.methods)
    assert original.selection_ms == 0
    assert slow.selection_ms >= 200


def test_methods_with_pictures_of_their_own() -> None:
    samples = worker.questions()[:2]
    own = [{name: value for name, value in sample.items() if name != "answers"} for sample in worker.questions()[2:4]]
    resized = Method("resize", 0.5, None, own, ((1, 2, 3), (1, 2, 4)))
    found = worker.compare(samples, None, methods=[resized])
    assert [run.answer for run in found.methods[1].runs] == [original for original, _ in worker.said()[2:4]]
    assert 0 < found.row("resize 50%").flops < 1


# --- interruption -----------------------------------------------------------------------------------------------------


class Interrupted(list[Any]):
    """Samples of which the third is not reached."""

    def __getitem__(self, number: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return super().__getitem__(number)


def without_times(result: Evaluation) -> Any:
    document = json.loads(result.to_json())
    for method in (*document["methods"], {"runs": document["summary"]}):
        for run in method["runs"]:
            for name in TIMES:
                del run[name]
    return {name: value for name, value in document.items() if name != "environment"}


def test_interrupted_it_goes_on_where_it_was(found: Evaluation, tmp_path: Path) -> None:
    samples, path = worker.questions(), tmp_path / "results" / "e.json"
    with pytest.raises(KeyboardInterrupt):
        worker.compare(Interrupted(samples), path, counts=found.counts)
    kept = {}
    for progress in path.parent.iterdir():
        header, *rows = map(json.loads, progress.read_text().splitlines())
        assert len(rows) == 2, "a header and two samples"
        ((label, _),) = header["methods"]
        kept[label] = [row["run"] for row in rows]
    result = worker.compare(samples, path)
    assert without_times(result) == without_times(found)
    assert kept == {method.label: [vars(run) for run in method.runs[:2]] for method in result.methods}, (
        "finished samples are not measured again"
    )
    assert [file.name for file in path.parent.iterdir()] == ["e.json"]


def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, ...]]]:
    """The number of every sample that is asked about from now on, and the methods that are asked."""
    found: list[tuple[int, tuple[str, ...]]] = []
    runs = Comparison.runs

    def noting(self: Any, sample: Any, number: int, counts: Any, labels: Any, original: Any) -> Any:
        found.append((number, tuple(labels)))
        return runs(self, sample, number, counts, labels, original)

    monkeypatch.setattr(Comparison, "runs", noting)
    return found


def test_further_methods_are_run_alone(found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whichever order methods come, the same answers; what is there is neither run again nor lost."""
    samples, path = worker.questions(), tmp_path / "e.json"
    small, full = worker.METHODS
    first = worker.compare(samples, path, methods=[full])
    calls = asked(monkeypatch)
    both = worker.compare(samples, path, methods=[full, small])
    assert calls == [(number, (small.label,)) for number in range(len(samples))]
    assert both.labels == ("original", full.label, small.label)
    assert both.methods[:2] == first.methods
    assert [method.session for method in both.methods] == [0, 0, 1]
    assert f"another moment: {small.label}." in markdown(both)
    assert "another moment" not in markdown(first)
    for label in found.labels:
        answers = [[(run.answer, run.changed) for run in one.method(label).runs] for one in (both, found)]
        assert answers[0] == answers[1]
    assert Evaluation.load(path) == both
    calls.clear()
    assert worker.compare(samples, path, methods=[small]) == both
    assert not calls
    assert [file.name for file in tmp_path.iterdir()] == ["e.json"]


def test_an_interrupted_evaluation_takes_further_methods(
    found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, path = worker.questions(), tmp_path / "e.json"
    small, full = worker.METHODS
    with pytest.raises(KeyboardInterrupt):
        worker.compare(Interrupted(samples), path, counts=found.counts, methods=[small])
    calls = asked(monkeypatch)
    result = worker.compare(samples, path)
    everything = ("original", small.label, full.label)
    assert calls == [(number, (full.label,) if number < 2 else everything) for number in range(len(samples))]
    assert without_times(result) == without_times(found)


def test_another_policy_of_the_same_label_is_refused(found: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    found.save(path)
    small = worker.METHODS[0]
    assert small.policy is not None
    other = dataclasses.replace(small, policy=small.policy.replace(visual_tokens=1))
    with pytest.raises(ValueError, match=r"has another method 'small 40%', of another policy; name this one otherwise"):
        worker.compare(worker.questions(), path, methods=[other])
    assert Evaluation.load(path) == found


def test_results_of_the_second_version_are_gone_on_with(
    found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = json.loads(found.to_json()) | {"version": 2}
    for method in document["methods"]:
        del method["session"], method["digests"]
    path = tmp_path / "e.json"
    path.write_text(json.dumps(document))
    calls = asked(monkeypatch)
    assert worker.compare(worker.questions(), path) == found
    assert not calls


def test_a_finished_result_is_returned_and_nothing_is_asked_again(
    found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found.save(tmp_path / "e.json")
    monkeypatch.setattr(measuring, "Comparison", None)  # would fail if it were called
    assert worker.compare(worker.questions(), tmp_path / "e.json") == found


def test_another_evaluation_is_refused_by_name(tmp_path: Path) -> None:
    samples, path = worker.questions()[:2], tmp_path / "e.json"
    with pytest.raises(KeyboardInterrupt):
        worker.compare(Interrupted([*samples, None]), path, counts=((1, 99, 3),) * 3)
    for finished in (False, True):
        given = samples if finished else [*samples, None]
        if finished:
            for file in tmp_path.iterdir():
                file.unlink()
            worker.compare(samples, path)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        for changes, named in (
            ({"max_new_tokens": 2}, "settings differ"),
            ({"backend": "aot_eager"}, "backend differ"),
            ({"tasks": ["a"] * len(given)}, "tasks differ"),
        ):
            with pytest.raises(ValueError, match=named):
                worker.compare(given, path, **changes)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="samples differ"):
        worker.compare(worker.questions()[:1], path)


def test_another_sample_is_refused(tmp_path: Path) -> None:
    samples, path = worker.questions(), tmp_path / "e.json"
    with pytest.raises(KeyboardInterrupt):
        worker.compare(Interrupted(samples), path, counts=((1, 99, 3),) * 5)
    with pytest.raises(ValueError, match="sample 0 is not the one"):
        worker.compare(samples[::-1], path)


def test_other_samples_of_the_same_number_are_refused(found: Evaluation, tmp_path: Path) -> None:
    samples, path = worker.questions(), tmp_path / "e.json"
    found.save(path)
    before = path.read_bytes()
    pixels = samples[3]["pixel_values"]
    for number, other in (
        (0, samples[::-1]),
        (2, [*samples[:2], *samples[:3]]),
        (3, [*samples[:3], {**samples[3], "pixel_values": pixels + 1}, samples[4]]),
        (4, [*samples[:4], {**samples[4], "answers": ["another"]}]),
    ):
        with pytest.raises(ValueError, match=f"sample {number} is not the one that was measured before"):
            worker.compare(other, path)
    assert path.read_bytes() == before


def test_other_pictures_of_a_method_are_refused(tmp_path: Path) -> None:
    samples, path = worker.questions()[:2], tmp_path / "e.json"
    own = [{name: value for name, value in sample.items() if name != "answers"} for sample in worker.questions()[2:]]
    first, other = (Method("resize", 0.5, None, few, ((1, 2, 3), (1, 2, 4))) for few in (own[:2], own[1:]))
    finished = worker.compare(samples, path, methods=[first])
    assert worker.compare(samples, path, methods=[first]) == finished
    with pytest.raises(ValueError, match="sample 0 is not the one that was measured before"):
        worker.compare(samples, path, methods=[other])


def test_a_result_that_does_not_say_of_which_samples_it_is_is_not_gone_on_with(
    found: Evaluation, tmp_path: Path
) -> None:
    """Files of the first version can be read, and no more."""
    document = json.loads(found.to_json()) | {"version": 1}
    del document["digests"]
    path = tmp_path / "e.json"
    path.write_text(json.dumps(document))
    assert Evaluation.load(path).methods == found.methods
    with pytest.raises(ValueError, match=r"e\.json does not say which samples it is of.* choose another file"):
        worker.compare(worker.questions(), path)


def test_counted_tokens_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, path = prompts(3), tmp_path / "tokens"
    counts = count_tokens(shared_model("llava"), samples, resume=path)
    monkeypatch.setattr(measuring, "prompt_counts", None)  # would fail if it were called
    assert count_tokens(shared_model("llava"), samples, resume=path) == counts


@pytest.mark.conformance
def test_two_processes_give_what_one_gives(found: Evaluation, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=worker.compare_as_rank, args=(n, 2, tmp_path)) for n in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
        assert rank.exitcode == 0
    results = [Evaluation.load(tmp_path / name) for name in ("rank-0.json", "rank-1.json", "e.json")]
    assert results[0].methods == results[1].methods == results[2].methods
    assert without_times(results[0]) == without_times(found)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    samples = worker.questions()[:2]
    no_answers = [samples[0], {**samples[1], "answers": []}]
    with pytest.raises(ValueError, match="sample 1: it has no answers"):
        worker.compare(no_answers, None)
    with pytest.raises(ValueError, match="sample 0: answers: expected a list"):
        worker.compare([{**samples[0], "answers": "x"}], None)
    with pytest.raises(ValueError, match="sample 1 has no task, and others have one"):
        worker.compare([samples[0], {**samples[1], "task": ""}], None)
    with pytest.raises(ValueError, match="sample 0 has no task, and others have one"):
        worker.compare(samples, None, tasks=["", "a"])
    with pytest.raises(ValueError, match="tasks: expected one entry for each of 2"):
        worker.compare(samples, None, tasks=["a"])
    with pytest.raises(ValueError, match="counts: expected one entry for each of 2"):
        worker.compare(samples, None, counts=((1, 2, 3),))
    with pytest.raises(ValueError, match="at least one"):
        worker.compare([], None)
    with pytest.raises(ValueError, match="small 40% given twice"):
        worker.compare(samples, None, methods=[*worker.METHODS, worker.METHODS[0]])
    with pytest.raises(ValueError, match="original given twice"):
        worker.compare(samples, None, methods=[Method("original", None, worker.SMALL)])
    with pytest.raises(TypeError, match="settings: expected JSON values"):
        worker.compare(samples, None, stopping_criteria=object())
    two_rows = {name: torch.cat([value] * 2) for name, value in prompts(1)[0].items()}
    with pytest.raises(ValueError, match="sample 0: expected what the model's forward takes for one prompt"):
        worker.compare([{**two_rows, "answers": ["x"]}], None)
