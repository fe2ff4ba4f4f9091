"""A device that is none: its tensors lie on the CPU, and whatever would make the host wait for a GPU is noted.

Noted are reads of values, copies to the host, blocking copies to the device, and operations whose result's size
depends on values. What asks for them is told by the innermost frame outside of torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import dop_compile

__all__ = ["Wait", "move_to_stand_in", "on_cpu", "stand_in_device", "waiting"]

aten = torch.ops.aten
_READS = {aten._local_scalar_dense.default: "value read", aten.equal.default: "torch.equal"}
_SIZED = {
    aten.nonzero.default: "nonzero",
    aten._unique2.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.unique_dim.default: "unique",
    aten.masked_select.default: "masked_select",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.bincount.default: "bincount",
}
_PROJECT = [Path(dop_compile.__file__).parent, *(Path(dop_compile.__file__).parent.parent / n for n in ("passes",))]
_waits: list[Wait] | None = None


@dataclass(frozen=True)
class Wait:
    """The host waits: why, where in the code, and whether that is this project's."""

    kind: str
    place: str
    ours: bool


class _Stand(Tensor):
    """A tensor on the stand-in device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _Stand:
        made: _Stand = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=stand_in_device(),
            requires_grad=False,
        )
        made.held = held
        return made

    def __init__(self, held: Tensor):
        pass

    def __repr__(self, **_: Any) -> str:
        return f"on the stand-in: {self.held!r}"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def stand_in_device() -> torch.device:
    if torch._C._get_privateuse1_backend_name() != "standin":
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend("standin")
    return torch.device("standin:0")


def on_cpu(value: Tensor) -> Tensor:
    """What a tensor holds; nobody waits for it."""
    return value.held if isinstance(value, _Stand) else value


def move_to_stand_in(model: nn.Module) -> None:
    """Put a model's weights there, in place."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                known = moved.setdefault(id(weight), nn.Parameter(_Stand(weight.detach()), requires_grad=False))
                module._parameters[name] = known
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _Stand(buffer)


@contextmanager
def waiting() -> Iterator[list[Wait]]:
    """Where the host waits while the block runs."""
    global _waits
    _waits = []
    try:
        with _Functions(), _Dispatch():
            yield _waits
    finally:
        _waits = None


def _note(kind: str) -> None:
    if _waits is None:
        return
    frame = sys._getframe(2)
    while frame.f_back is not None:
        file = Path(frame.f_code.co_filename)
        if "torch" not in file.parts and file != Path(__file__) and not file.name.startswith("<"):
            break
        frame = frame.f_back
    ours = any(file.is_relative_to(folder) or file.is_relative_to(folder.resolve()) for folder in _PROJECT)
    _waits.append(Wait(kind, f"{'/'.join(file.parts[-3:])}:{frame.f_lineno}", ours))


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == stand_in_device().type


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, spec = pytree.tree_flatten((args, kwargs))
    there = any(isinstance(value, _Stand) for value in flat)
    plain_args, plain = pytree.tree_unflatten([on_cpu(v) if isinstance(v, Tensor) else v for v in flat], spec)
    target = there
    if plain.get("device") is not None:
        target = _is_there(plain["device"])
        plain["device"] = torch.device("cpu")
    plain.pop("pin_memory", None)
    if function is aten._to_copy.default and kwargs.get("device") is not None:
        if there and not target:
            _note("copy to the host")
        elif target and not there and not kwargs.get("non_blocking"):
            _note("copy to the device")
        plain.pop("non_blocking", None)
    elif function is aten.copy_.default:
        _note_copy(args, kwargs)
    elif there and function in (_READS | _SIZED):
        _note((_READS | _SIZED)[function])
    elif there and function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        _note_indexing(args)
    result = function(*plain_args, **plain)
    if function in _READS or not target:
        return result
    if function._schema.name.endswith("_") and isinstance(args[0], _Stand):
        return args[0]
    return pytree.tree_map(lambda v: _Stand(v) if isinstance(v, Tensor) and not isinstance(v, _Stand) else v, result)


def _note_copy(args: Any, kwargs: dict[str, Any]) -> None:
    to, source = isinstance(args[0], _Stand), isinstance(args[1], _Stand)
    blocking = not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking")
    if to and not source and blocking:
        _note("copy to the device")
    elif source and not to:
        _note("copy to the host")


def _note_indexing(args: Any) -> None:
    indices = [index for index in args[1] if isinstance(index, Tensor)]
    if any(index.dtype == torch.bool for index in indices):
        _note("boolean index")
    if isinstance(args[0], _Stand) and any(not isinstance(index, _Stand) and index.dim() for index in indices):
        _note("copy to the device")


class _Dispatch(TorchDispatchMode):
    """Sees what makes tensors on the device from nothing."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Sees what does not come by the dispatcher: `tolist`, and tensors made of Python's numbers."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is Tensor.tolist and isinstance(args[0], _Stand):
            _note("value read")
            return args[0].held.tolist()
        if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            return _made(function, args, kwargs)
        return function(*args, **kwargs)


def _made(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    method = function is Tensor.new_tensor
    data, device = args[method], kwargs.get("device")
    if method and device is None and isinstance(args[0], _Stand):
        device = stand_in_device()
    if isinstance(data, Tensor):
        return data if device is None or _is_there(device) == isinstance(data, _Stand) else data.to(device)
    flat, spec = pytree.tree_flatten(data)
    for value in flat:
        if isinstance(value, _Stand):
            _note("value read")
    data = pytree.tree_unflatten([on_cpu(v).tolist() if isinstance(v, Tensor) else v for v in flat], spec)
    dtype = kwargs.get("dtype") or (args[0].dtype if method else None)
    if not _is_there(device):
        return torch.tensor(data, dtype=dtype, device=device or "cpu")
    _note("copy to the device")
    return _Stand(torch.tensor(data, dtype=dtype, device="cpu"))
