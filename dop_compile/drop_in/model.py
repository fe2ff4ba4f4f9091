"""The drop-in model: an object of the model's own class whose decoder is compiled.

Nothing of the original is changed and no weight is copied. The modules on the path from the model to its text decoder
are shallow copies with the same parameters and children; each call works on copies of its own (a *frame*).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dop_compile.drop_in.frame import CALL_ARGUMENTS, Frame, Session, presented_as
from dop_compile.drop_in.presentation import present_tiers
from dop_compile.drop_in.saving import check_push, save_compiled
from dop_compile.drop_in.warmup import Warmup, warm_up
from dop_compile.drop_in.wrapped_forward import OwnForward, forget_preparation
from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.copies import own, shallow_copy
from dop_compile.hf.names import CONTINUOUS_BATCHING
from dop_compile.policy.policy import Policy

__all__ = ["drop_in", "generate_under"]


def drop_in(state: Any, source: nn.Module, tier: str, outer: OwnForward | None = None) -> Any:
    """An object of the model's class that runs `tier` unless a call names another.

    `source` is the module that it shares everything with, and whose changes it follows: the compiled model's copy of
    the original, or another view.

    Adds to the class's own interface: `forward` and `generate` take `tier`, `visual_indices` and `token_groups`;
    `tier(name)` is a view with another default, usable from any thread; `warmup` makes the first calls; `dop` is the
    `CompiledState`, `dop_tier` the default tier and `tiers` all policies by name. `save_pretrained` writes the original
    model, and the tiers beside it.
    """
    view = shallow_copy(source, own_children=False)
    forget_preparation(view)
    state.views.add(view, source)

    def session(kwargs: dict[str, Any]) -> Session:
        values = {name: kwargs.pop(name, None) for name in CALL_ARGUMENTS}
        chosen = values.pop("tier") or tier
        state.check_tier(chosen)
        return Session(chosen, **values)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return Frame(state, view, session(kwargs)).forward(*args, **kwargs)

    def generate(*args: Any, **kwargs: Any) -> Any:
        frame = Frame(state, view, session(kwargs))
        frame.run_within(own_forward.around)
        return frame.generate(*args, **kwargs)

    def train(mode: bool = True) -> Any:
        state.original.train(mode)
        view.training = mode
        return view

    def no_continuous_batching(*_: Any, **__: Any) -> Any:
        raise UnsupportedUsageError(
            "continuous batching packs requests into one row and pages the cache of every layer alike, which a pruned "
            "cache is not; call generate with padded batches"
        )

    def cannot_copy(*_: Any) -> Any:
        raise TypeError(
            "a compiled model cannot be copied or pickled: it shares the original's weights. Save it with "
            "save_pretrained, or copy the original and compile again"
        )

    def save_pretrained(directory: Any, *args: Any, **kwargs: Any) -> None:
        save_compiled(view, state, tier, directory, *args, **kwargs)

    def warmup(
        *,
        batch_sizes: Sequence[int] = (1,),
        text_lengths: Sequence[int] | None = None,
        tiers: Sequence[str] | None = None,
        padded: bool = False,
        inputs: Any = None,
        progress: bool = True,
    ) -> Warmup:
        return warm_up(view, state, batch_sizes, text_lengths, tiers, padded, inputs, progress)

    def push_to_hub(*args: Any, **kwargs: Any) -> Any:
        check_push(view, state)
        return state.model_class.push_to_hub(view, *args, **kwargs)

    own_forward = OwnForward(view, forward, outer)
    view.forward = own_forward.presented
    view.train = own(train)
    for name in CONTINUOUS_BATCHING:
        setattr(view, name, own(no_continuous_batching))
    view.__deepcopy__ = view.__reduce_ex__ = own(cannot_copy)
    view.generate = presented_as(state.model_class.generate, generate)
    view.save_pretrained = presented_as(state.model_class.save_pretrained, save_pretrained)
    view.push_to_hub = presented_as(state.model_class.push_to_hub, push_to_hub)
    view.warmup = own(warmup)
    view.tier = own(lambda name: drop_in(state, view, state.check_tier(name), own_forward))
    view.dop = state
    view.dop_tier = tier
    present_tiers(view, state, tier)
    return view


def generate_under(compiled: Any, policy: Policy, **kwargs: Any) -> Any:
    """`compiled.generate` under a policy that is none of its tiers."""
    session = Session(compiled.dop_tier, kwargs.pop("visual_indices", None), kwargs.pop("token_groups", None))
    session.policy = policy
    return Frame(compiled.dop, compiled, session).generate(**kwargs)
