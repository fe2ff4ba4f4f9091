"""lmms-eval's own evaluator on the task of `examples/digits_vlm`, from its files to its table.

Nothing of lmms-eval is replaced. Without the default tasks, whose files take long to read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is not installed: pip install lmms-eval")

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model_manifest, list_available_models
from lmms_eval.tasks import TaskManager

from digits_vlm import benchmark, data, evaluate, models
from dop_compile import Policy, dop_compile
from dop_compile.plugins.lmms_eval.manifest import manifest

CHECKPOINT = Path(__file__).parents[3] / "examples" / "digits_vlm" / "checkpoints" / "llava"
POLICY = {"mha_depth": 5, "mlp_depth": 2}
QUESTIONS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits_task")
    benchmark.write(folder, QUESTIONS)
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["lmms-eval"])


def results(folder: Path, task: str, arguments: str, **settings: Any) -> dict[str, float]:
    tasks = TaskManager("ERROR", include_path=str(folder), include_defaults=False, model_name="dop_compile")
    found = simple_evaluate(
        model="dop_compile",
        model_args=f"pretrained={CHECKPOINT},backend=eager,device=cpu,{arguments}",
        tasks=[task],
        task_manager=tasks,
        batch_size=4,
        bootstrap_iters=0,
        log_samples=False,
        **settings,
    )
    return {name.partition(",")[0]: value for name, value in found["results"][task].items() if name.endswith(",none")}


def test_the_installed_package_announces_the_model() -> None:
    assert "dop_compile" in list_available_models(), "the package has an entry point; install it again"
    assert get_model_manifest("dop_compile") == manifest()


@pytest.mark.parametrize("simple", [False, True])
def test_the_evaluator_finds_the_accuracy_of_the_compiled_model(folder: Path, simple: bool) -> None:
    arguments = ",".join(f"{name}={value}" for name, value in POLICY.items())
    found = results(folder, "digits_vlm", arguments, force_simple=simple)
    model, reader = models.load(CHECKPOINT)
    compiled = dop_compile(model, Policy.depthwise(8, **POLICY), backend="eager")
    asked = list(data.examples("validation", QUESTIONS * len(data.KINDS), seed=1))
    expected = evaluate.accuracy(compiled, reader, asked)
    assert len(set(expected.values())) > 1
    assert {kind: found[kind] for kind in data.KINDS} == expected
    assert found["accuracy"] == pytest.approx(sum(expected.values()) / len(expected))


def test_the_likeliest_of_the_options(folder: Path) -> None:
    found = results(folder, "digits_vlm_likelihood", "policy=original", force_simple=True)
    asked = [
        e for e in data.examples("validation", QUESTIONS * len(data.KINDS), seed=1) if e.kind in ("yesno", "choice")
    ]
    model, reader = models.load(CHECKPOINT)
    options = {"yesno": ["yes", "no"], "choice": list(data.LETTERS)}
    right = 0
    for example in asked:
        logits = model(**reader([example.image], [example.prompt])).logits[0, -1]
        ids = [reader.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in options[example.kind]]
        right += options[example.kind][int(logits[ids].argmax())] == example.answer
    assert found["acc"] == pytest.approx(right / len(asked))
