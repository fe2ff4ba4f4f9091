"""The exported graphs run one after the other, plainly: what `verify` compares with PyTorch.

No buffers are kept and no tensors are bound: this is the contract of `dop_compile.onnx.contract.manifest` in code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dop_compile.onnx.contract.manifest import Manifest
from dop_compile.onnx.contract.parts import VisionGraph
from dop_compile.onnx.run.exported_reducer import GraphReducer
from dop_compile.onnx.run.prepare import Prepared, placeholders, prepare, prompt_positions
from dop_compile.onnx.run.sessions import GraphSession, open_graph
from dop_compile.reducers import Reducer
from dop_compile.vision.items import has_items

__all__ = ["PlainPipeline", "vision_items"]


class PlainPipeline:
    """Sessions of an exported directory and greedy generation with them.

    Args:
        model: of the exported class, for positions; it needs no weights.
    """

    def __init__(self, folder: Path, manifest: Manifest, model: Any, provider: str, optimized: bool):
        self.folder, self.manifest, self.model = folder, manifest, model
        self._provider, self._optimized = provider, optimized
        self._sessions: dict[str, GraphSession] = {}

    def session(self, name: str) -> GraphSession:
        if name not in self._sessions:
            self._sessions[name] = open_graph(self.folder, self.manifest, name, self._provider, self._optimized)
        return self._sessions[name]

    def close(self, name: str) -> None:
        """Free a graph that is not needed any more."""
        self._sessions.pop(name, None)

    def embeddings(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(batch, tokens, hidden) embeddings, and (batch, tokens) places of features, of newlines among them, and the
        number of the image or video that each place belongs to, -1 where that is not known."""
        ids = inputs["input_ids"]
        pixels = {g.pixels for g in self.manifest.vision}
        given = any(inputs.get(name) is not None for name in pixels)
        visual = placeholders(self.manifest, ids) if given else torch.zeros_like(ids, dtype=torch.bool)
        embeds = self.session(self.manifest.embed).run({"input_ids": ids.masked_fill(visual, 0)})["embeds"]
        newlines, items = torch.zeros_like(visual), torch.full_like(ids, -1)
        known = 0
        for modality in {graph.modality for graph in self.manifest.vision}:
            parts = self._features(inputs, modality)
            if not parts:
                continue
            one = len(self.manifest.placeholder_ids) == 1
            place = visual if one else ids == self.manifest.placeholder_ids[modality]
            features = torch.cat([features for features, _ in parts])
            if int(place.sum()) != len(features):
                raise ValueError(f"{int(place.sum())} {modality} placeholders for {len(features)} features")
            embeds[place] = features.to(embeds)
            newlines[place] = torch.cat([rows for _, rows in parts])
            if has_items(self.manifest.model.class_name):
                sizes = torch.tensor([len(features) for features, _ in parts])
                items[place] = torch.arange(known, known + len(parts)).repeat_interleave(sizes)
                known += len(parts)
        return embeds, visual, newlines, items

    def _features(self, inputs: Mapping[str, Any], modality: str) -> list[tuple[Tensor, Tensor]]:
        """Per image, features and which of them are newlines."""
        graphs = [g for g in self.manifest.vision if g.modality == modality]
        pixels = inputs.get(graphs[0].pixels)
        if pixels is None:
            return []
        found = []
        for graph, part in vision_items(graphs, pixels, inputs):
            dtype = getattr(torch, self.manifest.graphs[graph.graph].inputs[0].dtype)
            features = self.session(graph.graph).run({graph.pixels: part.to(dtype)})["features"]
            rows = torch.zeros(len(features), dtype=torch.bool)
            rows[list(graph.newlines)] = True
            found.append((features, rows))
        return found

    def prepare(self, tier: str, inputs: Mapping[str, Any], visual_indices: Sequence[Any] | None = None) -> Prepared:
        """A left-padded batch, as a processor returns it, for a tier's prefill; `visual_indices` as in `prepare`."""
        info = self.manifest.tiers[tier]
        embeds, visual, newlines, items = self.embeddings(inputs)
        positions = prompt_positions(self.model, self.manifest, inputs)
        return prepare(
            info.policy,
            info.sections,
            embeds,
            inputs["attention_mask"],
            positions,
            visual,
            newlines=newlines,
            items=items,
            visual_indices=visual_indices,
            around=self.reducer(tier),
        )

    def reducer(self, tier: str) -> Callable[[Reducer], Reducer] | None:
        """What puts the tier's exported reducer in the place of its policy's; None where there is none."""
        info = self.manifest.tiers[tier].reducer
        if info is None or info.graph is None or info.tokens is None:
            return None
        return functools.partial(GraphReducer, self.session(info.graph).run, info.tokens)

    def generate(self, tier: str, prepared: Prepared, new_tokens: int) -> tuple[Tensor, Tensor]:
        """Greedy generation.

        Returns:
            (batch, vocabulary) logits of the first token, and (batch, new_tokens) ids, `pad_token_id` after an end.
        """
        manifest, info = self.manifest, self.manifest.tiers[tier]
        outputs = self.session(info.prefill).run(prepared.inputs)
        logits = first = outputs["logits"]
        model = manifest.model
        batch = logits.shape[0]
        dtype = getattr(torch, model.dtype)
        slots = [
            torch.cat(
                [prepared.section_slots[s] for s in c.tiers[tier]] or [torch.empty(batch, 0, dtype=torch.long)], 1
            )
            for c in manifest.past_classes
        ]
        past = {}
        for layer, (heads, size) in enumerate(zip(model.kv_heads, model.head_dims, strict=True)):
            for part in ("key", "value"):
                empty = torch.zeros(batch, heads, 0, size, dtype=dtype)
                past[layer, part] = outputs.get(f"present.{layer}.{part}", empty)
        slot, position = prepared.next_slots[:, None], prepared.next_positions[:, None]
        done = torch.zeros(batch, dtype=torch.bool)
        ids: list[Tensor] = []
        for number in range(new_tokens):
            token = torch.where(done, model.pad_token_id, logits.argmax(-1))
            ids.append(token)
            done |= torch.isin(token, torch.tensor(model.eos_token_ids, dtype=torch.long))
            if bool(done.all()) or number == new_tokens - 1:
                break
            feeds = {"input_ids": token[:, None], "slots": slot, "position_ids": self._on_axes(position)}
            feeds |= {f"past_slots.{number}": held for number, held in enumerate(slots)}
            feeds |= {f"past_key_values.{layer}.{part}": held for (layer, part), held in past.items()}
            outputs = self.session(info.decode).run(self._padded(info.decode, feeds))
            logits = outputs["logits"]
            past = {(n, p): torch.cat([held, outputs[f"new.{n}.{p}"]], 2) for (n, p), held in past.items()}
            slots = [torch.cat([held, slot], 1) for held in slots]
            slot, position = slot + 1, position + 1
        return first, torch.stack(ids, 1)

    def _on_axes(self, position: Tensor) -> Tensor:
        rows = self.manifest.position_rows
        return position if rows is None else position.expand(rows, *position.shape)

    def _padded(self, graph: str, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """Entries with slot -1 up to what the graph takes at least."""
        specs = {spec.name: spec for spec in self.manifest.graphs[graph].inputs}
        for name, value in feeds.items():
            kind = name.partition(".")[0]
            if kind in ("past_slots", "past_key_values") and name in specs:
                axis = 1 if kind == "past_slots" else 2
                lacking = specs[name].min[axis] - value.shape[axis]
                if lacking > 0:
                    pad = (lacking, 0) if axis == 1 else (0, 0, lacking, 0)
                    feeds[name] = torch.nn.functional.pad(value, pad, value=-1 if axis == 1 else 0)
        return feeds


def vision_items(
    graphs: list[VisionGraph], pixels: Tensor, inputs: Mapping[str, Any]
) -> list[tuple[VisionGraph, Tensor]]:
    """Each image's pixels with the graph that was made for them.

    Raises:
        ValueError: pixels of a layout that no graph was exported for.
    """
    if not graphs[0].constants:
        graph = next((g for g in graphs if tuple(g.example[1:]) == tuple(pixels.shape[1:])), None)
        if graph is None:
            raise ValueError(_unknown(graphs, f"{tuple(pixels.shape[1:])}"))
        return [(graph, pixels[n : n + 1]) for n in range(len(pixels))]
    if missing := [name for name in graphs[0].constants if inputs.get(name) is None]:
        raise ValueError(f"{missing[0]}: expected it with {graphs[0].pixels}, as the processor returns both")
    count = len(inputs[next(iter(graphs[0].constants))])
    found = []
    start = 0
    for number in range(count):
        own = {n: tuple(inputs[n][number].flatten().tolist()) for n in graphs[0].constants}
        graph = next((g for g in graphs if all(g.constants[n] == (own[n],) for n in own)), None)
        if graph is None:
            raise ValueError(_unknown(graphs, str(own)))
        # Per image one first row (tiles), or as many rows as the graph was made with (patches)
        rows = graph.example[0]
        part = pixels[start : start + rows]
        if part.dim() > 1 and part.shape[1:] != graph.example[1:]:
            part = part[:, : graph.example[1]]  # tiles are padded to the largest image of a batch
        found.append((graph, part))
        start += rows
    return found


def _unknown(graphs: list[VisionGraph], layout: str) -> str:
    known = ", ".join(str(g.constants or g.example[1:]) for g in graphs)
    return f"pixels of layout {layout}: no vision graph was exported for them, only for {known}; export with an example"
