"""What is known of a published policy, beside the policy itself."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from dop_compile.zoo.geometry import Geometry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["PREFIX", "Method", "PublishedModel", "PublishedPolicy"]

PREFIX = "zoo:"
"""Begins the name of a published policy where a file is expected: zoo:llava-1.5-7b/28%."""


@dataclass(frozen=True)
class PublishedModel:
    """A model that policies were published for.

    Args:
        name: as `Policy.published` takes it.
        checkpoint: its weights in the form of transformers, on the hub.
        geometry: how its configuration is told.
        visual_tokens: of one picture before reduction, as published.
        picture: what picture has so many.
    """

    name: str
    checkpoint: str
    geometry: Geometry
    visual_tokens: int
    picture: str


@dataclass(frozen=True)
class Method:
    """How policies were found.

    Args:
        name: of the method, with the reducer.
        paper: title and number.
        assumes: what has to be as in the publication for its numbers to hold, as sentences.
    """

    name: str
    paper: str
    assumes: str


@dataclass(frozen=True)
class PublishedPolicy:
    """One published policy, and what was published of it. Nothing was measured again.

    Args:
        model: whose policy it is.
        budget: as `Policy.published` takes it: the published percentage of FLOPs, or the method's name.
        method: how it was found.
        source: where in the publication it stands.
        flops: the published fraction of the original's FLOPs; None where it is not known.
        accuracy: the published mean of benchmarks relative to the original; None where it is not known.
        accuracy_source: where that stands; "" where it is not known.
    """

    model: PublishedModel
    budget: str
    method: Method
    source: str
    flops: float | None = None
    accuracy: float | None = None
    accuracy_source: str = ""

    @property
    def name(self) -> str:
        """The model's name, as `Policy.published` takes it."""
        return self.model.name

    @property
    def reference(self) -> str:
        """As commands take it in place of a file: "zoo:llava-1.5-7b/28%"."""
        return f"{PREFIX}{self.name}/{self.budget}"

    @property
    def assumes(self) -> str:
        """What has to be as in the publication for its numbers to hold."""
        return self.method.assumes

    @property
    def document(self) -> str:
        """The policy as versioned JSON text, which `Policy.from_json` reads."""
        file = resources.files("dop_compile.zoo") / "policies" / f"{self.name}-{self.budget.rstrip('%')}.json"
        return file.read_text(encoding="utf-8")

    def check(self, config: PreTrainedConfig) -> None:
        """Raises ValueError for a configuration that is not like the model's, saying where they differ."""
        if differences := self.model.geometry.differences(config):
            raise ValueError(
                f"{self.reference} was published for {self.model.checkpoint}, and this model is another: "
                f"{', '.join(differences)}; search a policy for it, or see which were published for a model like it: "
                "dop_compile.zoo.published_for(config), dop-compile zoo --model MODEL"
            )
