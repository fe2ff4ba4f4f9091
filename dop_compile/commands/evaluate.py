"""`dop-compile eval`: from a model, samples and names of methods to a table."""

from __future__ import annotations

import functools
import itertools
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace

from dop_compile.commands.inputs import check_backend, write_file
from dop_compile.commands.measuring import decoder_of, model_and_samples, processes
from dop_compile.commands.named_files import named_files, read_file
from dop_compile.commands.outputs import output_directory
from dop_compile.commands.policies import load_policy, replacing
from dop_compile.commands.usage import UsageError, usage_errors
from dop_compile.evaluation.in_decoder import FITPRUNE
from dop_compile.evaluation.measuring import check_tasks, count_tokens, evaluate
from dop_compile.evaluation.methods import FULL, ORIGINAL, RESIZE, Counts, Method, Planner, check_name
from dop_compile.evaluation.report import markdown, tradeoff_figure
from dop_compile.evaluation.resizing import Resized
from dop_compile.policy.policy import Policy
from dop_compile.search.candidates import SPACES
from dop_compile.search.divergences import Divergences
from dop_compile.search.fit_prune import measure_attention
from dop_compile.search.order import OperationOrder
from dop_compile.search.samples import Samples

__all__ = ["eval_command"]

RESULT, TOKENS = "evaluation.json", "tokens"
FIT_SAMPLES = 25
"""So many of the samples is FitPrune fitted to."""


def eval_command(arguments: Namespace) -> None:
    """Compare methods on samples; write JSON, Markdown and a picture."""
    check_backend(arguments.backend)
    load = functools.partial(load_policy, arguments.model)
    policies = replacing(dict(named_files("--policy", arguments.policy, load)), arguments.model, (ORIGINAL, FULL))
    orders = dict(named_files("--order", arguments.order, OperationOrder.load))
    divergences = None
    if arguments.divergences is not None:
        divergences = read_file("--divergences", arguments.divergences, Divergences.load)
    _check_methods(arguments, bool(orders), bool(policies))
    out = output_directory(arguments.out)
    with processes(arguments) as rank:
        model, samples, processor = model_and_samples(arguments)
        with usage_errors():
            tasks = check_tasks([row.task for row in samples.rows])
            for row in samples.rows:
                if not row.answers:
                    raise ValueError(f"{row.name}: it has no answers to compare with")
            counts = count_tokens(model, samples, resume=out / TOKENS)
            shares = None
            if FITPRUNE in arguments.method:  # needs no answers
                few = itertools.islice(samples, FIT_SAMPLES)
                shares = measure_attention(model, few, total=min(FIT_SAMPLES, len(counts)))
            planner = Planner.of(model, counts, divergences=divergences, shares=shares, positions=arguments.positions)
            found = evaluate(
                model,
                samples,
                _methods(arguments, planner, samples, policies, orders),
                decoder_of(processor),
                counts=counts,
                tasks=tasks,
                backend=arguments.backend,
                resume=out / RESULT,
                max_new_tokens=arguments.max_new_tokens,
            )
        if rank == 0:
            text = markdown(found)
            write_file(out / "evaluation.md", text + "\n")
            figure = tradeoff_figure(found)
            write_file(out / "evaluation.png", functools.partial(figure.savefig, format="png", dpi=120))
            print(text)
            print(f"\nsaved {RESULT}, evaluation.md and evaluation.png in {out}")


def _check_methods(arguments: Namespace, has_orders: bool, has_policies: bool) -> None:
    """What can be told before a model is loaded."""
    with usage_errors():
        for name in arguments.method:
            check_name(name)
        for budget in arguments.budget:
            if not 0 < budget <= 1:
                raise UsageError(f"--budget {budget:g}: expected a fraction of FLOPs kept, 0 < budget <= 1")
    found = [name for name in arguments.method if name.partition("+")[0] in SPACES]
    if found and arguments.divergences is None:
        raise UsageError(
            f"--method {found[0]}: it is found in measured divergences; give --divergences FILE, which `dop-compile "
            "profile` writes"
        )
    made = [name for name in arguments.method if name not in (ORIGINAL, FULL)]
    needing = [*(f"--method {name}" for name in made), *(["--order"] if has_orders else [])]
    if needing and not arguments.budget:
        raise UsageError(f"{needing[0]}: it is made for a budget; give --budget, a fraction of FLOPs kept")
    if arguments.budget and not needing:
        raise UsageError("--budget: no method takes one; name methods by --method or --order")
    if not needing and not has_policies and not arguments.method:
        raise UsageError(
            "nothing to compare: give --method, --policy or --order, or a model that was saved with its tiers"
        )


def _methods(
    arguments: Namespace,
    planner: Planner,
    samples: Samples,
    policies: dict[str, Policy],
    orders: dict[str, OperationOrder],
) -> list[Method]:
    lengths = functools.cache(lambda: [row["input_ids"].shape[1] for row in samples])

    def smaller(most: int) -> Resized:
        return Resized(samples, most)

    def count(own: Resized) -> Counts:
        return own.counts(lengths(), planner.counts)

    methods = []
    for name in arguments.method:
        if name in (ORIGINAL, FULL):
            methods.append(planner.named(name, None))
        elif name == RESIZE:
            methods += [planner.resized(budget, smaller, count) for budget in arguments.budget]
        else:
            methods += [planner.named(name, budget) for budget in arguments.budget]
    methods += [planner.ordered(name, order, budget) for name, order in orders.items() for budget in arguments.budget]
    methods += [planner.given(name, policy) for name, policy in policies.items()]
    return [_with_own_pictures(method, smaller, count) for method in methods]


def _with_own_pictures(method: Method, smaller: Callable[[int], Resized], count: Callable[[Resized], Counts]) -> Method:
    """The method with smaller pictures where its policy is for these."""
    policy = method.policy
    if policy is None or policy.reducer != RESIZE or policy.visual_tokens is None:
        return method
    own = smaller(policy.visual_tokens)
    return replace(method, samples=own, counts=tuple(count(own)))
