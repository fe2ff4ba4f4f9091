"""`dop-compile profile | greedy | report`: from samples to what was measured, and to pictures."""

from __future__ import annotations

import functools
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dop_compile.commands.inputs import check_backend, load_processor, load_vision_model, write_file
from dop_compile.commands.named_files import named_files
from dop_compile.commands.outputs import check_new, output_directory, output_file
from dop_compile.commands.usage import UsageError, one_line, usage_errors
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.policy.policy import Policy
from dop_compile.reports.table import POLICY_FLOPS
from dop_compile.search import report
from dop_compile.search.divergences import Divergences
from dop_compile.search.greedy import greedy_order
from dop_compile.search.joint import measure_accuracy, measure_policies
from dop_compile.search.measure import measure_divergences
from dop_compile.search.samples import Row, Samples, check_images, choose, read_data_set, read_jsonl
from dop_compile.zoo import PREFIX, find, split_reference

__all__ = [
    "decoder_of",
    "greedy_command",
    "model_and_samples",
    "model_of",
    "processes",
    "profile_command",
    "read_divergences",
    "report_command",
    "whole_policies",
]


def _rows(arguments: Namespace) -> list[Row]:
    source = Path(arguments.samples).expanduser()
    try:
        if source.is_file():
            rows = read_jsonl(source)
        elif source.suffix in (".jsonl", ".json"):
            raise UsageError(f"--samples {arguments.samples!r}: no such file")
        else:
            columns = {"image": arguments.image_column, "prompt": arguments.prompt_column}
            columns |= {"answers": arguments.answers_column, "task": getattr(arguments, "task_column", None)}
            rows = read_data_set(arguments.samples, split=arguments.split, **columns)
    except OSError as error:
        raise UsageError(f"--samples {arguments.samples!r}: {error.strerror or one_line(error)}") from error
    return check_images(choose(rows, arguments.count, arguments.seed), skip_bad=arguments.skip_bad)


def model_and_samples(arguments: Namespace) -> tuple[Any, Samples, Any]:
    """The model, the samples as its inputs, and its processor, as the options of `samples_options` name them."""
    with usage_errors():
        rows = _rows(arguments)
    processor = load_processor(arguments.model)
    if arguments.tensor_parallel and "WORLD_SIZE" not in os.environ:
        raise UsageError("--tensor-parallel: start several processes, for example by torchrun --nproc-per-node=2")
    model = load_vision_model(
        arguments.model, arguments.device, arguments.dtype, tensor_parallel=arguments.tensor_parallel
    )
    return model, Samples(rows, processor, device=model.device, dtype=model.dtype), processor


