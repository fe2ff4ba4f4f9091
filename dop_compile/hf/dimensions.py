"""Sizes of a decoder, by which eq. 11 of DOP counts, and how they are read off a configuration.

Cases read from a Hugging Face configuration:
1. gated MLP (3 matrices)   2. plain MLP (2 matrices), known by model type   3. grouped KV heads
4. mixtures of experts: a token pays for its routed and shared experts, or for one wide MLP in a dense layer
5. decoders with recurrent or convolutional layers, whose sizes are read off the layers (`layer_sizes`)
6. layers of unlike sizes, read off them too: heads of two sizes, layers that read the keys and values of earlier ones
Refused, as eq. 11 does not describe them: latent attention, sparse attention, values that are the keys, several
residual streams, mixtures in unlike layers or whose configuration is not recognised. Build `DecoderDims` by hand.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dop_compile.checks import integer, store
from dop_compile.hf.names import (
    ATTENTION_LAYERS,
    EXPERT_COUNTS,
    EXPERTS_SWITCH,
    GATED_PREFIXES,
    MIXER_LAYERS,
    PER_LAYER_SIZE,
    PLAIN_MLP,
    UNLIKE_LAYERS,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["DecoderDims"]


_OF_MIXERS = ("attends", "mixer_flops", "window_numbers", "state_numbers")
_OF_UNLIKE_LAYERS = ("query_widths", "key_value_widths", "side_sizes")


@dataclass(frozen=True)
class DecoderDims:
    """Sizes of a decoder that its FLOPs depend on.

    `intermediate_sizes`: per layer, the width of one MLP or one routed expert. `active_experts`: per layer,
    how many of that width a token passes (1 when dense). `shared_sizes`: per layer, the width of the shared
    experts that every token passes besides (0 without). `gated`: an MLP has 3 matrices, else 2.

    For decoders with token mixers besides attention, per layer: `attends`, whether it has an attention (by default all
    have); `mixer_flops`, of its mixers for each token of their sequence; `window_numbers` and `state_numbers`, how many
    numbers a sample's convolutions and recurrences keep there, in the model's dtype and in float32.
    `gated_attention`: attention projects an output gate as wide as its queries.

    For decoders whose layers differ, per layer: `query_widths`, heads x head size (none: the same in all layers);
    `key_value_widths`, KV heads x head size of the keys that it projects and stores, 0 where it reads those of an
    earlier layer (none: the same in all); `side_sizes`, the width of an MLP of two matrices that every token passes
    besides (0 by default).
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int
    num_key_value_heads: int
    intermediate_sizes: tuple[int, ...]
    gated: bool = True
    active_experts: tuple[int, ...] = ()
    shared_sizes: tuple[int, ...] = ()
    attends: tuple[bool, ...] = ()
    mixer_flops: tuple[int, ...] = ()
    window_numbers: tuple[int, ...] = ()
    state_numbers: tuple[int, ...] = ()
    gated_attention: bool = False
    query_widths: tuple[int, ...] = ()
    key_value_widths: tuple[int, ...] = ()
    side_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("num_layers", "hidden_size", "num_heads", "head_dim", "num_key_value_heads"):
            store(self, field, integer(field, getattr(self, field), low=1))
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of {self.num_heads} heads, got {self.num_key_value_heads}"
            )
        if not isinstance(self.gated, bool):
            raise TypeError(f"gated: expected True (3 matrices) or False (2), got {self.gated!r}")
        if not isinstance(self.gated_attention, bool):
            raise TypeError(f"gated_attention: expected True or False, got {self.gated_attention!r}")
        for field, low, default in (
            ("intermediate_sizes", 0, None),
            ("active_experts", 1, 1),
            ("shared_sizes", 0, 0),
            ("mixer_flops", 0, 0),
            ("window_numbers", 0, 0),
            ("state_numbers", 0, 0),
            ("side_sizes", 0, 0),
        ):
            store(self, field, tuple(integer(field, size, low=low) for size in self._per_layer(field, default)))
        for field, low in (("query_widths", 1), ("key_value_widths", 0)):
            if given := tuple(getattr(self, field)):  # else they follow from the sizes of all layers
                given = self._per_layer(field, None)
            store(self, field, tuple(integer(field, size, low=low) for size in given))
        attends = self._per_layer("attends", True)
        if not all(isinstance(own, bool) for own in attends):
            raise TypeError(f"attends: expected True or False for each layer, got {attends!r}")
        store(self, "attends", attends)

    def _per_layer(self, field: str, default: Any) -> tuple[Any, ...]:
        """A field's values; where there are none the default for each layer, if it has one."""
        values = tuple(getattr(self, field))
        if not values and default is not None:
            values = (default,) * self.num_layers
        if len(values) != self.num_layers:
            raise ValueError(f"{field}: expected one per layer ({self.num_layers}), got {len(values)}")
        return values

    def as_document(self) -> dict[str, Any]:
        """The fields by name, for JSON; those of other token mixers and of unlike layers only where there are some."""
        fields = dataclasses.asdict(self)
        mixers: dict[str, Any] = {**dict.fromkeys(_OF_MIXERS, ()), "gated_attention": False}
        for without in (mixers, dict.fromkeys(_OF_UNLIKE_LAYERS, ())):
            if dataclasses.replace(self, **without) == self:
                for name in without:
                    del fields[name]
        return fields

    def query_width(self, layer: int) -> int:
        """Width of a layer's queries: d of eq. 11."""
        return self.query_widths[layer] if self.query_widths else self.num_heads * self.head_dim

    def key_value_width(self, layer: int) -> int:
        """Width of the keys, and of the values, that a layer projects and stores; 0 where it reads an earlier one's."""
        return self.key_value_widths[layer] if self.key_value_widths else self.num_key_value_heads * self.head_dim

    @cached_property
    def mlp_widths(self) -> tuple[int, ...]:
        """Per layer, the summed width of everything that a token passes in the MLP: m of eq. 11."""
        parts = zip(self.intermediate_sizes, self.active_experts, self.shared_sizes, strict=True)
        return tuple(size * active + shared for size, active, shared in parts)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> DecoderDims:
        """Sizes of the text decoder of a Hugging Face configuration; ValueError where eq. 11 does not fit."""
        text: Any = config.get_text_config(decoder=True)
        kind = str(text.model_type)
        _refuse_other_attention(text, kind)
        layers, heads = _size(text, kind, "num_hidden_layers"), _size(text, kind, "num_attention_heads")
        hidden = _size(text, kind, "hidden_size")
        first = text.per_layer_config[0] if getattr(text, "is_heterogeneous", False) else text
        common: dict[str, Any] = {
            "num_layers": layers,
            "hidden_size": hidden,
            "num_heads": heads,
            "head_dim": getattr(first, "head_dim", None) or hidden // heads,
            "num_key_value_heads": getattr(first, "num_key_value_heads", None) or heads,
        }
        if _layer_kinds(text) & MIXER_LAYERS or _has_unlike_layers(text):
            gated = _is_gated(text, kind)
            return cls(**common, gated=gated, **_read_off_layers(text, kind, common, gated=gated))
        sizes, active, shared = _mlp_sizes(text, kind, layers)
        gated = _is_gated(text, kind)
        return cls(**common, gated=gated, intermediate_sizes=sizes, active_experts=active, shared_sizes=shared)


