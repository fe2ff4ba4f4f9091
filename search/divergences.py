"""What a model loses when one thing is pruned: the measured curves that every search works on."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dop_compile.checks import choice, finite, integer, pairs
from dop_compile.documents import Format, keep, kept, parse, read_text, write_atomic
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.policy import JsonScalar, Policy
from dop_compile.search.axes import AXES, VISUAL_TOKENS, tokens_kept

__all__ = ["Divergences"]

FORMAT = Format("dop_compile.divergences", (1, 2), "a file of divergences", "measure the divergences again")
"""Version 1 did not say what was transferred: divergences of as many prompts as samples were taken as measured."""


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
        transferred: whether these are another model's, and `counts` therefore not those of the measured samples.
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
    transferred: bool = False

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
        if self.transferred:
            return (self.visual_tokens,) * len(self.digests)
        return tuple(visual for _, visual, _ in self.counts)

    def coordinates(self, axis: str, visual: int | None = None) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(points + 1,) ascending, the full value last: layers, or tokens kept of `visual` (the largest sample's)."""
        scale = visual or self.visual_tokens
        points = self.points[axis]
        if axis == VISUAL_TOKENS:
            # A sample keeps whole tokens; between those of another model is interpolated (DOP C.5)
            ascending = [p * scale if self.transferred else tokens_kept(p, scale) for p in reversed(points)]
            return np.array([*ascending, scale], dtype=np.float64)
        return np.array([*reversed(points), self.num_layers], dtype=np.float64)

    def means(self, axis: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(points + 1,) mean over the samples, by `coordinates`; zero at the full value."""
        return np.append(self.array(axis).mean(axis=1)[::-1], 0.0)

    def subset(self, samples: list[int]) -> Divergences:
        """Those of some samples only; one may be named several times (bootstrap). A target's prompts stay all."""
        values = {axis: tuple(tuple(row[i] for i in samples) for row in rows) for axis, rows in self.values.items()}
        digests = tuple(self.digests[i] for i in samples)
        counts = self.counts if self.transferred else tuple(self.counts[i] for i in samples)
        return dataclasses.replace(self, values=values, counts=counts, digests=digests)

    # --- JSON -----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        document = FORMAT.header()
        for field in dataclasses.fields(self):
            document[field.name] = getattr(self, field.name)
        document["dims"] = self.dims.as_document()
        document["base"] = json.loads(self.base.to_json())
        document["metric_options"], document["versions"] = dict(self.metric_options), dict(self.versions)
        return json.dumps(document | kept(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "divergences JSON") -> Divergences:
        """Strict reading of `to_json` text.

        Raises:
            ValueError: starting with `where`, and naming the field, for anything else.
        """
        try:
            opened = FORMAT.open(parse(text))
            document = opened.take(_READERS)
            if opened.version == 1:
                _add_transferred(document)
            if wrong := set(_READERS).symmetric_difference(document):
                raise ValueError(f"{', '.join(sorted(wrong))}: unknown or missing")
            found = cls(**{name: _read(name, document[name]) for name in _READERS})
            found.check()
            keep(found, opened)
            return found
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from error

    def check(self) -> None:
        """Raises ValueError where the parts do not fit each other."""
        samples = len(self.digests)
        if not samples or not self.counts:
            raise ValueError("digests, counts: expected at least one sample")
        if not self.transferred and len(self.counts) != samples:
            raise ValueError(f"counts: expected one entry for each of {samples} samples, got {len(self.counts)}")
        if not self.visual_tokens:
            raise ValueError("counts: expected visual tokens, got samples without any")
        self.base.check_layers(self.num_layers)
        for axis, points in self.points.items():
            largest: float = 1 if axis == VISUAL_TOKENS else self.num_layers
            if axis == VISUAL_TOKENS and all(isinstance(point, int) for point in points):
                largest = np.inf
            bounds = (largest, *points, 0)
            if not points or list(bounds) != sorted(bounds, reverse=True):
                raise ValueError(f"points[{axis!r}]: expected descending values from 0 to {largest}, got {points}")
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
        return cls.from_json(read_text(path), os.fspath(path))


# --- fields of the JSON document ----------------------------------------------------------------------------------


def _add_transferred(document: dict[str, Any]) -> None:
    """The field that version 1 left to be guessed."""
    if "transferred" in document:
        raise ValueError("transferred: unknown or missing")
    counts, digests = document.get("counts"), document.get("digests")
    document["transferred"] = isinstance(counts, list) and isinstance(digests, list) and len(counts) != len(digests)


def _read(name: str, value: Any) -> Any:
    try:
        return _READERS[name](value)
    except (TypeError, ValueError, AttributeError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(name) else f"{name}: {text}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r}")
    return value


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {value!r}")
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {value!r}")
    return value


def _by_axis(value: Any, read: Callable[[Any], Any]) -> dict[str, tuple[Any, ...]]:
    return {choice("axis", axis, AXES): tuple(map(read, _list(items))) for axis, items in _mapping(value).items()}


def _point(value: Any) -> int | float:
    return integer("point", value, low=0) if isinstance(value, int) else finite("point", value)


def _counts(value: Any) -> tuple[int, int, int]:
    system, visual, text = (integer("tokens", number, low=0) for number in _list(value))
    return system, visual, text


def _dims(value: Any) -> DecoderDims:
    sizes: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in _mapping(value).items()}
    return DecoderDims(**sizes)


_READERS: dict[str, Callable[[Any], Any]] = {
    "model_fingerprint": _text,
    "model_type": _text,
    "dims": _dims,
    "dtype_bytes": lambda value: integer("dtype_bytes", value, low=1),
    "metric": _text,
    "metric_options": lambda value: pairs("metric_options", _mapping(value)),
    "base": lambda value: Policy.from_json(json.dumps(value)),
    "counts": lambda value: tuple(map(_counts, _list(value))),
    "points": lambda value: _by_axis(value, _point),
    "values": lambda value: _by_axis(value, lambda row: tuple(finite("value", number) for number in _list(row))),
    "digests": lambda value: tuple(map(_text, _list(value))),
    "prefills": lambda value: finite("prefills", value),
    "seed": lambda value: integer("seed", value, low=-(2**63)),
    "versions": lambda value: tuple((name, _text(version)) for name, version in pairs("versions", _mapping(value))),
    "transferred": _flag,
}
