"""From samples to a tier that is advised: measured, searched, run and asked, each step resumable.

    advice = recommend(model, samples, decode, out="advice", max_loss=0.01)
    print(advice.text)

1. one half of the samples is searched on: curves, candidates run as wholes (`dop_compile.search`);
2. the other half is asked: the original, what was taken for each budget, and fewer tokens alone, one after the other
   for each sample, so that a machine that slows down slows all of them;
3. a tier is advised by what the second half shows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dop_compile.checks import finite
from dop_compile.evaluation.advice import TOKENS_ONLY, Advice, advise
from dop_compile.evaluation.measuring import check_tasks, count_tokens, evaluate
from dop_compile.evaluation.methods import RESIZE, Method
from dop_compile.policy.policy import Policy
from dop_compile.search.joint import measure_policies
from dop_compile.search.measure import measure_divergences
from dop_compile.search.optimize import Choice, choose_each

__all__ = ["BUDGETS", "LEAST_SAMPLES", "Recommendation", "halves", "recommend"]

BUDGETS = (0.5, 0.37, 0.28, 0.23)
"""Fractions of the original's policy FLOPs; 0.5 and those of the paper's tables."""
LEAST_SAMPLES = 8
"""Two to search on that select, two that report, and four to ask."""
DIVERGENCES, EVALUATION, CANDIDATES, TOKENS = "divergences.json", "evaluation.json", "candidates", "tokens"

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Recommendation:
    """What was found, by budget ("28%"), and what is advised."""

    choices: Mapping[str, Choice]
    advice: Advice

    def policies(self) -> dict[str, Policy]:
        """What was taken for each budget."""
        return {name: choice.taken.policy for name, choice in self.choices.items()}

    def advised(self) -> Policy | None:
        """The policy of the tier that is advised; None where that is the original."""
        label = self.advice.label
        if label is None or label in self.choices:
            return None if label is None else self.choices[label].taken.policy
        alone = self.choices[label.removesuffix(f" {TOKENS_ONLY}")].tokens_only
        assert alone is not None
        return alone.policy


def halves(samples: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the samples that are searched on and of those that are asked, each in order; drawn by the seed.

    Raises:
        ValueError: fewer than `LEAST_SAMPLES`.
    """
    if samples < LEAST_SAMPLES:
        raise ValueError(
            f"samples: expected at least {LEAST_SAMPLES}, of which one half is searched on and the other asked, got "
            f"{samples}"
        )
    drawn = np.random.default_rng(seed).permutation(samples).tolist()
    return sorted(drawn[: samples // 2]), sorted(drawn[samples // 2 :])


class _Part(Sequence[Sample]):
    """Some of the samples, each made when it is asked for."""

    def __init__(self, samples: Sequence[Sample], numbers: Sequence[int]):
        self._samples, self._numbers = samples, tuple(numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: Any) -> Any:
        return self._samples[self._numbers[number]]


def recommend(
    model: Any,
    samples: Sequence[Sample],
    decode: Callable[[Tensor], str],
    *,
    out: str | os.PathLike[str],
    budgets: Sequence[float] = BUDGETS,
    max_loss: float = 0.01,
    max_ms: float | None = None,
    tasks: Sequence[str] | None = None,
    reducer: str = "uniform",
    space: str = "split",
    backend: str = "eager",
    seed: int = 0,
    **settings: Any,
) -> Recommendation:
    """Search a policy for each budget on one half of the samples, compare them on the other half, and advise one.

    Everything finished is kept in `out`; the same call goes on there. Under `torchrun` every process takes its share.

    Args:
        model: the untouched Hugging Face model, in eval mode.
        samples: model inputs of one row each, and `answers`; may be lazy.
        decode: new token ids to text.
        out: a folder, which is made if it is not there.
        budgets: fractions of the original's policy FLOPs.
        max_loss: right answers that may be lost, as a fraction of all questions (mean over tasks).
        max_ms: most milliseconds to the first token, vision and selection included, in the median; then the tier that
            loses least within it is advised, whatever `max_loss`.
        tasks: of each sample, where there are several kinds.
        reducer, space: of the search.
        backend: of `dop_compile`.
        seed: of the halves.
        settings: of `generate`, beside greedy decoding.

    Raises:
        TypeError, ValueError: too few samples, a sample without answers, wrong budgets; what is found in `out` belongs
            to something else.
    """
    if reducer == RESIZE:
        raise ValueError(
            "reducer: smaller pictures are other inputs, and which they are differs by tier; compare them by "
            "`dop-compile eval --method resize`, and choose another reducer here"
        )
    if not len(budgets):
        raise ValueError("budgets: expected at least one, got none")
    if not 0 <= finite("max_loss", max_loss) < 1:
        raise ValueError(f"max_loss: expected a fraction of the answers, 0 <= max_loss < 1, got {max_loss}")
    if max_ms is not None and finite("max_ms", max_ms) <= 0:
        raise ValueError(f"max_ms: expected milliseconds, more than 0, got {max_ms}")
    for budget in budgets:
        if not 0 < finite("budget", budget) <= 1:
            raise ValueError(f"budget: expected a fraction of FLOPs kept, 0 < budget <= 1, got {budget}")
    names = {f"{100 * budget:g}%": budget for budget in sorted(budgets, reverse=True)}
    if len(names) < len(budgets):
        raise ValueError(f"budgets: expected each once, got {list(budgets)}")
    searched, asked = halves(len(samples), seed)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    search_on, ask = _Part(samples, searched), _Part(samples, asked)
    divergences = measure_divergences(
        model, search_on, reducer=reducer, backend=backend, seed=seed, resume=folder / DIVERGENCES
    )

    def measure(policies: Sequence[Policy]) -> Any:
        text = "".join(policy.replace(provenance=None).to_json() for policy in policies)
        kept = folder / f"{CANDIDATES}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        return measure_policies(model, search_on, policies, backend=backend, resume=kept)

    found = choose_each(divergences, list(names.values()), space=space, measure=measure)
    choices = dict(zip(names, found, strict=True))
    methods = []
    for name, choice in choices.items():
        methods.append(Method(name, None, choice.taken.policy.replace(provenance=None)))
        if choice.tokens_only is not None:
            methods.append(Method(f"{name} {TOKENS_ONLY}", None, choice.tokens_only.policy.replace(provenance=None)))
    result = evaluate(
        model,
        ask,
        methods,
        decode,
        counts=count_tokens(model, ask, resume=folder / TOKENS),
        tasks=None if tasks is None else [check_tasks(tasks)[number] for number in asked],
        backend=backend,
        resume=folder / EVALUATION,
        **settings,
    )
    return Recommendation(choices, advise(result, choices, max_loss=max_loss, max_ms=max_ms))
