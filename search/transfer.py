"""Divergences of one model as a prediction for another (DOP C.5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.policy import Policy
from dop_compile.search.axes import VISUAL_TOKENS
from dop_compile.search.divergences import Divergences

__all__ = ["transfer"]


def transfer(
    divergences: Divergences,
    dims: DecoderDims,
    counts: Sequence[tuple[int, int, int]],
    *,
    model_type: str,
    model_fingerprint: str,
    dtype_bytes: int | None = None,
) -> Divergences:
    """The curves of one model on the axes of another: depths scale by L'/L, visual tokens by N'/N (eq. 12).

    Values are kept; `optimize` interpolates between the rescaled points and uses the target's own FLOPs and minimal
    visual tokens.

    Args:
        divergences: of the source model.
        dims: the target decoder's sizes (`DecoderDims.from_config`).
        counts: system, visual and text tokens of typical prompts of the target.
        model_type, model_fingerprint: of the target.
        dtype_bytes: of one weight of the target; the source's if None.

    Raises:
        ValueError: no counts, or none with visual tokens.
    """
    layer_scale = dims.num_layers / divergences.num_layers
    points = {
        axis: tuple(
            (min(point / divergences.visual_tokens, 1.0) if isinstance(point, int) else point)
            if axis == VISUAL_TOKENS
            else point * layer_scale
            for point in values
        )
        for axis, values in divergences.points.items()
    }
    base = Policy.full(dims.num_layers).replace(
        reducer=divergences.base.reducer,
        reducer_options=divergences.base.reducer_options,
        positions=divergences.base.positions,
    )
    found = dataclasses.replace(
        divergences,
        model_fingerprint=model_fingerprint,
        model_type=model_type,
        dims=dims,
        dtype_bytes=dtype_bytes or divergences.dtype_bytes,
        counts=tuple((int(system), int(visual), int(text)) for system, visual, text in counts),
        base=base,
        points=points,
        transferred=True,
    )
    found.check()
    return found
