"""The oracle: what a pruned model must compute, from the untouched Hugging Face model.

Nothing here is shared with the code under test. Every row of a batch is computed alone and unpadded. The
outer model runs as usual (vision tower, merging, positions, output head); only its text decoder's `forward`
is replaced meanwhile. The replacement

1. drops the removed visual tokens from the embeddings, positions and side inputs,
2. runs the decoder's own `forward` with one explicit boolean mask per layer: the model's own mask over the
   reduced sequence AND the keys that the policy keeps in that layer,
3. sets the attention output of queries without a visible key to zero before the output projection,
4. runs a mixer with a state (recurrence, convolution) on the tokens that are its keys and on no other,
5. sets the attention, mixer and MLP branches to zero for the tokens whose update is pruned, and
6. returns the result in the caller's positions, the final norm of its embedding for a token that was removed.

Refused: attention implementations other than sdpa and eager, compact positions with several position
axes (M-RoPE), decoder layers without an attention, mixer or MLP child.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

if TYPE_CHECKING:
    from dop_compile.policy.policy import Policy

TEXT, VISUAL, SYSTEM = 0, 1, 2
OWN_ARGUMENTS = ("input_ids", "inputs_embeds", "position_ids", "attention_mask")
RUNS_ARE_BLOCKS = {"gemma3": "token_type_ids", "gemma4_unified": "mm_token_type_ids"}
"""Model types of which every run of image tokens is a bidirectional block, and the tensor that marks them."""

BLOCKS_WITHIN_WINDOWS = ("gemma3_text",)  # elsewhere a block is seen whole, also through a sliding window
LAYERS = ("layers", "h")
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "layer_norm", "embedding_norm")
FINAL_NORMS += ("norm_f",)
ATTENTIONS = ("self_attn", "attention", "self_attention", "attn")
PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
MLPS = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "per_layer_projection")
MLPS += ("fc2",)  # OPT has no module around its projections
TOWER_INPUTS = {
    "image": ("pixel_values", "pixel_values_images", "pixel_attention_mask", "image_sizes", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"),
}
Ordinals = Sequence[Sequence[int]] | None
Towers = Sequence[dict[str, Tensor]] | None
Leaving = Sequence[Mapping[str, Sequence[int]]] | None


def reference_logits(
    model: nn.Module,
    inputs: dict[str, Tensor],
    policy: Policy,
    kept: Ordinals = None,
    token_groups: Tensor | None = None,
    salient: Ordinals = None,
    towers: Towers = None,
    leaving: Leaving = None,
) -> list[Tensor]:
    """The logits of each row, (tokens of the row, vocab) in float32, in the caller's positions, no padding.

    `kept` lists per row the visual tokens that enter the decoder, as increasing ordinals 0..n-1 of the row's
    visual tokens (newline embeddings are not counted). `salient` lists those of them that form
    `visual_salient`, in the same numbering; newlines are `visual_rest`. `token_groups` (batch, tokens) gives
    the groups of a text-only model: 0 text, 1 visual, 2 system. `towers` are the rows' images and videos, which
    are otherwise found in `inputs`. `leaving` gives per row the ordinals of the groups `visual_until_L`.
    """
    rows = split_rows(model, inputs, kept, token_groups, salient, towers)
    rows = rows if leaving is None else [replace(row, leaving=own) for row, own in zip(rows, leaving, strict=True)]
    return [_run(model, row, policy)[0] for row in rows]


def reference_generate(
    model: nn.Module,
    inputs: dict[str, Tensor],
    policy: Policy,
    max_new_tokens: int,
    kept: Ordinals = None,
    token_groups: Tensor | None = None,
    salient: Ordinals = None,
    towers: Towers = None,
    leaving: Leaving = None,
) -> list[list[int]]:
    """The greedily chosen new ids of each row. There is no cache: every step runs prompt and output anew.

    A row ends with the end-of-sequence id of `model.generation_config`, if it has one.
    """
    eos = getattr(model.generation_config, "eos_token_id", None)
    stop = set(eos if isinstance(eos, list) else [eos])
    generated = []
    rows = split_rows(model, inputs, kept, token_groups, salient, towers)
    for number, row in enumerate(rows):
        row = row if leaving is None else replace(row, leaving=leaving[number])
        while len(row.output) < max_new_tokens and not stop.intersection(row.output[-1:]):
            _, last = _run(model, row, policy)
            row = replace(row, output=[*row.output, int(last.argmax())])
        generated.append(row.output)
    return generated


@dataclass(frozen=True)
class Row:
    """One row of a batch, alone and unpadded: the outer model's arguments, and the caller's about the row."""

    inputs: dict[str, Tensor]
    kept: Sequence[int] | None = None
    groups: Tensor | None = None
    salient: Sequence[int] | None = None
    leaving: Mapping[str, Sequence[int]] = field(default_factory=dict)
    output: list[int] = field(default_factory=list)


def split_rows(
    model: nn.Module,
    inputs: dict[str, Tensor],
    kept: Ordinals = None,
    token_groups: Tensor | None = None,
    salient: Ordinals = None,
    towers: Towers = None,
) -> list[Row]:
    """The rows of a batch, each with its own images and videos: `towers`, or found by counting placeholders."""
    mask = inputs["attention_mask"].bool()
    ids = inputs["input_ids"]
    parts: list[dict[str, Tensor]] = [{} for _ in ids] if towers is None else [dict(tower) for tower in towers]
    for kind, names in TOWER_INPUTS.items() if towers is None else ():
        tower = {name: inputs[name] for name in names if name in inputs}
        if tower:
            placeholder = getattr(model.config, f"{kind}_token_id")
            tokens = ((ids == placeholder) & mask).sum(-1).tolist()
            for part, own in zip(parts, _split_tower(model, tower, tokens), strict=True):
                part.update(own)
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids", "position_ids"):
        if name in inputs:
            for index, part in enumerate(parts):
                part[name] = inputs[name][..., index, :][..., mask[index]].unsqueeze(-2)
    rows = []
    for index, part in enumerate(parts):
        own_ids = ids[index, mask[index]][None]
        part |= {"input_ids": own_ids, "attention_mask": torch.ones_like(own_ids)}
        rows.append(
            Row(
                part,
                kept=None if kept is None else list(kept[index]),
                groups=None if token_groups is None else token_groups[index, mask[index]],
                salient=None if salient is None else list(salient[index]),
            )
        )
    return rows


def _split_tower(model: nn.Module, tower: dict[str, Tensor], tokens: list[int]) -> list[dict[str, Tensor]]:
    """Give each row the images (or videos) whose features fill its number of placeholders."""
    grid = next((tower[name] for name in tower if name.endswith("_grid_thw")), None)
    pixels = next(value for name, value in tower.items() if name.startswith("pixel_values"))
    if "pixel_attention_mask" in tower:  # (batch, images, ...), zeros where a row has fewer images
        real = pixels.flatten(2).ne(0).any(-1)
        parts = [{n: v[row : row + 1, real[row]] for n, v in tower.items()} for row in range(len(tokens))]
        return [part if real[row].any() else {} for row, part in enumerate(parts)]
    if grid is not None:
        counts = (grid.prod(-1) // model.config.vision_config.spatial_merge_size**2).tolist()
    elif "image_sizes" in tower:
        with torch.no_grad():
            features = model.get_image_features(**tower).pooler_output
        counts = [len(feature) for feature in features]
    else:
        counts = [sum(tokens) // len(pixels)] * len(pixels)
    patches = grid.prod(-1).tolist() if grid is not None else [1] * len(counts)
    parts, item, patch = [], 0, 0
    for wanted in tokens:
        first, first_patch = item, patch
        while wanted > 0:
            wanted -= counts[item]
            patch += patches[item]
            item += 1
        assert wanted == 0, "the placeholders of a row are not a whole number of its images"
        own = {n: value[first:item] for n, value in tower.items() if item > first}
        if own and grid is not None:
            own |= {n: v[first_patch:patch] for n, v in tower.items() if n.startswith("pixel_values")}
        parts.append(own)
    assert item == len(counts), "more images than the placeholders of the batch"
    return parts


# One row through the model.


@torch.no_grad()
def _run(model: nn.Module, row: Row, policy: Policy) -> tuple[Tensor, Tensor]:
    """Logits of the prompt, (tokens, vocab), and of the last token, both in float32."""
    decoder = text_decoder(model)
    placeholders: list[Tensor] = []
    original = decoder.forward
    names = list(inspect.signature(type(decoder).forward).parameters)[1:]

    def forward(*positional: Any, **arguments: Any) -> ModelOutput:
        arguments |= dict(zip(names, positional, strict=False))
        sequence = _sequence(model, decoder, original, row, arguments, placeholders)
        groups = _group_names(policy, row, sequence)
        return _reduced_forward(decoder, original, policy, row, sequence, groups, arguments)

    with _patched(decoder, "forward", forward), _recorded_placeholders(model, placeholders):
        logits = model(**row.inputs, use_cache=False).logits[0].float()
    return logits[: row.inputs["input_ids"].shape[1]], logits[-1]


@dataclass(frozen=True)
class Tokens:
    """What the decoder is given, output tokens appended: tensors over the caller's positions (T,)."""

    embeds: Tensor  # (1, T, hidden)
    positions: Tensor  # (..., 1, T)
    visual: Tensor  # bool (T,)
    newline: Tensor  # bool (T,)
    prompt: int
    blocks: Tensor  # (T,): number of the bidirectional block, -1 outside


