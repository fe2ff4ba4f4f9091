"""FitPrune (arXiv 2409.10197): how many visual tokens may leave after each layer, fitted to attention of a few samples.

In every layer of the original, visual tokens are sorted by the attention that they receive from visual tokens times
that from text tokens, either the max over heads, summed over the tokens that attend. A layer may lose tokens as long as
those that leave hold no more than a share alpha of either attention; a token that has left stays away. The smallest
alpha whose FLOPs meet the budget is found by bisection.

The authors' code fits otherwise: it sorts by either attention apart, takes away what is lowest in both orders, and runs
each next layer on the tokens that are left by then. Here there is one order, that by which the policy ranks, and all
attention is the original's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dop_compile.checks import finite
from dop_compile.compiler import dop_compile
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.costs import prefill_flops
from dop_compile.policy.policy import Policy
from dop_compile.policy.ranking import Ranking, Stage
from dop_compile.rankings import LayerView
from dop_compile.rankings.attention import Product
from dop_compile.runtime.call_rankings import observing
from dop_compile.search.limits import InfeasibleBudgetError
from dop_compile.search.meter import model_inputs

__all__ = ["AttentionShares", "fit_prune", "measure_attention"]

GRID = 1001
BISECTIONS = 40
Counts = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class AttentionShares:
    """What visual tokens hold of the attention on them (max over heads), per layer, mean over samples.

    Args:
        own, cross: (layers - 1, grid) share of the attention from visual and from text tokens that the lowest ranked
            tokens hold together; the grid is the fraction of visual tokens that they are, 0 to 1. Nothing comes after
            the last layer, and it is not measured.
        samples: how many were measured.
    """

    own: NDArray[np.float64]
    cross: NDArray[np.float64]
    samples: int

    @property
    def num_layers(self) -> int:
        return len(self.own) + 1

    def kept(self, alpha: float) -> NDArray[np.float64]:
        """(layers - 1,) fraction of visual tokens that are left after each layer."""
        allowed = (self.own <= alpha) & (self.cross <= alpha)
        last = GRID - 1 - np.argmax(allowed[:, ::-1], axis=1)
        return np.minimum.accumulate(1 - last / (GRID - 1))

    def policy(self, alpha: float) -> Policy:
        """The policy for a share that may be lost."""
        stages, before = [], 1.0
        for layer, fraction in enumerate(self.kept(alpha)):
            if fraction < before:
                stages.append(Stage(layer, fraction=float(fraction)))
                before = fraction
        full = Policy.full(self.num_layers)
        return full.replace(ranking=Ranking("product", tuple(stages))) if stages else full


def measure_attention(
    model: Any, samples: Iterable[Mapping[str, Any]], *, total: int | None = None, progress: bool = True
) -> AttentionShares:
    """Attention shares of the original, one prefill a sample.

    Args:
        model: the untouched model.
        samples: what its forward takes, one sample each; `answers` and `task` are left aside.
        total: how many, for the progress bar.

    Raises:
        ValueError: no sample has visual tokens.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    stages = tuple(Stage(layer, fraction=1.0) for layer in range(layers - 1))
    compiled = dop_compile(model, Policy.full(layers).replace(ranking=Ranking("product", stages)), backend="eager")
    sums = np.zeros((2, layers - 1, GRID))
    count = 0

    def note(stage: int, view: LayerView) -> None:
        sums[:, stage] += _shares(view)

    for sample in tqdm(samples, total=total, desc="attention", unit="sample", disable=not progress):
        before = sums[0, 0, -1]
        with torch.no_grad(), observing(note):
            compiled(**model_inputs(sample), logits_to_keep=1)
        count += int(sums[0, 0, -1] > before)
    if not count:
        raise ValueError("samples: expected at least one with visual tokens")
    return AttentionShares(sums[0] / count, sums[1] / count, count)


def _shares(view: LayerView) -> NDArray[np.float64]:
    """(2, grid): own and cross attention of the lowest ranked tokens of a batch of one, as shares."""
    candidates = view.candidates[0]
    own, cross = (mass[0][candidates].double().cpu().numpy() for mass in Product.masses(view))
    order = np.argsort(own * cross, kind="stable")
    places = np.linspace(0, 1, len(order) + 1)
    grid = np.linspace(0, 1, GRID)
    found = []
    for mass in (own, cross):
        held = np.concatenate([[0.0], np.cumsum(mass[order])]) / max(mass.sum(), np.finfo(float).tiny)
        found.append(np.interp(grid, places, held))
    return np.stack(found)


def fit_prune(shares: AttentionShares, dims: DecoderDims, counts: Counts, budget: float) -> Policy:
    """The policy of the smallest alpha whose FLOPs meet a budget.

    Args:
        dims: the decoder's sizes.
        counts: system, visual and text tokens of the samples that the budget is of.
        budget: fraction of the original's eq. 11 FLOPs.

    Raises:
        ValueError: no share that is lost meets the budget; the message says what the least is.
    """
    if not 0 < finite("budget", budget) <= 1:
        raise ValueError(f"budget: expected a fraction of FLOPs kept, 0 < budget <= 1, got {budget}")

    def flops(policy: Policy) -> float:
        return sum(prefill_flops(dims, policy, *sample) for sample in counts)

    whole = flops(Policy.full(shares.num_layers))
    least = shares.policy(1.0)
    if flops(least) > budget * whole:
        raise InfeasibleBudgetError(
            f"fitprune: no share of attention meets the budget (budget: {budget:.4g} asked for, "
            f"{flops(least) / whole:.4g} is the least: the first layer has every token)"
        )
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if flops(shares.policy(middle)) <= budget * whole else (middle, high)
    return shares.policy(high)
