"""What `dop_compile` returns, for type checkers and completion.

A compiled model is of the class of the model that was compiled, which can do more than is said here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from dop_compile.policy.policy import Policy

__all__ = ["CompiledModel"]

if TYPE_CHECKING:
    from transformers import GenerationMixin

    class CompiledModel(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
        """A model whose decoder skips what its policy prunes; of the class of the original, whose weights it shares."""

        dop: Any
        """What all its views share (`dop_compile.compiler.CompiledState`)."""
        dop_tier: str
        """Its own tier: what a call runs that names none."""
        tiers: Mapping[str, Policy]
        """All policies by name; the first is the default of what `dop_compile` returns."""

        def tier(self, name: str) -> CompiledModel:
            """A view with another default tier, usable from any thread.

            Raises:
                ValueError: there is no such tier.
            """
            raise NotImplementedError

        def forward(
            self,
            *args: Any,
            tier: str | None = None,
            visual_indices: Tensor | None = None,
            token_groups: Tensor | Callable[[Tensor], Tensor] | None = None,
            **kwargs: Any,
        ) -> Any:
            """The original's `forward` in a tier.

            Args:
                tier: its name; None: the view's, or the first.
                visual_indices: (batch, count) for the reducer "given".
                token_groups: (batch, tokens), or a function of `input_ids`; 0 text, 1 visual, 2 system.
            """

        def __call__(self, *args: Any, tier: str | None = None, **kwargs: Any) -> Any:
            """`forward`."""

        def generate(self, *args: Any, tier: str | None = None, **kwargs: Any) -> Any:
            """The original's `generate` in a tier; arguments as of `forward` and of the original's."""
else:

    class _Compiled(type):
        """Tells compiled models, which are of the originals' classes, from those."""

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, PreTrainedModel) and "dop_tier" in vars(instance)

    class CompiledModel(metaclass=_Compiled):
        """What `dop_compile` returns: for annotations and `isinstance`."""