def _merged_embeds(decoder: nn.Module, original: Callable[..., Any], arguments: dict[str, Any]) -> Tensor:
    """What enters the first layer of the untouched decoder."""
    entering: list[Tensor] = []
    first = named_child(decoder, LAYERS)[0]
    handle = first.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    original(**arguments)
    handle.remove()
    return entering[0]


def _sequence(
    model: nn.Module,
    decoder: nn.Module,
    original: Callable[..., Any],
    row: Row,
    arguments: dict[str, Any],
    placeholders: list[Tensor],
) -> Tokens:
    if any("pixel_values" in name and v is not None for name, v in arguments.items()):  # it merges images itself
        embeds = _merged_embeds(decoder, original, arguments)
    elif (embeds := arguments.get("inputs_embeds")) is None:
        embeds = decoder.get_input_embeddings()(arguments["input_ids"])
    prompt, device = embeds.shape[1], embeds.device
    visual = torch.zeros(prompt, dtype=torch.bool, device=device)
    for mask in placeholders:
        visual |= mask[0].reshape(prompt, -1).any(-1)
    if not placeholders and len(row.inputs) > 2 and row.groups is None:  # the class tells placeholders by their ids
        for config in (model.config, getattr(model.config, "vision_config", None)):
            for name in ("image_token_id", "video_token_id"):
                if (number := getattr(config, name, None)) is not None:
                    visual |= row.inputs["input_ids"][0] == number
    if row.groups is not None:
        visual = row.groups.to(device) == VISUAL
    newline = torch.zeros_like(visual)
    if (embedding := getattr(model.base_model, "image_newline", None)) is not None:
        newline = visual & (embeds[0] == embedding.to(embeds.dtype)).all(-1)
    positions = arguments.get("position_ids")
    if positions is None:
        positions = torch.arange(prompt, device=device)[None]
    blocks = torch.full((prompt,), -1, device=device)
    if model.config.model_type == "paligemma":  # the whole prompt, but for a suffix to learn from
        blocks = row.inputs["token_type_ids"][0].ne(0).long().neg()
    elif model.config.model_type == "molmo2":  # all images are one block
        blocks = row.inputs["mm_token_type_ids"][0].eq(1).long() - 1
    elif (name := RUNS_ARE_BLOCKS.get(model.config.model_type)) in row.inputs:
        image = row.inputs[name][0] == 1
        starts = image & ~nn.functional.pad(image, (1, 0))[:-1]
        blocks = torch.where(image, starts.cumsum(0) - 1, -1)
    if new := len(row.output):
        pad, output = nn.functional.pad, torch.tensor([row.output], device=device)
        embeds = torch.cat([embeds, model.get_input_embeddings()(output).to(embeds.dtype)], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1 + torch.arange(new, device=device)], -1)
        visual, newline = pad(visual, (0, new)), pad(newline, (0, new))
        blocks = pad(blocks, (0, new), value=-1)
    return Tokens(embeds, positions, visual, newline, prompt, blocks)


