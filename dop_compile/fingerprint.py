"""One name for a model's configuration and weights, used by policies, measurements and manifests."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

__all__ = ["model_fingerprint"]

_SAMPLES_PER_TENSOR = 4096
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")


def _lasting(config: Any) -> Any:
    """A configuration without what does not belong to the model: precision, paths and versions, at every level."""
    if isinstance(config, dict):
        return {key: _lasting(value) for key, value in config.items() if key not in _VOLATILE}
    return config


def model_fingerprint(model: PreTrainedModel) -> str:
    """64 hexadecimal digits of SHA-256 over the configuration and up to 4,096 evenly spaced values of each weight.

    Values are compared in float32, so the same checkpoint loaded in another precision has another fingerprint only
    where rounding changes a sampled value. Weights on the meta device count by name and shape. Of a tensor parallel
    model every process must ask at once.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=str).encode())
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            if tensor.device.type == "meta" or not tensor.numel():
                continue
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # of all processes that share it
            flat = whole.reshape(-1)
            step = -(-flat.numel() // _SAMPLES_PER_TENSOR)
            digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()
