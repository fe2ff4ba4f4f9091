"""One name for a model's configuration and weights, used by policies, measurements and manifests."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from dop_compile.hf.adapters import effective_names

__all__ = ["model_fingerprint"]

_SAMPLES_PER_TENSOR = 4096
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")


def _lasting(config: Any) -> Any:
    """A configuration without what does not belong to the model: precision, paths and versions, at every level."""
    if isinstance(config, dict):
        return {key: _lasting(value) for key, value in config.items() if key not in _VOLATILE}
    return config


def _written(value: Any) -> str:
    """What is not JSON, without the address that some objects are written with."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


def model_fingerprint(model: PreTrainedModel, state_dict: Mapping[str, Any] | None = None) -> str:
    """64 hexadecimal digits of SHA-256 over the configuration and up to 4,096 evenly spaced values of each weight.

    Values are compared in float32, so the same checkpoint loaded in another precision has another fingerprint only
    where rounding changes a sampled value. A weight of another kind (quantised) counts by the tensors that it consists
    of, so a quantised model is another than the one it was made of. So is a model with adapters: those that are active
    count, whatever they are called; those that are off, merged or not active do not. Weights without values (on the
    meta device), and of classes that do not say what they consist of, count by name and shape. Of a tensor parallel
    model every process must ask at once.

    Args:
        model: the model.
        state_dict: weights to count in place of the model's own.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=_written).encode())
    weights = model.state_dict() if state_dict is None else state_dict
    with torch.no_grad():
        for name, own in sorted((name, own) for own, name in effective_names(model, weights).items()):
            for label, tensor in _parts(name, weights[own]):
                digest.update(label.encode())
                if tensor is not None:
                    digest.update(_samples(tensor).tobytes())
    return digest.hexdigest()


def _parts(name: str, value: Any) -> Iterator[tuple[str, Tensor | None]]:
    """A label for each tensor that an entry of a state dict consists of, and the tensor where it has values."""
    if not isinstance(value, Tensor):  # extra state of a module
        for number, leaf in enumerate(tree_leaves(value)):
            if isinstance(leaf, Tensor):
                yield from _parts(f"{name}.{number}", leaf)
            else:
                yield f"{name}.{number}={_written(leaf)}", None
    elif is_lazy(value):
        yield name, None
    elif value.is_nested and value.layout is torch.strided:
        for number, part in enumerate(value.unbind()):
            yield from _parts(f"{name}.{number}", part)
    elif value.device.type == "meta" or not value.numel() or isinstance(value, FakeTensor):
        yield name + _shape(value), None
    elif isinstance(value, DTensor):
        yield from _parts(name, value.full_tensor())  # of all processes that share it
    elif is_traceable_wrapper_subclass(value):
        inner, context = value.__tensor_flatten__()
        yield name + _shape(value) + _context(context), None
        for attribute in inner:
            yield from _parts(f"{name}.{attribute}", getattr(value, attribute))
    elif value.layout is not torch.strided:
        yield name + _shape(value), value.to_dense()
    elif not value.data_ptr():  # made of other tensors, and does not say of which
        yield f"{name}{_shape(value)}{type(value).__name__}", None
    else:  # without what a class of weights (that of bitsandbytes, for one) does where it is indexed
        yield name + _shape(value), value.as_subclass(Tensor)


def _shape(tensor: Tensor) -> str:
    return str(tuple(size if type(size) is int else "ragged" for size in tensor.shape))


def _context(context: Any) -> str:
    """What a tensor of another kind knows besides tensors, without what is not set: later versions may know more."""
    if not isinstance(context, dict):
        return _written(context)
    return _written({key: value for key, value in sorted(_lasting(context).items()) if value})


def _samples(tensor: Tensor) -> Any:
    """Evenly spaced values in float32; no copy of the whole is made where the values lie one after another or not."""
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    elif not _is_number(tensor.dtype):
        tensor = tensor.view(torch.uint8)
    step = -(-tensor.numel() // _SAMPLES_PER_TENSOR)
    if tensor.is_contiguous():
        found = tensor.view(-1)[::step]
    else:
        places = torch.arange(0, tensor.numel(), step, device=tensor.device)
        found = tensor[torch.unravel_index(places, tensor.shape)] if tensor.dim() else tensor.reshape(1)
    return found.float().cpu().numpy()


@functools.cache
def _is_number(dtype: torch.dtype) -> bool:
    """Whether values can be read as numbers; several to a byte cannot."""
    try:
        torch.empty(1, dtype=dtype).float()
    except (RuntimeError, NotImplementedError):
        return False
    return True