def _group_names(policy: Policy, row: Row, sequence: Tokens) -> list[str]:
    """The group of every token; "" for a visual token that is removed."""
    counted = (sequence.visual & ~sequence.newline).nonzero()[:, 0].tolist()
    kept = range(len(counted)) if row.kept is None else row.kept
    if row.kept is None and policy.visual_tokens is not None and policy.visual_tokens < len(counted):
        raise ValueError("The policy removes visual tokens: the reference needs `kept`.")
    if sorted(set(kept)) != list(kept) or (len(kept) and not 0 <= kept[0] <= kept[-1] < len(counted)):
        raise ValueError(f"kept must be increasing ordinals below {len(counted)}, not {list(kept)}.")
    split = policy.salient_fraction is not None
    if split and row.salient is None and counted:
        raise ValueError("The policy tells salient visual tokens apart: the reference needs `salient`.")
    if row.salient is not None and not set(row.salient) <= set(kept):
        raise ValueError("salient must be a subset of kept.")
    entering = {counted[ordinal] for ordinal in kept}
    salient = {counted[ordinal] for ordinal in row.salient or ()}
    leaving = {counted[ordinal]: group for group, ordinals in row.leaving.items() for ordinal in ordinals}
    first = int(sequence.visual.nonzero()[0]) if sequence.visual.any() else 0
    names = []
    for index in range(sequence.embeds.shape[1]):
        if index >= sequence.prompt:
            names.append("output")
        elif sequence.visual[index]:
            present = bool(sequence.newline[index]) or index in entering
            whole = leaving.get(index, "visual")
            names.append(("visual_salient" if index in salient else "visual_rest") if split else whole)
            names[-1] = names[-1] if present else ""
        elif row.groups is not None:
            names.append("system" if row.groups[index] == SYSTEM and sequence.visual.any() else "text")
        else:
            names.append("system" if index < first else "text")
    return names


