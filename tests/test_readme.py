"""What README and pages show is what happens: their Python runs, their commands parse, their tables are today's."""

from __future__ import annotations

import functools
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import dop_compile
from digits_vlm import data, models
from dop_compile import explain
from dop_compile.cli import _parser, main
from dop_compile.demo import run as demo
from dop_compile.onnx.run.pipeline import OnnxPipeline
from dop_compile.reducers import registry
from dop_compile.reports.table import show_bytes, show_percent
from tests import make_passes
from tests.local_llava import local_llava, local_processor, picture
from tests.reducers.tiny_clip import clip, tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
IN_ORDER = (
    "quickstart",
    "use",
    "published",
    "search",
    "evaluation",
    "concepts",
    "reducers",
    "rankings",
    "models",
    "performance",
    "onnx",
)
"""Pages whose Python goes on from each other."""
PAGES = {path: path.read_text() for path in [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]}
SITE = "\n".join(PAGES[ROOT / "docs" / f"{name}.md"] for name in IN_ORDER)
EVERYTHING = "\n".join(PAGES.values())
LAYERS = 32  # as LLaVA-1.5-7B has


def blocks(language: str, text: str = SITE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_readme_is_short_and_its_example_prints_what_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(README.splitlines()) <= 250
    monkeypatch.chdir(ROOT)
    (source,) = blocks("python", README)
    exec(compile(source, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.rstrip() in "\n".join(blocks("text", README))
    assert out.startswith("100% 7 5 6\n")


def test_the_tutorial_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    answers = {tier: names["answer"](tier) for tier in names["compiled"].tiers}
    assert answers == {"100%": names["example"].answer, "37%": names["example"].answer}
    assert names["found"].provenance.budget <= 0.37


def test_links_lead_somewhere() -> None:
    for path, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("http", "#")):
                assert (path.parent / target.partition("#")[0]).exists(), (path, target)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").rglob("*.md"):
        assert f"{path.relative_to(ROOT / 'docs')}" in navigation


def test_the_pages_of_the_passes_are_todays() -> None:
    assert {path.stem: path.read_text() for path in make_passes.FOLDER.glob("*.md")} == make_passes.pages()


def test_the_python_blocks_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one namespace, top to bottom, with a tiny model where a checkpoint is named, and run eagerly."""
    monkeypatch.chdir(tmp_path)
    picture().save("photo.jpg")
    sizes: dict[str, Any] = {"layers": LAYERS, "hidden": 32, "image_size": 140}

    load = hf.LlavaForConditionalGeneration.from_pretrained

    def load_model(name: str, **settings: Any) -> Any:
        return load(name) if Path(name).is_dir() else local_llava(**sizes).to(settings["dtype"])

    monkeypatch.setattr(hf.LlavaForConditionalGeneration, "from_pretrained", load_model)
    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", lambda name: local_processor(140))
    eagerly = functools.partial(dop_compile.dop_compile, backend="eager")
    monkeypatch.setattr(dop_compile, "dop_compile", eagerly)
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    config = hf.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=2)
    names: dict[str, Any] = {"text_model": hf.LlamaForCausalLM(config).eval(), "groups": torch.tensor([[2, 1, 1, 0]])}
    names |= {"clip_model": clip(), "clip_tokenizer": tokenizer()}
    # An export of its own would take a minute; the runtime's tests have theirs
    monkeypatch.setattr(OnnxPipeline, "load", lambda directory, *, memory: lambda *prompt, **settings: prompt[1])
    sources = blocks("python")
    assert len(sources) >= 6
    for source in sources:
        exec(compile(source, "docs", "exec"), names)
    assert "tier 'default'" in capsys.readouterr().out
    # The reducer of one's own, which the pages register last, works
    compiled = eagerly(names["model"], names["policy"])
    assert compiled.generate(**names["inputs"], max_new_tokens=1).shape[1] == names["inputs"]["input_ids"].shape[1] + 1


def test_the_commands_are_those_of_the_command_line() -> None:
    lines = [
        line for block in blocks("sh", EVERYTHING) for line in block.splitlines() if line.startswith("dop-compile")
    ]
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line.partition(" > ")[0], comments=True)
        assert _parser().parse_args(words[1:]).command in line


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`?make (?:PYTHON=\S+ )?([a-z]+)", "\n".join(re.findall(r"`[^`]*`", EVERYTHING))))
    assert named >= {"demo", "test", "lint", "types", "bench"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def token_counts(prompt: str) -> dict[str, int]:
    """Tokens of a prompt about one canvas: before it, its own, and after it."""
    before, after = models.tokenizer("llava")(prompt.split("<image>"))["input_ids"]
    return {"system": len(before), "visual": demo.VISUAL, "text": len(after) - 1}  # one <s>, at the beginning


def test_the_demo_table_has_todays_costs() -> None:
    (table,) = re.findall(r"<!-- DEMO -->\n```text\n(.*?)```\n<!-- /DEMO -->", README, re.DOTALL)
    lines = [" ".join(line.split()) for line in table.splitlines()]
    _, questions = demo.compose()
    for question in questions:
        assert any(line.startswith(f"{question.text} {question.answer} ") for line in lines), question
    counts: Any = token_counts(data.prompt(questions[0].text))
    assert f"{counts['system']} system + {counts['visual']} visual + {counts['text']} text tokens" in table
    compiled = dop_compile.dop_compile(models.build("llava").eval(), demo.demo_policies(), backend="eager")
    for cost in explain(compiled, **counts).tiers:
        figures = [show_percent(cost.eq11_ratio), show_percent(cost.executed_ratio), show_bytes(cost.kv_bytes)]
        start = " ".join([cost.tier, *figures, ""])
        assert any(line.startswith(start) for line in lines), start


def test_the_explain_table_is_todays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf.LlavaConfig(dtype="float16").save_pretrained(tmp_path)  # the geometry of LLaVA-1.5-7B
    argv = ["explain", str(tmp_path), "--mha-depth", "26", "--mlp-depth", "19", "--visual-tokens", "97"]
    argv += ["--system", "35", "--text", "100"]
    assert main(argv) == 0
    assert capsys.readouterr().out in blocks("text")


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(ROOT / "examples" / "tiers.py"))
    out = capsys.readouterr().out
    question = names["question"]
    # A trained model: it answers with digits, as it was asked to
    answers = re.findall(rf"^(\w+): \d(?: \d)* \(expected {question.answer}\)$", out, re.MULTILINE)
    assert answers == ["all", "fewer", "frozen"]
    assert "visual frozen" in out
    counts = token_counts(data.prompt(question.text))
    assert sum(counts.values()) == names["inputs"]["input_ids"].shape[1]
    assert f"{counts['system']} system + {counts['visual']} visual + {counts['text']} text tokens" in out
