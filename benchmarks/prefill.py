"""Decoder prefill: the original against compiled policies, interleaved in one run.

    python benchmarks/prefill.py                                   # 16 layers x 1024 on CPU, eager and inductor
    python benchmarks/prefill.py --geometry llava-next-7b          # needs a GPU; random weights in bfloat16

Every round times each contender once, in a new random order; the table gives medians and the median of the ratios
taken within a round. "original again" is the original a second time: its ratio shows what the machine can resolve.
Weights are random, so only time is measured. Vision tower, selection and lm_head are timed apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import environment, interleave
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, LlamaConfig, LlamaForCausalLM

from dop_compile import Policy, dop_compile, explain, prefill_flops
from dop_compile.hf.spellings import CACHE, spelled
from dop_compile.runtime.call import Call
from dop_compile.runtime.decoder import run_decoder
from dop_compile.runtime.prompt import Prompt, make_reducer, reduce_prompt
from dop_compile.timing.rounds import ratio


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Decoder shape, token counts and the published policies (32-layer depths, visual tokens) to scale to it."""

    config: dict[str, int]
    system: int
    visual: int
    text: int
    published: dict[str, tuple[int, int, int]]
    split_at: tuple[str, ...]
    device: str = "cuda"
    dtype: str = "bfloat16"


VICUNA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SMALL = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 16, "num_attention_heads": 16}
LLAVA_15 = {"37%": (25, 19, 192), "28%": (26, 19, 97), "23%": (25, 16, 51)}
LLAVA_NEXT = {"23%": (25, 16, 965), "14%": (29, 16, 485), "9%": (30, 16, 240)}
GEOMETRIES = {
    "small": Geometry(SMALL, 35, 576, 105, LLAVA_15, ("37%", "28%"), "cpu", "float32"),
    "llava-1.5-7b": Geometry(VICUNA_7B, 35, 576, 105, LLAVA_15, ("37%", "28%")),
    "llava-next-7b": Geometry(VICUNA_7B, 35, 2880, 105, LLAVA_NEXT, ("23%", "14%")),
}


def policies(geometry: Geometry) -> dict[str, Policy]:
    """The published policies scaled to the geometry's depth, and split ones of about the same FLOPs."""
    layers = geometry.config["num_hidden_layers"]
    result = {"100%": Policy.full(layers)}
    for name, (mha, mlp, tokens) in geometry.published.items():
        result[name] = Policy.depthwise(
            layers, mha_depth=round(mha * layers / 32), mlp_depth=round(mlp * layers / 32), visual_tokens=tokens
        )
    for name in geometry.split_at:
        result[f"{name} split"] = _split_policy(geometry, result[name])
    return result


def _split_policy(geometry: Geometry, like: Policy) -> Policy:
    """All visual tokens, keys and values in every layer; the query and MLP depth nearest in FLOPs to `like`."""
    layers = geometry.config["num_hidden_layers"]
    counts = {"system": geometry.system, "visual": geometry.visual, "text": geometry.text}
    config = LlamaConfig(**geometry.config)
    goal = prefill_flops(config, like, **counts)

    def candidates() -> Any:
        for key_value in range(layers, 0, -1):
            for depth in range(0, layers // 2):
                yield Policy.depthwise(
                    layers, mha_query_depth=depth, mha_key_value_depth=key_value, mlp_depth=max(1, depth - 1)
                )

    return min(candidates(), key=lambda policy: abs(prefill_flops(config, policy, **counts) - goal))


class Bench:
    """One model, its compiled tiers, and decoder calls that time nothing but the decoder."""

    def __init__(self, geometry: Geometry, attention: str):
        self.geometry = geometry
        self.device = torch.device(geometry.device)
        dtype = getattr(torch, geometry.dtype)
        config = LlamaConfig(**geometry.config, vocab_size=32000, max_position_embeddings=4096)
        torch.manual_seed(0)
        with torch.device(self.device):
            self.model = LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=dtype).eval()
        tokens = geometry.system + geometry.visual + geometry.text
        self.embeds = torch.randn(1, tokens, config.hidden_size, device=self.device, dtype=dtype) * 0.02
        groups = torch.zeros(1, tokens, dtype=torch.long)
        groups[:, : geometry.system] = 2
        groups[:, geometry.system : geometry.system + geometry.visual] = 1
        self.groups = groups.to(self.device)

    def original(self) -> Callable[[], Any]:
        decoder = self.model.model
        return lambda: decoder(inputs_embeds=self.embeds, **_new_cache(decoder))

    def compiled_layers(self) -> Callable[[], Any]:
        """The original with every layer under torch.compile, as Hugging Face documents it; on a copy."""
        decoder = type(self.model.model)(self.model.config).to(self.embeds).eval()
        decoder.load_state_dict(self.model.model.state_dict(), assign=True)
        torch._dynamo.config.recompile_limit = 2 * len(decoder.layers)
        for layer in decoder.layers:
            layer.compile(dynamic=True)
        return lambda: decoder(inputs_embeds=self.embeds, **_new_cache(decoder))

    def tier(self, compiled: Any, name: str) -> Callable[[], Any]:
        state = compiled.dop
        policy = state.tiers[name]

        def call() -> Any:
            request = Call(name, policy, rows=1, token_groups=self.groups)
            return run_decoder(state, state.decoder, request, inputs_embeds=self.embeds, use_cache=True)

        return call


def _new_cache(decoder: Any) -> dict[str, Any]:
    """An empty cache, under the name that the decoder has for it."""
    return spelled(type(decoder).forward, {CACHE: DynamicCache(config=decoder.config)})


