"""The policy that is taken for a budget: the best of the best candidates, and never worse than fewer tokens alone.

1. candidates: those of least predicted divergence, within the bound of DOP C.4 on the visual tokens and without it, and
   what the reducer alone does;
2. each is run as a whole on one half of the samples, and the best there is taken;
3. what is reported of it was measured on the other half.

Where nothing can be run, predictions decide. `faithful` is the paper's search instead: its bound, and prediction alone
or its joint check of the best (F.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np

from dop_compile.checks import finite, integer
from dop_compile.policy.policy import Policy
from dop_compile.search.candidates import Candidate, InfeasibleBudgetError, candidates, tokens_only
from dop_compile.search.divergences import Divergences
from dop_compile.search.latency import LatencyModel

__all__ = ["Choice", "InfeasibleBudgetError", "Rated", "choose", "choose_each", "optimize"]

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Measure = Callable[[Sequence[Policy]], Any]

VERIFIED = 4
"""Candidates that are run within the bound of C.4, and as many without it."""
LEAST_SAMPLES = 4
"""With fewer there are no halves: all are selected on, and reported."""


@dataclass(frozen=True)
class Rated:
    """A candidate, and its mean joint divergence on the samples that were selected on and on the others.

    None where it was not run.
    """

    candidate: Candidate
    selected: float | None = None
    reported: float | None = None

    @property
    def policy(self) -> Policy:
        """With what was measured of it."""
        policy, source = self.candidate.policy, self.candidate.policy.provenance
        if self.reported is None or source is None:
            return policy
        return policy.replace(provenance=replace(source, measured_divergence=self.reported))

    @property
    def loss(self) -> float:
        """What it is judged by: measured, else predicted."""
        return self.candidate.divergence if self.selected is None else self.selected


@dataclass(frozen=True)
class Choice:
    """What was taken for a budget, and what stood beside it.

    Args:
        taken: the policy.
        tokens_only: the reducer alone at that budget; None where no number of tokens meets it, or in a faithful search.
        bounded: the best within the bound of C.4, which the taken one may not be; None where none meets the budget.
        samples: how many were selected on, and how many of the others reported; None where nothing was run.
    """

    taken: Rated
    tokens_only: Rated | None = None
    bounded: Rated | None = None
    samples: tuple[int, int] | None = None


def choose(
    divergences: Divergences,
    budget: float | None = None,
    *,
    space: str = "split",
    alpha: float | str | None = "auto",
    monotone: bool = True,
    faithful: bool = False,
    verify_top: int | None = None,
    measure: Measure | None = None,
    cheaper: Sequence[Candidate] = (),
    **budgets: Any,
) -> Choice:
    """What `optimize` takes, and what it was chosen from; arguments as there.

    `cheaper`, what was taken for smaller budgets, are candidates too, but not of a faithful search.
    """
    settings = {"space": space, "monotone": monotone, **budgets}
    if verify_top is None:
        verify_top = VERIFIED if measure is not None and not faithful else 1
    verify_top = integer("verify_top", verify_top, low=1)
    if verify_top > 1 and measure is None:
        raise TypeError("measure: verify_top needs a function that measures policies jointly")
    try:
        bounded = candidates(divergences, budget, alpha=alpha, top=verify_top, **settings)
    except InfeasibleBudgetError:
        if faithful or alpha is None:
            raise
        bounded = []
    alone, free = None, []
    if not faithful:
        del settings["space"]
        alone = tokens_only(divergences, budget, **settings)
        if verify_top > 1 or not bounded:
            free = candidates(divergences, budget, alpha=None, top=verify_top, space=space, **settings)
    others = [] if faithful else [_for_budget(one, budget) for one in cheaper]
    found = list(dict.fromkeys([*bounded, *free, *([] if alone is None else [alone]), *others]))
    rated, samples = [Rated(one) for one in found], None
    if verify_top > 1 and len(found) > 1:
        assert measure is not None
        rated, samples = _measured(found, measure, divergences.seed)
    taken = min(rated, key=lambda one: (one.loss, one.candidate.flops))
    by_candidate = {one.candidate: one for one in rated}
    return Choice(
        taken,
        None if alone is None else by_candidate[alone],
        min((by_candidate[one] for one in bounded), key=lambda one: one.loss, default=None),
        samples,
    )


def choose_each(divergences: Divergences, budgets: Sequence[float | None], **settings: Any) -> list[Choice]:
    """`choose` for several budgets: whoever may spend more is not given worse, since it may have what costs less."""
    order = sorted(range(len(budgets)), key=lambda n: 0 if budgets[n] is None else finite("budget", budgets[n]))
    choices: dict[int, Choice] = {}
    for number in order:
        taken = [choice.taken.candidate for choice in choices.values()]
        choices[number] = choose(divergences, budgets[number], cheaper=taken, **settings)
    return [choices[number] for number in range(len(budgets))]


def _for_budget(candidate: Candidate, budget: float | None) -> Candidate:
    source = candidate.policy.provenance
    assert source is not None
    return replace(candidate, policy=candidate.policy.replace(provenance=replace(source, budget=budget)))


def _measured(found: Sequence[Candidate], measure: Measure, seed: int) -> tuple[list[Rated], tuple[int, int]]:
    losses = np.asarray(measure([one.policy for one in found]), dtype=np.float64)
    if losses.ndim == 1:
        losses = losses[:, None]
    if losses.ndim != 2 or len(losses) != len(found) or not losses.size or not np.isfinite(losses).all():
        raise ValueError(
            f"measure: expected a finite divergence for each of {len(found)} policies, or one per policy and sample, "
            f"got {losses.tolist() if losses.size < 20 else losses.shape}"
        )
    first, second = _halves(losses.shape[1], seed)
    rated = [
        Rated(one, float(loss[first].mean()), float(loss[second].mean()))
        for one, loss in zip(found, losses, strict=True)
    ]
    return rated, (len(first), len(second))


def _halves(samples: int, seed: int) -> tuple[Numbers, Numbers]:
    """Numbers of the samples that are selected on and of those that are reported, drawn by the seed."""
    drawn = np.random.default_rng(seed).permutation(samples)
    if samples < LEAST_SAMPLES:
        return drawn, drawn
    return drawn[: (samples + 1) // 2], drawn[(samples + 1) // 2 :]


@overload
def optimize(
    divergences: Divergences,
    budget: float | None = None,
    *,
    max_kv_bytes: float | None = ...,
    max_ms: float | None = ...,
    latency: LatencyModel | None = ...,
    space: str = ...,
    alpha: float | str | None = ...,
    monotone: bool = ...,
    faithful: bool = ...,
    verify_top: int | None = ...,
    measure: Measure | None = ...,
) -> Policy: ...
@overload
def optimize(
    divergences: Divergences,
    budget: Sequence[float],
    *,
    max_kv_bytes: float | None = ...,
    max_ms: float | None = ...,
    latency: LatencyModel | None = ...,
    space: str = ...,
    alpha: float | str | None = ...,
    monotone: bool = ...,
    faithful: bool = ...,
    verify_top: int | None = ...,
    measure: Measure | None = ...,
) -> list[Policy]: ...


def optimize(
    divergences: Divergences,
    budget: float | Sequence[float] | None = None,
    *,
    max_kv_bytes: float | None = None,
    max_ms: float | None = None,
    latency: LatencyModel | None = None,
    space: str = "split",
    alpha: float | str | None = "auto",
    monotone: bool = True,
    faithful: bool = False,
    verify_top: int | None = None,
    measure: Measure | None = None,
) -> Policy | list[Policy]:
    """The policy of least divergence within a budget, of which the reducer alone is always a candidate.

    Args:
        divergences: as `measure_divergences` returns them, or `transfer`.
        budget: policy FLOPs (eq. 11 at the samples' own token counts) as a fraction of the original's, 0 < budget <= 1;
            several give a policy each, and what is taken for a smaller one is a candidate for a larger.
        max_kv_bytes: mean bytes of a sample's keys and values after prefill.
        max_ms: milliseconds of a decoder prefill, as `latency` predicts them.
        latency: of the device that the policy will run on (`measure_latency`).
        space: "split", or "dop" for the paper's (d_A, d_P, n_v).
        alpha: at least alpha n_e visual tokens enter where operations are pruned (DOP C.4); "auto" is 1.5 for LLaVA and
            1.25 for others, None is no such bound. Candidates without it are tried too where they are measured, or
            where none within it meets the budget.
        monotone: see `dop_compile.search.curves`.
        faithful: the search as published, for either space: the bound holds, and the reducer alone is no candidate.
        verify_top: how many of the best candidates, within the bound and as many without, are measured jointly; the
            best is returned. 1: predictions alone decide. None: 4 if there is a `measure`, 1 in a faithful search.
        measure: (policies,) or (policies, samples) joint divergences of policies, as `measure_policies` gives them. Of
            4 samples and more, one half drawn by the divergences' seed is selected on, and the mean of the other half
            is the `measured_divergence` of the policy's provenance.

    Raises:
        InfeasibleBudgetError: no policy meets the budget.
        TypeError, ValueError: wrong values; a needed axis was not measured.
    """
    settings: dict[str, Any] = {"max_kv_bytes": max_kv_bytes, "max_ms": max_ms, "latency": latency}
    settings |= {"space": space, "alpha": alpha, "monotone": monotone}
    settings |= {"faithful": faithful, "verify_top": verify_top, "measure": measure}
    if isinstance(budget, Sequence) and not isinstance(budget, str):
        return [choice.taken.policy for choice in choose_each(divergences, budget, **settings)]
    return choose(divergences, budget, **settings).taken.policy
