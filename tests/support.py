"""What the behaviour tests share: batches, kept tokens, comparisons with the oracle."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from dop_compile import Policy, dop_compile
from tests.families import FAMILIES, IMAGE, VIDEO, Family, Segment
from tests.reference import LAYERS, layer_parts, named_child, reference_generate, reference_logits, text_decoder

MODULES = ("mha_query", "mha_key_value", "mlp")
Rows = Sequence[Sequence[Segment]]

ONE_IMAGE: Rows = [[("text", 4), ("image",), ("text", 3)]]


def mixed_rows(family: Family) -> list[list[Segment]]:
    """Images at different places and of different counts, a video where the class takes one, a row of text."""
    rows: list[list[Segment]] = [] if family.needs_image else [[("text", 5), ("text", 6)]]
    if family.is_text_only:
        return [*rows, [("text", 14)], [("text", 20)]]
    rows += [[("text", 3), ("image",), ("text", 4), ("image", 1), ("text", 3)], [("image", 2), ("text", 6)]]
    if family.has_video:
        rows += [[("text", 2), ("video",), ("text", 3), ("image",), ("text", 2)]]
    return rows


@functools.lru_cache(32)
def shared_model(family: str | Family, attn: str | None = None, seed: int | None = None) -> nn.Module:
    """One model for many tests; none of them changes it."""
    return (FAMILIES[family] if isinstance(family, str) else family).build(seed=seed, attn=attn)


def compile_eagerly(model: nn.Module, policy: Policy | dict[str, Policy], **arguments: Any) -> Any:
    return dop_compile(model, policy, **({"backend": "eager", "debug": True} | arguments))


@dataclass(frozen=True)
class Batch:
    """One batch for one model. `groups` (batch, tokens) are those of a text-only model; `towers` are each row's own
    images and videos, and `sizes` how many placeholders each of these has."""

    family: Family
    model: nn.Module = field(repr=False)
    inputs: dict[str, Tensor]
    groups: Tensor | None = None
    towers: list[dict[str, Tensor]] | None = None
    sizes: list[list[int]] | None = None

    @property
    def mask(self) -> Tensor:
        return self.inputs["attention_mask"].bool()

    @functools.cached_property
    def visual(self) -> Tensor:
        """(batch, tokens) bool: the visual tokens that reduction counts."""
        ids = self.inputs["input_ids"]
        if self.groups is not None:
            return (self.groups == 1) & self.mask
        visual = torch.isin(ids, torch.tensor([IMAGE, VIDEO])) & self.mask
        if not self.family.has_newlines or not visual.any():
            return visual
        given: list[Tensor] = []
        hook = text_decoder(self.model).register_forward_pre_hook(
            lambda _, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        with torch.no_grad():
            self.model(**self.inputs)
        hook.remove()
        return visual & (given[0] != self.model.base_model.image_newline).any(-1)

    @property
    def counts(self) -> list[int]:
        return self.visual.sum(1).tolist()

    @property
    def items(self) -> Tensor | None:
        """(batch, tokens) number of the image or video that each placeholder belongs to, -1 elsewhere."""
        if self.sizes is None:
            return None
        items = torch.full_like(self.inputs["input_ids"], -1)
        sizes = torch.tensor([size for row in self.sizes for size in row], dtype=torch.long)
        places = torch.isin(self.inputs["input_ids"], torch.tensor([IMAGE, VIDEO])) & self.mask
        items[places] = torch.arange(len(sizes)).repeat_interleave(sizes)
        return items

    def random_kept(self, count: int, seed: int = 0) -> list[list[int]]:
        """Per row up to `count` ordinals of visual tokens, ascending."""
        draw = random.Random(seed)
        return [sorted(draw.sample(range(n), min(count, n))) for n in self.counts]

    def call_arguments(self, kept: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
        arguments: dict[str, Any] = {} if self.groups is None else {"token_groups": self.groups}
        return arguments if kept is None else arguments | {"visual_indices": kept}


def make_batch(
    name: str | Family, rows: Rows | None = None, padding: str = "left", seed: int = 0, model: nn.Module | None = None
) -> Batch:
    family = FAMILIES[name] if isinstance(name, str) else name
    model = shared_model(name) if model is None else model
    rows = mixed_rows(family) if rows is None else rows
    inputs = family.make_inputs(model, rows, padding=padding, seed=seed)
    groups = None
    if family.is_text_only:
        # 2 system, then visual with text between, then text; the first row is text alone
        pattern = torch.tensor([2, 2, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0])
        place = (inputs["attention_mask"].cumsum(1) - 1).clamp(0, len(pattern) - 1)
        groups = pattern[place] * inputs["attention_mask"]
        groups[0] = 0
    # Those of the fast set are found by counting, also where a test changes the inputs
    known = family.is_text_only or family.name in FAMILIES
    towers = None if known else family.make_towers(model, rows, seed)
    sizes = None if family.is_text_only else family.item_sizes(model, rows, seed)
    return Batch(family, model, inputs, groups, towers, sizes)


# Comparisons. `scale` of every error is the largest number of the reference.


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if not actual.numel():
        return 0.0
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = relative_error(actual.float(), expected.float())
    assert error <= tolerance, f"relative error {error:.1e}, at most {tolerance:.0e} is allowed"


def padded(rows: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The oracle's rows in the places of their tokens in the batch; zeros where there is padding."""
    out = torch.zeros(*mask.shape, rows[0].shape[-1])
    for index, row in enumerate(rows):
        out[index, mask[index]] = row
    return out


