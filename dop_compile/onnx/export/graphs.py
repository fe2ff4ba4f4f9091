"""The modules that are exported, each a plain function of tensors.

Weights are the model's own parameters; nothing is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dop_compile.compiler import build_graph
from dop_compile.errors import UnsupportedModelError
from dop_compile.hf.copies import copy_path
from dop_compile.hf.model_path import decoder_path
from dop_compile.hf.spellings import EMBEDS, POSITIONS, spelled
from dop_compile.onnx.export.capture import MODALITIES, VisionCall, features_of
from dop_compile.onnx.export.lowering import DecoderCall, run_graph
from dop_compile.onnx.export.sections import Section, SectionLayout, keep_table, universe
from dop_compile.policy.keep import KeepTable
from dop_compile.policy.policy import Policy
from dop_compile.reducers import VisualContext, create
from dop_compile.tokens import Universe
from dop_compile.tracing.trace import DecoderInputs

__all__ = ["Decode", "Embed", "Prefill", "Reduce", "Vision"]


class _Head:
    """From the decoder's last hidden states to logits, by the outer model's own forward."""

    def __init__(self, model: Any):
        self._model = model
        self._path = decoder_path(model)

    def __call__(self, hidden: Tensor, positions: Tensor, output_class: type | None) -> Tensor:
        """(batch, vocabulary) float32 of hidden (batch, 1, hidden)."""
        chain = copy_path(self._model, self._path)

        def decoder(*_: Any, **__: Any) -> Any:
            return (hidden, None) if output_class is None else output_class(last_hidden_state=hidden)

        chain[-1].forward = decoder
        function = type(self._model).forward
        given = spelled(function, {EMBEDS: hidden, POSITIONS: positions, "use_cache": False, "return_dict": True})
        output = function(chain[0], **given)
        logits: Tensor = output.logits
        return logits[:, 0].float()


class Prefill(nn.Module):
    """A tier's prompt pass; inputs and outputs as `dop_compile.onnx.contract.manifest` says.

    Attributes:
        layers: those that store entries, in the order of the outputs.
    """

    def __init__(self, model: Any, policy: Policy, sections: Sequence[Section], position_rows: int | None):
        super().__init__()
        self.model = model
        self.sections = tuple(sections)
        decoder = model.get_submodule(decoder_path(model))
        table = keep_table(policy, sections)
        self.graph = build_graph(decoder, table, universe(sections), DecoderInputs(position_rows=position_rows))
        self.root = self.graph.traced.root
        updated = (block.layer for block in self.graph.blocks if block.update is not None)
        self.layers = sorted(layer for layer in updated if table.layers[layer].key_value)
        self._head = _Head(model)

    @property
    def input_names(self) -> list[str]:
        kinds = ("embeds", "position_ids", "slots")
        return [f"{kind}.{section.name}" for section in self.sections for kind in kinds]

    @property
    def output_names(self) -> list[str]:
        return ["logits", *(f"present.{layer}.{part}" for layer in self.layers for part in ("key", "value"))]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        embeds, positions, slots = inputs[0::3], inputs[1::3], inputs[2::3]
        lengths = {section.name: part.shape[1] for section, part in zip(self.sections, embeds, strict=True)}
        call = DecoderCall(SectionLayout(self.graph.universe, lengths), torch.cat(slots, 1))
        all_positions = torch.cat(positions, -1)
        hidden = run_graph(self.graph, call, torch.cat(embeds, 1), all_positions)
        hidden = call.layout.take(hidden, self.graph.universe.requested, self.graph.output_tokens)
        logits = self._head(hidden, all_positions[..., -1:], self.graph.traced.output_class)
        return logits, *(tensor for layer in self.layers for tensor in call.stored[layer])


class Decode(nn.Module):
    """One token per row, for all tiers.

    Args:
        classes: layers of each past class.
    """

    def __init__(self, model: Any, classes: Sequence[Sequence[int]], position_rows: int | None):
        super().__init__()
        self.model = model
        self.classes = tuple(tuple(layers) for layers in classes)
        decoder = model.get_submodule(decoder_path(model))
        keep = KeepTable.dense(sum(map(len, self.classes)))
        inputs = DecoderInputs(position_rows=position_rows)
        self.graph = build_graph(decoder, keep, Universe(keep.groups), inputs)
        self.root = self.graph.traced.root
        self.layers = sorted(block.layer for block in self.graph.blocks if block.update is not None)
        self._head = _Head(model)

    @property
    def input_names(self) -> list[str]:
        slots = [f"past_slots.{number}" for number in range(len(self.classes))]
        past = [f"past_key_values.{layer}.{part}" for layer in self.layers for part in ("key", "value")]
        return ["input_ids", "position_ids", "slots", *slots, *past]

    @property
    def output_names(self) -> list[str]:
        return ["logits", *(f"new.{layer}.{part}" for layer in self.layers for part in ("key", "value"))]

    def forward(self, input_ids: Tensor, positions: Tensor, slots: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        embeds = self.model.get_input_embeddings()(input_ids)
        past_slots, tensors = past[: len(self.classes)], past[len(self.classes) :]
        of_layer = {layer: past_slots[number] for number, layers in enumerate(self.classes) for layer in layers}
        held = {
            layer: (of_layer[layer], tensors[2 * number], tensors[2 * number + 1])
            for number, layer in enumerate(self.layers)
        }
        (group,) = self.graph.universe.groups
        call = DecoderCall(SectionLayout(self.graph.universe, {group: 1}), slots, held)
        hidden = run_graph(self.graph, call, embeds, positions)
        logits = self._head(hidden, positions, self.graph.traced.output_class)
        return logits, *(tensor for layer in self.layers for tensor in call.stored[layer])


class Embed(nn.Module):
    """input_ids (batch, tokens) -> embeds (batch, tokens, hidden)."""

    input_names = ("input_ids",)
    output_names = ("embeds",)

    def __init__(self, model: Any):
        super().__init__()
        self.embedding = model.get_input_embeddings()

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = self.embedding(input_ids)
        return embeds


class Vision(nn.Module):
    """Pixels -> features (tokens, hidden), by the model's own method, for one layout of pixels."""

    output_names = ("features",)

    def __init__(self, model: Any, call: VisionCall):
        super().__init__()
        self.model = model
        self._method = getattr(model.get_submodule(call.path), MODALITIES[call.modality])
        self._pixels = call.pixels
        self._given = {name: value for name, value in call.kwargs.items() if name != call.pixels}
        self.input_names = (call.pixels,)

    def forward(self, pixels: Tensor) -> Tensor:
        arguments = {self._pixels: pixels, **self._given}
        return features_of(self._method(**arguments))


