"""The reducers' definitions, restated in plain loops over one image. Slow on purpose.

Cosines are compared as float32, which is what the methods are defined with. They are summed up in another precision
than the methods', so that no test passes by equal rounding.
"""

from __future__ import annotations

import math

import numpy as np


def cosine(a: np.ndarray, b: np.ndarray) -> np.float32:
    a, b = a.astype(np.longdouble), b.astype(np.longdouble)
    if not a.any() or not b.any():
        return np.float32(0)
    return np.float32((a @ b) / np.sqrt((a @ a) * (b @ b)))


def by_score(indices, score) -> list[int]:
    """Highest first; ties: the lowest index."""
    return sorted(indices, key=lambda i: (-score[i], i))


def vispruner(attention: np.ndarray, features: np.ndarray, count: int, ratio: float = 0.5) -> list[int]:
    order = by_score(range(len(attention)), attention)
    important = int(count * ratio)
    kept, rest = order[:important], order[important:]
    diverse = count - important
    while len(rest) > diverse and diverse:
        even, odd = rest[0::2], rest[1::2]
        score = {i: max(cosine(features[i], features[j]) for j in odd) for i in even}
        removed = by_score(even, score)[: min(8, len(rest) - diverse)]
        rest = [i for i in by_score(even, score) if i not in removed] + odd
    return kept + (rest if diverse else [])


def divprune(projected: np.ndarray, count: int) -> list[int]:
    tokens = range(len(projected))
    far = [[np.float32(1) - cosine(projected[i], projected[j]) for j in tokens] for i in tokens]
    chosen: list[int] = []
    while len(chosen) < count:
        left = [i for i in tokens if i not in chosen]
        near = {i: min([far[i][j] for j in (chosen or tokens) if j != i], default=math.inf) for i in left}
        chosen.append(by_score(left, near)[0])
    return chosen


def relevance(projected: np.ndarray, text: np.ndarray) -> np.ndarray:
    mean = text.astype(np.float64).mean(0)
    return np.array([cosine(row, mean) for row in projected])


def scaled(scores: np.ndarray) -> np.ndarray:
    spread = scores.max() - scores.min()
    return (scores - scores.min() + 1e-6) / max(spread, 1e-6)


def determinant_gains(kernel: np.ndarray, chosen: list[int]) -> np.ndarray:
    """det(L of chosen and i) / det(L of chosen) for each i, by the Schur complement; 0 where it is explained."""
    gains = np.diag(kernel).copy()
    if chosen:
        inside = kernel[np.ix_(chosen, chosen)]
        across = kernel[chosen]
        gains = gains - (across * np.linalg.lstsq(inside, across, rcond=1e-9)[0]).sum(0)
    return np.where(gains > 1e-6 * np.diag(kernel), gains, 0.0)


def visionzip(
    attention: np.ndarray, features: np.ndarray, keys: np.ndarray, count: int, share: float = 10 / 64
) -> tuple[list[int], dict[int, np.ndarray]]:
    """Kept tokens, and features before the projector of those that are merged."""
    contextual = math.floor(count * share + 0.5)
    dominant = by_score(range(len(attention)), attention)[: count - contextual]
    rest = [i for i in range(len(attention)) if i not in dominant]
    if not contextual:
        return dominant, {}
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    assigned: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            assigned[by_score(targets, {t: cosine(keys[i], keys[t]) for t in targets})[0]].append(i)
    merged = {
        t: features[t].astype(np.float64) + np.mean([features[i].astype(np.float64) for i in own], axis=0)
        for t, own in assigned.items()
        if own
    }
    return dominant + targets, merged


def outliers(attention: np.ndarray) -> int:
    low, high = np.percentile(attention.astype(np.float64), [25, 75])
    return int((attention > high + 1.5 * (high - low)).sum())


def prumerge(
    attention: np.ndarray, features: np.ndarray, keys: np.ndarray, count: int, spaced: int, neighbours: int = 32
) -> tuple[list[int], dict[int, np.ndarray]]:
    tokens = range(len(attention))
    order = by_score(tokens, attention)
    if count in (0, len(attention)):
        return order[:count], {}
    attended = math.ceil((count - 1) / (1 + spaced))
    kept = order[:attended]
    rest = [i for i in tokens if i not in kept]
    extra = count - 1 - attended
    kept = kept + [rest[math.floor((i + 0.5) * len(rest) / extra)] for i in range(extra)]
    weights, values = attention.astype(np.float64), features.astype(np.float64)
    merged = {}
    for i in kept:
        others = [j for j in tokens if j != i]
        nearest = by_score(others, {j: cosine(keys[i], keys[j]) for j in others})[:neighbours]
        merged[i] = values[i] + sum((weights[j] * values[j] for j in nearest), np.zeros(values.shape[1]))
    dropped = [i for i in tokens if i not in kept]
    merged[dropped[-1]] = sum(weights[j] * values[j] for j in dropped)
    return [*kept, dropped[-1]], merged


def trim(scores: np.ndarray, features: np.ndarray, count: int) -> tuple[list[int], dict[int, np.ndarray]]:
    order = by_score(range(len(scores)), scores)
    if count in (0, len(scores)):
        return order[:count], {}
    kept, dropped = order[: count - 1], sorted(order[count - 1 :])
    return [*kept, dropped[-1]], {dropped[-1]: features[dropped].astype(np.float64).mean(0)}
