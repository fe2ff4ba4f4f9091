"""Training rows: a picture and about a dozen questions about it, packed behind one another.

Every question sees the prefix, the image and itself, so that a row costs one image for all of them. Image tokens may
be dropped, as a reducer drops them: the others keep their positions, or are numbered anew (`compact`).

    [prefix][image tokens][end of image][question 1][question 2] ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digits_vlm import data, models

__all__ = ["Batch", "decode_batch", "make_batch"]

KIND_WEIGHTS = {"read": 0.2, "row": 0.2, "yesno": 0.12, "count": 0.2, "choice": 0.28}
REFINING = {"read": 0.12, "row": 0.12, "yesno": 0.08, "count": 0.16, "choice": 0.52}
"""Shares of the kinds of question, at first and when a model is refined."""
HINT_WEIGHT = 0.5


@dataclass
class Batch:
    """One step's pictures and questions.

    Args:
        pixels: what the vision tower takes.
        prefix: (prefix,) token ids before the image; after: those behind it.
        questions: (batch, length) token ids, the answers included.
        block: (batch, length) number of each token's question, from 1; -1 padding.
        offset: (batch, length) place of each token in its question.
        targets: (n, 3) batch row, column among the questions, and token to predict there; weights: (n,).
        patches: (batch, image tokens, 2) digit of each image token (10: empty) and whether it is a digit's centre.
        cells: (batch, cells) digit of each cell (10: empty); present: (batch, 10) which digits there are.
        kept: (batch, kept) image tokens that enter the decoder; None for all.
        compact: whether they are numbered anew.
    """

    pixels: dict[str, Tensor]
    prefix: Tensor
    after: Tensor
    questions: Tensor
    block: Tensor
    offset: Tensor
    targets: Tensor
    weights: Tensor
    patches: Tensor
    cells: Tensor
    present: Tensor
    kept: Tensor | None
    compact: bool

    def to(self, device: torch.device | str) -> Batch:
        moved = {key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**{**vars(self), **moved, "pixels": {k: v.to(device) for k, v in self.pixels.items()}})


def _patch_labels(canvas: data.Canvas, side: int) -> np.ndarray:
    """(side * side, 2) for a canvas seen as side x side image tokens."""
    size = data.CANVAS / side
    labels = np.stack([np.full((side, side), 10), np.zeros((side, side), dtype=int)], axis=-1)
    edges = np.arange(side) * size
    for row, column in np.argwhere(canvas.digits >= 0):
        corner = canvas.corners[row, column]
        shares = [
            (np.minimum(edges + size, start + data.DIGIT) - np.maximum(edges, start)).clip(0) / size for start in corner
        ]
        inside = np.outer(*shares) >= 0.4
        labels[inside, 0] = canvas.digits[row, column]
        middle = ((corner + data.DIGIT / 2) / size).astype(int)
        labels[middle[0], middle[1]] = canvas.digits[row, column], 1
    return labels.reshape(side * side, 2)


def _drop(rng: np.random.Generator, batch: int, tokens: int) -> np.ndarray:
    """(batch, kept) image tokens: as many for each row, at random or evenly spaced."""
    count = max(8, round(rng.uniform(0.2, 1.0) * tokens))
    if rng.random() < 0.5:
        spaced = np.floor((np.arange(count) + 0.5) * tokens / count).astype(int)
        return np.broadcast_to(spaced, (batch, count)).copy()
    return np.sort(rng.permuted(np.tile(np.arange(tokens), (batch, 1)), axis=1)[:, :count], axis=1)


def make_batch(
    name: str,
    numbers: range,
    *,
    seed: int = 0,
    questions: int = 14,
    split: str = "train",
    full: bool = False,
    kinds: Mapping[str, float] = KIND_WEIGHTS,
    words: Any,
    images: Any,
) -> Batch:
    """The batch of the canvases `numbers`; it depends on nothing but the arguments.

    Args:
        full: every cell of the canvases has a digit.
        kinds: share of each kind of question.
        words, images: the model's tokenizer and image processor.
    """
    rng = np.random.default_rng([seed, 3, numbers.start])
    canvases = [data.canvas(split, number, seed, full) for number in numbers]
    side = data.CANVAS if name == "llava" else int(rng.choice([72, 96, 120, 144], p=[0.2, 0.4, 0.2, 0.2]))
    pictures = [canvas.image.resize((side, side)) for canvas in canvases]
    pixels = dict(images(pictures, return_tensors="pt"))
    tokens_per_side = data.CANVAS // 8 if name == "llava" else side // 12

    before, after = data.prompt("").split("<image>")[0], ""
    if name == "qwen2_5_vl":
        before, after = before + "<|vision_start|>", "<|vision_end|>"

    def encode(text: str) -> list[int]:
        return list(words(text, add_special_tokens=False)["input_ids"])

    rows: list[tuple[list[int], list[int], list[int]]] = []
    targets, weights = [], []
    for row, canvas in enumerate(canvases):
        ids: list[int] = []
        block: list[int] = []
        offset: list[int] = []
        for index, kind in enumerate(rng.choice(list(kinds), size=questions, p=list(kinds.values()))):
            question = data.ask(canvas, str(kind), rng)
            asked = encode(f"{question.text} Answer:")
            answer = [*encode(question.answer), models.EOS]
            for place, word in question.hints:
                targets.append((row, len(ids) + place, encode(word)[0]))
                weights.append(HINT_WEIGHT)
            for place, token in enumerate(answer):
                targets.append((row, len(ids) + len(asked) - 1 + place, token))
                weights.append(0.2 if token == models.EOS else 1.0)
            line = asked + answer[:-1]
            ids += line
            block += [index + 1] * len(line)
            offset += range(len(line))
        rows.append((ids, block, offset))
    length = max(len(ids) for ids, _, _ in rows)
    padded = [
        [part + [fill] * (length - len(part)) for part, fill in zip(row, (0, -1, 0), strict=True)] for row in rows
    ]
    grid = torch.tensor(padded)
    image_tokens = tokens_per_side**2
    kept = torch.from_numpy(_drop(rng, len(rows), image_tokens)) if rng.random() < 0.5 else None
    present = np.array([[(canvas.digits == digit).any() for digit in range(10)] for canvas in canvases])
    return Batch(
        pixels=pixels,
        prefix=torch.tensor([models.BOS, *encode(before)]),
        after=torch.tensor(encode(after), dtype=torch.long),
        questions=grid[:, 0],
        block=grid[:, 1],
        offset=grid[:, 2],
        targets=torch.tensor(targets),
        weights=torch.tensor(weights),
        patches=torch.from_numpy(np.stack([_patch_labels(canvas, tokens_per_side) for canvas in canvases])),
        cells=torch.from_numpy(np.stack([canvas.digits.flatten() for canvas in canvases])) % 11,
        present=torch.from_numpy(present).float(),
        kept=kept,
        compact=name == "llava" and bool(rng.random() < 0.5),
    )


def _positions(batch: Batch, image_tokens: int, axes: int) -> tuple[Tensor, int]:
    """(axes, image tokens) positions of the image's tokens, and the next position behind it."""
    start = len(batch.prefix)
    if axes == 1:
        return torch.arange(start, start + image_tokens)[None], start + image_tokens
    side = int(image_tokens**0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    flat = torch.stack([torch.zeros(image_tokens, dtype=torch.long), rows.flatten(), columns.flatten()])
    return start + flat, start + side


def decode_batch(model: Any, batch: Batch, features: Tensor) -> Tensor:
    """Logits (n, vocabulary) at the batch's targets; `features` is (batch, image tokens, hidden)."""
    decoder, device = model.model.language_model, features.device
    rows, image_tokens, _ = features.shape
    axes = 1 if model.config.model_type == "llava" else 3
    image, following = _positions(batch, image_tokens, axes)
    image = image[:, None].expand(-1, rows, -1).to(device)
    if batch.kept is not None:
        features = features.gather(1, batch.kept[..., None].expand(-1, -1, features.shape[-1]))
        image = image.gather(2, batch.kept.expand(axes, -1, -1))
        if batch.compact:
            image = len(batch.prefix) + torch.arange(batch.kept.shape[1], device=device).expand(axes, rows, -1)
            following = len(batch.prefix) + batch.kept.shape[1]
    prefix, after = len(batch.prefix), len(batch.after)

    def line(start: int, count: int) -> Tensor:
        return torch.arange(start, start + count, device=device).expand(axes, rows, -1)

    positions = torch.cat(
        [line(0, prefix), image, line(following, after), (following + after + batch.offset).expand(axes, -1, -1)], dim=2
    )
    embed = decoder.embed_tokens
    embeds = torch.cat(
        [
            embed(batch.prefix).expand(rows, -1, -1),
            features.to(embed.weight.dtype),
            embed(batch.after).expand(rows, -1, -1),
            embed(batch.questions),
        ],
        dim=1,
    )
    shared = embeds.shape[1] - batch.questions.shape[1]
    block = torch.cat([torch.zeros(rows, shared, dtype=torch.long, device=device), batch.block], dim=1)
    place = torch.arange(embeds.shape[1], device=device)
    visible = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
    visible = visible & (place[None, :] <= place[:, None])
    mask = torch.zeros(visible.shape, dtype=embeds.dtype, device=device)
    mask = mask.masked_fill(~visible, torch.finfo(embeds.dtype).min)[:, None]
    hidden = decoder(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions[0] if axes == 1 else positions,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[batch.targets[:, 0], shared + batch.targets[:, 1]])
