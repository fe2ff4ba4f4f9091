"""Visual tokens that leave inside the decoder: ranked by what a layer sees, stage by stage.

A stage stands at a layer: there the visual tokens that are left are ranked, and those that are not kept take part in no
later layer. They are a token group of their own, `visual_until_L`, so that costs, passes and the cache treat them as
any other group; which tokens they are is known once layer L has run.

Sources: FastV (arXiv 2403.06764), PyramidDrop (2410.17247), FitPrune (2409.10197), SparseVLM (2410.04417), DART
(2502.11494); the policies of that name are made in `dop_compile.policy.baselines`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from dop_compile.checks import finite, integer, pairs, store

__all__ = ["Ranking", "Stage"]

ROUNDING = 1e-9


@dataclass(frozen=True)
class Stage:
    """How many visual tokens stay after layer `layer` (from 0): so many, or a fraction of those that entered.

    Give `tokens` (an integer >= 0) or `fraction` (0 to 1, rounded down to whole tokens), not both. Fewer tokens than
    asked for are all kept.
    """

    layer: int
    tokens: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        store(self, "layer", integer("ranking: layer of a stage", self.layer, low=0))
        where = f"ranking: stage at layer {self.layer}"
        if (self.tokens is None) == (self.fraction is None):
            raise ValueError(f"{where}: expected either tokens or fraction, got {self.tokens!r} and {self.fraction!r}")
        if self.tokens is not None:
            store(self, "tokens", integer(f"{where}: tokens", self.tokens, low=0))
        else:
            fraction = finite(f"{where}: fraction", self.fraction)
            if not 0 <= fraction <= 1:
                raise ValueError(f"{where}: fraction: expected 0 to 1, got {fraction}")
            store(self, "fraction", fraction)

    @property
    def group(self) -> str:
        """The group of the tokens that leave here."""
        return f"visual_until_{self.layer}"

    def count(self, entered: int) -> int:
        """How many of `entered` visual tokens stay."""
        if self.tokens is not None:
            return min(self.tokens, entered)
        assert self.fraction is not None
        return math.floor(self.fraction * entered + ROUNDING)  # 0.29 of 100 are 29


@dataclass(frozen=True)
class Ranking:
    """By what visual tokens are ranked inside the decoder, and where.

    Args:
        criterion: name of the ranking (`dop_compile.rankings.known()`).
        stages: in the order of layers, one per layer; later ones keep no more tokens than earlier ones, or more than
            are left, which keeps these.
        options: of the criterion.

    Raises:
        TypeError, ValueError: an unknown criterion or option, no stage, stages out of order.
    """

    criterion: str
    stages: tuple[Stage, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        options: Any = self.options
        store(self, "options", pairs("ranking: options", options))
        self._rule()
        stages = tuple(self.stages)
        if not stages or not all(isinstance(stage, Stage) for stage in stages):
            raise TypeError(f"ranking: stages: expected at least one Stage, got {self.stages!r}")
        layers = [stage.layer for stage in stages]
        if layers != sorted(set(layers)):
            raise ValueError(f"ranking: stages: expected increasing layers, each once, got {layers}")
        store(self, "stages", stages)

    def _rule(self) -> Any:
        """The criterion; ValueError for an unknown name or option."""
        from dop_compile.rankings import criterion  # which needs torch, as policies without rankings do not

        return criterion(self.criterion, dict(self.options))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of the tokens that leave, first to last."""
        return tuple(stage.group for stage in self.stages)

    def last_layer(self, group: str) -> int | None:
        """The last layer that a group takes part in; None for a group that no stage drops."""
        return next((stage.layer for stage in self.stages if stage.group == group), None)

    def counts(self, entered: int) -> dict[str, int]:
        """How many of `entered` visual tokens are of which group: `visual` are those that stay to the end."""
        left, counts = entered, {}
        for stage in self.stages:
            kept = min(left, stage.count(entered))
            counts[stage.group] = left - kept
            left = kept
        return {"visual": left, **counts}

    def __str__(self) -> str:
        stages = (f"{s.tokens if s.fraction is None else s.fraction:g} after {s.layer}" for s in self.stages)
        return f"{self.criterion}: {', '.join(stages)}"

    def check(self, policy: Any) -> None:
        """Raise ValueError where a policy prunes what a stage looks at, or has no layer after it."""
        looks_at = self._rule()
        if policy.salient_fraction is not None:
            raise ValueError("ranking: it cannot be combined with salient_fraction, which splits visual tokens too")
        for stage in self.stages:
            if stage.layer > policy.num_layers - 2:
                raise ValueError(
                    f"ranking: a stage at layer {stage.layer} of {policy.num_layers} leaves no layer after it; "
                    f"expected layers 0 to {policy.num_layers - 2}"
                )
            read = [(group, "mha_key_value") for group in sorted(looks_at.keys)]
            read += [(group, "mha_query") for group in sorted(looks_at.raters)]
            at = stage.layer + looks_at.reads_next
            where = "there" if at == stage.layer else f"in layer {at}"
            for group, module in read:
                if not policy.keeps(group, at, module):
                    raise ValueError(
                        f"ranking: the stage at layer {stage.layer} reads {module} of {group} tokens, which the policy "
                        f"prunes {where}; keep it or move the stage"
                    )

    def to_document(self) -> dict[str, Any]:
        """Plain values for JSON."""
        stages = [{"layer": s.layer, "tokens": s.tokens, "fraction": s.fraction} for s in self.stages]
        return {"criterion": self.criterion, "options": dict(self.options), "stages": stages}

    @classmethod
    def from_document(cls, document: Any) -> Ranking:
        """Strict reading of `to_document`'s values; TypeError or ValueError for anything else."""
        _fields("ranking", document, ("criterion", "options", "stages"))
        if not isinstance(document["stages"], list):
            raise TypeError("ranking.stages: expected a list")
        for stage in document["stages"]:
            _fields("ranking.stages", stage, ("layer", "tokens", "fraction"))
        options = cast("Iterable[tuple[str, Any]]", document["options"])
        return cls(document["criterion"], tuple(Stage(**s) for s in document["stages"]), pairs("options", options))


def _fields(where: str, value: Any, names: tuple[str, ...]) -> None:
    if not isinstance(value, Mapping) or set(value) != set(names):
        raise ValueError(f"{where}: expected an object with the fields {', '.join(names)}, got {value!r}")
