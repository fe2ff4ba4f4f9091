"""Measure what a model loses along each axis, on a few samples (DOP section 3.2.2, appendices C.1-C.2).

    divergences = measure_divergences(model, samples, resume="divergences.json")

Per sample the vision tower and the original decoder run once; every depth point goes on from the residual stream that
the original had there, and computes only what reaches the compared logits (`dop_compile.replay`).

Under `torchrun` every process takes its share of the samples and returns the same result; processes that share a tensor
parallel model measure every sample together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from dop_compile.checks import choice, integer
from dop_compile.compiler import dop_compile
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.policy.policy import JsonScalar, Policy
from dop_compile.search.axes import DEPTH_AXES, SPLIT_AXES, VISUAL_TOKENS, axis_policy, check_points
from dop_compile.search.divergences import Divergences
from dop_compile.search.meter import SampleMeter, resizing, sample_digest
from dop_compile.search.metrics import METRICS
from dop_compile.search.processes import Team, barrier, gather
from dop_compile.search.progress import Progress, check_header, check_sample

__all__ = ["measure_divergences"]


def measure_divergences(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    *,
    axes: Sequence[str] = SPLIT_AXES,
    points: Mapping[str, Sequence[int | float]] | None = None,
    metric: str = "top_k_kl",
    tokens: int = 4,
    decode: Callable[[Tensor], str] | None = None,
    reducer: str = "uniform",
    reducer_options: Mapping[str, JsonScalar] | None = None,
    positions: str = "original",
    backend: str = "eager",
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
) -> Divergences:
    """Divergence along each axis, point and sample.

    Args:
        model: the untouched Hugging Face model, in eval mode.
        samples: per sample what the model's `forward` takes for a prompt of one row (as a processor returns it), and
            `answers` for metrics that need them. May be lazy: each is asked for once, by its number.
        axes, points: see `dop_compile.search.axes`; by default those that DOP and the split space need.
        metric: "top_k_kl" (DOP C.2), "kl", "forced_kl" (mean over the original's first `tokens` tokens) or
            "accuracy_drop" (DOP F.5; greedy answers, which `decode` turns into text).
        reducer, reducer_options, positions: as in `Policy`. For "resize" the samples need a method
            `resized(number, visual_tokens)`, which gives one from smaller pictures; the vision tower then runs once per
            point of `visual_tokens`.
        backend: of `dop_compile`; compiling pays off for large models only.
        seed: recorded: the one that the samples were drawn with.
        resume: where the result is saved; every finished sample is kept beside it, and a later call goes on there. A
            result that is there already is returned.

    Raises:
        TypeError, ValueError: no samples, a sample without visual tokens, unknown axes, points or metrics; what is
            found at `resume` belongs to another measurement.
    """
    team = Team.of(model)
    if not len(samples):
        raise ValueError("samples: expected at least one, got none")
    choice("metric", metric, METRICS)
    tokens = integer("tokens", tokens, low=1)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if not len(axes):
        raise ValueError("axes: expected at least one, got none")
    for axis in axes:
        choice("axes", axis, (*DEPTH_AXES, VISUAL_TOKENS))
    chosen = check_points(points, tuple(dict.fromkeys(axes)), layers)
    base = Policy.full(layers).replace(
        reducer=reducer, reducer_options=tuple(sorted((reducer_options or {}).items())), positions=positions
    )
    options = (("tokens", tokens),) if METRICS[metric].forced else ()
    header = _header(model_fingerprint(model), len(samples), metric, options, base, chosen, seed)
    path = None if resume is None else Path(resume)
    progress = Progress(path, header, team.rank, writes=team.writes)
    barrier()  # all have read what is there before anybody writes
    if path is not None and path.exists():
        done = _finished(path, header, samples)
        if team.leader:
            progress.remove()
        return done
    compiled = dop_compile(model, base, backend=backend)
    depths = sorted({int(point) for axis in axes if axis in DEPTH_AXES for point in chosen[axis]} - {layers})
    todo = [number for number in range(len(samples)) if number not in progress.rows]
    finished = [number for number in progress.rows if number % team.processes == team.rank]
    for number in finished:
        check_sample(number, sample_digest(samples[number]), progress.rows[number]["digest"])
    with tqdm(
        desc="measuring", total=len(samples), initial=len(progress.rows), disable=not team.leader, file=sys.stderr
    ) as bar:
        for index, number in enumerate(todo):
            if index % team.processes != team.rank:
                bar.update(team.leader)
                continue
            sample = samples[number]
            resize = resizing(samples, number)
            meter = SampleMeter(compiled, sample, metric, depths=depths, tokens=tokens, decode=decode, resize=resize)
            progress.add(number, _measure(meter, sample, number, chosen, base))
            bar.update()
    rows = gather(progress.rows)
    result = _result(header, chosen, rows, model, base, metric, options, seed)
    if path is not None:
        if team.leader:
            result.save(path)
            progress.remove()
        barrier()
    return result


def _measure(
    meter: SampleMeter,
    sample: Mapping[str, Any],
    number: int,
    chosen: Mapping[str, Sequence[int | float]],
    base: Policy,
) -> dict[str, Any]:
    system, visual, text = meter.counts
    if not visual:
        raise ValueError(f"sample {number}: it has no visual tokens; leave it out, or pass token_groups with it")
    values: dict[str, list[float]] = {}
    flops = whole = meter.replay.original_flops
    for axis, points in chosen.items():
        values[axis] = []
        for point in points:
            policy = axis_policy(axis, point, visual, base)
            values[axis].append(meter.divergence(policy))
            flops += meter.flops(policy)
    return {
        "digest": sample_digest(sample),
        "counts": [system, visual, text],
        "prefills": flops / whole,
        "values": values,
    }


def _header(
    fingerprint: str,
    samples: int,
    metric: str,
    options: tuple[tuple[str, JsonScalar], ...],
    base: Policy,
    points: Mapping[str, Sequence[int | float]],
    seed: int,
) -> dict[str, Any]:
    """What makes two measurements the same, but for the samples."""
    return {
        "fingerprint": fingerprint,
        "samples": samples,
        "metric": [metric, *options],
        "base": base.to_json(),
        "points": {axis: list(values) for axis, values in points.items()},
        "seed": seed,
    }


def _finished(path: Path, header: dict[str, Any], samples: Sequence[Mapping[str, Any]]) -> Divergences:
    """The result at `path`, if it is that of this measurement."""
    found = Divergences.load(path)
    settings = (found.metric, found.metric_options, found.base, found.points, found.seed)
    check_header(path, _header(found.model_fingerprint, len(found.digests), *settings), header)
    for number, digest in enumerate(found.digests):
        check_sample(number, sample_digest(samples[number]), digest)
    return found


def _result(
    header: Mapping[str, Any],
    chosen: Mapping[str, tuple[int | float, ...]],
    rows: Sequence[Mapping[str, Any]],
    model: Any,
    base: Policy,
    metric: str,
    options: tuple[tuple[str, JsonScalar], ...],
    seed: int,
) -> Divergences:
    counted = [point for point in chosen.get(VISUAL_TOKENS, ()) if isinstance(point, int)]
    visual = {row["counts"][1] for row in rows}
    if counted and len(visual) > 1:
        raise ValueError(
            f"points['visual_tokens']: the samples have from {min(visual)} to {max(visual)} visual tokens; give "
            "fractions (numbers from 0 to 1) instead of counts"
        )
    result = Divergences(
        model_fingerprint=str(header["fingerprint"]),
        model_type=str(model.config.model_type),
        dims=DecoderDims.from_config(model.config),
        dtype_bytes=model.dtype.itemsize,
        metric=metric,
        metric_options=options,
        base=base,
        counts=tuple((row["counts"][0], row["counts"][1], row["counts"][2]) for row in rows),
        points=chosen,
        values={axis: tuple(zip(*(row["values"][axis] for row in rows), strict=True)) for axis in chosen},
        digests=tuple(row["digest"] for row in rows),
        prefills=float(np.mean([row["prefills"] for row in rows])),
        seed=seed,
        versions=(("torch", torch.__version__), ("transformers", transformers.__version__)),
    )
    result.check()
    return result
