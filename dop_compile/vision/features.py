"""What reducers ask about visual tokens, from what passed through the vision tower: one row per token.

A token is a row of what `get_image_features` returns; that row is one of the projector's, and the projector's row was
made of one patch of the tower or of several. So two maps are found, and checked against what the model computed:

1. rows of the projector to tokens: the same order; windows put back in order (Qwen2.5-VL); tiles packed, unpadded and
   interleaved with newlines (LLaVA-NeXT).
2. patches to rows of the projector: one each; consecutive ones (Qwen2-VL); a pixel shuffle (InternVL, SmolVLM); square
   blocks of a square picture (Gemma 3).
(refused, with the reason) anything else: reducers that need no more than the projected features still work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dop_compile.hf.copies import shallow_copy
from dop_compile.hf.private import window_order
from dop_compile.reducers.gradients import refusing_gradients
from dop_compile.vision.items import feature_parts
from dop_compile.vision.rows import attention_rows
from dop_compile.vision.tap import Observed, Tower, VisionModules

__all__ = ["TokenFeatures", "token_features"]

NEWLINE = -1


@dataclass
class TokenFeatures:
    """One call's tokens. `missing` says why a field is None that was wanted.

    Args:
        rows: (tokens, hidden) as they are scattered into the prompt.
        sizes: rows of each image or video, in order; () where that is not known.
        features, cls_attention, keys, project: as in `VisualContext`; rows of newlines have no meaning.
        tiles: (tokens,) int64 on the CPU.
        shapes: (height, width) in tokens of each tile, None where it is no rectangle of tokens.
    """

    rows: Tensor
    sizes: tuple[int, ...] = ()
    features: Tensor | None = None
    cls_attention: Tensor | None = None
    keys: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    tiles: Tensor | None = None
    shapes: tuple[tuple[int, int] | None, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)


def token_features(
    wanted: frozenset[str],
    observed: Observed,
    output: Any,
    sizes: tuple[int, ...],
    grid: Tensor | None,
    modules: VisionModules,
) -> TokenFeatures | None:
    """The wanted fields of one call of a feature method; None if it returned no features as they enter the decoder.

    Where gradients are recorded, `features`, `cls_attention`, `keys` and what `project` returns carry them, since
    reducers may make of them what enters the decoder.

    Args:
        wanted: names of fields.
        observed: what passed during the call.
        output: what the method returned.
        sizes: see `item_sizes`.
        grid: (images, 3) patches of each image or video, of models that are told.
        modules: where it passed.
    """
    parts, owner = feature_parts(output), modules.owner
    if parts is None:
        return None
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).detach()
    result = TokenFeatures(rows, sizes if sum(sizes) == len(rows) else ())
    if not wanted:
        return result
    try:
        if modules.projector is None:
            raise _Unknown("no projector was found between vision tower and decoder")
        if len(observed.projections) != 1:
            raise _Unknown(f"the projector ran {len(observed.projections)} times for one set of images")
        given, output_rows, more = observed.projections[0]
        projected = output_rows.detach()
        flat = projected.reshape(-1, projected.shape[-1])
        merge = getattr(getattr(owner, "visual", None), "spatial_merge_size", 1)
        frames = None if grid is None else [(h // merge, w // merge) for t, h, w in grid.tolist() for _ in range(t)]
        source = _sources(observed, owner, grid, rows, flat)
        result.tiles, result.shapes = _tiles(projected, source, frames, bool(observed.packed))
    except _Unknown as unknown:
        result.missing = dict.fromkeys(wanted, str(unknown))
        return result
    index = None if source is None else source.clamp(min=0).to(rows.device)
    projector = owner.get_submodule(modules.projector)
    project = functools.cache(lambda: _project(projector, given, flat, more))
    patches = functools.cache(lambda: _patches(observed, given, len(flat), projector, project))
    attention = functools.cache(lambda: _attention(observed, modules.towers, given, patches()))
    lost = _lost_gradients(observed)
    makers: dict[str, Callable[[], Any]] = {
        "features": lambda: _features(given, len(flat), patches()),
        "project": project,
        "cls_attention": lambda: attention()[0],
        "keys": lambda: attention()[1],
    }
    for name in sorted(wanted & makers.keys()):
        try:
            value = makers[name]()
        except _Unknown as unknown:
            result.missing[name] = str(unknown)
            continue
        if isinstance(value, Tensor):
            value = value if index is None else value[index]
            value = refusing_gradients(value, lost[name]) if name in lost else value
        setattr(result, name, value)
    return result


def _lost_gradients(observed: Observed) -> dict[str, str]:
    """Fields that were noted without the gradients that reach the decoder, and why."""
    (given, projected, _), lost = observed.projections[0], dict[str, str]()
    if not torch.is_grad_enabled():
        return lost
    reason = "gradients cannot pass through a reducer's {}, since the {} ran without recording them, as reentrant "
    reason += "checkpointing does; use gradient_checkpointing_kwargs={{'use_reentrant': False}}, or a reducer that "
    reason += "merges no tokens"
    if "projector" in observed.unrecorded and projected.requires_grad and not given.requires_grad:
        lost["features"] = reason.format("features", "projector")
    if "tower" in observed.unrecorded and given.requires_grad:
        lost |= {name: reason.format(name, "vision tower") for name in ("cls_attention", "keys")}
    return lost


class _Unknown(Exception):
    """Something that cannot be told; the message says why, for users."""


# Rows of the projector to tokens.


def _sources(observed: Observed, owner: Any, grid: Tensor | None, rows: Tensor, flat: Tensor) -> Tensor | None:
    """(tokens,) the projector's row of each token on the CPU, -1 for newlines; None: its own."""
    source: Tensor | None = None
    if observed.packed:
        source = observed.packed[0]
        if source is None:
            raise _Unknown("the tiles of an image are resized after the projector, which mixes tokens")
    elif grid is not None and hasattr(getattr(owner, "visual", None), "window_size"):
        source = _window_order(owner.visual, grid).argsort()
    same = len(rows) == (len(flat) if source is None else len(source))
    if same and source is None:
        same = torch.equal(rows, flat)
    elif same and source is not None:
        own = source.to(rows.device)
        same = torch.equal(rows[own >= 0], flat[own[own >= 0]])
    if not same:
        raise _Unknown("what the projector returns is changed before it enters the decoder")
    return source


