"""Writes the graphs of one export, one after the other, and describes them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dop_compile.errors import UnsupportedModelError
from dop_compile.onnx.contract.manifest import DECODE, FORMAT, WEIGHTS, Manifest
from dop_compile.onnx.contract.parts import Graph, PastClass, SectionInfo, Tier, VisionGraph
from dop_compile.onnx.export.capture import Capture, modality_id
from dop_compile.onnx.export.convert import Range, Signature, write_graph
from dop_compile.onnx.export.describe import (
    cache_sizes,
    model_info,
    nested,
    newlines,
    position_rows,
    reducer_info,
    save_files,
    slugs,
    why_runtime_reduces,
)
from dop_compile.onnx.export.flat import flat
from dop_compile.onnx.export.graphs import Decode, Embed, Prefill, Reduce, Vision
from dop_compile.onnx.export.sections import past_classes, tier_sections
from dop_compile.onnx.export.shapes import Shapes, decode_signature, past_ranges, prefill_signature, section_lengths
from dop_compile.onnx.export.weights import WeightStore
from dop_compile.policy.policy import Policy
from dop_compile.reports.explain import explain

__all__ = ["Exporter"]

PACKAGES = ("dop_compile", "torch", "transformers", "onnx", "onnxscript")


class Exporter:
    """One export: graphs are written one after the other into `folder`."""

    def __init__(
        self,
        model: Any,
        policies: Mapping[str, Policy],
        captures: Sequence[Capture],
        shapes: Shapes,
        opset: int,
        folder: Path,
        progress: bool,
    ):
        self.model, self.policies, self.captures = model, policies, captures
        self.shapes, self.opset, self.folder = shapes, opset, folder
        self.hidden = captures[0].embeds.shape[-1]
        self.rows = position_rows(captures)
        self.sections = dict(zip(policies, tier_sections(policies.values()), strict=True))
        self.classes = past_classes(policies, self.sections)
        self.lengths = {name: self._lengths(name) for name in policies}
        self.reducers = {name: reducer_info(policy) for name, policy in policies.items()}
        self.names = slugs(policies)
        self.graphs: dict[str, Graph] = {}
        self._bar = tqdm(desc="export", disable=not progress, file=sys.stderr, leave=False, unit="graph")

    # --- sizes ----------------------------------------------------------------------------------------------------

    def _lengths(self, tier: str) -> dict[str, int | None]:
        """Static section lengths that every example fits in; None where dynamic."""
        wanted = self.shapes.visual_length
        prompts = [
            (sum(len(call.features) for call in c.vision), sum(len(newlines(call, c.newline)) for call in c.vision))
            for c in self.captures
            if c.vision
        ]
        if isinstance(wanted, int):
            prompts = [(wanted, max((rows for _, rows in prompts), default=0))]
        if wanted == "dynamic" or not prompts:
            if self.shapes.static:
                raise ValueError("visual_length: a static export of a model without a vision tower needs a number")
            prompts = []
        found = [section_lengths(self.policies[tier], self.sections[tier], *prompt) for prompt in prompts]
        text = self.shapes.text[1] if self.shapes.static else None
        return {
            section.name: max((size for lengths in found if (size := lengths[section.name]) is not None), default=text)
            for section in self.sections[tier]
        }

    def _tokens(self) -> Range:
        """Whole prompts, whose placeholders are embedded, too."""
        text, (usual, largest) = self.shapes.range("text"), self._visual()
        sections = 2 if any("system" in lengths for lengths in self.lengths.values()) else 1
        return Range(1, sections * text.opt + usual, sections * text.max + largest)

    def _visual(self) -> tuple[int, int]:
        """Visual tokens of a prompt before reduction, usually and at most."""
        seen = max(sum(len(call.features) for call in c.vision) for c in self.captures)
        wanted = self.shapes.visual_length
        if isinstance(wanted, int):
            return wanted, wanted
        if wanted is None and seen:
            return seen, seen
        return min(seen or 576, self.shapes.max_visual), self.shapes.max_visual

    def _ranges(self, lengths: Mapping[str, int | None]) -> dict[str, Range]:
        text = self.shapes.range("text")
        visual = Range(1, min(576, self.shapes.max_visual), self.shapes.max_visual)
        sections = {name: text if name in ("text", "system") else visual for name in lengths}
        if not self.shapes.static and "system" in sections:
            sections["system"] = Range(1, text.opt, text.max)
        return {"batch": self.shapes.range("batch"), **sections}

    # --- graphs ---------------------------------------------------------------------------------------------------

    def _write(
        self,
        name: str,
        module: nn.Module,
        signature: Signature,
        ranges: Mapping[str, Range],
        example: Sequence[Tensor] | None = None,
    ) -> str:
        self._bar.set_postfix_str(name)
        path = self.folder / f"{name}.onnx"
        self.graphs[name] = write_graph(module.eval(), signature, ranges, path, self.store, self.opset, example)
        self._bar.update()
        return name

    def _prefill(self, tier: str) -> str:
        sections, lengths = self.sections[tier], self.lengths[tier]
        module = Prefill(self.model, self.policies[tier], sections, self.rows)
        signature = prefill_signature(sections, lengths, module.output_names, self.model.dtype, self.hidden, self.rows)
        name = f"prefill-{self.names[tier]}"
        return self._write(name, module, signature, self._ranges(lengths))

    def _decode(self, kv_heads: Sequence[int], head_dims: Sequence[int]) -> str:
        classes = [layers for layers, _ in self.classes]
        module = Decode(self.model, classes, self.rows)
        signature = decode_signature(classes, kv_heads, head_dims, module.output_names, self.model.dtype, self.rows)
        ranges = {"batch": self.shapes.range("batch")}
        ranges |= past_ranges(self.shapes, [held for _, held in self.classes], self.lengths)
        return self._write(DECODE, module, signature, ranges)

    def _embed(self) -> str:
        signature = Signature((("input_ids", torch.int64, ("batch", "tokens")),), Embed.output_names)
        ranges = {"batch": self.shapes.range("batch"), "tokens": self._tokens()}
        return self._write("embed", Embed(self.model), signature, ranges)

    def _vision(self) -> tuple[VisionGraph, ...]:
        found: dict[Any, VisionGraph] = {}
        for capture in self.captures:
            for call in capture.vision:
                constants = nested(call.constants)
                items = call.kwargs[call.pixels].shape[0]
                if any(len(rows) != 1 for rows in constants.values()):
                    raise ValueError(
                        "examples: a vision graph is made for one image at a time; give prompts with one image each"
                    )
                # Without constants every image (or tile) is like the others, and the first stands for all
                pixels = call.kwargs[call.pixels] if constants else call.kwargs[call.pixels][:1]
                key = (call.modality, tuple(pixels.shape), str(constants))
                if key in found:
                    continue
                name = f"vision-{call.modality}-{len(found)}"
                signature = Signature(((call.pixels, pixels.dtype, tuple(pixels.shape)),), Vision.output_names)
                module = Vision(self.model, call)
                self._write(name, flat(module, pixels) if constants else module, signature, {}, [pixels])
                tokens = len(call.features) // (1 if constants else items)
                rows = tuple(newlines(call, capture.newline))
                found[key] = VisionGraph(name, call.modality, call.pixels, tuple(pixels.shape), constants, tokens, rows)
        return tuple(found.values())

    def _reduce(self, vision: Sequence[VisionGraph]) -> None:
        for tier, info in self.reducers.items():
            if info is None or info.reason:
                continue
            policy = self.policies[tier]
            if reason := why_runtime_reduces(policy, vision):
                self.reducers[tier] = replace(info, reason=reason)
                continue
            tokens = vision[0].tokens
            name = f"reduce-{self.names[tier]}"
            inputs = (("features", self.model.dtype, (tokens, self.hidden)),)
            try:
                module = Reduce(policy)
                if module.reads_text(tokens, self.hidden):
                    raise UnsupportedModelError("it reads the prompt's text")
                self._write(name, module, Signature(inputs, Reduce.output_names), {})
            except (UnsupportedModelError, ValueError) as error:  # it decides in Python by what it sees
                (self.folder / f"{name}.onnx").unlink(missing_ok=True)
                self.reducers[tier] = replace(info, reason=str(error))
            else:
                self.reducers[tier] = replace(info, graph=name, tokens=tokens)

    # --- all of it ------------------------------------------------------------------------------------------------

    def run(self, compiled: Any, examples: Sequence[Mapping[str, Any]], processor: Any) -> Manifest:
        with self._bar, torch.no_grad(), WeightStore(self.folder / WEIGHTS) as self.store:
            embed = self._embed()  # first: where its table is the head's, too, the others read it as it is stored here
            prefills = {tier: self._prefill(tier) for tier in self.policies}
            kv_heads, head_dims = cache_sizes(self.model)
            self._decode(kv_heads, head_dims)
            vision = self._vision()
            self._reduce(vision)
            weights = self.store.finish()
        costs = self._costs(compiled, examples[0])
        tiers = {
            name: Tier(
                policy=policy,
                prefill=prefills[name],
                decode=DECODE,
                sections=tuple(SectionInfo(s.name, s.groups, self.lengths[name][s.name]) for s in self.sections[name]),
                reducer=self.reducers[name],
                **costs[name],
            )
            for name, policy in self.policies.items()
        }
        ids = {m: i for m in ("image", "video") if (i := modality_id(self.model, m)) is not None}
        return Manifest(
            **FORMAT.header(),
            opset=self.opset,
            static=self.shapes.static,
            model=model_info(self.model, self.hidden, kv_heads, head_dims),
            weights=weights,
            graphs=self.graphs,
            embed=embed,
            vision=vision,
            tiers=tiers,
            past_classes=tuple(PastClass(layers, held) for layers, held in self.classes),
            placeholder_ids=ids,
            positions="model" if self.rows is not None else "sequential",
            position_rows=self.rows,
            files=save_files(self.model, processor, self.folder),
            versions={name: version(name) for name in PACKAGES},
        )

    def _costs(self, compiled: Any, example: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        visual = sum(len(call.features) for call in self.captures[0].vision)
        total = int(example["input_ids"].shape[1])
        ids = [i for m in ("image", "video") if (i := modality_id(self.model, m)) is not None]
        places = torch.isin(example["input_ids"][0].cpu(), torch.tensor(ids, dtype=torch.long)).nonzero()
        system = int(places[0]) if visual and len(places) else 0
        counts = (system, visual, total - system - visual)
        found = explain(compiled, system=counts[0], visual=counts[1], text=counts[2])
        return {
            cost.tier: {
                "counts": counts,
                "eq11_flops": cost.eq11_flops,
                "eq11_fraction": None if not cost.original_flops else (cost.eq11_flops or 0) / cost.original_flops,
                "executed_flops": cost.executed_flops,
                "kv_bytes": cost.kv_bytes,
            }
            for cost in found.tiers
        }
