"""Measure what a model loses along each axis, on a few samples (DOP section 3.2.2, appendices C.1-C.2).

    divergences = measure_divergences(model, samples, resume="divergences.json")

Per sample the vision tower and the original decoder run once; every depth point goes on from the residual stream that
the original had there, and computes only what reaches the compared logits (`dop_compile.replay`).

Under `torchrun` every process takes its share of the samples and returns the same result.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from tqdm import tqdm

from dop_compile.compiler import dop_compile
from dop_compile.costs import DecoderDims, prefill_flops
from dop_compile.dropin import generate_under
from dop_compile.fingerprint import model_fingerprint
from dop_compile.policy import JsonScalar, Policy
from dop_compile.policy_json import choice, integer
from dop_compile.replay import Replay
from dop_compile.search.axes import DEPTH_AXES, SPLIT_AXES, VISUAL_TOKENS, axis_policy, check_points
from dop_compile.search.divergences import Divergences
from dop_compile.search.metrics import METRICS, is_right
from dop_compile.search.progress import Progress, check_header

__all__ = ["SampleMeter", "measure_divergences", "measure_policies"]

ANSWERS = "answers"
"""Where a sample keeps its right answers, beside the model's inputs."""


class SampleMeter:
    """One sample prepared for comparisons: how far the model under a policy is from the original on it.

    Args:
        compiled: a compiled model.
        sample: what the model's `forward` takes; `answers` (a sequence of strings) where the metric needs them.
        metric: a name in `METRICS`.
        depths: where depth-wise policies may go on from.
        tokens: for "forced_kl", how many of the original's tokens are compared.
        decode: token ids to text, for "accuracy_drop".

    Raises:
        ValueError: the metric needs answers, and the sample has none.
    """

    def __init__(
        self,
        compiled: Any,
        sample: Mapping[str, Any],
        metric: str = "top_k_kl",
        *,
        depths: Sequence[int] = (),
        tokens: int = 4,
        decode: Callable[[Tensor], str] | None = None,
    ):
        self._metric = METRICS[metric]
        self._compiled = compiled
        self._answers = sample.get(ANSWERS)
        self._inputs = {name: value for name, value in sample.items() if name != ANSWERS}
        self._decode = decode
        if isinstance(self._answers, str):
            raise TypeError(f"answers: expected a list of strings, got {self._answers!r}")
        if self._metric.compare is None and (not self._answers or decode is None):
            raise ValueError("accuracy_drop: expected samples with answers, and decode (token ids to text)")
        if "input_ids" not in self._inputs or self._inputs["input_ids"].shape[0] != 1:
            raise ValueError("expected what the model's forward takes for one prompt: input_ids (1, tokens)")
        columns = self._inputs["input_ids"].shape[1]
        inputs, rows = self._inputs, 1
        if self._metric.forced and tokens > 1:
            inputs, rows = _forced(compiled, self._inputs, tokens - 1), tokens
        self._forced_tokens = rows - 1
        self.replay = Replay(compiled, inputs, depths=depths, prompt_tokens=columns, rows=rows)
        self._right: bool | None = None

    @property
    def counts(self) -> tuple[int, int, int]:
        """System, visual and text tokens of the prompt, before reduction."""
        system, visual, text = self.replay.counts
        return system, visual, text - self._forced_tokens

    def flops(self, policy: Policy) -> int:
        """Decoder FLOPs of the run that `divergence` compares; of generated answers those of the prompt alone."""
        if self._metric.compare is None:
            return prefill_flops(self._compiled.config, policy, *self.counts)
        return self.replay.flops(policy)

    def divergence(self, policy: Policy) -> float:
        """Of the model under `policy` from the original."""
        if self._metric.compare is not None:
            rows = zip(self.replay.original, self.replay.logits(policy), strict=True)
            return float(np.mean([self._metric.compare(original, pruned) for original, pruned in rows]))
        if self._right is None:
            self._right = self._is_right(Policy.full(policy.num_layers))
        return float(self._right) - float(self._is_right(policy))

    def _is_right(self, policy: Policy) -> bool:
        assert self._decode is not None
        assert self._answers is not None
        output = generate_under(self._compiled, policy, **self._inputs, do_sample=False)
        return is_right(self._decode(output[0, self._inputs["input_ids"].shape[1] :]), self._answers)


