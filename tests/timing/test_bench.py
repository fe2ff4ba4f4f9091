"""What a benchmark measures, on a tiny model and under a clock that counts its own readings; no test reads a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dop_compile import Policy, dop_compile, explain, prefill_flops
from dop_compile.evaluation import clock
from dop_compile.timing import Benchmark, Contender, Setting, Timing, bench
from dop_compile.timing.measuring import repeated
from dop_compile.timing.report import markdown
from dop_compile.timing.result import AGAIN, FULL, ORIGINAL
from tests.command_line import refused, run
from tests.local_llava import local_llava, local_processor
from tests.support import make_batch

LAYERS, NEW = 4, 3
SMALL = Policy.depthwise(LAYERS, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=1, visual_tokens=5)
TIERS = {"small": SMALL, "joint": Policy.depthwise(LAYERS, mha_depth=2, mlp_depth=2)}
NAMES = [ORIGINAL, AGAIN, FULL, *TIERS]


class Ticks:
    """A clock that is one second later whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture(scope="module")
def row() -> Any:
    return make_batch("llava", [[("text", 3), ("image",), ("text", 4)]])


@pytest.fixture(scope="module")
def result(row: Any) -> Benchmark:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "time", Ticks())
        return bench(row.model, TIERS, row.inputs, batches=(1, 3), rounds=2, new_tokens=NEW)


# --- what is measured


def test_every_setting_has_every_contender(result: Benchmark) -> None:
    assert [(setting.backend, setting.batch) for setting in result.settings] == [("eager", 1), ("eager", 3)]
    for setting in result.settings:
        assert [contender.name for contender in setting.contenders] == NAMES
        assert {len(contender.timings) for contender in setting.contenders} == {2}
    assert result.counts == (3, 9, 4)
    assert (result.model, result.dtype, result.new_tokens) == ("LlavaForConditionalGeneration", "float32", NEW)
    assert {"torch", "transformers"} <= result.environment["packages"].keys()


def test_parts_of_an_answer(result: Benchmark) -> None:
    # The clock is read wherever a part ends: once for vision, prefill and decode each, and twice around each part of a
    # selection: noting what the tower returns, finding it among the embeddings, choosing
    for setting in result.settings:
        for contender in setting.contenders:
            selects = contender.name == "small"
            for timing in contender.timings:
                assert timing.selection_ms == (3000.0 if selects else 0.0)
                assert timing.decode_ms == 1000.0 / (NEW - 1)
                assert timing.first_token_ms == timing.vision_ms + timing.selection_ms + timing.prefill_ms
                assert timing.first_token_ms == (8000.0 if selects else 2000.0)
        assert setting.tokens_per_second(ORIGINAL) == setting.batch * (NEW - 1)


def test_smaller_pictures_are_compared_with_the_originals_prompt(row: Any) -> None:
    fewer = make_batch("llava", [[("text", 3), ("text", 4)]]).inputs
    found = bench(row.model, TIERS, row.inputs, tier_inputs={"joint": fewer}, rounds=1, new_tokens=1)
    small = {contender.name: contender for contender in found.settings[0].contenders}["joint"]
    system, visual, text = found.counts
    written, whole = (
        prefill_flops(row.model.config, policy, system=system, visual=visual, text=text)
        for policy in (TIERS["joint"], Policy.full(LAYERS))
    )
    assert small.eq11_ratio == written / whole, "the policy's, at the counts of the prompt that was given"
    assert small.executed_ratio is not None
    assert small.executed_ratio < 7 / 16, "of the tokens that it was given in their place"


