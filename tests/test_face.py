"""What `import dop_compile` brings: names on first use, fast commands, logs for whoever asks."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import dop_compile
from dop_compile import Policy, logs
from dop_compile.cli import ACTIONS
from tests.support import make_batch

HEAVY = ("torch", "transformers", "torchao", "onnx", "onnxruntime", "matplotlib", "scipy", "numpy")


def python(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import dop_compile",
        "from dop_compile import Policy; Policy.from_json(Policy.depthwise(4, mlp_depth=2, visual_tokens=3).to_json())",
        "from dop_compile.cli import main; main(['--help'])",
        "from dop_compile.cli import main; main(['--version'])",
        "from dop_compile.cli import main; main(['explane', 'model'])",
        "from dop_compile.cli import main; main(['run', '--help'])",
        "from dop_compile.cli import main; main(['search', 'd.json', '--bugdet', '0.3'])",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    """What is imported is what takes the time: a torch takes seconds, and all the rest a tenth of one."""
    found = python(f"import sys; {code}; print('HEAVY', [name for name in {HEAVY} if name in sys.modules])")
    assert "HEAVY []" in found


def test_every_name_is_there_and_listed() -> None:
    for name in dop_compile.__all__:
        assert getattr(dop_compile, name) is not None
        assert name in dir(dop_compile)
    assert set(dop_compile._HOMES) == set(dop_compile.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'compile_all'"):
        dop_compile.compile_all  # noqa: B018


def test_every_command_has_what_does_it() -> None:
    for place in ACTIONS.values():
        module, _, function = place.partition(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    from dop_compile.cli import main

    assert main(["--version"]) == 0
    assert dop_compile.__version__ in capsys.readouterr().out


def test_compiled_models_are_told_from_their_originals() -> None:
    batch = make_batch("llama")
    compiled = dop_compile.dop_compile(batch.model, {"a": Policy.full(batch.family.num_layers)}, backend="eager")
    assert isinstance(compiled, dop_compile.CompiledModel)
    assert isinstance(compiled.tier("a"), dop_compile.CompiledModel)
    assert not isinstance(batch.model, dop_compile.CompiledModel)


@pytest.fixture
def _as_before() -> Iterator[None]:
    kept = [(logger, logger.level, logger.propagate) for logger in (logs.TRACE, logs.PASSES, logs.COMPILE)]
    yield
    for logger, level, propagate in kept:
        logger.handlers.clear()
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.mark.usefixtures("_as_before")
def test_logs_say_what_is_traced_rewritten_and_compiled(capfd: pytest.CaptureFixture[str]) -> None:
    batch = make_batch("llama")
    policy = Policy.depthwise(batch.family.num_layers, mlp_depth=1)

    def run() -> str:
        torch._dynamo.reset()
        compiled = dop_compile.dop_compile(batch.model, policy, backend=lambda graph, inputs: graph.forward)
        with torch.no_grad():
            compiled(**batch.inputs, **batch.call_arguments())
        return capfd.readouterr().err

    others = [logging.getLogger(name).level for name in ("torch", "transformers", "root")]
    assert "[dop_compile" not in run()
    logs.configure("passes,compile")
    found = run()
    assert "[dop_compile.passes] # 01 annotate" in found
    assert "[dop_compile.compile] piece 0" in found
    assert "[dop_compile.trace]" not in found
    logs.configure("all")
    assert "[dop_compile.trace] LlamaModel:" in run()
    assert [logging.getLogger(name).level for name in ("torch", "transformers", "root")] == others
    with pytest.warns(UserWarning, match="fusion: no such log; known are trace, passes, compile and all"):
        logs.configure("fusion")
