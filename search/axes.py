"""The axes along which divergences are measured, and the points on them.

A point on a depth axis is the number of layers kept; one on `visual_tokens` is the fraction of a sample's visual tokens
that enter (a number from 0 to 1), or their count (an int).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

from dop_compile.checks import choice, finite, integer
from dop_compile.policy.policy import Policy

__all__ = [
    "AXES",
    "DEPTH_AXES",
    "DOP_AXES",
    "SPLIT_AXES",
    "VISUAL_TOKENS",
    "axis_policy",
    "check_points",
    "default_points",
    "tokens_kept",
]

VISUAL_TOKENS = "visual_tokens"
DEPTH_AXES = (
    "mha_depth",
    "mlp_depth",
    "mha_query_depth",
    "mha_key_value_depth",
    "system_mha_depth",
    "system_mlp_depth",
)
AXES = (*DEPTH_AXES, VISUAL_TOKENS)
DOP_AXES = ("mha_depth", "mlp_depth", VISUAL_TOKENS)
SPLIT_AXES = (*DOP_AXES, "mha_query_depth")
"""Key-values alone need no axis: without them nobody reads the visual tokens, so their curve is that of `mha_depth`."""

POINTS = 6
_TABLE_6 = {28: (23, 18, 13, 8, 4, 0), 32: (26, 20, 14, 8, 4, 0), 40: (32, 24, 16, 8, 4, 0)}


def default_points(axis: str, num_layers: int) -> tuple[int | float, ...]:
    """Six points, the largest first, as in DOP Table 6.

    Depths are those of the table for 28, 32 and 40 layers, and those for 32 rescaled for any other number; visual
    tokens are 8/9 of all, halved five times (512 of 576 and 2560 of 2880: the table's LLaVA rows).
    """
    choice("axis", axis, AXES)
    if axis == VISUAL_TOKENS:
        return tuple(8 / 9 / 2**number for number in range(POINTS))
    depths = _TABLE_6.get(num_layers) or [math.floor(depth * num_layers / 32 + 0.5) for depth in _TABLE_6[32]]
    return tuple(sorted({depth for depth in depths if depth < num_layers}, reverse=True))


def check_points(
    points: Mapping[str, Sequence[int | float]] | None, axes: Sequence[str], num_layers: int
) -> dict[str, tuple[int | float, ...]]:
    """Points per axis, descending and without the full value, whose divergence is known to be zero.

    Raises:
        TypeError, ValueError: an unknown axis, no points, or one out of range; the message names it.
    """
    given = dict(points or {})
    for axis in given:
        choice("points", axis, axes)
    result: dict[str, tuple[int | float, ...]] = {}
    for axis in axes:
        values = given.get(axis, default_points(axis, num_layers))
        field = f"points[{axis!r}]"
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise TypeError(f"{field}: expected a list of points, got {values!r}")
        values = tuple(values)
        checked = {
            _fraction(field, v) if axis == VISUAL_TOKENS else integer(field, v, low=0, high=num_layers) for v in values
        }
        full = 1.0 if axis == VISUAL_TOKENS else num_layers
        checked = {value for value in checked if value != full or type(value) is not type(full)}  # 1 is a count
        if not checked:
            raise ValueError(f"{field}: expected at least one point below the full value, got {list(values)}")
        if len({isinstance(value, int) for value in checked}) > 1:
            raise TypeError(f"{field}: expected fractions or counts, not both, got {list(values)}")
        result[axis] = tuple(sorted(checked, reverse=True))
    return result


def _fraction(field: str, value: object) -> int | float:
    if isinstance(value, Integral):
        return integer(field, value, low=0)
    fraction = finite(field, value)
    if not 0 <= fraction <= 1:
        raise ValueError(f"{field}: expected a fraction from 0 to 1, or a count (an int), got {fraction}")
    return fraction


def tokens_kept(point: int | float, visual: int) -> int:
    """How many of a sample's visual tokens a point keeps."""
    return min(point, visual) if isinstance(point, int) else math.floor(point * visual + 0.5)


def axis_policy(axis: str, point: int | float, visual: int, base: Policy) -> Policy:
    """`base`, which prunes nothing and names the reducer, with one axis at a point, for a sample's visual tokens."""
    if axis == VISUAL_TOKENS:
        return base.replace(visual_tokens=tokens_kept(point, visual))
    depths = {axis: int(point)}
    return base.replace(pruned=Policy.depthwise(base.num_layers, **depths).pruned)  # type: ignore[arg-type]
