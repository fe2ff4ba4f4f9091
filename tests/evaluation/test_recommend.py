"""`dop-compile recommend`: what is advised by which rule, and the command from samples to a tier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dop_compile import Policy
from dop_compile.evaluation import Evaluation
from dop_compile.evaluation import recommend as _exported
from dop_compile.evaluation.advice import Advice, advice_figure, advise
from dop_compile.evaluation.recommend import halves, recommend
from dop_compile.search.candidates import Candidate
from dop_compile.search.optimize import Choice, Rated
from tests.command_line import refused, run
from tests.evaluation.test_result import measured
from tests.local_llava import local_llava, local_processor, picture

LAYERS = 2
POLICY = Policy.depthwise(LAYERS, mlp_depth=1)


def of(*tiers: tuple[str, str, dict[str, Any]]) -> Evaluation:
    """Ten questions: the original answers nine right in 10 ms."""
    methods = [measured("original", "yyyyyyyyyn", vision_ms=2, selection_ms=0, prefill_ms=8)]
    methods += [measured(label, rights, **changes) for label, rights, changes in tiers]
    environment = {"packages": {}, "device": "a processor", "threads": 3, "memory": "none"}
    return Evaluation({"model": "Llava"}, environment, ("all",) * 10, ((1, 16, 5),) * 10, tuple(methods), ("a",) * 10)


def advised(result: Evaluation, **bounds: Any) -> Advice:
    """By choices whose measured divergence is the budget's."""

    def choice(budget: float) -> Choice:
        taken, alone = (Rated(Candidate(POLICY, loss, budget), loss, loss) for loss in (budget / 100, budget / 10))
        return Choice(taken, alone, taken, (3, 4))

    budgets = {label.split()[0] for label in result.labels[1:]}
    return advise(result, {name: choice(float(name.rstrip("%"))) for name in budgets}, **{"max_loss": 0.1, **bounds})


FAST = {"vision_ms": 2.0, "selection_ms": 0.5, "prefill_ms": 2.5}
RESULT = of(
    ("50%", "yyyyyyyyyn", {**FAST, "flops": 500}),
    ("50% tokens only", "yyyyyyyyyn", {**FAST, "flops": 490}),
    ("28%", "yyyyyyyynn", {**FAST, "prefill_ms": 1.5, "flops": 280, "kv_bytes": 1024}),
    ("28% tokens only", "yyynnnnnnn", {"vision_ms": 1.0, "selection_ms": 0.0, "prefill_ms": 1.0, "flops": 270}),
)


@pytest.mark.parametrize(
    ("bounds", "label", "says"),
    [
        (
            {},
            "28%",
            "0.40 of the original's time to the first token, 25.0 % of its KV cache, and -10.0 points of right answers",
        ),
        ({"max_loss": 0.05}, "50% tokens only", "49.0 % of the policy FLOPs"),
        ({"max_ms": 6.0}, "50% tokens only", "+0.0 points"),
        ({"max_ms": 3.0}, "28% tokens only", "-60.0 points"),
        (
            {"max_ms": 1.0},
            None,
            "No tier gives its first token within 1 ms; the fastest, '28% tokens only', takes 2 ms",
        ),
    ],
)
def test_what_is_advised(bounds: dict[str, Any], label: str | None, says: str) -> None:
    advice = advised(RESULT, **bounds)
    assert advice.label == label
    assert says in advice.sentence
    assert advice.text.endswith(advice.sentence)


def test_of_what_is_as_fast_the_one_that_loses_least_is_advised() -> None:
    near, far = {"vision_ms": 2.0, "selection_ms": 0.0, "prefill_ms": 2.1}, {"prefill_ms": 2.4, "selection_ms": 0.0}
    fast = ("28%", "yyyyyyyynn", {**near, "prefill_ms": 2.0, "flops": 280})
    assert advised(of(("37%", "yyyyyyyyyn", {**near, "flops": 370}), fast)).label == "37%"
    assert advised(of(("37%", "yyyyyyyyyn", {**far, "flops": 370}), fast)).label == "28%", "ten per cent are told apart"


def test_nothing_that_loses_too_much_or_is_slower_is_advised() -> None:
    lossy = advised(of(("28%", "yyynnnnnnn", {**FAST, "flops": 280})))
    assert lossy.label is None
    assert "Stay with the original" in lossy.sentence
    assert "'28%', loses 60 points" in lossy.sentence
    slow = advised(of(("28%", "yyyyyyyyyn", {"flops": 280, "prefill_ms": 9.0})))
    assert slow.label is None
    assert "'28%', is slower than the original here" in slow.sentence


