"""Intermediates are freed behind their last use: a compiled prefill holds no more at once than the original's does."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dop_compile import Policy
from dop_compile.runtime import lines
from tests.families import FAMILIES
from tests.support import compile_eagerly, make_batch, shared_model

MOST = 1.02
"""Of the original's peak."""
TEXT = 400
NAMES = ("llava", "qwen2_5_vl", "gemma3", "llama")


class PeakBytes(TorchDispatchMode):
    """The most bytes at once that tensors made inside took: each storage from its first tensor to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        self.peak = max(self.peak, sum(self._live.values()))
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            weakref.finalize(storage, self._live.pop, key, None)


def test_the_peak_is_that_of_what_lives_at_once() -> None:
    with PeakBytes() as bytes_:
        kept = torch.zeros(10)
        for _ in range(5):
            kept = (kept + 1).view(2, 5).view(10)
        both = [kept * 2, kept[:3]]
    assert bytes_.peak == 3 * 40 - 40, "a sum beside what it is made of; then a product beside the last sum"
    assert both[1].untyped_storage().data_ptr() == kept.data_ptr()


@torch.no_grad()
def peaks(name: str, rows: int = 0) -> tuple[int, int]:
    """Of a prefill of one prompt, by the original and by the compiled model at 100 %; logits of `rows` or of all."""
    family = FAMILIES[name]
    model: Any = shared_model(name)
    compiled = compile_eagerly(model, Policy.full(family.num_layers), debug=False)
    row = [("text", TEXT)] if family.is_text_only else [("text", 4), ("image",), ("text", TEXT)]
    batch = make_batch(name, [row], model=model)
    found = []
    for one, more in ((model, {}), (compiled, batch.call_arguments())):
        one(**batch.inputs, **more, logits_to_keep=rows)  # what is kept after first calls: traces, rotary tables
        with PeakBytes() as bytes_:
            one(**batch.inputs, **more, logits_to_keep=rows)
        found.append(bytes_.peak)
    return found[0], found[1]


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_prefill_holds_no_more_than_the_originals(name: str, rows: int) -> None:
    original, compiled = peaks(name, rows)
    assert compiled <= MOST * original


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_freed_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its `del` a program fails the test above."""
    monkeypatch.setattr(lines, "_freed_behind", lambda steps: [[] for _ in steps])
    original, compiled = peaks(name)
    assert compiled > 1.2 * original
