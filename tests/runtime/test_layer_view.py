"""How a layer is read: under every attention implementation, in half precision, and at what cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dop_compile import Policy
from dop_compile.policy.ranking import Ranking, Stage
from dop_compile.rankings.attention import TextRaters
from dop_compile.rankings.pivots import Pivots
from dop_compile.runtime.call_rankings import observing
from dop_compile.runtime.layer_view import StoredLayerView
from dop_compile.spans import SELECTION, listening
from tests.families import FAMILIES
from tests.flash_stand_in import install
from tests.support import Batch, assert_rows_match, compile_eagerly, make_batch

CRITERIA = ("last_token", "next_layer", "text_raters", "product", "pivots")
NEXT_LAYER = functools.partial(Ranking, "last_token", options=(("next_layer", True),))
KERNELS = ("flash_attention_2", "flex_attention")


def two_stages(name: str, criterion: str, **changes: Any) -> Policy:
    stages = (Stage(0, fraction=0.7), Stage(2, tokens=2))
    ranking = Ranking(criterion, stages) if criterion != "next_layer" else NEXT_LAYER(stages)
    return Policy(FAMILIES[name].num_layers, ranking=ranking, **changes)


@pytest.mark.parametrize("reducer", [{}, {"visual_tokens": 5, "reducer": "uniform"}], ids=["all", "reduced"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "cohere2_vision"])
@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_every_kernel_ranks_alike(
    kernel: str, name: str, criterion: str, reducer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later stages, and any stage behind a reducer, stand where a kernel's mask is no longer the model's own."""
    install(monkeypatch, "flash_attention_2")
    batch, policy = make_batch(name), two_stages(name, criterion, **reducer)
    expected = compile_eagerly(batch.model, policy)(**batch.inputs).logits
    model = FAMILIES[name].build()
    model.get_decoder().config._attn_implementation = kernel
    with torch.compiler.set_stance("force_eager"):
        found = compile_eagerly(model, policy)(**batch.inputs).logits
    assert_rows_match(found, expected, batch.mask)


def views(batch: Batch, policy: Policy, look: Callable[[StoredLayerView], None]) -> None:
    with torch.no_grad(), observing(lambda _, view: look(view)):
        compile_eagerly(batch.model, policy)(**batch.inputs)


def test_rows_that_are_not_asked_for_may_be_nan() -> None:
    """In half precision a row of padding, whose scores are all the lowest number, overflows."""
    seen = 0

    def look(view: StoredLayerView) -> None:
        nonlocal seen
        text = view.group("text")
        expected = view.received(text)
        others = (~text).to(view.device).gather(1, view.layout.slots(view.queries)[0])
        view.query = view.query.masked_fill(others[:, None, :, None], float("nan"))
        assert torch.equal(view.received(text), expected)
        seen += 1

    views(make_batch("llava"), two_stages("llava", "last_token"), look)
    assert seen == 2


def test_the_text_that_rates_is_found_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    original = TextRaters.weights

    def weights(*args: Any) -> Tensor:
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(TextRaters, "weights", staticmethod(weights))
    batch = make_batch("llava")
    compiled = compile_eagerly(batch.model, two_stages("llava", "text_raters"))
    with torch.no_grad():
        compiled(**batch.inputs)
        assert len(made) == 1
        compiled(**batch.inputs)
    assert len(made) == 2
    assert torch.equal(made[0], made[1])


class Calls(TorchDispatchMode):
    """Notes every operation and the sizes of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.sizes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket._qualified_op_name)
        if isinstance(out, Tensor):
            self.sizes.add(tuple(out.shape))
        return out


def test_the_text_that_rates_costs_visual_times_text_tokens() -> None:
    batch = make_batch("llava", [[("text", 6), ("image",), ("text", 3)]])
    sizes: list[set[tuple[int, ...]]] = []

    def look(view: StoredLayerView) -> None:
        with Calls() as calls:
            TextRaters()(view, [2])
        sizes.append(calls.sizes)

    views(batch, two_stages("llava", "text_raters"), look)
    slots, text = batch.mask.shape[1], 3
    assert [(1, 9, text) in found for found in sizes] == [True, False]  # found once, for both stages
    assert not any(size[-2:] == (slots, slots) for found in sizes for size in found)


def test_pivots_read_no_number_back() -> None:
    """What an accelerator is waited for would be a read of a single number."""
    batch = make_batch("llava")
    seen = []

    def look(view: StoredLayerView) -> None:
        view.states()  # the layout's own numbers are the CPU's
        with Calls() as calls:
            Pivots()(view, [0, 3, 4])
        seen.append("aten::_local_scalar_dense" in calls.names)

    views(batch, two_stages("llava", "pivots"), look)
    assert seen == [False, False]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ranking_is_selection(criterion: str) -> None:
    batch = make_batch("llava")
    compiled = compile_eagerly(batch.model, two_stages("llava", criterion))
    told: list[tuple[str, bool]] = []
    with torch.no_grad(), listening(lambda name, begins: told.append((name, begins))):
        compiled(**batch.inputs)
    assert told == [(SELECTION, True), (SELECTION, False)] * 2