def reference(
    batch: Batch,
    policy: Policy,
    kept: Sequence[Sequence[int]] | None = None,
    salient: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """(batch, tokens, vocab) logits of the oracle, zeros on padding."""
    in_order = None if kept is None else [sorted(row) for row in kept]
    rows = reference_logits(batch.model, batch.inputs, policy, in_order, batch.groups, salient, batch.towers)
    return padded(rows, batch.mask)


def assert_rows_match(logits: Tensor, expected: Tensor, mask: Tensor, tolerance: float = 1e-5) -> None:
    """Rows of tokens are those of the oracle; rows of padding are not compared. Both end with the same token."""
    rows = logits.shape[1]
    scale = expected.abs().max()
    error = ((logits.float() - expected[:, -rows:]).abs().amax(-1) * mask[:, -rows:]).max() / scale
    assert error <= tolerance, f"relative error {error:.1e}, at most {tolerance:.0e} is allowed"


@torch.no_grad()
def assert_forward_matches(
    compiled: Any,
    batch: Batch,
    policy: Policy,
    kept: Sequence[Sequence[int]] | None = None,
    salient: Sequence[Sequence[int]] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """All rows with and without a cache, and the last three rows alone, are the oracle's."""
    expected = reference(batch, policy, kept, salient)
    given = batch.call_arguments(kept if policy.reducer == "given" else None)
    last = ({"logits_to_keep": 3},) if batch.family.has_logits_to_keep else ()
    for settings in ({"use_cache": True}, {"use_cache": False}, *last):
        logits = compiled(**batch.inputs, **given, **settings).logits
        assert logits.shape[1] == min(settings.get("logits_to_keep", 10**6), expected.shape[1])
        assert_rows_match(logits, expected, batch.mask, tolerance)


@torch.no_grad()
def assert_generates_reference(
    compiled: Any, batch: Batch, policy: Policy, kept: Sequence[Sequence[int]] | None = None, tokens: int = 4
) -> None:
    """Greedy tokens are the oracle's, in every row of a left-padded batch."""
    given = batch.call_arguments(kept if policy.reducer == "given" else None)
    generated = compiled.generate(
        **without(batch.inputs, "position_ids"), **given, max_new_tokens=tokens, do_sample=False
    )
    expected = reference_generate(batch.model, batch.inputs, policy, tokens, kept, batch.groups, towers=batch.towers)
    assert generated[:, batch.inputs["input_ids"].shape[1] :].tolist() == expected


# Policies and what they keep.


def operations(
    num_layers: int, groups: Sequence[str], modules: Sequence[str] = MODULES, start: int = 0
) -> list[tuple[str, int, str]]:
    return [(group, layer, module) for group in groups for layer in range(start, num_layers) for module in modules]


def random_operations(
    num_layers: int, seed: int, groups: Sequence[str] = ("system", "visual", "text"), share: float = 0.4
) -> list[tuple[str, int, str]]:
    draw = random.Random(seed)
    return [operation for operation in operations(num_layers, groups) if draw.random() < share]


def uniform_kept(batch: Batch, count: int) -> list[list[int]]:
    """What a uniform stride keeps: images share `count` by largest remainder, each takes the middles of stretches."""
    items = batch.items
    if items is None:  # runs of visual tokens
        places = batch.visual
        if batch.groups is None:
            places = torch.isin(batch.inputs["input_ids"], torch.tensor([IMAGE, VIDEO]))
        first = places & ~torch.nn.functional.pad(places, (1, -1))
        items = torch.where(places, first.cumsum(1), -1)
    kept = []
    for row, counted in zip(items.tolist(), batch.visual.tolist(), strict=True):
        by_item: dict[int, int] = {}
        for item, is_counted in zip(row, counted, strict=True):
            if item >= 0:
                by_item[item] = by_item.get(item, 0) + is_counted
        sizes = list(by_item.values())
        total = sum(sizes)
        shares = [Fraction(min(count, total) * size, total) for size in sizes]
        quotas = [int(share) for share in shares]
        by_remainder = sorted(range(len(sizes)), key=lambda i: quotas[i] - shares[i])
        for index in by_remainder[: min(count, total) - sum(quotas)]:
            quotas[index] += 1
        starts = itertools.accumulate(sizes, initial=0)
        kept.append(
            [
                start + (2 * number + 1) * size // (2 * quota)
                for start, size, quota in zip(starts, sizes, quotas, strict=False)
                for number in range(quota)
            ]
        )
    return kept


def fixed_policies(batch: Batch) -> dict[str, tuple[Policy, list[list[int]] | None]]:
    """A few policies that together use every part of the semantics, with the visual tokens that they keep."""
    layers = batch.family.num_layers
    depthwise = functools.partial(Policy.depthwise, layers)
    given = batch.random_kept(5)
    scattered = Policy.from_operations(layers, random_operations(layers, 3), visual_tokens=5, reducer="given")
    positions = "original" if batch.family.has_mrope else "compact"
    return {
        "joint_depth": (depthwise(mha_depth=2, mlp_depth=1, system_mha_depth=3, system_mlp_depth=2), None),
        "query_and_key_value_apart": (depthwise(mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2), None),
        "uniform": (
            depthwise(mha_query_depth=1, mlp_depth=3, visual_tokens=6, positions=positions),
            uniform_kept(batch, 6),
        ),
        "given_scattered": (scattered, given),
    }


# The original must not run.


@contextlib.contextmanager
def original_decoder_forbidden(model: nn.Module) -> Iterator[None]:
    """The forward of the decoder's class and of its layers raises: only a rewritten graph can answer."""
    decoder = text_decoder(model)
    layers = named_child(decoder, LAYERS)
    classes = {type(decoder), *(type(part) for layer in layers for part in (layer, *layer_parts(layer)["attention"]))}
    saved = {kind: kind.forward for kind in classes}

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the original decoder ran")

    try:
        for kind in classes:  # with their signatures: some models pass arguments by position
            kind.forward = functools.wraps(saved[kind])(functools.partial(forward))
        yield
    finally:
        for kind, original in saved.items():
            kind.forward = original


def without(inputs: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name not in names}


def extended(batch: Batch, ids: Tensor) -> Batch:
    """The batch with text appended to every row: ids (batch, count)."""
    inputs = dict(batch.inputs)
    for name, more in (("input_ids", ids), ("attention_mask", torch.ones_like(ids))):
        inputs[name] = torch.cat([inputs[name], more], 1)
    if batch.family.type_ids:
        inputs[batch.family.type_ids] = torch.nn.functional.pad(inputs[batch.family.type_ids], (0, ids.shape[1]))
    return replace(batch, inputs=inputs)
