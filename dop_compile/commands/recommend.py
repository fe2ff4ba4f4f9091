"""`dop-compile recommend`: from a model and samples to a tier that is advised."""

from __future__ import annotations

import functools
from argparse import Namespace

from dop_compile.commands.inputs import check_backend, write_file
from dop_compile.commands.measuring import decoder_of, model_and_samples, processes
from dop_compile.commands.outputs import output_directory
from dop_compile.commands.usage import usage_errors
from dop_compile.evaluation.advice import advice_figure
from dop_compile.evaluation.recommend import BUDGETS, halves, recommend

__all__ = ["recommend_command"]

RECOMMENDED, TABLE, PICTURE = "recommended.json", "recommendation.txt", "recommendation.png"


def recommend_command(arguments: Namespace) -> None:
    """Profile, search, run, ask and advise; write policies, the table and a picture."""
    check_backend(arguments.backend)
    out = output_directory(arguments.out)
    with processes(arguments) as rank:
        model, samples, processor = model_and_samples(arguments)
        with usage_errors():
            halves(len(samples), arguments.seed)  # before minutes of work
            for row in samples.rows:
                if not row.answers:
                    raise ValueError(f"{row.name}: it has no answers, by which tiers are judged")
            tasks = [row.task for row in samples.rows]
            found = recommend(
                model,
                samples,
                decoder_of(processor),
                out=out,
                budgets=arguments.budget or BUDGETS,
                max_loss=arguments.max_loss,
                max_ms=arguments.max_ms,
                tasks=tasks if any(tasks) else None,
                reducer=arguments.reducer,
                space=arguments.space,
                backend=arguments.backend,
                seed=arguments.seed,
                max_new_tokens=arguments.max_new_tokens,
            )
    if rank > 0:
        return
    policies = found.policies()
    for name, policy in policies.items():
        write_file(out / f"{name.rstrip('%')}.json", policy.to_json() + "\n")
    text, saved = found.advice.text, [*(f"{name.rstrip('%')}.json" for name in policies), TABLE, PICTURE]
    if (advised := found.advised()) is not None:
        write_file(out / RECOMMENDED, advised.to_json() + "\n")
        saved.insert(0, RECOMMENDED)
    else:
        (out / RECOMMENDED).unlink(missing_ok=True)  # of a run that asked for something else
    write_file(out / TABLE, text + "\n")
    figure = advice_figure(found.advice)
    write_file(out / PICTURE, functools.partial(figure.savefig, format="png", dpi=120))
    print(text)
    print(f"\nsaved {', '.join(saved)} in {out}")
