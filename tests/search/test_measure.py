"""Measured divergences against independent whole runs; interrupted, distributed and refused measurements."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from torch import Tensor

from dop_compile import Policy, dop_compile
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.policy.costs import prefill_flops
from dop_compile.replay import Replay
from dop_compile.reports.executed import SampleTokens, resumed_flops
from dop_compile.search import Divergences, measure, measure_divergences, measure_policies
from dop_compile.search.axes import DEPTH_AXES, DOP_AXES, default_points
from dop_compile.search.meter import sample_digest
from tests.families import FAMILIES, Segment
from tests.search import worker
from tests.support import Batch, make_batch, reference, shared_model, uniform_kept

PAPER = ("llava", "llava_next", "qwen2_5_vl", "internvl")
ROWS: list[list[Segment]] = [
    [("text", 3), ("image",), ("text", 4)],
    [("text", 2), ("image", 1), ("text", 2), ("image", 2), ("text", 3)],
]
COUNT = 7


@functools.cache
def compiled_once(model: Any, policy: Any, backend: str) -> Any:
    return dop_compile(model, policy, backend=backend)


@pytest.fixture(autouse=True)
def _compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of one model share its programs, for speed; a compiled model keeps no state of its runs."""

    def cached(model: Any, policy: Any, *, backend: str) -> Any:
        if isinstance(policy, Policy):
            return compiled_once(model, policy, backend)
        return dop_compile(model, policy, backend=backend)

    monkeypatch.setattr(measure, "dop_compile", cached)


def batches_of(name: str) -> list[Batch]:
    return [make_batch(name, [row], seed=seed) for seed, row in enumerate(ROWS)]