def _reduced_forward(
    decoder: nn.Module,
    original: Callable[..., Any],
    policy: Policy,
    row: Row,
    sequence: Tokens,
    groups: list[str],
    arguments: dict[str, Any],
) -> ModelOutput:
    """The decoder's output, its last hidden state (1, T, hidden) in the caller's positions."""
    embeds = sequence.embeds
    entering = torch.tensor([bool(group) for group in groups], device=embeds.device)
    index = entering.nonzero()[:, 0]
    full = named_child(decoder, FINAL_NORMS)(embeds).clone()
    present = [group for group in groups if group]
    positions = sequence.positions[..., index]
    if policy.positions == "compact":
        if positions.ndim != 2 and len(index) < len(groups):
            raise NotImplementedError("compact positions are not defined for several position axes.")
        positions = positions if positions.ndim != 2 else torch.arange(len(index), device=index.device)[None]
    extras = _token_arguments(decoder, row, arguments, entering)
    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(named_child(decoder, LAYERS)):
            blocks = sequence.blocks[index]
            hooks.enter_context(_pruned_layer(decoder.config, layer, number, policy, present, blocks))
        # The mask only keeps the decoder from making its own: every layer gets the one of its hooks.
        mask = torch.ones(1, 1, len(index), len(index), dtype=torch.bool, device=embeds.device)
        given = {"inputs_embeds": embeds[:, index], "position_ids": positions, "attention_mask": mask}
        output = BaseModelOutputWithPast()
        if len(index):
            output = original(**given, **extras, use_cache=False)
            full[:, index] = output.last_hidden_state
    return type(output)(last_hidden_state=full)


