"""What a model loses when one thing is pruned: the measured curves that every search works on."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dop_compile.costs import DecoderDims
from dop_compile.policy import JsonScalar, Policy
from dop_compile.policy_json import write_atomic
from dop_compile.search.axes import VISUAL_TOKENS

__all__ = ["Divergences"]

FORMAT = "dop_compile.divergences"
VERSION = 1


@dataclass(frozen=True)
class Divergences:
    """Divergence from the original per axis, point and sample.

    Args:
        model_fingerprint, model_type: of the model measured.
        dims: the decoder's sizes, which its FLOPs depend on; `dtype_bytes` of one weight.
        metric: name of the metric, and `metric_options`.
        base: a policy that prunes nothing and names reducer, options and positions.
        counts: system, visual and text tokens of every sample, before reduction; of transferred divergences, those of
            the target's prompts.
        points: per axis, descending; fractions, counts or depths as in `dop_compile.search.axes`.
        values: per axis (points, samples).
        digests: SHA-256 of each sample's inputs.
        prefills: decoder cost of the measurement per sample, in original prefills (FLOPs).
        seed: of whatever the samples or reducers drew.
        versions: of the packages.
    """

    model_fingerprint: str
    model_type: str
    dims: DecoderDims
    dtype_bytes: int
    metric: str
    metric_options: tuple[tuple[str, JsonScalar], ...]
    base: Policy
    counts: tuple[tuple[int, int, int], ...]
    points: Mapping[str, tuple[int | float, ...]]
    values: Mapping[str, tuple[tuple[float, ...], ...]]
    digests: tuple[str, ...]
    prefills: float
    seed: int
    versions: tuple[tuple[str, str], ...]

    @property
    def num_layers(self) -> int:
        return self.dims.num_layers

    @property
    def visual_tokens(self) -> int:
        """The largest sample's visual tokens: what the fraction 1 stands for."""
        return max(visual for _, visual, _ in self.counts)

    def array(self, axis: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(points, samples) of an axis.

        Raises:
            ValueError: the axis was not measured.
        """
        if axis not in self.values:
            raise ValueError(f"axis {axis!r} was not measured; these divergences have {', '.join(self.values)}")
        return np.asarray(self.values[axis], dtype=np.float64)

    @property
    def sample_tokens(self) -> tuple[int, ...]:
        """All visual tokens of each measured sample; transferred divergences count them on the target's scale."""
        if len(self.counts) == len(self.digests):
            return tuple(visual for _, visual, _ in self.counts)
        return (self.visual_tokens,) * len(self.digests)

    def coordinates(self, axis: str, visual: int | None = None) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(points + 1,) ascending, the full value last: layers, or tokens kept of `visual` (the largest sample's)."""
        scale = visual or self.visual_tokens
        points = self.points[axis]
        if axis == VISUAL_TOKENS:
            ascending = [p if isinstance(p, int) else p * scale for p in reversed(points)]
            return np.array([*ascending, scale], dtype=np.float64)
        return np.array([*reversed(points), self.num_layers], dtype=np.float64)

    def means(self, axis: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(points + 1,) mean over the samples, by `coordinates`; zero at the full value."""
        return np.append(self.array(axis).mean(axis=1)[::-1], 0.0)

    def subset(self, samples: list[int]) -> Divergences:
        """Those of some samples only; one may be named several times (bootstrap)."""
        values = {axis: tuple(tuple(row[i] for i in samples) for row in rows) for axis, rows in self.values.items()}
        digests = tuple(self.digests[i] for i in samples)
        own = len(self.counts) == len(self.digests)
        counts = tuple(self.counts[i] for i in samples) if own else self.counts
        return dataclasses.replace(self, values=values, counts=counts, digests=digests)

    # --- JSON -----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        document = {"format": FORMAT, "version": VERSION}
        for field in dataclasses.fields(self):
            document[field.name] = getattr(self, field.name)
        document["dims"] = dataclasses.asdict(self.dims)
        document["base"] = json.loads(self.base.to_json())
        document["metric_options"], document["versions"] = dict(self.metric_options), dict(self.versions)
        return json.dumps(document, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "divergences JSON") -> Divergences:
        """Strict reading of `to_json` text.

        Raises:
            ValueError: starting with `where`, and naming the field, for anything else.
        """
        try:
            document = json.loads(text)
            if not isinstance(document, dict) or document.get("format") != FORMAT:
                raise ValueError("format: this is not a file of divergences")
            if document.get("version") != VERSION:
                raise ValueError(f"version: this release reads version {VERSION}; measure the divergences again")
            names = {field.name for field in dataclasses.fields(cls)}
            if wrong := names.symmetric_difference(set(document) - {"format", "version"}):
                raise ValueError(f"{', '.join(sorted(wrong))}: unknown or missing")
            found = cls._from_document({name: document[name] for name in names})
            found.check()
            return found
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{where}: {error}") from error

    @classmethod
    def _from_document(cls, document: dict[str, Any]) -> Divergences:
        sizes = {name: tuple(v) if isinstance(v, list) else v for name, v in document["dims"].items()}
        return cls(
            **document
            | {
                "dims": DecoderDims(**sizes),
                "base": Policy.from_json(json.dumps(document["base"])),
                "counts": tuple(tuple(int(n) for n in row) for row in document["counts"]),
                "points": {axis: tuple(points) for axis, points in document["points"].items()},
                "values": {
                    axis: tuple(tuple(float(v) for v in row) for row in rows)
                    for axis, rows in document["values"].items()
                },
                "digests": tuple(document["digests"]),
                "metric_options": tuple(sorted(document["metric_options"].items())),
                "versions": tuple(sorted(document["versions"].items())),
            }
        )

    def check(self) -> None:
        """Raises ValueError where the parts do not fit each other."""
        samples = len(self.digests)
        if not samples or not self.counts:
            raise ValueError("digests, counts: expected at least one sample")
        if set(self.points) != set(self.values):
            raise ValueError(f"values: measured axes {sorted(self.values)}, but points of {sorted(self.points)}")
        for axis, rows in self.values.items():
            if [len(row) for row in rows] != [samples] * len(self.points[axis]):
                raise ValueError(f"values[{axis!r}]: expected {len(self.points[axis])} points x {samples} samples")
            if not np.isfinite(np.asarray(rows)).all():
                raise ValueError(f"values[{axis!r}]: expected finite numbers")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to `path` atomically: a failure leaves the previous file, and no other."""
        write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Divergences:
        """Read what `save` wrote; ValueError naming the file and the field for anything else."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{os.fspath(path)}: expected UTF-8 JSON text, {error}") from error
        return cls.from_json(text, os.fspath(path))