def inputs_of(batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    return [batch.inputs for batch in batches]


# --- the oracle


def c2_divergence(original: Tensor, pruned: Tensor) -> float:
    """DOP eq. 9-10 of one row each."""
    p, q = softmax(original.double().numpy()), softmax(pruned.double().numpy())
    top = np.argsort(-p)[:10]
    return float(entropy(p[top] + 1e-8, q[top] + 1e-8))


def whole_kl(original: Tensor, pruned: Tensor) -> float:
    p, q = log_softmax(original.double().numpy()), log_softmax(pruned.double().numpy())
    return float((np.exp(p) * (p - q)).sum())


@torch.no_grad()
def original_logits(batch: Batch) -> Tensor:
    return batch.model(**batch.inputs).logits[0, -1]


def half_up(number: float) -> int:
    return int(np.floor(number + 0.5))


def policy_of(axis: str, point: float, batch: Batch) -> tuple[Policy, list[list[int]] | None]:
    """What a point stands for, with the visual tokens that a uniform stride keeps there."""
    layers = batch.family.num_layers
    if axis != "visual_tokens":
        return Policy.depthwise(layers, **{axis: int(point)}), None
    count = half_up(point * batch.counts[0])
    return Policy.full(layers).replace(visual_tokens=count), uniform_kept(batch, count)


def independent(axis: str, point: float, batch: Batch, divergence: Callable[[Tensor, Tensor], float]) -> float:
    policy, kept = policy_of(axis, point, batch)
    return divergence(original_logits(batch), reference(batch, policy, kept)[0, -1])


def close(expected: float) -> Any:
    return pytest.approx(expected, rel=1e-5, abs=1e-5)


# --- values


@pytest.mark.parametrize("name", [*PAPER, "gemma3"])
def test_values_are_those_of_independent_whole_runs(name: str) -> None:
    batches = batches_of(name)
    layers = batches[0].family.num_layers
    points: dict[str, tuple[float, ...]] = {
        "mha_depth": (layers - 1, 1),
        "mlp_depth": (1,),
        "visual_tokens": (0.5, 0.0),
    }
    found = measure_divergences(batches[0].model, inputs_of(batches), axes=DOP_AXES, points=points)
    for axis, own in points.items():
        expected = [[independent(axis, point, batch, c2_divergence) for batch in batches] for point in own]
        np.testing.assert_allclose(found.array(axis), expected, rtol=1e-5, atol=1e-5)
        assert found.array(axis).max() > 1e-3, "nothing was pruned"
    assert [counts[1] for counts in found.counts] == [batch.counts[0] for batch in batches]
    assert [sum(counts) for counts in found.counts] == [batch.inputs["input_ids"].shape[1] for batch in batches]
    assert found.points == points


def test_every_axis_and_the_compiled_model_itself() -> None:
    (batch, _), layers = batches_of("llava"), 4
    points = {axis: (2,) for axis in DEPTH_AXES}
    found = measure_divergences(batch.model, [batch.inputs], axes=DEPTH_AXES, points=points)
    tiers = {axis: Policy.depthwise(layers, **{axis: 2}) for axis in DEPTH_AXES}
    compiled = dop_compile(batch.model, tiers, backend="eager")
    for axis in DEPTH_AXES:
        with torch.no_grad():
            pruned = compiled(**batch.inputs, tier=axis).logits[0, -1]
        assert found.values[axis][0][0] == close(c2_divergence(original_logits(batch), pruned))
    np.testing.assert_allclose(
        found.array("mha_key_value_depth"), found.array("mha_depth"), rtol=1e-6
    )  # by construction


def test_the_whole_vocabulary_can_be_compared() -> None:
    batch, _ = batches_of("llava")
    found = measure_divergences(
        batch.model, [batch.inputs], axes=["mlp_depth"], points={"mlp_depth": (0,)}, metric="kl"
    )
    assert found.metric == "kl"
    assert found.values["mlp_depth"][0][0] == close(independent("mlp_depth", 0, batch, whole_kl))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_forced_kl_is_that_of_decoding_the_originals_tokens(name: str) -> None:
    batch = batches_of(name)[1]
    layers, columns = batch.family.num_layers, batch.inputs["input_ids"].shape[1]
    points = {"mha_depth": (1,), "visual_tokens": (0.5,)}
    found = measure_divergences(
        batch.model, [batch.inputs], axes=tuple(points), points=points, metric="forced_kl", tokens=3
    )
    assert found.metric_options == (("tokens", 3),)
    assert sum(found.counts[0]) == columns, "forced tokens are not the prompt's"
    greedy = batch.model.generate(**batch.inputs, max_new_tokens=3, do_sample=False)[:, columns:]
    tiers = {"full": Policy.full(layers)} | {axis: policy_of(axis, own[0], batch)[0] for axis, own in points.items()}
    compiled = dop_compile(batch.model, tiers, backend="eager")

    @torch.no_grad()
    def decoded(tier: str) -> list[Tensor]:
        """Logits of the first tokens, by a cache and one token at a time."""
        step = compiled(**batch.inputs, tier=tier, use_cache=True)
        rows, cache = [step.logits[0, -1]], step.past_key_values
        for place in range(2):
            mask = torch.ones(1, columns + place + 1, dtype=torch.long)
            step = compiled(
                input_ids=greedy[:, place : place + 1],
                attention_mask=mask,
                past_key_values=cache,
                position_ids=positions(batch, place),
                tier=tier,
            )
            rows.append(step.logits[0, -1])
        return rows

    original = decoded("full")
    assert [int(row.argmax()) for row in original] == greedy[0].tolist()
    for axis in points:
        pairs = zip(original, decoded(axis), strict=True)
        expected = float(np.mean([c2_divergence(*pair) for pair in pairs]))
        assert found.values[axis][0][0] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def positions(batch: Batch, place: int) -> Tensor | None:
    """Multi-axis positions of a generated token: the model leaves counting them to `generate`."""
    if not batch.family.has_mrope:
        return None
    model: Any = batch.model
    own = {name: batch.inputs[name] for name in ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")}
    known, _ = model.model.get_rope_index(**own)
    return known.max() + 1 + place + torch.zeros(3, 1, 1, dtype=torch.long)


def test_one_forced_token_is_the_first() -> None:
    batch, _ = batches_of("llava")
    arguments: dict[str, Any] = {"axes": ["mha_depth"], "points": {"mha_depth": (1,)}}
    forced = measure_divergences(batch.model, [batch.inputs], metric="forced_kl", tokens=1, **arguments)
    assert forced.values == measure_divergences(batch.model, [batch.inputs], **arguments).values


def decode(ids: Tensor) -> str:
    return " ".join(map(str, ids.tolist()))


def test_accuracy_drop_is_right_before_and_wrong_after() -> None:
    batches = batches_of("llava")
    model = FAMILIES["llava"].build()
    model.generation_config.max_new_tokens = 3
    right = [
        decode(model.generate(**batch.inputs, do_sample=False)[0, batch.inputs["input_ids"].shape[1] :])
        for batch in batches
    ]
    samples = [
        {**batches[0].inputs, "answers": ["something else", f" {right[0]}."]},
        {**batches[1].inputs, "answers": ["something else"]},
    ]
    points = {"mha_depth": (0,), "mlp_depth": (3,)}
    found = measure_divergences(
        model, samples, axes=tuple(points), points=points, metric="accuracy_drop", decode=decode
    )
    seen = set()
    for axis, own in points.items():
        for index, depth in enumerate(own):
            compiled = dop_compile(model, Policy.depthwise(4, **{axis: depth}), backend="eager")
            output = compiled.generate(**batches[0].inputs, do_sample=False)
            answer = decode(output[0, batches[0].inputs["input_ids"].shape[1] :])
            assert found.values[axis][index] == (float(answer != right[0]), 0.0)
            seen.add(answer == right[0])
    assert seen == {True, False}
    # Every answer begins with a prefill of its own
    whole = [prefill_flops(model.config, Policy.full(4), *counts) for counts in found.counts]
    pruned = [
        sum(prefill_flops(model.config, Policy.depthwise(4, **{axis: own[0]}), *counts) for axis, own in points.items())
        for counts in found.counts
    ]
    assert found.prefills == pytest.approx(1 + np.mean(np.array(pruned) / np.array(whole)))


def test_text_only_models_are_measured_with_groups() -> None:
    batch = make_batch("llama")
    assert batch.groups is not None
    row = {name: value[1:2, -14:] for name, value in batch.inputs.items()}
    own = Batch(batch.family, batch.model, row, batch.groups[1:2, -14:])
    sample = {**row, "token_groups": own.groups}
    points = {"mha_depth": (2, 0), "visual_tokens": (0.5,)}
    arguments: dict[str, Any] = {"axes": tuple(points), "points": points}
    found = measure_divergences(batch.model, [sample], **arguments)
    for axis, chosen in points.items():
        expected = [[independent(axis, point, own, c2_divergence)] for point in chosen]
        np.testing.assert_allclose(found.array(axis), expected, rtol=1e-5, atol=1e-5)
    forced = measure_divergences(batch.model, [sample], metric="forced_kl", tokens=2, **arguments)
    assert forced.counts == found.counts
    assert forced.values != found.values


def test_reducer_and_positions_are_measured_and_recorded() -> None:
    batch = batches_of("llava")[1]
    arguments: dict[str, Any] = {"axes": ["visual_tokens"], "points": {"visual_tokens": (7,)}}
    found = measure_divergences(
        batch.model,
        [batch.inputs],
        reducer="random",
        reducer_options={"seed": 4},
        positions="compact",
        seed=9,
        **arguments,
    )
    policy = Policy.full(4).replace(reducer="random", reducer_options={"seed": 4}, positions="compact")
    assert found.base == policy
    with torch.no_grad():
        pruned = dop_compile(batch.model, policy.replace(visual_tokens=7), backend="eager")(**batch.inputs)
    assert found.values["visual_tokens"][0][0] == close(c2_divergence(original_logits(batch), pruned.logits[0, -1]))
    assert found.values != measure_divergences(batch.model, [batch.inputs], **arguments).values
    assert found.seed == 9
    assert found.model_fingerprint == model_fingerprint(batch.model)
    assert found.model_type == "llava"
    assert found.dims == DecoderDims.from_config(batch.model.config)
    assert found.dtype_bytes == 4
    assert dict(found.versions) == {"torch": torch.__version__, "transformers": hf.__version__}


def test_lazy_samples_are_asked_for_once_in_order() -> None:
    asked: list[int] = []

    class Lazy(Sequence[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, number: Any) -> Any:
            asked.append(number)
            return worker.prompts(3)[number]

    found = measure_divergences(shared_model("llava"), Lazy(), **worker.SETTINGS)
    assert asked == [0, 1, 2]
    assert found == worker.measure(3, None)
    assert len(set(found.digests)) == 3


def test_joint_divergences_of_whole_policies() -> None:
    batches = batches_of("llava")
    policies = [
        Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2, visual_tokens=6),
        Policy.depthwise(4, mha_depth=2),
        Policy.full(4),
    ]
    found = measure_policies(batches[0].model, inputs_of(batches), policies)
    assert found.shape == (3, 2)
    for column, batch in enumerate(batches):
        for row, policy in enumerate(policies):
            kept = None if policy.visual_tokens is None else uniform_kept(batch, policy.visual_tokens)
            expected = c2_divergence(original_logits(batch), reference(batch, policy, kept)[0, -1])
            assert found[row, column] == close(expected)


# --- cost


def test_the_reported_cost_is_that_of_the_runs() -> None:
    batches = batches_of("llava")
    points = {"mha_depth": (3, 1), "mlp_depth": (2,), "visual_tokens": (0.5,)}
    found = measure_divergences(batches[0].model, inputs_of(batches), axes=DOP_AXES, points=points)
    compiled = dop_compile(batches[0].model, Policy.full(4), backend="eager")
    shares = []
    for batch in batches:
        replay = Replay(compiled, batch.inputs, depths=(1, 2, 3))
        policies = [policy_of(axis, point, batch)[0] for axis, own in points.items() for point in own]
        shares.append(1 + sum(replay.flops(policy) for policy in policies) / replay.original_flops)
    assert found.prefills == pytest.approx(np.mean(shares))
    assert 1 < found.prefills < 1 + 4


@functools.cache
def seven_billion() -> Any:
    """LLaVA's decoder, Vicuna-7B, without weights."""
    config = hf.LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config).eval()
    return dop_compile(model, Policy.full(32), backend="eager")


@pytest.mark.parametrize(
    ("visual", "share"), [pytest.param(576, 0.35, id="LLaVA-1.5-7B"), pytest.param(2880, 0.27, id="LLaVA-NeXT-7B")]
)
def test_the_papers_measurement_costs_a_third_of_whole_runs(visual: int, share: float) -> None:
    """In FLOPs, of one original and 3 I pruned prefills."""
    compiled = seven_billion()
    dims = DecoderDims.from_config(compiled.config)
    full, prompt = Policy.full(32), SampleTokens(35, visual, 100, rows=1, use_cache=False)
    whole = prefill_flops(dims, full, 35, visual, 100)
    spent, runs = whole, 1
    for axis in DOP_AXES:
        for point in default_points(axis, 32):
            if axis == "visual_tokens":
                policy, first = full.replace(visual_tokens=half_up(point * visual)), 0
            else:
                policy, first = Policy.depthwise(32, **{axis: int(point)}), int(point)
            spent += resumed_flops(compiled.dop, policy, prompt, dims, first)
            runs += 1
    assert runs == 3 * 6 + 1
    assert spent / whole <= share * runs


# --- killed and resumed


def lines_in(path: Path) -> int:
    """Whole lines of progress, the header left out."""
    return max(sum(f.read_bytes().count(b"\n") - 1 for f in path.parent.glob(f"{path.name}.progress-*")), 0)


def kill_after(lines: int, path: Path) -> None:
    """Measure in a process of its own, and kill that as soon as so many samples are on disk."""
    process = worker.processes().Process(target=worker.measure_slowly, args=(COUNT, path))
    process.start()
    deadline = time.monotonic() + 120
    while lines_in(path) < lines:
        assert process.is_alive(), "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


class Counting:
    """Counts the samples that a measurement prepares, the one of `uninterrupted` apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        uninterrupted()
        self.count = 0
        meter = measure.SampleMeter

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return meter(*args, **kwargs)

        monkeypatch.setattr(measure, "SampleMeter", counted)


@functools.cache
def uninterrupted() -> Divergences:
    return worker.measure(COUNT, None)


def test_killed_again_and_again_it_ends_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = uninterrupted()
    path = tmp_path / "results" / "d.json"
    for lines in (1, 2, 4):
        kill_after(lines, path)
        assert not path.exists()
        assert lines <= lines_in(path) < COUNT
    done, counting = lines_in(path), Counting(monkeypatch)
    assert worker.measure(COUNT, path) == expected
    assert counting.count == COUNT - done, "nothing is lost or measured twice"
    assert Divergences.load(path) == expected
    assert list(path.parent.iterdir()) == [path], "nothing is left beside the result"


def test_ctrl_c_leaves_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.json"
    interrupted(path, monkeypatch, after=3)
    assert lines_in(path) == 3
    counting = Counting(monkeypatch)
    assert worker.measure(COUNT, path) == uninterrupted()
    assert counting.count == COUNT - 3


def interrupted(path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """A measurement that ends, as by Ctrl-C, once `after` samples are on disk."""
    with monkeypatch.context() as patch:
        whole, calls = measure._measure, iter(range(after))

        def failing(*args: Any) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return whole(*args)

        patch.setattr(measure, "_measure", failing)
        with pytest.raises(KeyboardInterrupt):
            worker.measure(COUNT, path)


@pytest.mark.parametrize("cut", [1, 40])
def test_a_torn_last_line_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    path = tmp_path / "d.json"
    interrupted(path, monkeypatch, after=3)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    counting = Counting(monkeypatch)
    assert worker.measure(COUNT, path) == uninterrupted()
    assert counting.count == COUNT - 2
    assert list(tmp_path.iterdir()) == [path]


def test_killed_between_saving_and_tidying_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.json"
    with monkeypatch.context() as patch:
        patch.setattr(measure.Progress, "remove", lambda self: None)
        worker.measure(COUNT, path)
    assert len(list(tmp_path.iterdir())) == 2
    counting = Counting(monkeypatch)
    assert worker.measure(COUNT, path) == uninterrupted()
    assert counting.count == 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_measurement_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.json"
    first = worker.measure(COUNT, path)
    counting = Counting(monkeypatch)
    assert worker.measure(COUNT, path) == first
    assert counting.count == 0


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.json"
    interrupted(path, monkeypatch, after=2)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            worker.measure(COUNT, path)
    assert lines_in(path) >= 2
    assert worker.measure(COUNT, path) == uninterrupted()


# --- what does not belong together


@pytest.fixture(params=["begun", "finished"])
def measured(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a measurement was begun, or finished."""
    path = tmp_path / "d.json"
    if request.param == "begun":
        interrupted(path, monkeypatch, after=2)
    else:
        uninterrupted().save(path)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.iterdir()}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 8}, "seed"),
        ({"metric": "kl"}, "metric"),
        ({"metric": "forced_kl", "tokens": 2}, "metric"),
        ({"reducer": "random"}, "base"),
        ({"positions": "compact"}, "base"),
        ({"points": {"mha_depth": (3,)}}, "points"),
        ({"axes": ("mha_depth",), "points": {"mha_depth": (2, 0)}}, "points"),
    ],
)
def test_other_settings_are_refused_by_name(measured: Path, changes: dict[str, Any], named: str) -> None:
    before = contents(measured)
    with pytest.raises(ValueError, match=rf"d\.json.* belongs to another measurement \({named} differ\)"):
        worker.measure(COUNT, measured, **changes)
    assert contents(measured) == before


