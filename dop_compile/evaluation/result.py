"""What a comparison found: every answer of every method, and what follows from them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dop_compile.checks import choice, integer
from dop_compile.documents import Format, keep, kept, parse, read_text, write_atomic
from dop_compile.evaluation.intervals import Difference, paired_difference
from dop_compile.evaluation.methods import ORIGINAL, RESIZE
from dop_compile.policy.policy import Policy

__all__ = ["Evaluation", "Measured", "Row", "Run"]

FORMAT = Format("dop_compile.evaluation", (1, 2, 3), "a file of an evaluation", "evaluate again")
_FIELDS = ("header", "environment", "summary", "tasks", "counts", "digests", "methods")
"""Version 1 did not say of which samples a result is; until version 2 all methods had been run at once."""


@dataclass(frozen=True)
class Run:
    """One method on one sample.

    Args:
        answer: what it said.
        right: whether that is one of the right answers.
        changed: whether the original said something else, by the same comparison.
        tokens: generated ones.
        flops: policy FLOPs of the decoder's prefill, by eq. 11 at the sample's token counts.
        executed_flops: of the tokens that entered, without work that reaches no output.
        kv_bytes: of keys and values after it.
        vision_ms, selection_ms, prefill_ms, decode_ms, memory_bytes: see `dop_compile.evaluation.answers.Answer`.
    """

    answer: str
    right: bool
    changed: bool
    tokens: int
    flops: int
    executed_flops: int
    kv_bytes: int
    vision_ms: float
    selection_ms: float
    prefill_ms: float
    decode_ms: float | None
    memory_bytes: int | None


@dataclass(frozen=True)
class Measured:
    """A method's name, budget and policy, and its runs, one per sample. The policy of the untouched model is None.

    `session` counts the calls of `evaluate` that added methods, from 0: times of different sessions are those of
    different moments. `digests` are SHA-256 of the inputs that the method has in place of the samples', if it has any.
    """

    name: str
    budget: float | None
    label: str
    policy: Policy | None
    runs: tuple[Run, ...]
    session: int = 0
    digests: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Row:
    """One method against the original.

    Args:
        label, name, budget: of the method.
        accuracy: per task, fractions.
        mean_accuracy: mean over tasks.
        relative_average: mean over tasks of accuracy / original's accuracy (the DOP paper's Rel. Avg.); None where the
            original answers nothing right in a task.
        difference: of `mean_accuracy` from the original's, with its confidence interval.
        changed: how many answers are not the original's.
        flops (policy FLOPs), executed_flops, kv_bytes: fractions of the original's, all summed over samples.
        vision_ms, selection_ms, prefill_ms, decode_ms: medians over samples; `decode_ms` per token after the first,
            None where no answer has two.
        memory_bytes: the largest peak; None where it is not known.
    """

    label: str
    name: str
    budget: float | None
    accuracy: Mapping[str, float]
    mean_accuracy: float
    relative_average: float | None
    difference: Difference
    changed: int
    flops: float
    executed_flops: float
    kv_bytes: float
    vision_ms: float
    selection_ms: float
    prefill_ms: float
    decode_ms: float | None
    memory_bytes: int | None


@dataclass(frozen=True)
class Evaluation:
    """Methods compared on the same samples; the untouched model is among them, and first.

    Args:
        header: what was measured: model, samples, methods, settings.
        environment: where (`dop_compile.evaluation.environment`); `memory` says what peak memory is.
        tasks: of each sample.
        counts: system, visual and text tokens of each sample, before reduction.
        methods: with their runs.
        digests: SHA-256 of each sample's inputs and answers; None in results of format version 1, which can be read
            and not gone on with.
    """

    header: Mapping[str, Any]
    environment: Mapping[str, Any]
    tasks: tuple[str, ...]
    counts: tuple[tuple[int, int, int], ...]
    methods: tuple[Measured, ...]
    digests: tuple[str, ...] | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the methods, in their order."""
        return tuple(method.label for method in self.methods)

    def method(self, label: str) -> Measured:
        """The method of that label.

        Raises:
            ValueError: there is none; the message suggests the nearest.
        """
        choice("method", label, self.labels)
        return self.methods[self.labels.index(label)]

    def right(self, label: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(samples,) whether each answer of a method is right."""
        return np.array([run.right for run in self.method(label).runs], dtype=bool)

    def accuracy(self, label: str) -> dict[str, float]:
        """Share of right answers by task, in the order in which tasks occur."""
        found, tasks = self.right(label), np.asarray(self.tasks)
        return {task: float(found[tasks == task].mean()) for task in dict.fromkeys(self.tasks)}

    def relative_average(self, label: str) -> float | None:
        """Mean over tasks of accuracy / original's accuracy; None where the original's is zero in a task."""
        own, base = self.accuracy(label), self.accuracy(ORIGINAL)
        if not all(base.values()):
            return None
        return sum(own[task] / base[task] for task in base) / len(base)

    def difference(self, first: str, second: str = ORIGINAL, *, task: str | None = None, **settings: Any) -> Difference:
        """Mean accuracy of one method less that of another, with a paired bootstrap interval.

        Args:
            first, second: labels of methods.
            task: of this task alone; None: the mean over tasks.
            settings: `resamples`, `confidence` and `seed` of `paired_difference`.

        Raises:
            ValueError: no such method or task.
        """
        if task is not None:
            choice("task", task, self.tasks)
        chosen = [number for number, name in enumerate(self.tasks) if task in (None, name)]
        tasks = [self.tasks[number] for number in chosen]
        own, other = self.right(first)[chosen].tolist(), self.right(second)[chosen].tolist()
        return paired_difference(own, other, tasks, **settings)

    def row(self, label: str) -> Row:
        """The summary of one method."""
        own, base = self.method(label), self.method(ORIGINAL).runs
        accuracy = self.accuracy(label)

        def share(field: str) -> float:
            spent, whole = (sum(getattr(run, field) for run in runs) for runs in (own.runs, base))
            return float(spent / whole)

        def median(field: str) -> float:
            return float(np.median([getattr(run, field) for run in own.runs]))

        decode = [run.decode_ms for run in own.runs if run.decode_ms is not None]
        memory = [run.memory_bytes for run in own.runs if run.memory_bytes is not None]
        return Row(
            label=label,
            name=own.name,
            budget=own.budget,
            accuracy=accuracy,
            mean_accuracy=sum(accuracy.values()) / len(accuracy),
            relative_average=self.relative_average(label),
            difference=self.difference(label),
            changed=sum(run.changed for run in own.runs),
            flops=share("flops"),
            executed_flops=share("executed_flops"),
            kv_bytes=share("kv_bytes"),
            vision_ms=median("vision_ms"),
            selection_ms=median("selection_ms"),
            prefill_ms=median("prefill_ms"),
            decode_ms=float(np.median(decode)) if decode else None,
            memory_bytes=max(memory, default=None),
        )

    def rows(self) -> list[Row]:
        """The summary of every method."""
        return [self.row(label) for label in self.labels]

    # --- JSON -----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Versioned JSON, the inverse of `from_json`; the summaries are in it for other readers."""
        document = {
            **FORMAT.header(),
            "header": dict(self.header),
            "environment": dict(self.environment),
            "summary": [dataclasses.asdict(row) for row in self.rows()],
            "tasks": self.tasks,
            "counts": self.counts,
            "digests": self.digests,
            "methods": [_method_document(method) for method in self.methods],
        }
        return json.dumps(document | kept(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "evaluation JSON") -> Evaluation:
        """Reading of `to_json` text.

        Raises:
            ValueError: starting with `where`, for anything else.
        """
        try:
            opened = FORMAT.open(parse(text))
            document, version = opened.take(_FIELDS), opened.version
            methods = tuple(_read_method(method, version) for method in document["methods"])
            # In version 2 they were also of the inputs that methods had of their own
            mixed = version == 2 and any(map(_has_own_inputs, methods))
            found = cls(
                document["header"],
                document["environment"],
                tuple(document["tasks"]),
                tuple((system, visual, text) for system, visual, text in document["counts"]),
                methods,
                None if version == 1 or mixed else _read_digests(document["digests"]),
            )
            found.check()
            keep(found, opened)
            return found
        except KeyError as error:
            raise ValueError(f"{where}: {error.args[0]}: the field is missing") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where}: {error}") from error

    def check(self) -> None:
        """Raises ValueError where the parts do not fit each other."""
        if not self.methods or self.methods[0].label != ORIGINAL:
            raise ValueError(f"methods: expected {ORIGINAL!r} first, got {', '.join(self.labels) or 'none'}")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"methods: expected labels that differ, got {', '.join(self.labels)}")
        sizes = {"counts": len(self.counts), **{method.label: len(method.runs) for method in self.methods}}
        if self.digests is not None:
            sizes["digests"] = len(self.digests)
        sizes |= {f"digests of {m.label}": len(m.digests) for m in self.methods if m.digests is not None}
        for name, size in sizes.items():
            if size != len(self.tasks) or not size:
                raise ValueError(f"{name}: expected one entry for each of {len(self.tasks)} samples, got {size}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to `path` atomically."""
        write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read what `save` wrote; ValueError naming the file for anything else."""
        return cls.from_json(read_text(path), os.fspath(path))


def _method_document(method: Measured) -> dict[str, Any]:
    return {
        "name": method.name,
        "budget": method.budget,
        "label": method.label,
        "policy": None if method.policy is None else json.loads(method.policy.to_json()),
        "session": method.session,
        "digests": method.digests,
        "runs": [dataclasses.asdict(run) for run in method.runs],
    }


def _has_own_inputs(method: Measured) -> bool:
    return RESIZE in (method.name, method.policy.reducer if method.policy is not None else None)


def _read_method(document: Mapping[str, Any], version: int) -> Measured:
    policy = document["policy"]
    later = version > 2
    return Measured(
        document["name"],
        document["budget"],
        document["label"],
        None if policy is None else Policy.from_json(json.dumps(policy)),
        read_runs(document["runs"]),
        integer("session", document["session"], low=0) if later else 0,
        _read_digests(document["digests"]) if later else None,
    )


def _read_digests(values: Any) -> tuple[str, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("digests: expected a list of texts, or null")
    return tuple(values)


def read_runs(documents: Sequence[Mapping[str, Any]]) -> tuple[Run, ...]:
    """Runs from JSON values; TypeError for unknown or missing fields."""
    return tuple(Run(**document) for document in documents)