def measure(bench: Bench, backend: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table for one backend."""
    geometry = bench.geometry
    tiers = policies(geometry)
    compiled = dop_compile(bench.model, tiers, backend=backend)
    base = bench.original() if backend == "eager" else bench.compiled_layers()
    contenders = {"original": base, "original again": base}
    contenders |= {name: bench.tier(compiled, name) for name in tiers}
    times = interleave(contenders, rounds, bench.device)
    counts = {"system": geometry.system, "visual": geometry.visual, "text": geometry.text}
    full = prefill_flops(bench.model.config, tiers["100%"], **counts)
    rows = []
    for name, values in times.items():
        share = ratio(values, times["original"])
        row = {
            "backend": backend,
            "policy": name,
            "ms": statistics.median(values),
            "ratio": share.median,
            "quartiles": (share.low, share.high),
        }
        if name in tiers:
            explained = explain(compiled, tier=name, **counts).summary
            row["eq11"] = prefill_flops(bench.model.config, tiers[name], **counts) / full
            row["executed"] = explained.executed_ratio
            row["kv"] = explained.kv_ratio
        rows.append(row)
    return rows


def measure_apart(bench: Bench, rounds: int) -> dict[str, float]:
    """Milliseconds of vision tower (CLIP ViT-L/14 at 336 px), selection (uniform) and lm_head (last row)."""
    geometry = bench.geometry
    tokens = min(policy.visual_tokens or geometry.visual for policy in policies(geometry).values())
    tiles = max(1, geometry.visual // 576)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device(bench.device):
        tower = CLIPVisionModel(vision).to(bench.embeds.dtype).eval()
        pixels = torch.randn(tiles, 3, 336, 336, dtype=bench.embeds.dtype)
    visual = bench.groups.cpu() == 1
    valid = torch.ones_like(visual)
    policy = Policy.full(geometry.config["num_hidden_layers"]).replace(visual_tokens=tokens)
    prompt = Prompt(bench.embeds, valid, visual, torch.zeros_like(visual), bench.groups.cpu() == 2)
    hidden = bench.embeds[:, -1:]
    times = interleave(
        {
            "vision": lambda: tower(pixels),
            "selection": lambda: reduce_prompt(prompt, policy, make_reducer(policy, None, 1)),
            "lm_head": lambda: bench.model.lm_head(hidden),
        },
        max(3, rounds // 2),
        bench.device,
    )
    return {name: statistics.median(values) for name, values in times.items()}


def measure_matmuls(bench: Bench, rounds: int) -> dict[int, float]:
    """Milliseconds of all the decoder's linear layers alone, by number of rows.

    Matrix multiplications of few rows are less efficient. No rewrite of the graph can be faster than these, so they
    say how much of the distance between a latency ratio and its FLOPs ratio is the machine's.
    """
    geometry = bench.geometry
    others = geometry.system + geometry.text
    kept = [tokens for _, _, tokens in geometry.published.values()]
    linears = [m for m in bench.model.model.layers.modules() if isinstance(m, torch.nn.Linear)]

    def call(rows: int) -> Callable[[], Any]:
        inputs = {
            width: torch.randn(1, rows, width, device=bench.device, dtype=bench.embeds.dtype)
            for width in {linear.in_features for linear in linears}
        }
        return lambda: [linear(inputs[linear.in_features]) for linear in linears]

    counts = [others + tokens for tokens in (geometry.visual, *kept, 0)]
    times = interleave({str(rows): call(rows) for rows in counts}, rounds, bench.device)
    return {int(rows): statistics.median(values) for rows, values in times.items()}


def markdown(
    rows: list[dict[str, Any]], apart: dict[str, float], matmuls: dict[int, float], around: dict[str, Any]
) -> str:
    lines = [
        "| backend | policy | policy FLOPs | executed FLOPs | KV cache | prefill ms | ratio to original (quartiles) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]

    def percent(row: dict[str, Any], key: str) -> str:
        return f"{100 * row[key]:.1f} %" if key in row else ""

    for row in rows:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['backend']} | {row['policy']} | {percent(row, 'eq11')} | {percent(row, 'executed')} | "
            f"{percent(row, 'kv')} | {row['ms']:.1f} | {row['ratio']:.3f} ({low:.3f}-{high:.3f}) |"
        )
    lines.append("")
    lines.append("Apart from the decoder, ms: " + ", ".join(f"{name} {value:.1f}" for name, value in apart.items()))
    full = max(matmuls)
    parts = [
        f"{count} rows ({count / full:.3f}) {value / matmuls[full]:.3f}"
        for count, value in matmuls.items()
        if count < full
    ]
    lines.append("")
    lines.append(f"The linear layers alone, time relative to {full} rows: " + ", ".join(parts))
    lines.append("")
    lines.append("; ".join(f"{name}: {value}" for name, value in around.items()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small")
    parser.add_argument("--backend", action="append", choices=["eager", "inductor"], help="default: both")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--device", help="instead of the geometry's own")
    parser.add_argument("--dtype", help="instead of the geometry's own")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder for prefill-GEOMETRY.json and .md")
    options = parser.parse_args()
    chosen = {name: value for name in ("device", "dtype") if (value := getattr(options, name))}
    geometry = dataclasses.replace(GEOMETRIES[options.geometry], **chosen)
    bench = Bench(geometry, options.attention)
    rows: list[dict[str, Any]] = []
    for backend in options.backend or ["eager", "inductor"]:
        rows += measure(bench, backend, options.rounds)
    apart = measure_apart(bench, options.rounds)
    matmuls = measure_matmuls(bench, options.rounds)
    around = environment(bench.device)
    text = markdown(rows, apart, matmuls, around)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = options.out / f"prefill-{options.geometry}"
        stem.with_suffix(".md").write_text(text + "\n")
        stem.with_suffix(".json").write_text(
            json.dumps({"rows": rows, "apart": apart, "matmuls": matmuls, **around}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