def _token_arguments(decoder: nn.Module, row: Row, arguments: dict[str, Any], entering: Tensor) -> dict[str, Any]:
    """The decoder's other arguments for the tokens that enter it; zeros for output tokens."""
    reduced: dict[str, Any] = {}
    given = arguments.get("inputs_embeds")
    count = (arguments["input_ids"] if given is None else given).shape[1]
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name not in OWN_ARGUMENTS and value.shape[:2] == (1, count):
            padded = value.new_zeros(1, len(entering), *value.shape[2:])
            padded[:, :count] = value
            if name == "per_layer_inputs" and row.output:  # Gemma 4's second embeddings
                padded[:, count:] = decoder.get_per_layer_inputs(torch.tensor([row.output]))
            reduced[name] = padded[:, entering]
    for name, mask in (("deepstack_visual_embeds", "visual_pos_masks"), ("deepstack_features", "vision_mask")):
        if arguments.get(name):
            visual = arguments[mask][0].flatten()
            levels, kept = arguments[name], entering[: len(visual)][visual]
            items = levels.items() if isinstance(levels, dict) else enumerate(levels)
            parts = {key: level[kept] for key, level in items}
            reduced[name] = parts if isinstance(levels, dict) else list(parts.values())
    return reduced


# One layer.


def text_decoder(model: nn.Module) -> Any:
    """The module that holds the decoder's layers."""
    decoder = model.get_decoder()
    while not any(name in LAYERS for name, _ in decoder.named_children()):
        decoder = named_child(decoder, ("model", "language_model", "text_model", "decoder"))
    return decoder


def named_child(module: nn.Module, names: tuple[str, ...]) -> Any:
    """The child with the first of the names that there is."""
    children = dict(module.named_children())
    found = [children[name] for name in names if name in children]
    if not found:
        raise NotImplementedError(f"{type(module).__name__} has none of {', '.join(names)}")
    return found[0]


