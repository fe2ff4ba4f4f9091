"""torch.compile: every block compiled once per kind, for all layers, tiers and lengths; inductor against eager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.exc import Unsupported, UserError

from dop_compile import Policy, compiler, dop_compile
from tests.conformance.table import EXACT
from tests.families import FAMILIES
from tests.support import ONE_IMAGE, make_batch

LAYERS = 4
SPLIT = Policy.depthwise(LAYERS, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=1)
JOINT = Policy.depthwise(LAYERS, mha_depth=3, mlp_depth=2, visual_tokens=5)
TIERS = {"split": SPLIT, "joint": JOINT, "100%": Policy.full(LAYERS)}


class CountingBackend:
    """A torch.compile backend that runs graphs as they are and counts compilations and runs."""

    def __init__(self) -> None:
        self.compiled = 0
        self.runs = 0

    def __call__(self, graph: fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def prompt(model: Any, before: int = 4, after: int = 5, rows: int = 1) -> dict[str, Tensor]:
    segments = [("text", before), ("image",), ("text", after)]
    inputs: dict[str, Tensor] = FAMILIES["llava"].make_inputs(model, [segments] * rows)
    return inputs


def pieces_run(compiled: Any, tier: str, inputs: dict[str, Tensor]) -> int:
    """Pieces of the program that a prefill of these inputs uses."""
    before = set(compiled.dop.programs)
    compiled(**inputs, tier=tier, logits_to_keep=1)
    (program,) = set(compiled.dop.programs) - before
    return len(program.pieces)


@torch.no_grad()
def test_every_piece_runs_compiled() -> None:
    backend = CountingBackend()
    model = FAMILIES["llava"].build()
    compiled = dop_compile(model, TIERS, backend=backend)
    for tier in TIERS:
        before = backend.runs
        expected = pieces_run(compiled, tier, prompt(model))
        assert backend.runs - before == expected > LAYERS


@torch.no_grad()
def test_layers_of_a_kind_share_one_compilation() -> None:
    counts = []
    for layers in (9, 18):
        torch._dynamo.reset()
        family = FAMILIES["llama"]
        config = family.config()
        config.num_hidden_layers = layers
        model = family.model_class(config).eval()
        backend = CountingBackend()
        policy = Policy.depthwise(layers, mha_depth=layers - 3, mlp_depth=3)
        compiled = dop_compile(model, policy, backend=backend)
        ids = torch.arange(20, 40)[None]
        compiled(ids, token_groups=(ids > 25).long() * (ids < 35).long(), logits_to_keep=1)
        counts.append(backend.compiled)
    assert counts[0] == counts[1]


@torch.no_grad()
def test_tiers_share_and_lengths_do_not_recompile() -> None:
    backend = CountingBackend()
    model = FAMILIES["llava"].build()
    compiled = dop_compile(model, TIERS, backend=backend)

    def converse(tier: str, before: int, after: int) -> None:
        out = compiled(**prompt(model, before, after), tier=tier, logits_to_keep=1)
        for _ in range(2):
            step = torch.full((1, 1), 20)
            out = compiled(step, past_key_values=out.past_key_values, tier=tier, logits_to_keep=1)

    for tier in TIERS:
        converse(tier, 4, 5)
    kinds, compilations = len(compiled.dop.library), backend.compiled
    assert compilations <= 2 * kinds, "at most one compilation a kind and phase"
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tier in TIERS:
            for before, after in ((3, 9), (8, 2), (6, 7)):
                converse(tier, before, after)
    assert (len(compiled.dop.library), backend.compiled) == (kinds, compilations)


def test_groups_and_requests_of_one_token_do_not_recompile() -> None:
    """torch.compile specialises sizes of one, and ways of autograd: each has a function of its own."""
    model = FAMILIES["llama"].build()
    compiled = dop_compile(model, Policy.depthwise(LAYERS, mha_depth=1, mlp_depth=1), backend=CountingBackend())
    sizes = [(3, 6, 5, 1), (1, 1, 5, 1), (3, 6, 1, 1), (3, 6, 5, 2), (4, 9, 8, 3), (1, 1, 9, 1)]
    with torch._dynamo.config.patch(recompile_limit=1):
        for mode in (torch.no_grad, torch.inference_mode):
            for system, visual, text, rows in sizes[: len(sizes) if mode is torch.no_grad else 1]:
                groups = torch.tensor([[2] * system + [1] * visual + [0] * text])
                with mode():
                    compiled(groups + 20, token_groups=groups, logits_to_keep=rows)


@torch.no_grad()
def test_second_tier_compiles_only_kinds_that_are_new() -> None:
    backend = CountingBackend()
    model = FAMILIES["llava"].build()
    compiled = dop_compile(model, {"a": JOINT, "b": JOINT.replace(visual_tokens=7)}, backend=backend)
    compiled(**prompt(model), tier="a", logits_to_keep=1)
    compilations = backend.compiled
    compiled(**prompt(model), tier="b", logits_to_keep=1)
    assert backend.compiled == compilations


def test_tiers_share_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """One per kind of inputs, whatever the tiers; their passes leave it as it was."""
    traced: list[tuple[Any, str]] = []

    def noted(*args: Any) -> Any:
        found = trace(*args)
        traced.append((found, str(found.graph)))
        return found

    trace = compiler.trace
    monkeypatch.setattr(compiler, "trace", noted)
    model = FAMILIES["llava"].build()
    compiled = dop_compile(model, TIERS, backend="eager")
    sample = prompt(model)
    with torch.no_grad():
        for tier in TIERS:
            compiled(**sample, tier=tier)
    assert len(compiled.dop.programs) >= len(TIERS)
    assert len({graph.inputs for graph, _ in traced}) == len(traced)
    assert all(str(graph.graph) == text for graph, text in traced)
    number = len(traced)
    model.get_decoder().norm.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        compiled(**sample, tier="100%")
    assert len(traced) == number + 1, "what was traced of other modules is forgotten"


@pytest.mark.conformance
@pytest.mark.parametrize(
    "name", ["gemma4", "llama4", "phi4_multimodal", "qwen3_vl_moe", "gpt_oss", "kimi_k25", "molmo2", "paligemma2"]
)
@torch.no_grad()
def test_all_kinds_of_blocks_can_be_compiled(name: str) -> None:
    batch = make_batch(EXACT[name])
    eager, compiled = (dop_compile(batch.model, SPLIT, backend=backend) for backend in ("eager", "aot_eager"))
    arguments = batch.inputs | batch.call_arguments()
    torch.testing.assert_close(compiled(**arguments).logits, eager(**arguments).logits)
    assert len(compiled.dop.library) > 5


@pytest.mark.conformance
@pytest.mark.parametrize("name", ["ernie4_5_vl_moe", "step3p7"])
@torch.no_grad()
def test_modules_that_branch_on_values_are_compiled_in_parts(name: str) -> None:
    """ERNIE's experts ask whether there are visual tokens, and Step's are called one by one."""
    batch = make_batch(EXACT[name], ONE_IMAGE)
    policy = Policy.full(LAYERS)
    backend = CountingBackend()
    expected = dop_compile(batch.model, policy, backend="eager")(**batch.inputs).logits
    actual = dop_compile(batch.model, policy, backend=backend)(**batch.inputs).logits
    torch.testing.assert_close(actual, expected)
    assert backend.runs > 3 * LAYERS
    whole = dop_compile(batch.model, policy, backend=backend, compile_options={"fullgraph": True})
    with pytest.raises((Unsupported, UserError), match=r"[Dd]ata-dependent"):
        whole(**batch.inputs)


@pytest.mark.inductor
@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.conformance)])
@torch.no_grad()
def test_inductor_equals_eager(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    inputs = family.make_inputs(model, [[("text", 4), ("image",), ("text", 5)]])
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = dop_compile(model, SPLIT)
        eager = dop_compile(model, SPLIT, backend="eager")
        actual, expected = (
            m.generate(**inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
            for m in (compiled, eager)
        )
    assert torch.equal(actual.sequences, expected.sequences)
    for a, b in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * len(compiled.dop.library)
