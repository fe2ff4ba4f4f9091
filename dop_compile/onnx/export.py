"""`export_onnx`: a model and its tiers as a directory of ONNX graphs over one file of weights.

examples --capture--> what the decoder is given --sections--> one prefill graph per tier, one decode graph
                 \\--> embedding graph, vision graph per layout of pixels
all graphs --convert--> weights.bin (each weight once), *.onnx, manifest.json
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from dop_compile.compiler import dop_compile
from dop_compile.errors import UnsupportedModelError
from dop_compile.explain import explain
from dop_compile.fingerprint import model_fingerprint
from dop_compile.onnx.capture import Capture, VisionCall, capture_prompt, modality_id
from dop_compile.onnx.check import OPSETS
from dop_compile.onnx.convert import Range, Signature, write_graph
from dop_compile.onnx.graphs import Decode, Embed, Prefill, Vision, flat
from dop_compile.onnx.manifest import (
    DECODE,
    FORMAT,
    MANIFEST,
    VERSION,
    WEIGHTS,
    DataFile,
    Graph,
    Manifest,
    ModelInfo,
    PastClass,
    ReducerInfo,
    SectionInfo,
    Tier,
    VisionGraph,
    file_sha256,
)
from dop_compile.onnx.sections import past_classes, tier_sections
from dop_compile.onnx.shapes import Shapes, decode_signature, past_ranges, prefill_signature, section_lengths
from dop_compile.onnx.weights import WeightStore
from dop_compile.onnx.workspace import new_directory
from dop_compile.policy import Policy
from dop_compile.processing import prompt_inputs
from dop_compile.prompt import make_reducer
from dop_compile.trace import DecoderInputs

__all__ = ["export_onnx"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PACKAGES = ("dop_compile", "torch", "transformers", "onnx", "onnxscript")


def export_onnx(
    model: Any,
    tiers: Mapping[str, Policy] | Policy,
    directory: str | os.PathLike[str],
    *,
    examples: Sequence[Mapping[str, Any]] | None = None,
    processor: Any = None,
    opset: int = 23,
    shapes: Shapes | None = None,
    force: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write a model and its tiers as ONNX graphs; `dop_compile.onnx.manifest` documents what the directory holds.

    Args:
        model: a Hugging Face vision-language or causal language model in eval mode, not compiled; the graphs are in its
            dtype (float32, float16 or bfloat16).
        tiers: policies by name, the first is the default; or one policy.
        directory: must not exist, unless `force`.
        examples: prompts of one row as a processor returns them. A vision graph is made for each layout of pixels among
            them; their largest number of visual tokens is the static length before reduction. None: one prompt with an
            image of the processor's own size, by `processor`.
        processor: saved with the graphs, if given.
        opset: 23, or 18 for runtimes without Attention, RMSNormalization and RotaryEmbedding.
        shapes: sizes to serve.
        force: replace an existing directory.
        progress: show a bar on stderr.

    Raises:
        FileExistsError: the directory exists.
        ValueError, TypeError: policies that are not for this model, a model in training mode, an unknown opset.
        UnsupportedModelError: the model cannot be pruned or exported; the message says why.
        OSError: the directory cannot be written.
    """
    tiers = {"default": tiers} if isinstance(tiers, Policy) else dict(tiers)
    compiled = dop_compile(model, tiers, backend="eager")  # checks model and policies
    _check(model, opset)
    examples = _examples(model, examples, processor)
    captures = [capture_prompt(model, example) for example in examples]
    needed = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    with new_directory(directory, force=force, needed_bytes=needed) as scratch:
        exporter = _Exporter(model, tiers, captures, shapes or Shapes(), opset, scratch, progress)
        manifest = exporter.run(compiled, examples, processor)
        manifest.save(scratch)
    return manifest


def _check(model: Any, opset: int) -> None:
    if opset not in OPSETS:
        raise ValueError(f"opset: expected one of {', '.join(map(str, OPSETS))}, got {opset!r}")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before the export")
    if model.dtype not in DTYPES:
        raise ValueError(f"the model is in {model.dtype}; expected float32, float16 or bfloat16")
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError("the model has no weights (meta device); load it with its weights before the export")