def _window_order(tower: Any, grid: Tensor) -> Tensor:
    """(tokens,) the order in which a tower with windows works on its tokens."""
    if hasattr(tower, "get_window_index"):
        order: Tensor = torch.as_tensor(tower.get_window_index(grid)[0])
    else:
        order = window_order(grid, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return order.cpu()


def _tiles(
    projected: Tensor, source: Tensor | None, frames: list[tuple[int, int]] | None, packed: bool
) -> tuple[Tensor, tuple[tuple[int, int] | None, ...]]:
    """(tokens,) what went through the tower as one picture, a row of its batch or a frame of a grid; their shapes."""
    if frames is not None:
        sizes = torch.tensor([height * width for height, width in frames], device="cpu")
        return torch.arange(len(frames), device="cpu").repeat_interleave(sizes), tuple(frames)
    per_picture = projected.shape[-2]
    count = projected.shape[:-1].numel()
    tiles = torch.arange(count, device="cpu") // per_picture
    across = math.isqrt(per_picture)
    shape = (across, across) if across**2 == per_picture and not packed else None
    return tiles if source is None else tiles[source.clamp(min=0)], (shape,) * (count // per_picture)


# Patches to rows of the projector.


@torch.no_grad()
def _patches(observed: Observed, given: Tensor, rows: int, projector: Any, project: Callable[[], Any]) -> Tensor | None:
    """(rows, patches per row) numbers of patches in the order of the tower, on the CPU; None: one each."""
    count = given.shape[:-1].numel()
    if observed.shuffled:
        return observed.shuffled[0].reshape(rows, -1)
    if count == rows:
        return None
    unknown = _Unknown(f"the projector makes {rows} tokens of {count} patches in a way that is not known")
    if count % rows == 0 and given.dim() == 2:
        try:
            project()  # works for single tokens if these are what consecutive patches make
        except _Unknown:
            raise unknown from None
        return torch.arange(count, device="cpu").view(rows, -1)
    pictures = given.shape[0]
    across, fewer = math.isqrt(count // pictures), math.isqrt(rows // pictures)
    if given.dim() != 3 or across**2 * pictures != count or fewer**2 * pictures != rows or across % fewer:
        raise unknown
    side = across // fewer
    grid = torch.arange(count, device="cpu").view(pictures, fewer, side, fewer, side)
    blocks = grid.transpose(2, 3).reshape(rows, side**2)
    if not _made_of(projector, given, blocks[: fewer**2]):
        raise unknown
    return blocks


def _made_of(projector: Any, given: Tensor, blocks: Tensor) -> bool:
    """Whether a token of the first picture, and no other, depends on its block of patches."""
    token = len(blocks) // 2
    other = given[:1].clone()
    other[0, blocks[token].to(other.device)] *= -1
    before, after = projector(given[:1]), projector(other)
    changed: list[int] = (before != after).any(dim=-1).flatten().nonzero().flatten().tolist()
    return changed == [token]


def _features(given: Tensor, rows: int, patches: Tensor | None) -> Tensor:
    flat = given.reshape(-1, given.shape[-1])
    if patches is None or len(flat) == rows:  # a pixel shuffle has put them together already
        return flat
    return flat[patches.to(flat.device)].reshape(rows, -1)


def _attention(
    observed: Observed, towers: tuple[Tower, ...], given: Tensor, patches: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(rows,) attention and (rows, key_dim) keys."""
    if not towers:
        raise _Unknown("no vision tower with layers of attention was found")
    if len(observed.attentions) != 1:
        raise _Unknown(f"the attention of {len(observed.attentions)} vision layers was seen, not of one")
    tower, module, args, kwargs = observed.attentions[0]
    found = attention_rows(module, args, kwargs, tower.has_class_token)
    if found is None:
        raise _Unknown(f"{type(module).__name__} does not use Hugging Face's attention interface")
    count = given.shape[:-1].numel() if patches is None else patches.numel()
    attention, keys = found
    special = attention.shape[1] - count // len(attention)
    if count % len(attention) or special < 0:
        raise _Unknown(f"a vision layer of {attention.shape[1]} tokens does not fit {count} patches at the projector")
    attention, keys = attention[:, special:].flatten(), keys[:, special:].flatten(0, 1)
    if patches is None:
        return attention, keys
    index = patches.to(attention.device)
    return attention[index].mean(dim=1), keys[index].mean(dim=1)


def _project(projector: nn.Module, given: Tensor, flat: Tensor, more: bool) -> Callable[[Tensor], Tensor]:
    """The projector for single tokens, tried on one of them."""
    module: Any = shallow_copy(projector, own_children=False)
    count, width = given.shape[:-1].numel(), given.shape[-1]

    def project(features: Tensor) -> Tensor:
        shape = (-1, width) if given.dim() == 2 else (1, -1, width)
        return module(features.reshape(shape)).reshape(len(features), -1)  # type: ignore[no-any-return]

    reason = "the projector does not work token by token"
    if more or count % len(flat) or (given.dim() != 2 and count != len(flat)):
        raise _Unknown(reason)
    middle = len(flat) // 2
    one = given.reshape(len(flat), -1)[middle : middle + 1]
    try:
        with torch.no_grad():
            again = project(one)
    except (RuntimeError, ValueError) as error:
        raise _Unknown(reason) from error
    scale = flat[middle].float().abs().amax()
    if again.shape != (1, flat.shape[1]) or not bool(((again[0] - flat[middle]).float().abs() <= 0.02 * scale).all()):
        raise _Unknown(reason)
    return project