def test_cache_bytes_are_those_of_explain(row: Any, result: Benchmark) -> None:
    compiled = dop_compile(row.model, {FULL: Policy.full(LAYERS), **TIERS}, backend="eager")
    for setting in result.settings:
        for name in (FULL, *TIERS):
            cost = explain(compiled, name, system=3, visual=9, text=4).summary
            contender = setting.contender(name)
            assert contender.kv_bytes == setting.batch * (cost.kv_bytes or 0) > 0
            assert (contender.eq11_ratio, contender.executed_ratio) == (cost.eq11_ratio, cost.executed_ratio)
        for name in (ORIGINAL, AGAIN):
            assert setting.contender(name).kv_bytes == setting.batch * (cost.original_kv_bytes or 0)
            assert setting.contender(name).eq11_ratio == 1.0


def test_answers_are_as_long_as_asked_for(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the model would stop."""
    first = row.model.generate(**row.inputs, max_new_tokens=1, do_sample=False)[0, -1].item()
    monkeypatch.setattr(row.model.generation_config, "eos_token_id", first)
    monkeypatch.setattr(clock, "time", Ticks())
    found = bench(row.model, TIERS, row.inputs, rounds=1, new_tokens=NEW)
    assert {c.median("decode_ms") for c in found.settings[0].contenders} == {1000.0 / (NEW - 1)}


def test_one_token_needs_no_decoding(row: Any) -> None:
    found = bench(row.model, TIERS, row.inputs, rounds=1, new_tokens=1)
    (setting,) = found.settings
    assert setting.contender("small").median("decode_ms") is None
    assert setting.tokens_per_second("small") is None
    assert setting.ratio("small", "decode_ms") is None
    assert "| - |" in markdown(found)


def test_a_batch_is_the_prompt_repeated(row: Any) -> None:
    rows = repeated({**row.inputs, "word": "kept"}, 3)
    assert rows["word"] == "kept"
    for name, value in row.inputs.items():
        assert torch.equal(rows[name], torch.cat([value, value, value])), name


def test_what_is_refused(row: Any) -> None:
    with pytest.raises(ValueError, match="at least one policy"):
        bench(row.model, {}, row.inputs)
    with pytest.raises(ValueError, match="'full' is the name"):
        bench(row.model, {FULL: SMALL}, row.inputs)
    with pytest.raises(ValueError, match="rounds"):
        bench(row.model, TIERS, row.inputs, rounds=0)
    with pytest.raises(ValueError, match="batches"):
        bench(row.model, TIERS, row.inputs, batches=(0,))


# --- arithmetic and tables


def timing(scale: float, memory: int | None = 2**20) -> Timing:
    return Timing(1.0 * scale, 0.5 * scale, 2.5 * scale, 2.0 * scale, memory)


def by_hand() -> Benchmark:
    original = Contender(ORIGINAL, tuple(map(timing, (1.0, 2.0, 4.0))), 4096, 1.0, 1.0)
    again = Contender(AGAIN, tuple(map(timing, (1.0, 2.0, 2.0))), 4096, 1.0, 1.0)
    half = Contender("half", tuple(map(timing, (0.5, 1.0, 1.0))), 1024, 0.5, 0.25)
    where = {"device": "abacus", "threads": 1, "python": "3.11", "packages": {}, "memory": "beads", "command": []}
    where |= {"packages": dict.fromkeys(("torch", "transformers", "dop_compile"), "1"), "command": ["/bin/x", "a b"]}
    return Benchmark(
        "Abacus", "f" * 64, "float32", (1, 2, 3), 5, where, (Setting("eager", 4, (original, again, half)),)
    )


def test_medians_and_ratios_are_those_counted_by_hand() -> None:
    (setting,) = by_hand().settings
    assert setting.contender(ORIGINAL).median("prefill_ms") == 5.0
    assert setting.contender(ORIGINAL).median("first_token_ms") == 8.0
    assert setting.tokens_per_second("half") == 1000 * 4 / 2.0
    found = setting.ratio("half", "first_token_ms")  # rounds: 0.5, 0.5, 0.25
    assert found is not None
    assert (found.median, found.low, found.high) == (0.5, 0.375, 0.5)
    spread = setting.ratio(AGAIN, "decode_ms")  # rounds: 1, 1, 0.5
    assert spread is not None
    assert (spread.median, spread.low, spread.high) == (1.0, 0.75, 1.0)
    assert Contender("x", (timing(1.0, None), timing(1.0)), 0).median("memory_bytes") is None


def test_json_holds_rounds_and_medians() -> None:
    content = json.loads(by_hand().to_json())
    row = content["settings"][0]["contenders"][2]
    assert [entry["prefill_ms"] for entry in row["timings"]] == [1.25, 2.5, 2.5]
    assert row["medians"]["prefill_ms"] == 2.5
    assert row["tokens_per_second"] == 2000.0
    assert row["of_original"]["prefill_ms"] == {"median": 0.5, "low": 0.375, "high": 0.5}


def test_the_table() -> None:
    text = markdown(by_hand())
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in text.splitlines()
             if line.startswith("| ") and "---" not in line}  # fmt: skip
    assert cells["half"] == ["50.0 %", "25.0 %", "1 KiB", "1", "0.5", "2.5", "0.500 (0.375-0.500)", "4", "2",
                             "0.500 (0.375-0.500)", "2000", "1 MiB"]  # fmt: skip
    assert cells[ORIGINAL][6] == cells[ORIGINAL][9] == ""
    assert "prefill 0.750-1.000, first token 0.750-1.000, decode 0.750-1.000; smaller differences" in text
    assert "**eager, batch 4**" in text
    assert "`x 'a b'`" in text
    assert "abacus" in text
    assert "Medians of 3 interleaved rounds" in text


# --- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llava")
    local_llava(layers=LAYERS, hidden=64, image_size=56).save_pretrained(folder)
    local_processor(56).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def policy(tmp_path: Path) -> str:
    path = tmp_path / "small.json"
    SMALL.save(path)
    return str(path)


def test_the_command_writes_json_and_markdown(
    capsys: pytest.CaptureFixture[str], model: str, policy: str, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "bench"
    quick = ["--rounds", "1", "--new-tokens", "2", "--batch", "1", "--batch", "2"]
    code, text, _ = run(capsys, "bench", model, "--policy", f"a={policy}", *quick, "--out", str(out))
    assert code == 0
    assert {path.name for path in out.iterdir()} == {"bench.json", "bench.md"}
    written = (out / "bench.md").read_text()
    assert text.startswith(written)
    assert "| a | " in written
    content = json.loads((out / "bench.json").read_text())
    assert [(s["backend"], s["batch"]) for s in content["settings"]] == [("eager", 1), ("eager", 2)]
    code, text, _ = run(capsys, "bench", model, "--mlp-depth", "2", *quick[:4])
    assert code == 0
    assert "| policy | " in text


def test_the_command_refuses(capsys: pytest.CaptureFixture[str], model: str, policy: str, tmp_path: Path) -> None:
    assert "no policy" in refused(capsys, "bench", model)
    assert "name each once" in refused(capsys, "bench", model, "--policy", policy, "--batch", "2", "--batch", "2")
    assert "not a backend" in refused(capsys, "bench", model, "--policy", policy, "--backend", "fast")
    assert "'full' is the name" in refused(capsys, "bench", model, "--policy", f"full={policy}")
    assert "no such directory" in refused(capsys, "bench", "./nowhere", "--policy", policy)
    picture = tmp_path / "empty.png"
    picture.touch()
    assert "not an image" in refused(capsys, "bench", model, "--policy", policy, "--image", str(picture))
    other = tmp_path / "other.json"
    Policy.full(3).save(other)
    assert "3" in refused(capsys, "bench", model, "--policy", str(other))


def test_it_asks_about_pictures_that_are_given(
    capsys: pytest.CaptureFixture[str], model: str, policy: str, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (30, 20)).save(picture)
    quick = ["--rounds", "1", "--new-tokens", "1"]
    one, two = (
        run(capsys, "bench", model, "--policy", policy, *quick, *["--image", str(picture)] * count)[1]
        for count in (1, 2)
    )
    assert "16 visual" in one
    assert "32 visual" in two
