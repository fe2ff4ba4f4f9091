"""Time to the first token of LLaVA-NeXT with its vision tower and the selection of visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from dop_compile import Policy, dop_compile
from gpu.setting import Setting, eq11, geometry
from gpu.timing import AGAIN, ORIGINAL, looked_at, measure

__all__ = ["first_token"]

PART = "first token, llava-next-7b"
IMAGE = 31999
TIER_OF_REDUCERS = {"14%": ("uniform", "divprune", "cdpruner", "vispruner"), "9%": ("cdpruner",)}


def first_token(setting: Setting) -> None:
    """A square picture of four tiles and its small copy: 2,880 visual tokens, and 48 newlines."""
    shape = geometry(setting, "llava-next-7b")
    model = _model(setting, shape.config)
    inputs, visual = _inputs(setting, model, shape.system, shape.text)
    layers = shape.config["num_hidden_layers"]
    tiers = {"100%": Policy.full(layers)}
    for tier, reducers in TIER_OF_REDUCERS.items():
        mha, mlp, kept = shape.published[tier]
        for reducer in reducers:
            tiers[f"{tier} {reducer}"] = Policy.depthwise(
                layers,
                mha_depth=round(mha * layers / 32),
                mlp_depth=round(mlp * layers / 32),
                visual_tokens=kept,
                reducer=reducer,
                positions="compact",
            )
    for title, backend, chosen in (
        ("eager", "eager", list(tiers)),
        ("compiled", setting.compiler, ["14% cdpruner"]),
    ):
        compiled = dop_compile(model, {name: tiers[name] for name in chosen}, backend=backend)
        calls: dict[str, Callable[[], Any]] = {ORIGINAL: _call(model, inputs)}
        if title == "eager":
            calls[AGAIN] = calls[ORIGINAL]
            calls["vision tower and projector alone"] = _vision(model, inputs)
        calls |= {name: _call(compiled, {**inputs, "tier": name}) for name in chosen}
        print(f"{PART}, {title}", flush=True)
        rows = measure(calls, setting.rounds, setting.device, setting.clock)
        tokens = {"system": shape.system, "visual": visual, "text": shape.text}
        config = model.config.text_config
        rows = [r | {"eq11": eq11(config, tiers[r["name"]], tokens) if r["name"] in tiers else None} for r in rows]
        setting.store.add(PART, title, rows, backend=backend)
        rows = looked_at(rows, calls, setting.device, setting.clock)
        setting.store.add(PART, title, rows, backend=backend)
    setting.store.note(PART, layout=f"{shape.system} + {visual} (without newlines) + {shape.text} tokens")


def _call(model: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    return lambda: model(**inputs, use_cache=True, logits_to_keep=1)


def _vision(model: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    return lambda: model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])


def _model(setting: Setting, sizes: dict[str, Any]) -> Any:
    tower: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    side, patch = 336, 14
    if setting.tiny:
        tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        side, patch = 48, 8
    config = LlavaNextConfig(
        text_config=LlamaConfig(**sizes, vocab_size=32000, max_position_embeddings=8192),
        vision_config=CLIPVisionConfig(**tower, image_size=side, patch_size=patch),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[2 * side, 2 * side]],
    )
    kind: Any = LlavaNextForConditionalGeneration
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = kind._from_config(config, attn_implementation="sdpa", dtype=setting.dtype).eval()
    # Some versions leave it as it was allocated, which may be no number
    torch.nn.init.normal_(model.model.image_newline, std=0.02)
    return model


def _inputs(setting: Setting, model: Any, system: int, text: int) -> tuple[dict[str, Any], int]:
    """The model's arguments, and how many visual tokens it sees that are no newlines."""
    side = model.config.vision_config.image_size
    per_side = side // model.config.vision_config.patch_size
    placeholders = per_side**2 + 2 * per_side * (2 * per_side + 1)
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(1, IMAGE, (1, system + text), generator=draw)
    ids = torch.cat([words[:, :system], torch.full((1, placeholders), IMAGE), words[:, system:]], 1)
    pixels = torch.randn(1, 5, 3, side, side, generator=draw)
    inputs = {
        "input_ids": ids.to(setting.device),
        "pixel_values": pixels.to(setting.device, setting.dtype),
        "image_sizes": torch.tensor([[2 * side, 2 * side]], device=setting.device),
    }
    return inputs, placeholders - 2 * per_side
