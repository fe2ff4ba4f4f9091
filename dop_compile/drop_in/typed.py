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
    from collections.abc import Sequence

    from transformers import GenerationMixin

    from dop_compile.drop_in.warmup import Warmup

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

        def warmup(
            self,
            *,
            batch_sizes: Sequence[int] = (1,),
            text_lengths: Sequence[int] | None = None,
            tiers: Sequence[str] | None = None,
            padded: bool = False,
            inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
            progress: bool = True,
        ) -> Warmup:
            """Generate three tokens for each kind of call named, so that later ones find what they need compiled.

            Nothing of the model or of torch's random state is changed by it. Gradients are off, as in `generate`;
            inference mode, autocast and training mode are those that it is called in, and hold for what is compiled.

            Args:
                batch_sizes: rows. Two kinds of code are compiled: for one row, and for any more.
                text_lengths: text tokens, one for all lengths being enough; None: 32, or those of `inputs`.
                tiers: names; None: all.
                padded: also batches whose rows have different lengths. Nothing more is compiled for these, but where
                    the decoder needs a mask.
                inputs: what `generate` takes for one prompt without padding, as the model's processor makes it, or
                    several, such as one with a picture and one without; None: system tokens, a picture and text, made
                    of the model's configuration.
                progress: whether a bar is shown on stderr.

            Returns:
                what was warmed, and what each took; `print` it for a table.

            Raises:
                TypeError, ValueError: no such tier, numbers below 1, `inputs` that are no prompt of one row, or a
                    configuration that does not say what a picture is.
            """
            raise NotImplementedError
else:

    class _Compiled(type):
        """Tells compiled models, which are of the originals' classes, from those."""

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, PreTrainedModel) and "dop_tier" in vars(instance)

    class CompiledModel(metaclass=_Compiled):
        """What `dop_compile` returns: for annotations and `isinstance`."""