def _size(text: Any, kind: str, *names: str) -> int:
    for name in names:
        value = getattr(text, name, None)
        if isinstance(value, list | tuple):
            raise ValueError(f"{kind}.{name}: expected one size, got {value!r}; build DecoderDims by hand")
        if value is not None:
            return integer(f"{kind}.{name}", value, low=1)
    raise ValueError(f"{kind}: the configuration has no {' or '.join(names)}; build DecoderDims by hand")


def _refuse_other_attention(text: Any, kind: str) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f"{kind}: eq. 11 does not describe {what}; build DecoderDims by hand")

    mixture = any(getattr(text, name, None) for name in ("num_experts_per_tok", *EXPERT_COUNTS))
    if _has_unlike_layers(text) and mixture and getattr(text, EXPERTS_SWITCH, True):
        refuse("a mixture of experts in unlike layers")
    if getattr(text, "kv_lora_rank", None):
        refuse("latent attention (kv_lora_rank)")
    if getattr(text, "altup_num_inputs", 0):
        refuse("several residual streams (altup_num_inputs)")
    if other := sorted(_layer_kinds(text) - ATTENTION_LAYERS - MIXER_LAYERS):
        refuse(f"layers of type {', '.join(other)}")


def _has_unlike_layers(text: Any) -> bool:
    return any(getattr(text, name, None) for name in UNLIKE_LAYERS)


def _layer_kinds(text: Any) -> set[str]:
    return {*(getattr(text, "layer_types", None) or ()), *(getattr(text, "layers_block_type", None) or ())}


