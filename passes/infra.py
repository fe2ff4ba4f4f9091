"""What a pass is: requires -> rewrite -> report, on one decoder graph.

A pass is a function of a `DecoderGraph` that changes it in place and notes in a `PassReport` what it did; every skip
carries its reason. `run_passes` times each pass, keeps what it changed in the graph's canonical text, verifies after
every pass in debug mode, and names the failing pass and those that ran before it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dop_compile.errors import PassError
from dop_compile.logs import PASSES
from dop_compile.passes.dump import diff_dumps, dump
from dop_compile.passes.graph import DecoderGraph
from dop_compile.passes.report import PassReport

__all__ = ["Pass", "describe_passes", "run_passes"]


@dataclass(frozen=True)
class Pass:
    """A named rewrite.

    Args:
        optional: whether it can be disabled; other passes define the semantics.
        after: passes that must have run before it.
        before: passes that must not have run yet.
        repeatable: whether it may run on the same graph again.
    """

    name: str
    run: Callable[[DecoderGraph, PassReport], None]
    optional: bool = True
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    repeatable: bool = False


def describe_passes(graph: DecoderGraph) -> str:
    """What every pass did, for people: a header, the changed lines (with `diff=True`), and what was kept and why."""
    return "\n".join(_described(graph, report) for report in graph.reports)


def _described(graph: DecoderGraph, report: PassReport) -> str:
    changes = [graph.diffs[report.name]] if report.name in graph.diffs else []
    return "\n".join([str(report), *changes, *(f"kept {reason}" for reason in report.kept)])


def _check_disabled(passes: Sequence[Pass], disable: Sequence[str]) -> None:
    optional = [item.name for item in passes if item.optional]
    for name in disable:
        if name not in optional:
            raise ValueError(f"disable: {name!r} is not an optional pass; choose from {', '.join(optional)}")


def _check_order(item: Pass, finished: tuple[str, ...]) -> None:
    if missing := [name for name in item.after if name not in finished]:
        raise PassError(item.name, f"needs {', '.join(missing)} to run before it", finished=finished)
    if late := [name for name in item.before if name in finished]:
        raise PassError(item.name, f"must run before {', '.join(late)}", finished=finished)
    if item.name in finished and not item.repeatable:
        raise PassError(item.name, "has already run on this graph; trace the decoder anew", finished=finished)


def run_passes(
    graph: DecoderGraph,
    passes: Sequence[Pass],
    *,
    disable: Sequence[str] = (),
    check: Callable[[DecoderGraph], None] | None = None,
    diff: bool = False,
) -> DecoderGraph:
    """Run passes in order; may be called again with later passes.

    Args:
        disable: names of optional passes to leave out.
        check: verifier called after every pass (debug mode, tests).
        diff: keep the changed lines of the canonical dump per pass in `graph.diffs`.

    Raises:
        PassError: a pass failed, left an illegal graph, or has run on this graph before.
        ValueError: `disable` names an unknown pass, or one that the semantics need.
    """
    _check_disabled(passes, disable)
    text = dump(graph.graph) if diff else ""
    for item in passes:
        if item.name in disable:
            continue
        finished = tuple(report.name for report in graph.reports)
        _check_order(item, finished)
        report = PassReport(item.name, len(finished) + 1, nodes_before=len(graph.graph.nodes))
        started = time.perf_counter()
        graph.reports.append(report)
        try:
            item.run(graph, report)
            if check is not None:
                check(graph)
        except PassError as error:
            raise PassError(
                item.name, error.reason, node=error.node, layer=error.layer, finished=finished
            ) from error.__cause__
        report.seconds = time.perf_counter() - started
        report.nodes_after = len(graph.graph.nodes)
        if diff:
            before, text = text, dump(graph.graph)
            graph.diffs[item.name] = diff_dumps(before, text)
        if PASSES.isEnabledFor(logging.INFO):
            PASSES.info("%s", _described(graph, report))
    return graph
