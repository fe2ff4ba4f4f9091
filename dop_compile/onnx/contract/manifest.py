"""What an exported directory holds and how its graphs are run: the contract between export and every runtime.

    manifest.json        this document
    weights.bin          every weight once, by content; all graphs refer to it by offset (ONNX external data)
    embed.onnx           input_ids -> embeddings
    vision-*.onnx        one image or video -> features, one graph per layout of pixels
    reduce-*.onnx        features -> the visual tokens that a tier keeps, where a reducer can be a graph
    prefill-*.onnx       one per tier
    decode.onnx          one for all tiers
    config.json, ...     the model's configuration, and its processor's files

**Sections.** A prompt enters a prefill graph not in the order of its tokens but by group: each *section* is a tensor of
its own, and holds the tokens of one or more groups of each row in prompt order, **padded on the left** to the longest
row. A tier's sections are listed in `Tier.sections`: `text` alone or `system` and `text` (apart only if a tier prunes
them differently), and `visual`, or `visual_salient` and `visual_rest` under a split policy. Group membership is thus a
value that enters the graph; what a layer keeps are whole sections. Three inputs per section NAME:

    embeds.NAME        (batch, NAME, hidden)   in the graphs' dtype; anything finite where there is padding
    position_ids.NAME  (batch, NAME) int64     or (position_rows, batch, NAME) with `position_rows` (M-RoPE: 3)
    slots.NAME         (batch, NAME) int64     the token's number in its row after reduction, from 0; -1 for padding

Slots are what causal masks and sliding windows count in: attention looks at them alone, so sections may stand in any
order, and rows of any lengths, also rows without visual tokens, can share a batch. The last token of `text` is the
last of the prompt, in every row: its logits come out. A section of `length` (a static size) takes rows with fewer
tokens, padded like any other; more do not fit.

    logits               (batch, vocabulary) float32, of the last token
    present.L.key/value  (batch, KV heads, entries, head dimension) of every layer L whose policy keeps entries: the
                         sections in `PastClass.tiers[tier]`, one after the other

**Decoding.** `decode.onnx` takes one token per row, and any number of entries per layer. Layers that hold the same
sections in every tier form a *past class* C (`Manifest.past_classes`); all of its layers have entries of one length
`past_C`, which differs from class to class and from tier to tier:

    input_ids                    (batch, 1) int64
    position_ids                 (batch, 1), or (position_rows, batch, 1)
    slots                        (batch, 1) int64, the token's slot: 1 more than the row's last
    past_slots.C                 (batch, past_C) int64: the `slots` of the sections in a row, then those of generated
                                 tokens; -1 where nothing is stored
    past_key_values.L.key/value  (batch, KV heads, past_C, head dimension)
    logits                       (batch, vocabulary) float32
    new.L.key/value              (batch, KV heads, 1, head dimension): the token's own entry

The graph only returns the new entry. A runtime either appends it, or writes it into a buffer of a fixed capacity whose
unused entries have slot -1: then no tensor is copied or bound anew from token to token, which also is the way of a
static export (`past_C` a number). Where nothing is stored, keys and values must be finite.

**From a prompt to sections** (`dop_compile.onnx.run.prepare` does it):
  1. positions of all tokens by the model's own rule (`positions`: "sequential", or "model" for its get_rope_index);
  2. image by image through the vision graph of its layout; the features are the embeddings of the row's placeholders
     (`placeholder_ids`) in order. Rows numbered in `VisionGraph.newlines` are never dropped and not counted;
  3. groups: `system` before the first placeholder, `visual` placeholders, `text` the rest; all `text` without any;
  4. `Tier.reducer` keeps `Tier.policy.visual_tokens`, of several images each its share; where `Tier.reducer.graph` is
     set that graph does it for a prompt with one image, else the runtime, by the reducer's name and options;
  5. slots number what is left, per row; kept tokens keep their positions ("original") or close up ("compact").
The first generated token's position is 1 + the largest position of the row before reduction ("compact": less the number
of dropped tokens); its slot is the number of slots.

**Shapes.** Each input has `min`, `opt` and `max` sizes, a TensorRT profile; a name in `shape` is a dynamic size. Sizes
of one name agree within a graph. Sections may be padded to reach a minimum.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from dop_compile.documents import Format, keep, kept, parse, read_text, write_atomic
from dop_compile.onnx.contract import records
from dop_compile.onnx.contract.parts import (
    DataFile,
    Graph,
    InputSpec,
    ModelInfo,
    OutputSpec,
    PastClass,
    ReducerInfo,
    SectionInfo,
    Tier,
    TierCheck,
    Verification,
    VisionGraph,
    file_sha256,
)

__all__ = [
    "DECODE",
    "MANIFEST",
    "WEIGHTS",
    "DataFile",
    "Graph",
    "InputSpec",
    "Manifest",
    "ModelInfo",
    "OutputSpec",
    "PastClass",
    "ReducerInfo",
    "SectionInfo",
    "Tier",
    "TierCheck",
    "Verification",
    "VisionGraph",
]

FORMAT = Format("dop_compile.onnx", (1,), "the manifest of an export", "export again")
MANIFEST, WEIGHTS = "manifest.json", "weights.bin"
DECODE = "decode"
POSITIONS = ("sequential", "model")
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "bool")


@dataclass(frozen=True)
class Manifest:
    """`graphs` by name; `tiers` in the order given, the first is the default."""

    format: str
    version: int
    opset: int
    static: bool
    model: ModelInfo
    weights: DataFile
    graphs: dict[str, Graph]
    embed: str
    vision: tuple[VisionGraph, ...]
    tiers: dict[str, Tier]
    past_classes: tuple[PastClass, ...]
    placeholder_ids: dict[str, int]
    positions: str
    position_rows: int | None
    files: tuple[DataFile, ...]
    versions: dict[str, str]
    verification: Verification | None = field(default=None)

    def to_json(self) -> str:
        return json.dumps(records.encode(self) | kept(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "manifest") -> Manifest:
        """Strict reading of `to_json` text; ValueError naming the field for anything else."""
        try:
            opened = FORMAT.open(parse(text))
            fields = opened.take(own.name for own in dataclasses.fields(cls))
            manifest = records.decode(cls, FORMAT.header(opened.version) | fields)
            manifest._check()
            keep(manifest, opened)
            return manifest
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from error

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, hashes: bool = False) -> Manifest:
        """The manifest of a directory, whose files are there and of the right size (`hashes`: and content).

        Raises:
            FileNotFoundError: there is no manifest, or a file that it names is missing.
            ValueError: a manifest that cannot be read, or a file that is not the one exported.
        """
        folder = Path(directory)
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no {MANIFEST} in it; expected a directory made by dop-compile export")
        manifest = cls.from_json(read_text(path), str(path))
        manifest.check_files(folder, hashes=hashes)
        return manifest

    def save(self, directory: str | os.PathLike[str]) -> None:
        write_atomic(Path(directory) / MANIFEST, self.to_json())

    @property
    def data_files(self) -> tuple[DataFile, ...]:
        return (self.weights, *(graph.data for graph in self.graphs.values()), *self.files)

    def check_files(self, directory: str | os.PathLike[str], *, hashes: bool = False) -> None:
        """See `load`."""
        for data in self.data_files:
            path = Path(directory) / data.file
            if not path.is_file():
                raise FileNotFoundError(f"{path}: the file is missing; the export is incomplete, export again")
            if (size := path.stat().st_size) != data.bytes:
                raise ValueError(f"{path}: {size} bytes, the manifest says {data.bytes}; export or copy it again")
            if hashes and (found := file_sha256(path)) != data.sha256:
                raise ValueError(
                    f"{path}: its SHA-256 is {found[:12]}..., the manifest says {data.sha256[:12]}...; it was "
                    "changed or damaged, export or copy it again"
                )

    def _check(self) -> None:
        """What one field says of another."""
        used = {"embed": self.embed, **{f"vision[{i}]": v.graph for i, v in enumerate(self.vision)}}
        for name, tier in self.tiers.items():
            used |= {f"tiers.{name}.prefill": tier.prefill, f"tiers.{name}.decode": tier.decode}
            if tier.reducer is not None and tier.reducer.graph is not None:
                used[f"tiers.{name}.reducer"] = tier.reducer.graph
            tier.policy.check_layers(self.model.num_layers)
        for where, graph in used.items():
            if graph not in self.graphs:
                raise ValueError(f"{where}: there is no graph {graph!r}")
        for data in self.data_files:
            if Path(data.file).is_absolute() or ".." in Path(data.file).parts:
                raise ValueError(f"{data.file!r}: expected a file inside the directory")
        if not self.tiers:
            raise ValueError("tiers: expected at least one")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions: expected one of {', '.join(POSITIONS)}, got {self.positions!r}")
        for name, described in self.graphs.items():
            for spec in described.inputs:
                if len({len(sizes) for sizes in (spec.shape, spec.min, spec.opt, spec.max)}) > 1:
                    raise ValueError(f"graphs.{name}: {spec.name}: shape, min, opt and max differ in length")
            tensors: list[InputSpec | OutputSpec] = [*described.inputs, *described.outputs]
            for tensor in tensors:
                if tensor.dtype not in DTYPES:
                    raise ValueError(f"graphs.{name}: {tensor.name}: unknown dtype {tensor.dtype!r}")
        for name, tier in self.tiers.items():
            held = {section.name for section in tier.sections}
            for number, group in enumerate(self.past_classes):
                if not held.issuperset(group.tiers.get(name, (None,))):
                    raise ValueError(f"past_classes[{number}]: expected sections of tier {name!r}")
        layers = sorted(layer for group in self.past_classes for layer in group.layers)
        if layers != list(range(self.model.num_layers)):
            raise ValueError(f"past_classes: expected each of {self.model.num_layers} layers once, got {layers}")
