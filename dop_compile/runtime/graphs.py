"""Prefills that are captured in CUDA graphs: the second prefill of a kind is captured, and those after it are replayed.

On a fast GPU a pruned prefill of one prompt waits for Python: LLaVA-1.5-7B's at 28 % needs 7 ms of an H200 and 30 ms of
its host. A replayed graph needs one call. What it reads is copied into tensors of its own, and what it wrote - hidden
states, keys and values - out of them, so that nothing a caller holds is written twice.

A graph does the same operations on the same addresses. A *kind* of prefill is thus: one program, one division of the
tokens among groups and padding, inputs of the same shapes, and the same state of torch. Replaced or moved weights are
told by their addresses; changed modules and settings clear all (see `Structure`).
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.spellings import CACHE
from dop_compile.logs import COMPILE
from dop_compile.runtime.cache import PrunedCache, ReducedView
from dop_compile.runtime.direct import is_settings, torch_state
from dop_compile.runtime.layout import TokenLayout
from dop_compile.runtime.masks import MaskSelector
from dop_compile.runtime.program import Program, building

__all__ = ["GRAPHS", "CudaRecorder", "PrefillGraphs", "Recorder"]

GRAPHS = 16
"""How many captured prefills a compiled model keeps; the one that was not used for longest goes first."""
_SEEN = 1024
_INPUTS = frozenset({"inputs_embeds", "position_ids", "attention_mask", CACHE, "cache_view", "masks"})
_capturing = threading.Lock()


class Recorder(Protocol):
    """Captures operations on a device."""

    def check(self, device: torch.device) -> None:
        """Raises UnsupportedUsageError where nothing can be captured."""
        ...

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        """What `run` returns, and what does its operations again; its values are there after the first replay."""
        ...


class CudaRecorder:
    """CUDA graphs, which share one pool of memory: never two are replayed at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def check(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise UnsupportedUsageError(
                f"the model was compiled with cuda_graphs=True and is on {device}; move it to an NVIDIA GPU, or "
                "compile it without"
            )

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        with _capturing, torch.cuda.device(device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = run()
        return result, graph.replay


@dataclass(frozen=True)
class _Captured:
    """One captured prefill.

    Args:
        inputs: what it reads, by name.
        hidden, cache: what it writes.
        held: what else its operations refer to.
        places, addresses: where its weights are, and where they were when it was captured.
        settings: lists and tables of its modules, each with a copy of what it was then.
    """

    inputs: Mapping[str, Tensor]
    hidden: Tensor
    cache: PrunedCache
    replay: Callable[[], None]
    held: tuple[Any, ...]
    places: tuple[tuple[dict[str, Any], str], ...]
    addresses: tuple[int, ...]
    settings: tuple[tuple[Any, Any], ...]

    def holds(self) -> bool:
        """Whether all weights are where they were, and no setting has changed."""
        if any(setting != before for setting, before in self.settings):
            return False
        try:
            return _addresses(self.places) == self.addresses
        except (KeyError, AttributeError):
            return False

    def run(self, values: Mapping[str, Any], cache: PrunedCache) -> Tensor:
        for name, tensor in self.inputs.items():
            tensor.copy_(values[name])
        self.replay()
        for layer, stored in enumerate(self.cache.layers):
            if isinstance(stored, DynamicLayer) and stored.is_initialized:
                cache.store(cast(Tensor, stored.keys), cast(Tensor, stored.values), layer)  # which copies them
        return self.hidden.clone()


class PrefillGraphs:
    """The captured prefills of one compiled model; for any number of threads, one after another.

    Args:
        recorder: of CUDA graphs, if none is given.
        limit: how many are kept.
    """

    def __init__(self, recorder: Recorder | None = None, limit: int = GRAPHS):
        self.recorder: Recorder = recorder or CudaRecorder()
        self.replayed = 0
        self._limit = limit
        self._captured: OrderedDict[Any, _Captured] = OrderedDict()
        self._seen: OrderedDict[Any, bool] = OrderedDict()  # whether it may be captured
        self._told: set[str] = set()
        self._lock = threading.RLock()
        self._last: Any = None

    def __len__(self) -> int:
        return len(self._captured)

    def clear(self) -> None:
        """Forget all: modules have changed."""
        with self._lock:
            self._captured.clear()
            self._seen.clear()

    def run(
        self,
        program: Program,
        values: dict[str, Any],
        layout: TokenLayout,
        selector: Callable[[], MaskSelector],
        index: Callable[[Any], Any],
    ) -> Tensor:
        """What `program(values, index)` returns, and the same in the cache.

        Args:
            selector: makes one such as that in `values`.

        Raises:
            UnsupportedUsageError: the recorder is not for this device.
        """
        embeds: Tensor = values["inputs_embeds"]
        self.recorder.check(embeds.device)
        state = torch_state()
        reason = _refusal(program, values, layout, state)
        if reason is not None:
            self._tell(reason)
            return cast(Tensor, program(values, index))
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        kinds = tuple((name, value.shape, value.dtype) for name, value in tensors.items())
        tokens = (layout.codes.numpy().tobytes(), layout.requested.numpy().tobytes())
        key = (program, embeds.device, state, kinds, tokens)
        with self._lock:
            captured = self._known(key)
            if captured is None and self._seen.get(key, False):
                captured = self._capture(key, program, tensors, layout, selector, index)
            if captured is not None:
                self.replayed += 1
                with self._in_turn(embeds.device):
                    return captured.run(values, values[CACHE])
            self._seen.setdefault(key, True)
            while len(self._seen) > _SEEN:
                self._seen.popitem(last=False)
        return cast(Tensor, program(values, index))

    def _known(self, key: Any) -> _Captured | None:
        captured = self._captured.get(key)
        if captured is None:
            return None
        if not captured.holds():
            del self._captured[key]
            return None
        self._captured.move_to_end(key)
        return captured

    def _capture(
        self,
        key: Any,
        program: Program,
        tensors: Mapping[str, Tensor],
        layout: TokenLayout,
        selector: Callable[[], MaskSelector],
        index: Callable[[Any], Any],
    ) -> _Captured | None:
        inputs = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        missing = dict.fromkeys(_INPUTS - inputs.keys())
        device = inputs["inputs_embeds"].device

        def once() -> tuple[Tensor, PrunedCache]:
            cache = PrunedCache()
            own = {**missing, **inputs, CACHE: cache, "cache_view": ReducedView(0), "masks": selector()}
            return program(own, index), cache

        masks = _Masks()
        places, settings = _places(program), _settings(program)
        try:
            with self._in_turn(device):
                with building(masks.make):
                    once()  # whatever is made on first use is there then
                with building(masks.made):
                    (hidden, cache), replay = self.recorder.record(once, device)
        except RuntimeError as error:  # torch's own of whatever makes the host wait, experts for one
            self._seen[key] = False
            self._tell(f"its operations cannot be captured: {' '.join(str(error).split())[:200]}")
            return None
        held = (layout, program, masks)
        captured = _Captured(inputs, hidden, cache, replay, held, places, _addresses(places), settings)
        self._captured[key] = captured
        COMPILE.info("prefill of %d x %d tokens captured", *layout.codes.shape)
        while len(self._captured) > self._limit:
            self._captured.popitem(last=False)
        return captured

    @contextmanager
    def _in_turn(self, device: torch.device) -> Iterator[None]:
        """Behind what other streams still do with the tensors of graphs."""
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if self._last is not None:
            stream.wait_event(self._last)
        yield
        self._last = cast(Any, torch.cuda).Event()
        self._last.record(stream)

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            COMPILE.info("prefill not captured: %s", reason)


class _Masks:
    """The masks of a program, which are told by the division of its tokens: made once, outside of the graph.

    Hugging Face's builders read values, and while a graph is captured would make masks where there need be none.
    """

    def __init__(self) -> None:
        self._made: list[Any] = []
        self._next: Iterator[Any] = iter(())

    def make(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mask = function(*args, **kwargs)
        self._made.append(mask)
        self._next = iter(self._made)
        return mask

    def made(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return next(self._next)


def _refusal(program: Program, values: Mapping[str, Any], layout: TokenLayout, state: Any) -> str | None:
    """Why such a call runs as it does without graphs."""
    cache = values[CACHE]
    if state is None:
        return "gradients, autocast or a mode of torch are on"
    if layout.length == 1:
        return "one token"
    if cache is None:
        return "no cache is used"
    if cache.columns_seen or cache.layers:
        return "a later turn of a conversation"
    if program.sequences:
        return "layers with states"
    if unknown := values.keys() - _INPUTS:
        return f"the decoder also takes {', '.join(sorted(unknown))}"
    mask = values["attention_mask"]
    if mask is not None and not isinstance(mask, Tensor):
        return f"the mask is a {type(mask).__name__}"
    if not program.is_plain:
        return "modules of other packages, with hooks, or with more than settings in them"
    return None


def _places(program: Program) -> tuple[tuple[dict[str, Any], str], ...]:
    """Where the tensors are that a program's modules hold."""
    found: list[tuple[dict[str, Any], str]] = []
    for module in program.modules:
        for owner in (module._parameters, module._buffers, vars(module)):
            found.extend((owner, name) for name, value in owner.items() if isinstance(value, Tensor))
    return tuple(found)


def _settings(program: Program) -> tuple[tuple[Any, Any], ...]:
    """Lists and tables of a program's modules, with copies."""
    values = [value for module in program.modules for value in vars(module).values() if is_settings(value)]
    return tuple((value, copy.deepcopy(value)) for value in {id(value): value for value in values}.values())


def _addresses(places: tuple[tuple[dict[str, Any], str], ...]) -> tuple[int, ...]:
    return tuple([owner[name].data_ptr() for owner, name in places])
