"""The order in which GSOP prunes the operations of visual tokens; any budget is a prefix of it.

Source: GSOP (arXiv 2507.02909); FLOPs are those of DOP eq. 11.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import operator
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dop_compile.checks import choice, finite, integer, pairs, store
from dop_compile.documents import Format, keep, kept, parse, read_text, write_atomic
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.costs import LayerTokens, group_counts, layer_flops
from dop_compile.policy.operations import Operation
from dop_compile.policy.policy import JsonScalar, Policy
from dop_compile.policy.provenance import Provenance
from dop_compile.search.greedy_sort import KEY_VALUE, MLP, QUERY, Step, implied, visual_groups
from dop_compile.search.limits import InfeasibleBudgetError
from dop_compile.search.metrics import METRICS

__all__ = ["OperationOrder", "check_counts"]

FORMAT = Format("dop_compile.operation_order", (1,), "the file of an operation order", "search again")


def check_counts(base: Policy, counts: Sequence[tuple[int, int, int]]) -> None:
    """Raises ValueError where a visual group has no token in any sample (system, visual, text): it costs nothing."""
    if not counts:
        raise ValueError("counts: expected at least one sample, got none")
    for group in visual_groups(base):
        if not any(group_counts(base, *row)[group] for row in counts):
            raise ValueError(
                f"counts: no sample has tokens of the group {group}; use samples with more visual tokens, or another "
                f"salient_fraction than {base.salient_fraction}"
            )


@dataclass(frozen=True)
class OperationOrder:
    """Operations sorted by what pruning them costs; see `dop_compile.search.greedy_order`.

    Args:
        model_fingerprint: of the model measured.
        dims: the decoder's sizes, which its FLOPs depend on.
        metric: name of the metric, and `metric_options`.
        base: a policy that prunes nothing; names the reducer whose ranking splits the visual group, and the split.
        counts: system, visual and text tokens of every sample.
        digests: SHA-256 of each sample's inputs.
        danger: operations that no prefix prunes ("danger-to-prune").
        free: operations pruned first, all at once ("free-to-prune"), and the divergence with them pruned.
        steps: the order after them.
        evaluations: how many policies were measured, each on all samples.
        settings: of the search, as `greedy_order` takes them.
        versions: of the packages.

    Raises:
        TypeError, ValueError: parts that do not fit each other; the message names the field.
    """

    model_fingerprint: str
    dims: DecoderDims
    metric: str
    metric_options: tuple[tuple[str, JsonScalar], ...]
    base: Policy
    counts: tuple[tuple[int, int, int], ...]
    digests: tuple[str, ...]
    danger: frozenset[Operation]
    free: frozenset[Operation]
    free_divergence: float
    steps: tuple[Step, ...]
    evaluations: int
    settings: tuple[tuple[str, JsonScalar], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.model_fingerprint, str) or not self.model_fingerprint:
            raise TypeError(f"model_fingerprint: expected a non-empty string, got {self.model_fingerprint!r}")
        choice("metric", self.metric, METRICS)
        if not isinstance(self.dims, DecoderDims) or not isinstance(self.base, Policy):
            raise TypeError("dims, base: expected DecoderDims and a Policy")
        if not self.base.is_full:
            raise ValueError("base: expected a policy that prunes nothing")
        if self.base.num_layers != self.dims.num_layers:
            raise ValueError(f"base: it is for {self.base.num_layers} layers, dims are of {self.dims.num_layers}")
        store(self, "counts", tuple(_counts(row) for row in self.counts))
        check_counts(self.base, self.counts)
        store(self, "digests", tuple(self.digests))
        if len(self.digests) != len(self.counts) or not all(isinstance(digest, str) for digest in self.digests):
            raise ValueError(f"digests: expected {len(self.counts)} strings, one per sample")
        store(self, "free_divergence", finite("free_divergence", self.free_divergence))
        store(self, "evaluations", integer("evaluations", self.evaluations, low=0))
        for field in ("metric_options", "settings", "versions"):
            store(self, field, _scalars(field, getattr(self, field)))
        Provenance(versions=self.versions)
        self._check_operations()

    def _check_operations(self) -> None:
        for field in ("danger", "free"):
            store(self, field, self._operations(field, getattr(self, field)))
        if implied(self.free, self.base.num_layers) != self.free:
            raise ValueError("free: it lacks operations that it implies")
        steps = []
        for number, step in enumerate(self.steps):
            (operation,) = self._operations(f"steps[{number}]", [step.operation])
            steps.append(Step(operation, finite(f"steps[{number}].divergence", step.divergence)))
        store(self, "steps", tuple(steps))
        pruned = self.free
        for number, step in enumerate(self.steps):
            if step.operation in pruned:
                raise ValueError(f"steps[{number}]: {tuple(step.operation)!r} is pruned before it already")
            pruned = implied(pruned | {step.operation}, self.base.num_layers)
        if wrong := sorted(pruned & self.danger):
            raise ValueError(f"danger: the order prunes {tuple(wrong[0])!r}")

    def _operations(self, field: str, given: Collection[Operation]) -> frozenset[Operation]:
        try:
            found = self.base.replace(pruned=given).pruned
        except (TypeError, ValueError) as error:
            raise type(error)(f"{field}: {error}") from error
        if other := {op.group for op in found} - set(visual_groups(self.base)):
            raise ValueError(f"{field}: expected operations of visual tokens, got group {min(other)!r}")
        if len(found) != len(given):
            raise ValueError(f"{field}: expected operations by their full names, each once")
        return found

    @property
    def num_layers(self) -> int:
        return self.dims.num_layers

    @cached_property
    def prefixes(self) -> tuple[tuple[frozenset[Operation], float], ...]:
        """Pruned operations and divergence per prefix: nothing, the free set where there is one, then every step."""
        found: list[tuple[frozenset[Operation], float]] = [(frozenset(), 0.0)]
        if self.free:
            found.append((self.free, self.free_divergence))
        for step in self.steps:
            found.append((implied(found[-1][0] | {step.operation}, self.num_layers), step.divergence))
        return tuple(found)

    @cached_property
    def flops(self) -> tuple[float, ...]:
        """Eq. 11 FLOPs per prefix as a fraction of the original's, both means over the samples; strictly decreasing."""
        samples = [group_counts(self.base, *row) for row in self.counts]

        def layer(number: int, pruned: frozenset[Operation]) -> int:
            def taking_part(tokens: dict[str, int], module: str) -> int:
                return sum(n for group, n in tokens.items() if Operation(group, number, module) not in pruned)

            return sum(
                layer_flops(self.dims, LayerTokens(*(taking_part(s, m) for m in (QUERY, KEY_VALUE, MLP))), number)
                for s in samples
            )

        layers = [layer(number, frozenset()) for number in range(self.num_layers)]
        total = sum(layers)
        found = [1.0]
        for (before, _), (pruned, _) in itertools.pairwise(self.prefixes):
            for number in {op.layer for op in pruned - before}:
                layers[number] = layer(number, pruned)
            found.append(sum(layers) / total)
        return tuple(found)

    def policies(self) -> tuple[Policy, ...]:
        """The policy of every prefix, as in `prefixes`, with its own FLOPs fraction as the budget."""
        return tuple(self._policy(number, budget) for number, budget in enumerate(self.flops))

    def policy(self, budget: float) -> Policy:
        """The shortest prefix within a budget. A budget of 1 prunes nothing.

        Args:
            budget: fraction of the original's eq. 11 FLOPs at the samples' own token counts, 0 < budget <= 1.

        Raises:
            TypeError, ValueError: not such a fraction.
            InfeasibleBudgetError: the whole order costs more; the message says how much.
        """
        budget = finite("budget", budget)
        if not 0 < budget <= 1:
            raise ValueError(f"budget: expected a fraction of FLOPs kept, 0 < budget <= 1, got {budget}")
        number = bisect.bisect_left(self.flops, -budget * (1 + 1e-12), key=operator.neg)
        if number == len(self.flops):
            raise InfeasibleBudgetError(
                f"no prefix of the order meets the budget (budget: {budget:.4g} asked for, {self.flops[-1]:.4g} is the "
                "least); search again with a larger max_loss or a smaller danger set"
            )
        return self._policy(number, budget)

    def _policy(self, number: int, budget: float) -> Policy:
        pruned, divergence = self.prefixes[number]
        provenance = Provenance(
            self.model_fingerprint, budget, None, len(self.counts), self.versions, measured_divergence=divergence
        )
        return self.base.replace(pruned=pruned, provenance=provenance)

    # --- JSON -----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Versioned JSON text, the inverse of `from_json`."""
        document = FORMAT.header()
        for field in dataclasses.fields(self):
            document[field.name] = getattr(self, field.name)
        document["dims"] = self.dims.as_document()
        document["base"] = json.loads(self.base.to_json())
        for name in ("metric_options", "settings", "versions"):
            document[name] = dict(document[name])
        for name in ("danger", "free"):
            document[name] = sorted(document[name])
        document["steps"] = [[*step.operation, step.divergence] for step in self.steps]
        return json.dumps(document | kept(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "operation order JSON") -> OperationOrder:
        """Strict reading of `to_json` text.

        Raises:
            ValueError: starting with `where`, and naming the field, for anything else.
        """
        try:
            opened = FORMAT.open(parse(text))
            names = {field.name for field in dataclasses.fields(cls)}
            document = opened.take(names)
            if wrong := names.symmetric_difference(document):
                raise ValueError(f"{', '.join(sorted(wrong))}: unknown or missing")
            found = cls(**_fields({name: document[name] for name in names}))
            keep(found, opened)
            return found
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to `path` atomically: a failure leaves the previous file, and no other."""
        write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OperationOrder:
        """Read what `save` wrote; ValueError naming the file and the field for anything else."""
        return cls.from_json(read_text(path), os.fspath(path))


def _counts(row: object) -> tuple[int, int, int]:
    if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != 3:
        raise TypeError(f"counts: expected (system, visual, text) tokens, got {row!r}")
    system, visual, text = (integer("counts", count, low=0) for count in row)
    return system, visual, text


def _scalars(field: str, given: object) -> tuple[tuple[str, JsonScalar], ...]:
    found = pairs(field, given)
    for name, value in found:
        if not isinstance(value, str | int | float | None):
            raise TypeError(f"{field}[{name!r}]: expected a JSON scalar, got {type(value).__name__}")
    return found


def _fields(document: dict[str, Any]) -> dict[str, Any]:
    """What JSON has as lists and objects, as the values that the fields hold."""

    def array(name: str) -> list[Any]:
        if not isinstance(value := document[name], list):
            raise TypeError(f"{name}: expected a list, got {type(value).__name__}")
        return value

    for name in ("dims", "base", "metric_options", "settings", "versions"):
        if not isinstance(document[name], dict):
            raise TypeError(f"{name}: expected a JSON object, got {type(document[name]).__name__}")
    for number, step in enumerate(array("steps")):
        if not isinstance(step, list) or len(step) != 4:
            raise TypeError(f"steps[{number}]: expected [group, layer, module, divergence], got {step!r}")
    sizes: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in document["dims"].items()
    }
    return document | {
        "dims": DecoderDims(**sizes),
        "base": Policy.from_json(json.dumps(document["base"])),
        "counts": tuple(array("counts")),
        "digests": tuple(array("digests")),
        "danger": array("danger"),
        "free": array("free"),
        "steps": tuple(Step(Operation(*step[:3]), step[3]) for step in array("steps")),
    }