class Reduce(nn.Module):
    """Features (tokens, hidden) of one image -> indices (kept,), ascending, and kept features (kept, hidden).

    The reducer itself is traced: what it reads of the features' values stays an operation, its constants are constants.
    """

    input_names = ("features",)
    output_names = ("indices", "kept")

    def __init__(self, policy: Policy):
        super().__init__()
        self._reducer = create(policy.reducer, policy.options)
        assert policy.visual_tokens is not None
        self._count = policy.visual_tokens

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self._select(features, features.new_zeros(1, features.shape[1]))

    def _select(self, features: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        segments = torch.zeros(features.shape[0], dtype=torch.long, device=features.device)
        context = VisualContext(projected=features, text=text, segments=segments, sample_index=0)
        selection = self._reducer(context, self._count)
        if selection.positions is not None:
            raise UnsupportedModelError(f"reducer {self._reducer.name!r} moves positions, which a graph cannot return")
        indices, order = torch.sort(selection.indices)
        return indices, features[indices] if selection.features is None else selection.features[order]

    def reads_text(self, tokens: int, hidden: int) -> bool:
        """Whether another prompt can change what is kept: tried, on features and texts drawn at random."""
        generator = torch.Generator().manual_seed(0)
        features, *texts = (torch.randn(n, hidden, generator=generator) for n in (tokens, 4, 4, 9))
        found = [self._select(features, text) for text in texts]
        pairs = [pair for one, other in itertools.pairwise(found) for pair in zip(one, other, strict=True)]
        return any(not torch.equal(a, b) for a, b in pairs)