def test_another_model_or_other_samples_are_refused_by_name(measured: Path) -> None:
    before = contents(measured)
    samples = worker.prompts(COUNT)
    with pytest.raises(ValueError, match=r"belongs to another measurement \(fingerprint differ\)"):
        measure_divergences(FAMILIES["llava"].build(seed=1), samples, resume=measured, **worker.SETTINGS)
    with pytest.raises(ValueError, match=r"belongs to another measurement \(samples differ\)"):
        measure_divergences(shared_model("llava"), samples[:-1], resume=measured, **worker.SETTINGS)
    pixels = samples[1]["pixel_values"].clone()
    pixels[0, 0, 0, 0] += 1e-3
    other = [samples[0], {**samples[1], "pixel_values": pixels}, *samples[2:]]
    with pytest.raises(ValueError, match="sample 1 is not the one that was measured before"):
        measure_divergences(shared_model("llava"), other, resume=measured, **worker.SETTINGS)
    with pytest.raises(ValueError, match="sample 0 is not the one"):
        measure_divergences(shared_model("llava"), samples[1:] + samples[:1], resume=measured, **worker.SETTINGS)
    assert contents(measured) == before


def test_a_file_that_holds_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"mine": 1}))
    with pytest.raises(ValueError, match=r"d\.json: format: .* this is not a file of divergences"):
        worker.measure(COUNT, path)
    assert contents(path) == {"d.json": b'{"mine": 1}'}


