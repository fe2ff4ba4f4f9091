"""`dop-compile search`: from measured divergences to a policy per budget."""

from __future__ import annotations

import functools
import hashlib
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dop_compile.commands.inputs import write_file
from dop_compile.commands.measuring import model_of, processes, read_divergences, whole_policies
from dop_compile.commands.outputs import check_new, output_directory, output_file
from dop_compile.commands.usage import UsageError, usage_errors
from dop_compile.policy.policy import Policy
from dop_compile.search import report
from dop_compile.search.choices import choices_table
from dop_compile.search.latency import LatencyModel, measure_latency
from dop_compile.search.meter import model_inputs
from dop_compile.search.optimize import choose_each
from dop_compile.search.processes import barrier

__all__ = ["search_command"]

CANDIDATES = "candidates"


def _latency(arguments: Namespace, path: Path, loaded: Any, rank: int) -> LatencyModel:
    """Measured latencies from their file; measured first where there is none."""
    if not path.exists():
        model, samples, _ = loaded
        with usage_errors():
            found = measure_latency(model, model_inputs(samples[0]), backend=arguments.backend)
        if rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            found.save(path)
        barrier()
    with usage_errors():
        return LatencyModel.load(path)


def _check_latency(arguments: Namespace) -> Path | None:
    """The file of latencies that `--max-ms` is read from, if it can be read or made."""
    if arguments.max_ms is None:
        return None
    if arguments.latency is None:
        raise UsageError("--max-ms: give also --latency, the file with measured latencies")
    path = Path(arguments.latency).expanduser()
    if path.exists():
        with usage_errors():
            known = LatencyModel.load(path)
        if arguments.model:  # named to measure what is there by now
            if known.backend != arguments.backend:
                raise UsageError(
                    f"--latency {arguments.latency!r}: measured under backend {known.backend!r}, not "
                    f"{arguments.backend!r}; name another file, or that --backend"
                )
            print(f"{path} is there: latencies of {known.device}, backend {known.backend}", file=sys.stderr)
        return path
    if not arguments.model or not arguments.samples:
        raise UsageError(f"--latency {arguments.latency!r}: no such file; to measure it give --model and --samples")
    return output_file(arguments.latency, "--latency")


def search_command(arguments: Namespace) -> None:
    """Find a policy per budget and save it."""
    divergences = read_divergences(arguments.divergences)
    alpha: float | str | None = {"auto": "auto", "off": None}.get(arguments.alpha, arguments.alpha)
    if alpha not in ("auto", None):
        try:
            alpha = float(arguments.alpha)
        except ValueError as error:
            raise UsageError(f"--alpha {arguments.alpha!r}: expected a number, auto or off") from error
    if not arguments.budget and arguments.max_kv_bytes is None and arguments.max_ms is None:
        raise UsageError("no budget: give --budget, --max-kv-bytes or --max-ms")
    names = {f"{100 * budget:g}%": budget for budget in arguments.budget or ()} or {"policy": None}
    if len(names) < len(arguments.budget or ()):
        raise UsageError("--budget: two of them are the same percentage; name each once")
    out = output_directory(arguments.out)
    files = {name: out / f"{name.rstrip('%')}.json" for name in names}
    latency_file = _check_latency(arguments)
    verifies = bool(arguments.model) and arguments.verify_top != 1 and (arguments.verify_top or not arguments.faithful)
    runs = verifies or (latency_file is not None and not latency_file.exists())
    if runs:  # that takes long: nothing shall then be in the way
        check_new(files.values(), arguments.force)
    with processes(arguments) if runs else nullcontext(0) as rank:
        loaded = model_of(arguments, divergences) if runs else None
        kept_at = functools.partial(_candidates_file, out)
        measure = whole_policies(arguments, divergences, loaded, kept_at) if verifies else None
        latency = None if latency_file is None else _latency(arguments, latency_file, loaded, rank)
        with usage_errors():
            found = choose_each(
                divergences,
                list(names.values()),
                max_kv_bytes=arguments.max_kv_bytes,
                max_ms=arguments.max_ms,
                latency=latency,
                space=arguments.space,
                alpha=alpha,
                monotone=not arguments.raw_curves,
                faithful=arguments.faithful,
                verify_top=arguments.verify_top,
                measure=measure,
            )
        choices = dict(zip(names, found, strict=True))
    if rank > 0:
        return
    texts = {files[name]: choice.taken.policy.to_json() + "\n" for name, choice in choices.items()}
    check_new([file for file, text in texts.items() if not _holds(file, text)], arguments.force)
    for file, text in texts.items():
        write_file(file, text)
    for finished in out.glob(f"{CANDIDATES}-*.progress-*"):
        finished.unlink()
    print(choices_table(divergences, choices))
    print(f"\n{report.costs_note(divergences)}\nsaved {len(choices)} policies in {out}")


def _candidates_file(out: Path, policies: Sequence[Policy]) -> Path:
    """Beside what the finished samples of some candidates are kept, until all policies are saved."""
    text = "".join(policy.replace(provenance=None).to_json() for policy in policies)
    return out / f"{CANDIDATES}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode()