def _forced(compiled: Any, inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The inputs with the original's first `count` greedy tokens behind the prompt."""
    full = Policy.full(next(iter(compiled.dop.tiers.values())).num_layers)
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    ids = generate_under(compiled, full, **inputs, **settings)
    columns = inputs["input_ids"].shape[1]
    longer = {**inputs, "input_ids": ids}
    for name, value in inputs.items():
        if name in ("input_ids", "token_groups"):  # the groups are those of the prompt
            continue
        if isinstance(value, Tensor) and value.shape == inputs["input_ids"].shape:
            fill = 1 if name == "attention_mask" else 0
            longer[name] = torch.nn.functional.pad(value, (0, ids.shape[1] - columns), value=fill)
    return longer


def _digest(sample: Mapping[str, Any]) -> str:
    found = hashlib.sha256()

    def note(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{tuple(value.shape)}{value.dtype}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, list | tuple):
            found.update(f"{type(value).__name__} {len(value)}".encode())
            for item in value:
                note(item)
        else:
            found.update(repr(value).encode())

    for name, value in sorted(sample.items()):
        found.update(name.encode())
        note(value)
    return found.hexdigest()


def _world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


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
        reducer, reducer_options, positions: as in `Policy`.
        backend: of `dop_compile`; compiling pays off for large models only.
        seed: recorded: the one that the samples were drawn with.
        resume: where the result is saved; every finished sample is kept beside it, and a later call goes on there. A
            result that is there already is returned.

    Raises:
        TypeError, ValueError: no samples, a sample without visual tokens, unknown axes, points or metrics; what is
            found at `resume` belongs to another measurement.
    """
    rank, world = _world()
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
    progress = Progress(path, header, rank)
    _barrier()  # all have read what is there before anybody writes
    if path is not None and path.exists():
        done = _finished(path, header, samples)
        if rank == 0:
            progress.remove()
        return done
    compiled = dop_compile(model, base, backend=backend)
    depths = sorted({int(point) for axis in axes if axis in DEPTH_AXES for point in chosen[axis]} - {layers})
    todo = [number for number in range(len(samples)) if number not in progress.rows]
    finished = [number for number in progress.rows if number % world == rank]
    for number in finished:
        _check_same(samples[number], number, progress.rows[number]["digest"])
    with tqdm(
        desc="measuring", total=len(samples), initial=len(progress.rows), disable=rank > 0, file=sys.stderr
    ) as bar:
        for index, number in enumerate(todo):
            if index % world != rank:
                bar.update(rank == 0)
                continue
            sample = samples[number]
            meter = SampleMeter(compiled, sample, metric, depths=depths, tokens=tokens, decode=decode)
            progress.add(number, _measure(meter, sample, number, chosen, base))
            bar.update()
    rows = _gather(progress.rows, len(samples), chosen)
    result = _result(header, chosen, rows, model, base, metric, options, seed)
    if path is not None:
        if rank == 0:
            result.save(path)
            progress.remove()
        _barrier()
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
        policies = [axis_policy(axis, point, visual, base) for point in points]
        values[axis] = [meter.divergence(policy) for policy in policies]
        flops += sum(meter.flops(policy) for policy in policies)
    return {
        "digest": _digest(sample),
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
        _check_same(samples[number], number, digest)
    return found


def _check_same(sample: Mapping[str, Any], number: int, digest: str) -> None:
    if _digest(sample) != digest:
        raise ValueError(
            f"sample {number} is not the one that was measured before; go on with the same samples, or choose another "
            "file"
        )


def _barrier() -> None:
    if _world()[1] > 1:
        dist.barrier()


def _gather(
    rows: Mapping[int, dict[str, Any]], samples: int, chosen: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """All rows on every process. Rows that several processes have read from disk are counted once."""
    if _world()[1] == 1:
        return [rows[number] for number in range(samples)]
    width = 1 + 32 + 3 + 1 + sum(map(len, chosen.values()))
    table = torch.full((samples, width), -torch.inf, dtype=torch.float64)
    for number, row in rows.items():
        flat = [value for axis in chosen for value in row["values"][axis]]
        line = [float(number), *bytes.fromhex(row["digest"]), *row["counts"], row["prefills"], *flat]
        table[number] = torch.tensor(line, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        table = table.cuda()
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    found = []
    for line in table.cpu().tolist():
        values, start = {}, 37
        for axis, points in chosen.items():
            values[axis] = line[start : start + len(points)]
            start += len(points)
        digest = bytes(int(byte) for byte in line[1:33]).hex()
        found.append(
            {"digest": digest, "counts": [int(n) for n in line[33:36]], "prefills": line[36], "values": values}
        )
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


def measure_policies(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    policies: Sequence[Policy],
    *,
    metric: str = "top_k_kl",
    tokens: int = 4,
    decode: Callable[[Tensor], str] | None = None,
    backend: str = "eager",
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(policies, samples) joint divergence of whole policies from the original.

    Args: as `measure_divergences`.
    """
    choice("metric", metric, METRICS)
    if not len(samples):
        raise ValueError("samples: expected at least one, got none")
    if not len(policies):
        raise ValueError("policies: expected at least one, got none")
    compiled = dop_compile(model, {str(number): policy for number, policy in enumerate(policies)}, backend=backend)
    found = np.empty((len(policies), len(samples)))
    for number in tqdm(range(len(samples)), desc="measuring policies", leave=False, file=sys.stderr):
        meter = SampleMeter(compiled, samples[number], metric, tokens=tokens, decode=decode)
        found[:, number] = [meter.divergence(policy) for policy in policies]
    return found
