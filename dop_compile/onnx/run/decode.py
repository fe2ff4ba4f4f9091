"""Token by token: keys and values in buffers that stay bound while tokens are generated.

Each past class has buffers of some capacity; what is not used has slot -1. A step writes the token's entry in the next
free place. Full buffers grow by a block: attention then works on at most `BLOCK` entries more than there are, and no
entry is copied more often than once in `BLOCK` tokens. A static export has one capacity.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from dop_compile.onnx.contract.manifest import Manifest
from dop_compile.onnx.run.bound_sessions import BoundSession
from dop_compile.onnx.run.prepare import Prepared

__all__ = ["BLOCK", "Decoder"]

BLOCK = 64


class Decoder:
    """Generated tokens of one batch.

    Args:
        session: the tier's decode graph.
        prefilled: what its prefill graph returned for `prepared`.
        steps: how many tokens will be fed at most.

    Raises:
        ValueError: a static export has not that many places.
    """

    def __init__(
        self,
        session: BoundSession,
        manifest: Manifest,
        tier: str,
        prepared: Prepared,
        prefilled: Mapping[str, Tensor],
        steps: int,
    ):
        self._classes = [group.layers for group in manifest.past_classes]
        self._steps = steps
        self._slot = prepared.next_slots.clone()
        self._position = prepared.next_positions.clone()
        self._rows = manifest.position_rows
        batch = len(self._slot)
        specs = {spec.name: spec for spec in session.graph.inputs}
        sizes = [specs[f"past_slots.{number}"].shape[1] for number in range(len(self._classes))]
        self._fixed = [size if isinstance(size, int) else None for size in sizes]
        self._used: list[int] = []
        inputs = {n: t.clone() for n, t in self._token(torch.zeros(batch, dtype=torch.long)).items()}
        nothing = torch.empty(batch, 0, dtype=torch.long)
        for number, group in enumerate(manifest.past_classes):
            slots = torch.cat([nothing, *(prepared.section_slots[name] for name in group.tiers[tier])], 1)
            used = slots.shape[1]
            self._used.append(used)
            capacity = self._capacity(number, specs[f"past_slots.{number}"].min[1])
            inputs[f"past_slots.{number}"] = pad(slots, (0, capacity - used), value=-1)
            for layer in group.layers:
                for part in ("key", "value"):
                    name = f"past_key_values.{layer}.{part}"
                    spec = specs[name]
                    size = (batch, spec.opt[1], capacity, spec.opt[3])
                    buffer = torch.zeros(size, dtype=getattr(torch, spec.dtype), device=session.device)
                    if used:
                        buffer[:, :, :used] = prefilled[f"present.{layer}.{part}"]
                    inputs[name] = buffer
        self._binding = session.bind(inputs)

    def _capacity(self, number: int, minimum: int) -> int:
        fixed, used = self._fixed[number], self._used[number]
        if fixed is None:
            return max(used + min(self._steps, BLOCK), minimum)
        if used + self._steps > fixed:
            raise ValueError(
                f"max_new_tokens: the export is static and generates at most {fixed - used + 1} tokens after this "
                f"prompt, got {self._steps + 1}; export with more new_tokens"
            )
        return fixed

    def _token(self, ids: Tensor) -> dict[str, Tensor]:
        position = self._position[:, None]
        axes = position if self._rows is None else position.expand(self._rows, -1, -1)
        return {"input_ids": ids[:, None], "position_ids": axes, "slots": self._slot[:, None]}

    def step(self, ids: Tensor) -> Tensor:
        """(batch, vocabulary) logits after the tokens `ids` (batch,), which are the rows' last."""
        held = self._binding.inputs
        for name, value in self._token(ids).items():
            held[name].copy_(value)
        self.run()
        for number, layers in enumerate(self._classes):
            self._store(number, layers)
        self._slot += 1
        self._position += 1
        return self._binding.outputs["logits"]

    def run(self) -> None:
        """Run the graph as it is bound, and store nothing."""
        self._binding.run()

    def _store(self, number: int, layers: tuple[int, ...]) -> None:
        """The step's entries, in the next place of each layer's buffers."""
        held, new = self._binding.inputs, self._binding.outputs
        place = self._used[number]
        slots = held[f"past_slots.{number}"]
        if place == slots.shape[1]:
            assert self._fixed[number] is None, "more steps than were asked for"
            self._grow(number, layers)
            slots = held[f"past_slots.{number}"]
        slots[:, place] = self._slot
        for layer in layers:
            for part in ("key", "value"):
                held[f"past_key_values.{layer}.{part}"][:, :, place] = new[f"new.{layer}.{part}"][:, :, 0]
        self._used[number] += 1

    def _grow(self, number: int, layers: tuple[int, ...]) -> None:
        held = self._binding.inputs
        slots = f"past_slots.{number}"
        self._binding.rebind(slots, pad(held[slots], (0, BLOCK), value=-1))
        for layer in layers:
            for part in ("key", "value"):
                name = f"past_key_values.{layer}.{part}"
                self._binding.rebind(name, pad(held[name], (0, 0, 0, BLOCK)))
