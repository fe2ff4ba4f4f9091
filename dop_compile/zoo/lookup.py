"""Published policies by name and budget, and by a model's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dop_compile.checks import choice
from dop_compile.zoo.catalogue import LEFT_OUT, MODELS, POLICIES
from dop_compile.zoo.entries import PREFIX, PublishedPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["find", "published_for", "published_policies", "split_reference"]


def published_policies(name: str | None = None) -> tuple[PublishedPolicy, ...]:
    """What has been published, or of it what is for one model.

    Raises:
        TypeError, ValueError: there is no such model; the message lists those that there are.
    """
    if name is None:
        return POLICIES
    choice("name", name, (model.name for model in MODELS))
    return tuple(policy for policy in POLICIES if policy.name == name)


def find(name: str, budget: str) -> PublishedPolicy:
    """The published policy of that name and budget.

    Raises:
        TypeError, ValueError: there is none; the message lists what there is.
    """
    by_budget = {policy.budget: policy for policy in published_policies(name)}
    if isinstance(budget, str) and (reason := LEFT_OUT.get((name, budget))):
        raise ValueError(f"budget: {name} has no {budget!r}: {reason}; expected one of {', '.join(by_budget)}")
    return by_budget[choice(f"budget of {name}", budget, by_budget)]


def split_reference(reference: str) -> tuple[str, str]:
    """Name and budget of "zoo:NAME/BUDGET"; ValueError for anything else."""
    name, separator, budget = reference.removeprefix(PREFIX).partition("/")
    if not reference.startswith(PREFIX) or not separator:
        raise ValueError(f"expected {PREFIX}NAME/BUDGET, such as {POLICIES[0].reference}, got {reference!r}")
    return name, budget


def published_for(config: PreTrainedConfig) -> tuple[str, ...]:
    """Names of the models whose sizes a Hugging Face configuration has: their policies fit it.

    Weights are not compared: a fine-tune has its model's sizes, and how good the policies are there is not known.
    """
    return tuple(model.name for model in MODELS if not model.geometry.differences(config))