def test_the_table_and_the_picture_have_every_tier() -> None:
    advice = advised(RESULT)
    lines = advice.text.splitlines()
    assert [line.split("  ")[0] for line in lines[1:6]] == list(RESULT.labels)
    assert "2.8000" in lines[4].split()[-6:][0] or "0.2800" in lines[4]
    assert "2.8000" in lines[5], "what fewer tokens alone measured"
    assert "of 10 questions that were not searched on" in advice.text
    assert "on 4 samples that did not select" in advice.text
    (panel,) = advice_figure(advice).axes
    assert panel.get_ylim()[0] == 0
    assert sorted(text.get_text() for text in panel.texts) == ["28%", "28%", "50%", "50%"]
    assert [text.get_text() for text in panel.get_legend().texts] == ["original", "taken", "tokens only"]
    assert [line.get_label() for line in panel.lines if len(line.get_xdata()) > 1 and line.get_linestyle() == "--"] == [
        "original"
    ]


def test_halves_share_nothing_and_are_drawn_by_the_seed() -> None:
    first, second = halves(9, 3)
    assert sorted(first + second) == list(range(9))
    assert (len(first), len(second)) == (4, 5)
    assert halves(9, 3) == (first, second)
    assert any(halves(9, seed) != (first, second) for seed in range(4, 8))
    with pytest.raises(ValueError, match="at least 8"):
        halves(7, 0)


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and eight samples with answers."""
    folder = tmp_path_factory.mktemp("recommend")
    local_llava(layers=LAYERS, hidden=32, image_size=56).save_pretrained(folder / "model")
    local_processor(56).save_pretrained(folder / "model")
    lines = []
    for number in range(8):
        picture().rotate(45 * number).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "prompt": "What is the table ?", "answers": ["table"]})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def command(folder: Path, out: Path, *more: str) -> list[str]:
    samples = ["--samples", str(folder / "samples.jsonl"), "--max-new-tokens", "2"]
    return ["recommend", str(folder / "model"), *samples, "--out", str(out), *more]


def test_from_samples_to_a_tier(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    out, budgets = tmp_path / "out", ["--budget", "0.7", "--budget", "0.8"]
    code, text, _ = run(capsys, *command(folder, out, *budgets, "--max-ms", "1e6"))
    assert code == 0
    labels = ("original", "80%", "80% tokens only", "70%", "70% tokens only")
    assert Evaluation.load(out / "evaluation.json").labels == labels
    assert (out / "recommendation.txt").read_text().strip() in text
    assert (out / "recommendation.png").stat().st_size > 1000
    saved = {name: Policy.load(out / f"{name}.json") for name in ("80", "70")}
    assert "Take '" in text
    advice = Policy.load(out / "recommended.json")
    assert advice in saved.values() or not advice.pruned
    # With other bounds nothing is run again
    monkeypatch.setattr("dop_compile.search.joint.SampleMeter", None)
    monkeypatch.setattr("dop_compile.evaluation.measuring.Comparison", None)
    code, text, _ = run(capsys, *command(folder, out, *budgets, "--max-ms", "0.001"))
    assert code == 0
    assert "No tier gives its first token within 0.001 ms" in text
    assert not (out / "recommended.json").exists(), "an earlier advice does not stay"


def test_what_is_refused(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    def says(*more: str, argv: list[str] | None = None) -> str:
        return refused(capsys, *(argv or command(folder, tmp_path / "refused")), *more)

    assert "at least 8" in says("--count", "7")
    assert "0 < budget <= 1" in says("--budget", "1.5")
    assert "expected each once" in says("--budget", "0.5", "--budget", "0.5")
    assert "smaller pictures are other inputs" in says("--reducer", "resize")
    assert "max_ms: expected milliseconds" in says("--max-ms", "0")
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    del lines[3]["answers"]
    path = folder / "some.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = ["recommend", str(folder / "model"), "--samples", str(path), "--out", str(tmp_path / "refused")]
    assert "it has no answers, by which tiers are judged" in says(argv=other)
    for wrong in ("1.0", "200%", "-1%"):
        assert run(capsys, *command(folder, tmp_path / "o", f"--max-loss={wrong}"))[0] == 2


def test_it_is_for_python_too() -> None:
    assert _exported is recommend
