"""Hugging Face's attention kernels: which there are, and what a decoder is given in their place."""

from __future__ import annotations

import functools
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import masking_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dop_compile.errors import UnsupportedModelError
from dop_compile.hf.rebuilt import names_in

__all__ = [
    "ATTENTION_REGISTRY",
    "MASK_BUILDERS",
    "KernelMask",
    "eager_attention",
    "following_runs",
    "is_attention",
    "is_flash",
]

ATTENTION_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
"""The name by which modeling files look a kernel up."""
MASK_BUILDERS = frozenset(
    function
    for name, function in vars(masking_utils).items()
    if name.startswith("create_") and inspect.isfunction(function)
)
"""What a decoder makes its masks with: one node of the graph each."""


def is_attention(module: nn.Module) -> bool:
    """Whether a module's forward looks its kernel up in the registry."""
    return ATTENTION_REGISTRY in names_in(type(module).forward)


def eager_attention(module: nn.Module) -> Callable[..., Any] | None:
    """The attention function with weights that the module's own file defines; None where there is none."""
    found: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return found if callable(found) else None


class KernelMask(ABC):
    """Stands in for the mask of a kernel that takes none: it calls the kernel itself."""

    @abstractmethod
    def attend(
        self, kernel: Callable[..., Any], module: Any, tensors: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the kernel returns for (query, key, value)."""


def is_flash(implementation: str) -> bool:
    """Whether an attention implementation is Hugging Face's interface to FlashAttention, with whatever kernel.

    Raises:
        UnsupportedModelError: the kernel aligns causality at the top left.
    """
    if ALL_ATTENTION_FUNCTIONS.get(implementation) is not flash_attention_forward:
        return False
    if flash_attn_supports_top_left_mask():  # type: ignore[no-untyped-call]
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} aligns causality at the top left here, which pruned queries "
            "cannot be given to; load the model with attn_implementation='sdpa'"
        )
    return True


@functools.cache
def following_runs(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of the attention interface; FlashAttention's also takes a `KernelMask`."""
    if kernel is not flash_attention_forward:
        return kernel

    @functools.wraps(kernel)
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if isinstance(mask, KernelMask):
            return mask.attend(kernel, module, (query, key, value), kwargs)
        return kernel(module, query, key, value, mask, **kwargs)

    return attention
