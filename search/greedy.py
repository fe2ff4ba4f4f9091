"""GSOP on a model: the order in which to prune the operations of its visual tokens (arXiv 2507.02909).

    order = greedy_order(model, samples, resume="order.json")
    order.policy(0.28)

The rules are those of `dop_compile.search.greedy_sort`. Every decision follows from the measured losses alone: they are
what is kept on disk, and what a search that goes on there replays. Under `torchrun` every process measures its share of
the samples and all take the same decisions.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from tqdm import tqdm

from dop_compile.checks import choice, integer
from dop_compile.compiler import dop_compile
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.policy.operations import Operation
from dop_compile.policy.policy import JsonScalar, Policy
from dop_compile.search.greedy_sort import GreedyRules, Measure, default_danger, greedy_sort
from dop_compile.search.meter import SampleMeter, resizing, sample_digest
from dop_compile.search.metrics import METRICS
from dop_compile.search.order import OperationOrder, check_counts
from dop_compile.search.processes import Team, barrier, gather, of_first, world
from dop_compile.search.progress import Progress, check_header

__all__ = ["greedy_order"]

MAX_LOSS = {"top_k_kl": 1.0, "kl": 1.0, "forced_kl": 1.0, "accuracy_drop": 0.3}
TOLERANCE = {"top_k_kl": 1e-3, "kl": 1e-3, "forced_kl": 1e-3, "accuracy_drop": 0.0}
DECIMALS = 6
"""Of a mean loss; the rest is rounding error, which shall not decide between operations that cost nothing."""
STREAMS = 8
"""Residual streams kept of each sample, where they are of use."""
PROGRAMS = 64
"""Compiled programs kept. Each policy is measured once, and a large decoder's program takes some megabytes."""


class _Samples:
    """This process's share of the samples, ready to be run under any policy; losses are means over all samples."""

    def __init__(self, compiled: Any, samples: Sequence[Mapping[str, Any]], metric: str, **options: Any):
        self._state, self._count, self._team = compiled.dop, len(samples), Team.of(compiled)
        self._meters: dict[int, SampleMeter] = {}
        own: dict[int, tuple[str, tuple[int, int, int]]] = {}
        for number in tqdm(
            self._team.share(samples), desc="preparing", leave=False, disable=not self._team.leader, file=sys.stderr
        ):
            sample = samples[number]
            meter = self._meters[number] = SampleMeter(
                compiled, sample, metric, resize=resizing(samples, number), **options
            )
            own[number] = sample_digest(sample), meter.counts
            if not meter.counts[1]:
                raise ValueError(
                    f"sample {number}: it has no visual tokens; leave it out, or pass token_groups with it"
                )
        whole = gather(own)
        self.digests = tuple(digest for digest, _ in whole)
        self.counts = tuple(counts for _, counts in whole)

    def __call__(self, policy: Policy) -> float:
        """The same number in every process, and whatever their number is."""
        if len(self._state.programs) > PROGRAMS:
            self._state._programs.clear()
        values = torch.zeros(self._count, dtype=torch.float64)
        for number, meter in self._meters.items():
            values[number] = meter.divergence(policy)
        if self._team.processes > 1:
            # Each entry is zero but in one process, so that the sum is exact
            values = values.cuda() if dist.get_backend() == "nccl" else values
            dist.all_reduce(values)
        # One process's: those that share a model might round differently, and must decide alike
        return float(of_first(lambda: round(float(np.mean(values.cpu().numpy())), DECIMALS)))


class _Replayed:
    """A measure that answers from finished evaluations as long as there are any, and keeps those that it makes."""

    def __init__(self, measure: Measure, path: Path | None, header: dict[str, Any], bar: Any):
        # The others follow what the first process has read, and write nothing
        self.progress: Progress = of_first(lambda: Progress(path, header))
        if world()[0] > 0:
            rows, self.progress = self.progress.rows, Progress(None, header)
            self.progress.rows = dict(rows)
        self._measure, self._path, self._bar, self._number = measure, path, bar, 0

    def __call__(self, policy: Policy) -> float:
        number, self._number = self._number, self._number + 1
        digest = hashlib.sha256(repr(sorted(policy.pruned)).encode()).hexdigest()[:16]
        if number not in self.progress.rows:
            self.progress.add(number, {"pruned": digest, "divergence": self._measure(policy)})
        row = self.progress.rows[number]
        if row["pruned"] != digest:
            raise ValueError(
                f"{self._path}: its finished evaluations are of another search (number {number} differs); remove its "
                "progress file to search again"
            )
        self._bar.update()
        self._bar.set_postfix(pruned=len(policy.pruned), loss=f"{row['divergence']:.3g}", refresh=False)
        return float(row["divergence"])


