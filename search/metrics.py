"""How far a pruned model's output is from the original's.

All take logits (rows, vocabulary) of the same rows and give one number >= 0, computed in float64; only the accuracy
drop may be negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["METRICS", "Metric", "full_kl", "is_right", "top_k_kl"]

TOP_K, EPSILON = 10, 1e-8


def top_k_kl(original: Tensor, pruned: Tensor, k: int = TOP_K, eps: float = EPSILON) -> float:
    """KL(original || pruned) over the original's k most likely tokens (DOP C.2, eq. 9-10), mean over rows.

    Both distributions are restricted to those tokens, `eps` is added, and they are normalised again.
    """
    p, q = original.double().softmax(-1), pruned.double().softmax(-1)
    top = p.topk(min(k, p.shape[-1]), dim=-1).indices
    p, q = p.gather(-1, top) + eps, q.gather(-1, top) + eps
    return _kl(p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True))


def full_kl(original: Tensor, pruned: Tensor) -> float:
    """KL(original || pruned) over the whole vocabulary, mean over rows."""
    p, q = original.double().log_softmax(-1), pruned.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum(-1).mean())


def is_right(answer: str, answers: Sequence[str]) -> bool:
    """Whether an answer is one of the right ones, but for case and outer white space and full stop."""

    def plain(text: str) -> str:
        return text.strip().rstrip(".").strip().casefold()

    return plain(answer) in {plain(right) for right in answers}


@dataclass(frozen=True)
class Metric:
    """`compare` takes logits (rows, vocabulary) of both; None where answers are generated instead."""

    name: str
    compare: Callable[[Tensor, Tensor], float] | None
    forced: bool = False


METRICS = {
    metric.name: metric
    for metric in (
        Metric("top_k_kl", top_k_kl),  # the first generated token: the paper's
        Metric("kl", full_kl),
        Metric("forced_kl", top_k_kl, forced=True),  # the original's first tokens, forced on both
        Metric("accuracy_drop", None),  # DOP F.5
    )
}
