"""A decoder's layers without what visual rows do not take part in.

Called in place of the model's own loop in steps that compute visual rows; all other steps, decoding above all, run the
model's own (perhaps compiled) loop. Layers are called as vLLM calls them, `layer(positions, hidden, residual)`, on
fewer rows: attention metadata has been narrowed to those (`backends`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, isin, nn
from vllm.forward_context import get_forward_context, is_forward_context_available

from dop_compile.errors import UnsupportedUsageError
from dop_compile.plugins.vllm.backends import PLAN, narrowed_backend
from dop_compile.plugins.vllm.key_values import KeyValues
from dop_compile.plugins.vllm.narrowing import Plan
from dop_compile.plugins.vllm.roles import Role, Roles
from dop_compile.plugins.vllm.streams import Streams

__all__ = ["PrunedDecoder"]


class PrunedDecoder:
    """Runs `inner`, a vLLM decoder, under roles; exchanges the attention backends of its layers.

    Args:
        inner: has `layers` of `input_layernorm`, `self_attn.attn`, `post_attention_layernorm` and `mlp`, and `norm`.
        roles: what visual tokens take part in.
    """

    def __init__(self, inner: Any, roles: Roles) -> None:
        self._inner, self._roles = inner, roles
        self._key_values = [KeyValues(layer.self_attn) for layer in inner.layers]
        self._stored_rows: Tensor | None = None
        for layer, role in self._layers():
            attention = layer.self_attn.attn
            attention.attn_backend = narrowed_backend(attention.attn_backend, role.attention)
            if role.attention == "keyless":
                attention.register_forward_pre_hook(self._leave_out_keys)

    def take_weights(self) -> None:
        """Once weights are loaded: what frozen tokens need of them."""
        for (_, role), key_values in zip(self._layers(), self._key_values, strict=True):
            if role.attention == "frozen":
                key_values.take_weight()

    def __call__(self, positions: Tensor, inputs_embeds: Tensor | None, **given: Any) -> Any:
        """Hidden states (rows, hidden) of the step; rows of visual tokens that left are zero, nobody asks for them.

        Args:
            positions: (rows,) or (3, rows).
            inputs_embeds: (rows, hidden).
            given: further arguments of the model's own loop.
        """
        plans = self._plans()
        if not any(plan is not None and plan.visual.numel() for plan in plans):
            return self._inner(positions=positions, inputs_embeds=inputs_embeds, **given)
        assert inputs_embeds is not None, "visual rows are embeddings"
        deepstack = given.get("deepstack_input_embeds")
        return self._run(positions, inputs_embeds, plans, [] if deepstack is None else list(deepstack.tensors.values()))

    def _layers(self) -> Iterator[tuple[Any, Role]]:
        return zip(self._inner.layers, self._roles.layers, strict=True)

    def _plans(self) -> list[Plan | None]:
        """Each layer's plan; where a plan moves keys, the layer is told where to."""
        context = get_forward_context() if is_forward_context_available() else None
        metadata = None if context is None else context.attn_metadata
        if context is None or metadata is None:  # vLLM measures memory
            return [None] * len(self._inner.layers)
        if not isinstance(metadata, dict):
            raise UnsupportedUsageError("steps in micro-batches cannot be pruned; start vLLM without --enable-dbo")
        context.slot_mapping = dict(context.slot_mapping)  # whoever made it may use it in another step
        plans = []
        for layer in self._inner.layers:
            name = layer.self_attn.attn.layer_name
            plan = getattr(metadata[name], PLAN)
            if plan is not None:
                context.slot_mapping[name] = plan.slots
            plans.append(plan)
        return plans

    def _run(self, positions: Tensor, hidden: Tensor, plans: list[Plan | None], deepstack: list[Tensor]) -> Tensor:
        plan = next(plan for plan in plans if plan is not None)
        streams = Streams(hidden, positions, plan.visual, plan.others)
        for number, (layer, role) in enumerate(self._layers()):
            if number == self._roles.removed_from:
                streams.drop_visual()
            own = plans[number]
            if role.full:
                streams.update_all(layer)
            elif role.query:
                self._attend(layer, role, streams, own)
            else:
                if role.key_value and own is not None:
                    assert own.visual_slots is not None
                    state = layer.input_layernorm(streams.visual)
                    self._key_values[number].store(streams.positions_of_visual, state, own.visual_slots)
                streams.update_others(layer)
                if role.mlp:
                    streams.add_to_visual(layer.mlp(layer.post_attention_layernorm(streams.visual)))
            if number < len(deepstack):
                streams.add_deepstack(deepstack[number])
        return streams.finish(self._inner.norm)

    def _attend(self, layer: Any, role: Role, streams: Streams, plan: Plan | None) -> None:
        """A layer in which attention updates visual tokens, without their keys or their MLP or both."""
        state = layer.input_layernorm(streams.all)
        attention = layer.self_attn
        if role.key_value:
            streams.add_to_all(attention(positions=streams.positions, hidden_states=state))
        else:
            assert plan is not None
            with self._storing(plan.others, plan.queries):
                update = attention(positions=streams.positions[..., plan.queries], hidden_states=state[plan.queries])
            streams.add_to_all(update, plan.queries)
            if plan.unseeing.numel():  # what they attend to is zero, and the output projection may have a bias
                nothing = state.new_zeros(len(plan.unseeing), attention.q_size)
                streams.add_to_all(attention.o_proj(nothing)[0], plan.unseeing)
        if role.mlp:
            streams.add_to_all(layer.mlp(layer.post_attention_layernorm(streams.all)))
        else:
            streams.add_to_others(lambda others: layer.mlp(layer.post_attention_layernorm(others)))

    @contextmanager
    def _storing(self, others: Tensor, queries: Tensor) -> Iterator[None]:
        """Meanwhile only keys of `others` among `queries` are stored: both are rows of the step, in order."""
        self._stored_rows = isin(queries, others)
        try:
            yield
        finally:
            self._stored_rows = None

    def _leave_out_keys(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._stored_rows is None:
            return None
        query, key, value = args
        return query, key[self._stored_rows], value[self._stored_rows]