def decoder_of(processor: Any) -> Callable[[Any], str]:
    """From token ids to text."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


@contextmanager
def processes(arguments: Namespace) -> Iterator[int]:
    """The process group of `torchrun`, if it started this process; yields the rank."""
    if "WORLD_SIZE" not in os.environ:
        yield 0
        return
    cuda = arguments.device.startswith("cuda")
    if cuda:
        arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(arguments.device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def profile_command(arguments: Namespace) -> None:
    """Measure the divergences of a model and save them."""
    check_backend(arguments.backend)
    out = output_file(arguments.out)
    with processes(arguments) as rank:
        model, samples, processor = model_and_samples(arguments)
        settings: dict[str, Any] = {} if not arguments.axis else {"axes": tuple(arguments.axis)}
        with usage_errors():
            found = measure_divergences(
                model,
                samples,
                metric=arguments.metric,
                tokens=arguments.tokens,
                decode=decoder_of(processor),
                reducer=arguments.reducer,
                positions=arguments.positions,
                backend=arguments.backend,
                seed=arguments.seed,
                resume=out,
                **settings,
            )
        if rank == 0:
            print(report.describe(found))
            print(f"\nsaved {out}; next: dop-compile search {out} --budget 0.28 --out policies")


def read_divergences(path: str) -> Divergences:
    """What `profile` wrote."""
    try:
        return Divergences.load(path)
    except OSError as error:
        raise UsageError(f"divergences {path!r}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(one_line(error)) from error


def model_of(arguments: Namespace, divergences: Divergences) -> tuple[Any, Samples, Any]:
    """What `model_and_samples` gives, if it is the model that the divergences are of."""
    check_backend(arguments.backend)
    found = model_and_samples(arguments)
    fingerprint = model_fingerprint(found[0])
    if fingerprint != divergences.model_fingerprint:
        raise UsageError(
            f"--model {arguments.model!r}: the divergences are of another model (fingerprint "
            f"{divergences.model_fingerprint[:12]}, this model has {fingerprint[:12]}); name theirs, or measure this "
            "one by dop-compile profile"
        )
    return found


def whole_policies(
    arguments: Namespace,
    divergences: Divergences,
    loaded: Any,
    resume: Callable[[Sequence[Policy]], Path] | None = None,
) -> Callable[[Sequence[Policy]], np.ndarray[Any, np.dtype[np.float64]]]:
    """(policies, samples) divergences of whole policies, by the metric of the divergences, on the samples named.

    `resume` says beside which file the finished samples of such policies are kept.
    """
    model, samples, processor = loaded
    tokens = dict(divergences.metric_options).get("tokens", 1)

    def measure(policies: Sequence[Policy]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return measure_policies(
            model,
            samples,
            list(policies),
            metric=divergences.metric,
            tokens=tokens if isinstance(tokens, int) else 1,
            decode=decoder_of(processor),
            backend=arguments.backend,
            resume=None if resume is None else resume(policies),
        )

    return measure


def greedy_command(arguments: Namespace) -> None:
    """Sort operations and save their order."""
    check_backend(arguments.backend)
    out = output_file(arguments.out)
    with processes(arguments) as rank:
        model, samples, processor = model_and_samples(arguments)
        with usage_errors():
            order = greedy_order(
                model,
                samples,
                metric=arguments.metric,
                decode=decoder_of(processor),
                reducer=arguments.reducer,
                backend=arguments.backend,
                max_loss=arguments.max_loss,
                steps=arguments.steps,
                resume=out,
            )
        if rank == 0:
            flops = order.flops
            print(
                f"{len(order.steps)} steps, from {flops[0]:.1%} of the {POLICY_FLOPS} (nothing lost) to "
                f"{flops[-1]:.1%}, in {order.evaluations} evaluations; saved {out}"
            )
            for budget in arguments.budget:
                with usage_errors():
                    print(f"{budget:.0%}: {order.policy(budget)}")


def report_command(arguments: Namespace) -> None:
    """Draw curves, trade-off and operation maps, and write the tables."""
    divergences = read_divergences(arguments.divergences)
    rows = []
    for name, policy in named_files("--policy", arguments.policy, functools.partial(_policy_of, divergences)):
        rows.append(report.policy_row(divergences, name, policy))
    rows.sort(key=lambda row: -row.flops)
    out = output_directory(arguments.out)
    names = ["divergences.png", *(["pareto.png", "operations.png"] if rows else []), "report.txt"]
    check_new([out / name for name in names], arguments.force)
    with processes(arguments) if arguments.model else nullcontext(0) as rank:
        if arguments.model:
            rows = _measured(arguments, divergences, rows)
    if rank > 0:
        return
    figures = {"divergences.png": report.curves_figure(divergences)}
    text = report.describe(divergences)
    if rows:
        figures["pareto.png"] = report.pareto_figure(rows, divergences.metric)
        figures["operations.png"] = report.tier_maps_figure(rows, divergences.visual_tokens)
        text = f"{text}\n\n{report.policies_table(rows)}\n\n{report.costs_note(divergences)}"
    for name, figure in figures.items():
        write_file(out / name, functools.partial(figure.savefig, format="png", dpi=120))
    write_file(out / "report.txt", text + "\n")
    print(text)
    print(f"\nsaved {', '.join(names)} in {out}")


def _policy_of(divergences: Divergences, file: str) -> Policy:
    """A policy from its file, if it is for the model that the divergences are of."""
    if file.startswith(PREFIX):
        entry = find(*split_reference(file))
        if entry.model.geometry.dims != divergences.dims:
            raise ValueError(f"published for {entry.model.checkpoint}, and the divergences are of another decoder")
        return Policy.published(entry.name, entry.budget)
    policy = Policy.load(file)
    policy.check_model(divergences.num_layers, divergences.model_fingerprint)
    return policy


def _measured(
    arguments: Namespace, divergences: Divergences, rows: Sequence[report.PolicyRow]
) -> list[report.PolicyRow]:
    """The rows with measured divergences, and accuracies where the samples have answers."""
    loaded = model_of(arguments, divergences)
    model, samples, processor = loaded
    policies = [row.policy for row in rows]
    with usage_errors():
        measured = whole_policies(arguments, divergences, loaded)(policies).mean(axis=1)
        accuracy: list[float | None] = [None] * len(rows)
        if all(row.answers for row in samples.rows):
            right = measure_accuracy(model, samples, policies, decoder_of(processor), backend=arguments.backend)
            accuracy = [float(share) for share in right.mean(axis=1)]
    return [
        replace(row, measured=float(value), accuracy=share)
        for row, value, share in zip(rows, measured, accuracy, strict=True)
    ]