def _examples(model: Any, examples: Sequence[Mapping[str, Any]] | None, processor: Any) -> Sequence[Mapping[str, Any]]:
    multimodal = model.config.get_text_config(decoder=True) is not model.config
    if examples is None and multimodal:
        if processor is None:
            raise ValueError("examples: give prompts with images, as the processor returns them, or the processor")
        examples = [prompt_inputs(processor, "Describe.", [Image.new("RGB", (336, 336))])]
    elif examples is None:
        examples = [{"input_ids": torch.arange(3)[None], "attention_mask": torch.ones(1, 3, dtype=torch.long)}]
    if not examples:
        raise ValueError("examples: expected at least one prompt, got none")
    found = []
    for number, example in enumerate(examples):
        if example["input_ids"].shape[0] != 1:
            raise ValueError(f"examples[{number}]: expected one row, got {example['input_ids'].shape[0]}")
        moved = {n: v.to(model.device) if isinstance(v, Tensor) else v for n, v in example.items()}
        found.append({n: v.to(model.dtype) if _is_float(v) else v for n, v in moved.items()})
    return found


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class _Exporter:
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
        self.rows = _position_rows(captures)
        self.sections = dict(zip(policies, tier_sections(policies.values()), strict=True))
        self.classes = past_classes(policies, self.sections)
        self.lengths = {name: self._lengths(policy) for name, policy in policies.items()}
        self.graphs: dict[str, Graph] = {}
        self._bar = tqdm(desc="export", disable=not progress, file=sys.stderr, leave=False, unit="graph")

    # --- sizes ----------------------------------------------------------------------------------------------------

    def _lengths(self, policy: Policy) -> dict[str, int | None]:
        sections = tier_sections([policy])[0] if len(self.policies) == 1 else self.sections[self._name(policy)]
        available: int | None = None
        newlines = 0
        for capture in self.captures:
            count = sum(len(call.features) for call in capture.vision)
            if count > (available or 0):
                available = count
                newlines = sum(len(_newlines(call, capture.newline)) for call in capture.vision)
        if isinstance(self.shapes.visual_length, int):
            available = self.shapes.visual_length
        if self.shapes.visual_length == "dynamic":
            available = None
        if available is None and self.shapes.static:
            raise ValueError("shapes.visual_length: a static export of a model without a vision tower needs a number")
        return section_lengths(policy, sections, available, newlines)

    def _name(self, policy: Policy) -> str:
        return next(name for name, other in self.policies.items() if other is policy)

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

    def _prefill(self, tier: str) -> tuple[str, Prefill]:
        sections, lengths = self.sections[tier], self.lengths[tier]
        module = Prefill(self.model, self.policies[tier], sections, self.rows)
        signature = prefill_signature(sections, lengths, module.output_names, self.model.dtype, self.hidden, self.rows)
        name = f"prefill-{_slug(tier, self.policies)}"
        return self._write(name, module, signature, self._ranges(lengths)), module

    def _decode(self, kv_heads: Sequence[int], head_dims: Sequence[int]) -> str:
        classes = [layers for layers, _ in self.classes]
        module = Decode(self.model, classes, self.rows)
        signature = decode_signature(classes, kv_heads, head_dims, module.output_names, self.model.dtype, self.rows)
        ranges = {"batch": self.shapes.range("batch")}
        ranges |= past_ranges(self.shapes, [held for _, held in self.classes], self.lengths)
        return self._write(DECODE, module, signature, ranges)

    def _embed(self) -> str:
        signature = Signature((("input_ids", torch.int64, ("batch", "tokens")),), Embed.output_names)
        text = self.shapes.text
        ranges = {"batch": self.shapes.range("batch"), "tokens": Range(1, text[1], text[2])}
        return self._write("embed", Embed(self.model), signature, ranges)

    def _vision(self) -> tuple[VisionGraph, ...]:
        found: dict[Any, VisionGraph] = {}
        for capture in self.captures:
            for call in capture.vision:
                constants = _nested(call.constants)
                pixels = call.kwargs[call.pixels]
                free = not constants
                key = (call.modality, tuple(pixels.shape[1:] if free else pixels.shape), str(constants))
                if key in found:
                    continue
                if not free and any(len(rows) != 1 for rows in constants.values()):
                    raise ValueError(
                        "examples: a vision graph is made for one image at a time; give prompts with one image each"
                    )
                name = f"vision-{call.modality}-{len(found)}"
                self._write_vision(name, call, pixels, free)
                newlines = tuple(_newlines(call, capture.newline))
                tokens = len(call.features) // (pixels.shape[0] if free else 1)
                found[key] = VisionGraph(
                    name, call.modality, call.pixels, tuple(pixels.shape), constants, tokens, free, newlines
                )
        return tuple(found.values())

    def _write_vision(self, name: str, call: VisionCall, pixels: Tensor, free: bool) -> None:
        first: int | str = "items" if free and not self.shapes.static else pixels.shape[0]
        signature = Signature(((call.pixels, pixels.dtype, (first, *pixels.shape[1:])),), Vision.output_names)
        items = {"items": Range(1, 1, 8)}
        example = torch.cat([pixels[:1]] * 2) if first == "items" else pixels
        module = Vision(self.model, call)
        self._write(name, module if free else flat(module, pixels), signature, items, [example])

    # --- all of it ------------------------------------------------------------------------------------------------

    def run(self, compiled: Any, examples: Sequence[Mapping[str, Any]], processor: Any) -> Manifest:
        with self._bar, torch.no_grad(), WeightStore(self.folder / WEIGHTS) as self.store:
            prefills = {tier: self._prefill(tier) for tier in self.policies}
            kv_heads, head_dims = _cache_sizes(self.model, next(iter(prefills.values()))[1])
            self._decode(kv_heads, head_dims)
            embed = self._embed()
            vision = self._vision()
            weights = self.store.finish()
        costs = self._costs(compiled, examples[0])
        tiers = {
            name: Tier(
                policy=policy,
                prefill=prefills[name][0],
                decode=DECODE,
                sections=tuple(SectionInfo(s.name, s.groups, self.lengths[name][s.name]) for s in self.sections[name]),
                reducer=_reducer(policy),
                **costs[name],
            )
            for name, policy in self.policies.items()
        }
        ids = {m: i for m in ("image", "video") if (i := modality_id(self.model, m)) is not None}
        return Manifest(
            format=FORMAT,
            version=VERSION,
            opset=self.opset,
            static=self.shapes.static,
            model=_model_info(self.model, self.hidden, kv_heads, head_dims),
            weights=weights,
            graphs=self.graphs,
            embed=embed,
            vision=vision,
            tiers=tiers,
            past_classes=tuple(PastClass(layers, held) for layers, held in self.classes),
            placeholder_ids=ids,
            positions="model" if self.rows is not None else "sequential",
            position_rows=self.rows,
            files=_save_files(self.model, processor, self.folder),
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


def _position_rows(captures: Sequence[Capture]) -> int | None:
    positions = captures[0].positions
    return None if positions is None or positions.dim() == 2 else int(positions.shape[0])


def _newlines(call: VisionCall, newline: Tensor | None) -> list[int]:
    if newline is None or call.modality != "image":
        return []
    same = (call.features == newline.to(call.features)).all(dim=-1)
    found: list[int] = same.nonzero().flatten().tolist()
    return found


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {name: tuple(tuple(row) for row in t.reshape(t.shape[0], -1).tolist()) for name, t in tensors.items()}


def _slug(tier: str, tiers: Mapping[str, Policy]) -> str:
    """A file name for a tier; its number is added where another tier's would be the same."""

    def plain(name: str) -> str:
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", name.replace("%", "")).strip("-.") or "tier"

    same = [name for name in tiers if plain(name).lower() == plain(tier).lower()]
    return plain(tier) if len(same) == 1 else f"{plain(tier)}-{list(tiers).index(tier)}"


def _reducer(policy: Policy) -> ReducerInfo | None:
    if policy.visual_tokens is None and policy.salient_fraction is None and policy.reducer != "given":
        return None
    reducer = None if policy.reducer == "given" else make_reducer(policy, None, 1)
    if reducer is not None and reducer.requires:
        raise UnsupportedModelError(
            f"reducer {policy.reducer!r} needs {', '.join(sorted(reducer.requires))} of the vision tower, which the "
            "exported vision graphs do not return; use another reducer for ONNX"
        )
    return ReducerInfo(policy.reducer, None, None)


def _cache_sizes(model: Any, prefill: Prefill) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """KV heads and head dimension of each layer, as an unpruned decoder's graph has them."""
    del prefill
    from dop_compile.model_path import decoder_path
    from dop_compile.trace import trace_decoder

    traced = trace_decoder(model.get_submodule(decoder_path(model)), DecoderInputs())
    sizes: dict[int, tuple[int, int]] = {}
    for node in traced.graph.nodes:
        layer = traced.layer_of(node)
        if node.meta.get("effect") and layer is not None:
            keys = node.args[1].meta["val"]
            sizes[layer] = int(keys.shape[1]), int(keys.shape[3])
    if sorted(sizes) != list(range(traced.num_layers)):
        raise UnsupportedModelError(
            f"{type(model).__name__} stores keys and values in {len(sizes)} of {traced.num_layers} layers; export to "
            "ONNX supports decoders that store them in every layer"
        )
    return tuple(sizes[n][0] for n in sorted(sizes)), tuple(sizes[n][1] for n in sorted(sizes))


def _model_info(model: Any, hidden: int, kv_heads: tuple[int, ...], head_dims: tuple[int, ...]) -> ModelInfo:
    settings = model.generation_config
    end = settings.eos_token_id
    ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)
    pad = settings.pad_token_id
    return ModelInfo(
        class_name=type(model).__name__,
        source=str(model.config._name_or_path or ""),
        model_type=str(model.config.model_type),
        fingerprint=model_fingerprint(model),
        dtype=str(model.dtype).removeprefix("torch."),
        num_layers=len(kv_heads),
        hidden_size=int(hidden),
        vocabulary=int(model.get_output_embeddings().weight.shape[0]),
        kv_heads=kv_heads,
        head_dims=head_dims,
        eos_token_ids=ends,
        pad_token_id=pad if isinstance(pad, int) else (ends[0] if ends else 0),
    )


def _save_files(model: Any, processor: Any, folder: Path) -> tuple[DataFile, ...]:
    before = {path.name for path in folder.iterdir()} | {MANIFEST}
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    paths = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] not in before
    )
    return tuple(
        DataFile(path.relative_to(folder).as_posix(), path.stat().st_size, file_sha256(path)) for path in paths
    )
