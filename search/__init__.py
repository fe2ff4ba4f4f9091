"""Policies from a few samples: measure what pruning costs along each axis, then optimise for any budget."""

from dop_compile.search.candidates import candidates
from dop_compile.search.divergences import Divergences
from dop_compile.search.fit_prune import AttentionShares, fit_prune, measure_attention
from dop_compile.search.greedy import greedy_order
from dop_compile.search.joint import measure_accuracy, measure_policies
from dop_compile.search.latency import LatencyModel, measure_latency
from dop_compile.search.measure import measure_divergences
from dop_compile.search.optimize import InfeasibleBudgetError, choose, choose_each, optimize
from dop_compile.search.order import OperationOrder
from dop_compile.search.transfer import transfer

__all__ = [
    "AttentionShares",
    "Divergences",
    "InfeasibleBudgetError",
    "LatencyModel",
    "OperationOrder",
    "candidates",
    "choose",
    "choose_each",
    "fit_prune",
    "greedy_order",
    "measure_accuracy",
    "measure_attention",
    "measure_divergences",
    "measure_latency",
    "measure_policies",
    "optimize",
    "transfer",
]