def greedy_order(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    *,
    metric: str = "top_k_kl",
    tokens: int = 4,
    decode: Callable[[Tensor], str] | None = None,
    salient_fraction: float | None = 0.25,
    reducer: str = "uniform",
    reducer_options: Mapping[str, JsonScalar] | None = None,
    danger: Iterable[tuple[str, int, str]] | None = None,
    free_layer: int | None = None,
    tolerance: float | None = None,
    max_loss: float | None = None,
    steps: int = 15,
    backend: str = "eager",
    resume: str | os.PathLike[str] | None = None,
) -> OperationOrder:
    """The order in which to prune the operations of a model's visual tokens.

    All samples' prepared inputs stay in memory.

    Args:
        model, samples, metric, tokens, decode, backend: as `measure_divergences`.
        salient_fraction: how many of a sample's visual tokens are `visual_salient`, the first in the ranking of
            `reducer`; None does not split them, and then goes on from stored residual streams.
        danger: operations that are never pruned; None is `default_danger`. Shorthands as in `Policy.from_operations`.
        free_layer: the free-to-prune operations stand in this layer or later; None is L // 2 - 1, as published.
        tolerance: the mean loss that counts as none; None is 1e-3 nats, and 0 of accuracy drop.
        max_loss: the mean loss at which the order ends; None is 1 nat, and 0.3 of accuracy drop (published: 0.3 times
            the original's accuracy, to be given where that is not near 1).
        steps: strides that max_loss is divided into; 15 or 20 published. At most so many rankings are made.
        resume: where the result is saved; every finished evaluation is kept beside it, by the first process, and a
            later call goes on there. A result that is there already is returned.

    Raises:
        TypeError, ValueError: no samples, a sample without visual tokens, wrong values; what is found at `resume`
            belongs to another search.
    """
    if not len(samples):
        raise ValueError("samples: expected at least one, got none")
    choice("metric", metric, METRICS)
    tokens = integer("tokens", tokens, low=1)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    base = Policy(
        layers,
        reducer=reducer,
        reducer_options=tuple(sorted((reducer_options or {}).items())),
        salient_fraction=salient_fraction,
    )
    rules = GreedyRules(
        base=base,
        danger=default_danger(base) if danger is None else cast("frozenset[Operation]", danger),  # checked there
        free_layer=max(layers // 2 - 1, 0) if free_layer is None else free_layer,
        tolerance=TOLERANCE[metric] if tolerance is None else tolerance,
        max_loss=MAX_LOSS[metric] if max_loss is None else max_loss,
        steps=steps,
    )
    return _search(model, samples, rules, backend, None if resume is None else Path(resume), metric, tokens, decode)


def _search(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    rules: GreedyRules,
    backend: str,
    path: Path | None,
    metric: str,
    tokens: int,
    decode: Callable[[Tensor], str] | None,
) -> OperationOrder:
    rank, base = world()[0], rules.base
    settings = {name: getattr(rules, name) for name in ("free_layer", "tolerance", "max_loss", "steps")}
    options = (("tokens", tokens),) if METRICS[metric].forced else ()
    fingerprint = model_fingerprint(model)

    def header(digests: Sequence[str]) -> dict[str, Any]:
        return _header(fingerprint, digests, metric, options, base, rules.danger, settings)

    if path is not None and of_first(path.exists):
        done: OperationOrder = of_first(lambda: OperationOrder.load(path))
        own = done.model_fingerprint, done.digests, done.metric, done.metric_options, done.base, done.danger
        digests = gather({number: sample_digest(samples[number]) for number in Team.of(model).share(samples)})
        check_header(path, _header(*own, dict(done.settings)), header(digests))
        if rank == 0:
            Progress(path, header(digests)).remove()
        barrier()
        return done
    # A split policy never goes on from a stored stream: its ranking is made at the decoder's input
    depths = () if base.salient_fraction is not None else range(0, base.num_layers, -(-base.num_layers // STREAMS))
    compiled = dop_compile(model, base, backend=backend)
    meters = _Samples(compiled, samples, metric, depths=depths, tokens=tokens, decode=decode)
    check_counts(base, meters.counts)
    with tqdm(desc="sorting", unit=" evaluations", disable=rank > 0, file=sys.stderr) as bar:
        measure = _Replayed(meters, path, header(meters.digests), bar)
        found = greedy_sort(rules, measure)
    result = OperationOrder(
        model_fingerprint=fingerprint,
        dims=DecoderDims.from_config(model.config),
        metric=metric,
        metric_options=options,
        base=base,
        counts=meters.counts,
        digests=meters.digests,
        danger=rules.danger,
        free=found.free,
        free_divergence=found.free_divergence,
        steps=found.steps,
        evaluations=found.evaluations,
        settings=tuple(settings.items()),
        versions=(("torch", torch.__version__), ("transformers", transformers.__version__)),
    )
    if path is not None:
        if rank == 0:
            result.save(path)
            measure.progress.remove()
        barrier()
    return result


def _header(
    fingerprint: str,
    digests: Sequence[str],
    metric: str,
    options: tuple[tuple[str, JsonScalar], ...],
    base: Policy,
    danger: frozenset[Operation],
    settings: Mapping[str, JsonScalar],
) -> dict[str, Any]:
    """What makes two searches the same."""
    return {
        "fingerprint": fingerprint,
        "samples": list(digests),
        "metric": [metric, *options],
        "base": base.to_json(),
        "danger": sorted(danger),
        "settings": dict(settings),
    }
