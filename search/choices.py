"""What was taken for each budget beside what only drops tokens, as a table with what has to be said of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dop_compile.search.divergences import Divergences
from dop_compile.search.optimize import Choice, Rated
from dop_compile.search.report import policies_table, policy_row

__all__ = ["choices_table"]


def choices_table(divergences: Divergences, choices: Mapping[str, Choice]) -> str:
    """A line for what was taken for each budget and one for tokens only, and notes below."""
    rows = []
    for name, choice in choices.items():
        rows.append(policy_row(divergences, name, choice.taken.policy))
        if choice.tokens_only is not None:
            rows.append(policy_row(divergences, f"{name} tokens only", choice.tokens_only.policy))
    notes = [note for name, choice in choices.items() for note in _notes(name, choice)]
    notes += _how(list(choices.values()))
    return "\n".join([policies_table(rows), *(["", *notes] if notes else [])])


def _notes(name: str, choice: Choice) -> Iterator[str]:
    taken, alone, bounded = choice.taken, choice.tokens_only, choice.bounded
    if alone is not None and taken.candidate == alone.candidate and not taken.policy.is_full:
        yield f"{name}: no pruned operation does better than fewer tokens alone, which was taken"
    elif bounded is None and alone is not None:
        yield f"{name}: no policy meets the budget with as many visual tokens as alpha asks for (DOP C.4): left out"
    elif bounded is not None and taken.candidate != bounded.candidate:
        yield (
            f"{name}: the bound on visual tokens (alpha, DOP C.4) would have cost {_loss(bounded)} instead of "
            f"{_loss(taken)}, on the samples that were selected on; a policy without it was taken"
        )


def _loss(rated: Rated) -> str:
    return f"{rated.loss:.4f}"


def _how(choices: list[Choice]) -> Iterator[str]:
    samples = next((choice.samples for choice in choices if choice.samples is not None), None)
    if samples is None:
        if any(choice.tokens_only is not None for choice in choices):
            yield "nothing was run, predicted divergences decided, which are sums of curves; give --model and --samples"
        return
    chosen, reported = samples
    if any(choice.taken.selected != choice.taken.reported for choice in choices):
        yield f"taken by {chosen} of the samples; the measured divergence is of the other {reported}"
    else:
        yield f"{chosen} samples are too few to be halved: the measured divergence is of those that were selected on"