@contextlib.contextmanager
def _pruned_layer(
    config: Any, layer: nn.Module, number: int, policy: Policy, groups: list[str], blocks: Tensor
) -> Iterator[None]:
    """Hooks that make one decoder layer compute only what the policy keeps for the given tokens."""

    def kept(module: str) -> Tensor:
        keeps = [group == "output" or policy.keeps(group, number, module) for group in groups]
        return torch.tensor(keeps, dtype=torch.bool, device=blocks.device)

    parts = layer_parts(layer)
    attention = parts["attention"][0] if parts["attention"] else None
    mixers, mlps = parts["mixer"], parts["mlp"]
    mask = own_mask(config, number, blocks) & kept("mha_key_value") if attention is not None else None
    keyless = None if mask is None else ~mask.any(-1)
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise NotImplementedError(f"attention implementation {implementation!r}")

    def set_mask(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        value = mask[None, None]
        if implementation == "eager":
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            additive = torch.zeros(value.shape, dtype=hidden.dtype, device=hidden.device)
            value = additive.masked_fill(~value, torch.finfo(hidden.dtype).min)
        return args, kwargs | {"attention_mask": value}

    def zero_keyless(_: nn.Module, args: tuple) -> tuple:
        return (args[0].masked_fill(keyless[:, None], 0.0), *args[1:])

    branch: list[tuple[Tensor, Tensor]] = []  # the newest tensor of the branch being computed, and its pruned tokens

    def zero_branch(pruned: Tensor) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            value = value.masked_fill(pruned[:, None], 0.0)
            branch[:] = [(value, pruned)]
            return (value, *output[1:]) if isinstance(output, tuple) else value

        return hook

    def zero_post_norm(_: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not branch or not args or args[0] is not branch[0][0]:  # the residual was added in between
            return None
        return output.masked_fill(branch[0][1][:, None], 0.0)

    handles = [mlp.register_forward_hook(zero_branch(~kept("mlp"))) for mlp in mlps]
    if attention is not None:
        handles += [
            attention.register_forward_pre_hook(set_mask, with_kwargs=True),
            named_child(attention, PROJECTIONS).register_forward_pre_hook(zero_keyless),
            attention.register_forward_hook(zero_branch(~kept("mha_query"))),
        ]
    sequence = kept("mha_key_value")
    handles += [m.register_forward_hook(zero_branch(~(kept("mha_query") & sequence))) for m in mixers]
    others = [child for child in layer.children() if child not in (attention, *mixers, *mlps)]
    handles += [child.register_forward_hook(zero_post_norm) for child in others]
    with contextlib.ExitStack() as patches:
        for mixer in mixers:
            patches.enter_context(_patched(mixer, "forward", on_sequence(mixer.forward, sequence)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


_source = functools.cache(inspect.getsource)  # finding a class parses its whole file


def layer_parts(layer: nn.Module) -> dict[str, list[nn.Module]]:
    """A layer's children that are an attention, a mixer with a state, or an MLP, by their names and sources."""
    parts: dict[str, list[nn.Module]] = {"attention": [], "mixer": [], "mlp": []}
    for name, child in layer.named_children():
        source = _source(type(child))
        if "update_conv_state" in source or "update_recurrent_state" in source:
            parts["mixer"].append(child)
        elif name in ATTENTIONS or (name == "mixer" and "q_proj" in source):  # NemotronH calls all of them `mixer`
            parts["attention"].append(child)
        elif name in MLPS or name == "mixer":
            parts["mlp"].append(child)
    if not any(parts.values()):
        raise NotImplementedError(f"{type(layer).__name__} has no attention, mixer or MLP")
    return parts


def on_sequence(original: Callable[..., Any], members: Tensor) -> Callable[..., Any]:
    """A mixer on the members of its sequence alone, (1, tokens, hidden) of one unpadded row; zeros for the others."""
    signature = inspect.signature(original)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        hidden = bound.arguments["hidden_states"]
        full = torch.zeros_like(hidden)
        if members.any():
            bound.arguments |= {"hidden_states": hidden[:, members], "attention_mask": None}
            full[:, members] = original(*bound.args, **bound.kwargs)
        return full

    return forward


def own_mask(config: Any, number: int, blocks: Tensor) -> Tensor:
    """The unpruned model's mask over the sequence, bool (query, key): True where the key is visible.

    Causal or in the same bidirectional block; in a sliding layer no further back than the window, in a chunked one
    only in the same chunk.
    """
    step = torch.arange(len(blocks), device=blocks.device)
    query, key = step[:, None], step[None, :]
    causal, same_block = key <= query, (blocks[:, None] == blocks[None, :]) & (blocks[:, None] >= 0)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    kind = kinds[number] if kinds else "full_attention" if window is None else "sliding_attention"
    kind = {"attention": "full_attention", "hybrid": "full_attention"}.get(kind, kind)
    if kind == "chunked_attention":
        chunk = config.attention_chunk_size
        return causal & (query // chunk == key // chunk)
    if kind not in ("full_attention", "sliding_attention"):
        raise NotImplementedError(f"layer {number} is of type {kind!r}")
    if kind == "full_attention":
        return causal | same_block
    if config.model_type in BLOCKS_WITHIN_WINDOWS:
        return (causal | same_block) & (key > query - window)
    return causal & (key > query - window) | same_block


# Temporary changes of the model, undone also when something raises.


@contextlib.contextmanager
def _patched(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = module.__dict__.get(name, missing)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is missing:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


@contextlib.contextmanager
def _recorded_placeholders(model: nn.Module, record: list[Tensor]) -> Iterator[None]:
    """Append every (1, T, hidden) mask that the model's `get_placeholder_mask` returns to `record`."""

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            masks = original(*args, **kwargs)
            record.extend(masks if isinstance(masks, tuple) else [masks])
            return masks

        return call

    with contextlib.ExitStack() as patches:
        for module in model.modules():
            if hasattr(module, "get_placeholder_mask"):
                wrapped = recording(module.get_placeholder_mask)
                patches.enter_context(_patched(module, "get_placeholder_mask", wrapped))
            if hasattr(module, "rope_deltas"):  # the outer forward writes them
                patches.enter_context(_patched(module, "rope_deltas", module.rope_deltas))
        yield