def test_the_digest_tells_samples_apart() -> None:
    given_sample = {"input_ids": torch.arange(4)[None], "answers": ["a", "b"], "visual_indices": [[0, 1]]}
    others: list[dict[str, Any]] = [
        {"input_ids": torch.arange(4)[:, None]},
        {"input_ids": torch.arange(4, dtype=torch.int32)[None]},
        {"input_ids": torch.tensor([[0, 1, 2, 4]])},
        {"answers": ["a"]},
        {"answers": ["ab"]},
        {"visual_indices": [[0, 2]]},
        {"visual_indices": [torch.arange(5000)]},
        {"visual_indices": [torch.arange(5000).index_fill(0, torch.tensor([2500]), 0)]},
        {"pixel_values": torch.zeros(0)},
    ]
    digests = [sample_digest(given_sample | change) for change in ({}, *others)]
    assert len(set(digests)) == len(digests)
    again = {name: given_sample[name] for name in reversed(given_sample)}
    assert sample_digest(again) == digests[0]


# --- several processes


def run_ranks(world: int, folder: Path) -> list[Divergences]:
    worker.run_ranks(worker.measure_as_rank, world, COUNT, folder)
    return [Divergences.load(folder / f"rank-{rank}.json") for rank in range(world)]


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path) == [uninterrupted()] * 2
    assert Divergences.load(tmp_path / "d.json") == uninterrupted()
    assert {file.name for file in tmp_path.iterdir()} <= {"d.json", "rank-0.json", "rank-1.json", "store"}