def _read_off_layers(text: Any, kind: str, common: dict[str, Any], *, gated: bool) -> dict[str, Any]:
    """Sizes of a decoder with other token mixers than attention, or of unlike layers."""
    from dop_compile.hf.layer_sizes import layer_sizes  # imports transformers' models

    layers = layer_sizes(text)
    width = (3 if gated else 2) * common["hidden_size"]
    side = getattr(text, PER_LAYER_SIZE, 0) or 0
    weights = [layer.mlp_weights - 2 * common["hidden_size"] * side for layer in layers]
    if odd := [number for number in weights if number % width]:
        raise ValueError(f"{kind}: an MLP of {odd[0]} weights is not understood; build DecoderDims by hand")
    queries = common["num_heads"] * common["head_dim"]
    unlike: dict[str, Any] = {}
    if _has_unlike_layers(text):
        if any(not layer.query_width or layer.key_width != layer.value_width for layer in layers):
            raise ValueError(
                f"{kind}: eq. 11 does not describe layers without a projection each for queries, keys and values; "
                "build DecoderDims by hand"
            )
        unlike = {
            "query_widths": tuple(layer.query_width for layer in layers),
            "key_value_widths": tuple(layer.key_width for layer in layers),
            "side_sizes": (side,) * len(layers),
        }
    return unlike | {
        "intermediate_sizes": tuple(number // width for number in weights),
        "attends": tuple(layer.attends for layer in layers),
        "mixer_flops": tuple(layer.mixer_flops for layer in layers),
        "window_numbers": tuple(layer.window_numbers for layer in layers),
        "state_numbers": tuple(layer.state_numbers for layer in layers),
        "gated_attention": not unlike and {y.query_width for y in layers if y.attends} == {2 * queries},
    }


def _is_gated(text: Any, kind: str) -> bool:
    if kind in PLAIN_MLP:
        return False
    activation = getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)
    if activation == "silu" or kind.startswith(GATED_PREFIXES):
        return True
    raise ValueError(
        f"{kind}: unknown whether its MLP is gated (3 matrices) or plain (2), activation {activation!r}; "
        "build DecoderDims by hand with gated=..."
    )


def _mlp_sizes(text: Any, kind: str, layers: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Per layer: width of an MLP or routed expert, experts a token passes, width of the shared experts."""
    given = getattr(text, "intermediate_size", None)
    wide = tuple(given) if isinstance(given, list | tuple) else None
    active = getattr(text, "num_experts_per_tok", None)
    if not active:
        if any(
            (getattr(text, name, None) or 0) > 1 for name in ("num_experts", "moe_num_experts", "num_local_experts")
        ):
            raise ValueError(f"{kind}: this mixture of experts is not recognised; build DecoderDims by hand")
        return wide or (_size(text, kind, "intermediate_size", "ffn_dim"),) * layers, (), ()
    expert = _size(text, kind, "moe_intermediate_size", "intermediate_size")
    shared = _shared_size(text, expert)
    sparse = [_is_sparse(text, layer) for layer in range(layers)]
    dense = _size(text, kind, "intermediate_size_mlp", "intermediate_size", "moe_intermediate_size")
    return (
        tuple(expert if moe else dense for moe in sparse),
        tuple(active if moe else 1 for moe in sparse),
        tuple(shared if moe else 0 for moe in sparse),
    )


def _shared_size(text: Any, expert: int) -> int:
    if hasattr(text, "intermediate_size_mlp"):
        return expert  # Llama 4 has one shared expert, of which its configuration says nothing.
    for name in ("shared_expert_intermediate_size", "shared_intermediate_size"):
        if (size := getattr(text, name, None)) is not None:
            return int(size)
    return (getattr(text, "n_shared_experts", None) or 0) * expert


def _is_sparse(text: Any, layer: int) -> bool:
    """Whether `layer` of a mixture has experts, by whichever of the conventions its configuration follows."""
    if (types := getattr(text, "mlp_layer_types", None)) is not None:
        return bool(types[layer] == "sparse")
    if (moe_layers := getattr(text, "moe_layers", None)) is not None:
        return layer in moe_layers
    first = max(getattr(text, "first_k_dense_replace", 0) or 0, getattr(text, "num_dense_layers", 0) or 0)
    step = getattr(text, "decoder_sparse_step", 1)
    return layer >= first and layer not in (getattr(text, "mlp_only_layers", None) or ()) and (layer + 1) % step == 0
