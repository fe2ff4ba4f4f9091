"""`dop-compile profile | search | greedy | report`: from samples to policies to pictures."""

from __future__ import annotations

import functools
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dop_compile.commands.inputs import UsageError, load_processor, load_vision_model, one_line, write_file
from dop_compile.policy import Policy
from dop_compile.search import report
from dop_compile.search.divergences import Divergences
from dop_compile.search.greedy import greedy_order
from dop_compile.search.joint import measure_accuracy, measure_policies
from dop_compile.search.latency import LatencyModel, measure_latency
from dop_compile.search.measure import measure_divergences
from dop_compile.search.meter import model_inputs
from dop_compile.search.optimize import optimize
from dop_compile.search.samples import Row, Samples, check_images, choose, read_data_set, read_jsonl

__all__ = [
    "decoder_of",
    "greedy_command",
    "model_and_samples",
    "processes",
    "profile_command",
    "report_command",
    "search_command",
    "usage_errors",
]


@contextmanager
def usage_errors() -> Iterator[None]:
    """Wrong input, whoever finds it, ends the command with one line and exit code 2."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(one_line(error)) from error


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
    out = Path(arguments.out).expanduser()
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


def _divergences(path: str) -> Divergences:
    try:
        return Divergences.load(path)
    except OSError as error:
        raise UsageError(f"divergences {path!r}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(one_line(error)) from error


def _joint(arguments: Namespace, divergences: Divergences) -> Callable[[Sequence[Policy]], list[float]]:
    """Mean joint divergence of policies on the samples that are named."""
    if not arguments.model or not arguments.samples:
        raise UsageError("--verify-top: give also --model and --samples, on which the candidates are measured")
    model, samples, processor = model_and_samples(arguments)
    options = dict(divergences.metric_options)

    def measure(policies: Sequence[Policy]) -> list[float]:
        tokens = options.get("tokens", 1)
        values = measure_policies(
            model,
            samples,
            list(policies),
            metric=divergences.metric,
            tokens=tokens if isinstance(tokens, int) else 1,
            decode=decoder_of(processor),
        )
        return [float(value) for value in values.mean(axis=1)]

    return measure


def _latency(arguments: Namespace) -> LatencyModel:
    """Measured latencies from their file; measured first where there is none."""
    if arguments.latency is None:
        raise UsageError("--max-ms: give also --latency, the file with measured latencies")
    path = Path(arguments.latency).expanduser()
    if not path.exists():
        if not arguments.model or not arguments.samples:
            raise UsageError(f"--latency {arguments.latency!r}: no such file; to measure it give --model and --samples")
        model, samples, _ = model_and_samples(arguments)
        with usage_errors():
            measure_latency(model, model_inputs(samples[0]), backend=arguments.backend).save(path)
    with usage_errors():
        return LatencyModel.load(path)


def search_command(arguments: Namespace) -> None:
    """Find a policy per budget and save it."""
    divergences = _divergences(arguments.divergences)
    out = Path(arguments.out).expanduser()
    alpha: float | str | None = {"auto": "auto", "off": None}.get(arguments.alpha, arguments.alpha)
    if alpha not in ("auto", None):
        try:
            alpha = float(arguments.alpha)
        except ValueError as error:
            raise UsageError(f"--alpha {arguments.alpha!r}: expected a number, auto or off") from error
    if not arguments.budget and arguments.max_kv_bytes is None and arguments.max_ms is None:
        raise UsageError("no budget: give --budget, --max-kv-bytes or --max-ms")
    measure = _joint(arguments, divergences) if arguments.verify_top > 1 else None
    latency = _latency(arguments) if arguments.max_ms is not None else None
    rows = []
    for budget in arguments.budget or [None]:
        with usage_errors():
            policy = optimize(
                divergences,
                budget,
                max_kv_bytes=arguments.max_kv_bytes,
                max_ms=arguments.max_ms,
                latency=latency,
                space=arguments.space,
                alpha=alpha,
                monotone=not arguments.raw_curves,
                verify_top=arguments.verify_top,
                measure=measure,
            )
        name = f"{100 * budget:g}%" if budget is not None else "policy"
        rows.append(report.policy_row(divergences, name, policy))
    for row in rows:
        write_file(out / f"{row.name.rstrip('%')}.json", row.policy.to_json() + "\n", "--out")
    print(report.policies_table(rows))
    print(f"\nsaved {len(rows)} policies in {out}")


def greedy_command(arguments: Namespace) -> None:
    """Sort operations and save their order."""
    out = Path(arguments.out).expanduser()
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
                f"{len(order.steps)} steps, from {flops[0]:.1%} of the FLOPs (nothing lost) to {flops[-1]:.1%}, in "
                f"{order.evaluations} evaluations; saved {out}"
            )
            for budget in arguments.budget:
                with usage_errors():
                    print(f"{budget:.0%}: {order.policy(budget)}")


def report_command(arguments: Namespace) -> None:
    """Draw curves, trade-off and operation maps, and write the tables."""
    divergences = _divergences(arguments.divergences)
    out = Path(arguments.out).expanduser()
    rows = []
    for file in arguments.policy:
        try:
            policy = Policy.load(file)
            policy.check_layers(divergences.num_layers)
        except (OSError, ValueError) as error:
            raise UsageError(f"policy {file!r}: {one_line(error)}") from error
        rows.append(report.policy_row(divergences, Path(file).stem, policy))
    rows.sort(key=lambda row: -row.flops)
    if arguments.model and rows:
        rows = _measured(arguments, divergences, rows)
    figures = {"divergences.png": report.curves_figure(divergences)}
    if rows:
        figures["pareto.png"] = report.pareto_figure(rows, divergences.metric)
        figures["operations.png"] = report.tier_maps_figure(rows, divergences.visual_tokens)
    text = report.describe(divergences) + ("\n\n" + report.policies_table(rows) if rows else "")
    for name, figure in figures.items():
        write_file(out / name, functools.partial(figure.savefig, format="png", dpi=120))
    write_file(out / "report.txt", text + "\n", "--out")
    print(text)
    print(f"\nsaved {', '.join([*figures, 'report.txt'])} in {out}")


def _measured(
    arguments: Namespace, divergences: Divergences, rows: Sequence[report.PolicyRow]
) -> list[report.PolicyRow]:
    """The rows with joint divergences, and accuracies where the samples have answers."""
    model, samples, processor = model_and_samples(arguments)
    policies = [row.policy for row in rows]
    decode = decoder_of(processor)
    with usage_errors():
        joint = measure_policies(model, samples, policies, metric="top_k_kl").mean(axis=1)
        accuracy: list[float | None] = [None] * len(rows)
        if all(row.answers for row in samples.rows):
            accuracy = [float(share) for share in measure_accuracy(model, samples, policies, decode).mean(axis=1)]
    return [
        report.PolicyRow(row.name, row.policy, row.flops, row.kv_bytes, row.predicted, float(value), share)
        for row, value, share in zip(rows, joint, accuracy, strict=True)
    ]
