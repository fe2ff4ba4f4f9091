"""Hypothesis strategies that several test files share."""

from __future__ import annotations

from hypothesis import strategies as st

from dop_compile.policy.operations import MODULES, PROMPT_GROUPS, SPLIT_VISUAL_GROUPS, Operation
from dop_compile.policy.policy import Policy
from dop_compile.policy.provenance import Provenance

_NAMES = st.text(min_size=1, max_size=8)
_FINITE = st.floats(allow_nan=False, allow_infinity=False)


def json_scalars() -> st.SearchStrategy[str | int | float | bool | None]:
    return st.none() | st.booleans() | st.integers() | _FINITE | st.text(max_size=8)


def provenances() -> st.SearchStrategy[Provenance]:
    return st.builds(
        Provenance,
        model_fingerprint=st.none() | _NAMES,
        budget=st.none() | st.floats(0, 1, exclude_min=True),
        divergence=st.none() | _FINITE,
        samples=st.none() | st.integers(1, 1000),
        versions=st.dictionaries(_NAMES, st.text(max_size=8), max_size=3),
        measured_divergence=st.none() | _FINITE,
    )


@st.composite
def policies(
    draw: st.DrawFn,
    num_layers: int,
    *,
    split: bool | None = False,
    reduction: bool = True,
    max_visual_tokens: int = 64,
    metadata: bool = False,
) -> Policy:
    """Any policy for `num_layers` layers: full, depthwise or an arbitrary set of operations.

    `split`: whether the visual group is split, None for either. `reduction`: whether `visual_tokens` may be
    other than None. `metadata`: whether to draw reducer, options and provenance too.
    """
    visual_tokens = draw(st.none() | st.integers(0, max_visual_tokens)) if reduction else None
    positions = draw(st.sampled_from(("original", "compact")))
    is_split = draw(st.booleans()) if split is None else split
    extra = (
        {
            "reducer": draw(_NAMES),
            "reducer_options": draw(st.dictionaries(_NAMES, json_scalars(), max_size=3)),
            "provenance": draw(st.none() | provenances()),
        }
        if metadata
        else {}
    )
    fraction = draw(st.floats(0.01, 0.99)) if is_split else None
    if draw(st.booleans()):
        depth = st.none() | st.integers(0, num_layers)
        names = ("mha_depth", "mlp_depth", "mha_query_depth", "mha_key_value_depth")
        names += ("system_mha_depth", "system_mlp_depth")
        depths = {name: draw(depth) for name in names}
        policy = Policy.depthwise(num_layers, visual_tokens=visual_tokens, positions=positions, **depths, **extra)
        return policy.replace(salient_fraction=fraction)
    groups = ("system", *SPLIT_VISUAL_GROUPS, "text") if is_split else PROMPT_GROUPS
    operation = st.builds(Operation, st.sampled_from(groups), st.integers(0, num_layers - 1), st.sampled_from(MODULES))
    return Policy.from_operations(
        num_layers,
        draw(st.frozensets(operation, max_size=3 * num_layers)),
        visual_tokens=visual_tokens,
        positions=positions,
        salient_fraction=fraction,
        **extra,
    )