def test_two_processes_go_on_where_one_was_killed(tmp_path: Path) -> None:
    kill_after(3, tmp_path / "d.json")
    assert run_ranks(2, tmp_path) == [uninterrupted()] * 2
    assert not list(tmp_path.glob("*.progress-*"))


# --- bad input


def test_no_samples_and_no_policies_are_refused() -> None:
    model = shared_model("llava")
    with pytest.raises(ValueError, match="samples: expected at least one, got none"):
        measure_divergences(model, [])
    with pytest.raises(ValueError, match="samples: expected at least one, got none"):
        measure_policies(model, [], [Policy.full(4)])
    with pytest.raises(ValueError, match="policies: expected at least one, got none"):
        measure_policies(model, worker.prompts(1), [])


def test_a_sample_without_visual_tokens_is_named() -> None:
    samples = [*worker.prompts(1), make_batch("llava", [[("text", 9)]]).inputs]
    with pytest.raises(ValueError, match="sample 1: it has no visual tokens"):
        measure_divergences(shared_model("llava"), samples, **worker.SETTINGS)


def test_counts_need_samples_of_equal_visual_tokens() -> None:
    points = {"visual_tokens": (6, 3)}
    arguments: dict[str, Any] = {"axes": ["visual_tokens"], "points": points}
    samples = worker.prompts(3)
    with pytest.raises(ValueError, match=r"points\['visual_tokens'\]: the samples have from 9 to 18 visual tokens"):
        measure_divergences(shared_model("llava"), samples, **arguments)
    equal = measure_divergences(shared_model("llava"), samples[::2], **arguments)
    fractions = measure_divergences(
        shared_model("llava"), samples[::2], axes=["visual_tokens"], points={"visual_tokens": (6 / 9, 3 / 9)}
    )
    assert equal.values == fractions.values
    assert equal.points == points


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes": ()}, "axes: expected at least one, got none"),
        ({"axes": ("mha_deph",)}, r"axes: .*'mha_deph'; did you mean 'mha_depth'"),
        ({"points": {"mha_depth": (5,)}}, r"points\['mha_depth'\]: .*from 0 to 4, got 5"),
        ({"points": {"system_mha_depth": (1,)}}, r"points: expected one of mha_depth, .*'system_mha_depth'"),
        ({"metric": "topk"}, "metric: .*'topk'; did you mean 'top_k_kl'"),
        ({"metric": "forced_kl", "tokens": 0}, "tokens: .*got 0"),
        ({"metric": "accuracy_drop"}, "accuracy_drop: expected samples with answers, and decode"),
        ({"reducer": "nearest"}, "unknown reducer 'nearest'"),
        ({"positions": "compat"}, "positions: .*'compact'"),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        measure_divergences(shared_model("llava"), worker.prompts(1), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": "seven"}, "answers: expected a list of strings, got 'seven'"),
        ({"answers": []}, "accuracy_drop: expected samples with answers"),
    ],
)
def test_wrong_answers_are_named(change: dict[str, Any], message: str) -> None:
    samples = [{**worker.prompts(1)[0], **change}]
    with pytest.raises((TypeError, ValueError), match=message):
        measure_divergences(shared_model("llava"), samples, metric="accuracy_drop", decode=decode)


def test_a_sample_is_one_prompt() -> None:
    batch = make_batch("llava", [[("image",), ("text", 3)]] * 2)
    with pytest.raises(ValueError, match=r"one prompt: input_ids \(1, tokens\)"):
        measure_divergences(batch.model, [batch.inputs])
    with pytest.raises(ValueError, match=r"one prompt: input_ids \(1, tokens\)"):
        measure_divergences(batch.model, [{"pixel_values": batch.inputs["pixel_values"]}])
