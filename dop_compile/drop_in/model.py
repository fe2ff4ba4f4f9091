"""The drop-in model: an object of the model's own class whose decoder is compiled.

Nothing of the original is changed and no weight is copied. The modules on the path from the model to its text decoder
are shallow copies with the same parameters and children; each call works on copies of its own (a *frame*).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dop_compile.drop_in.frame import CALL_ARGUMENTS, Frame, Session, presented_as
from dop_compile.drop_in.model_path import shallow_copy
from dop_compile.drop_in.presentation import present_tiers
from dop_compile.errors import UnsupportedUsageError
from dop_compile.policy import Policy
from dop_compile.tiers_file import save_policies

__all__ = ["drop_in", "generate_under"]

CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Ways into transformers' own server loop."""


def drop_in(state: Any, base: nn.Module, tier: str) -> Any:
    """An object of the model's class that runs `tier` unless a call names another.

    Adds to the class's own interface: `forward` and `generate` take `tier`, `visual_indices` and `token_groups`;
    `tier(name)` is a view with another default, usable from any thread; `dop` is the `CompiledState`, `dop_tier` the
    default tier and `tiers` all policies by name. `save_pretrained` writes the original model, and the tiers beside it.
    """
    view = shallow_copy(base, own_children=False)

    def session(kwargs: dict[str, Any]) -> Session:
        values = {name: kwargs.pop(name, None) for name in CALL_ARGUMENTS}
        chosen = values.pop("tier") or tier
        state.check_tier(chosen)
        return Session(chosen, **values)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return Frame(state, view, session(kwargs)).forward(*args, **kwargs)

    def generate(*args: Any, **kwargs: Any) -> Any:
        if view.forward is not own_forward:
            raise UnsupportedUsageError(
                "the forward of the compiled model was replaced, and generate would not call it; use a forward hook"
            )
        return Frame(state, view, session(kwargs)).generate(*args, **kwargs)

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

    def save_pretrained(directory: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("push_to_hub"):
            raise UnsupportedUsageError(
                "push_to_hub: call push_to_hub of the compiled model, which sends its tiers too"
            )
        saved = state.model_class.save_pretrained(view, directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            save_policies({tier: state.tiers[tier], **state.tiers}, directory)
        return saved

    own_forward = view.forward = presented_as(state.model_class.forward, forward)
    view.train = train
    for name in CONTINUOUS_BATCHING:
        setattr(view, name, no_continuous_batching)
    view.__deepcopy__ = view.__reduce_ex__ = cannot_copy
    view.generate = presented_as(state.model_class.generate, generate)
    view.save_pretrained = presented_as(state.model_class.save_pretrained, save_pretrained)
    view.tier = lambda name: drop_in(state, base, state.check_tier(name))
    view.dop = state
    view.dop_tier = tier
    present_tiers(view, state, tier)
    return view


def generate_under(compiled: Any, policy: Policy, **kwargs: Any) -> Any:
    """`compiled.generate` under a policy that is none of its tiers."""
    session = Session(compiled.dop_tier, kwargs.pop("visual_indices", None), kwargs.pop("token_groups", None))
    session.policy = policy
    return Frame(compiled.dop, compiled, session).generate(**kwargs)
