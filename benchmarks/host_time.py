"""What a call costs beside arithmetic: a decoder of 32 layers x 32 hidden, original and compiled, in one run.

    python benchmarks/host_time.py                       # eager: prefill and one generated token
    python benchmarks/host_time.py --backend inductor    # against the same model with its decoder under torch.compile

Every round times each contender once, in a new random order; the tables give medians and the median of the ratios
within a round. "original again" is the original a second time: its ratio shows what the machine can resolve. A
token's time is the difference of two `generate` calls over the tokens that one makes more than the other.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import environment, interleave
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dop_compile import Policy, dop_compile
from dop_compile.timing.rounds import ratio

IMAGE, SHORT, LONG = 63, 2, 34
BASE = "original"


def model(layers: int) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        projection_dim=32,
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=512,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    torch.manual_seed(0)
    made = LlavaForConditionalGeneration(config).eval()
    made.generation_config.pad_token_id = 0
    return made


def policies(layers: int) -> dict[str, Policy]:
    """The full model, the published 28 % of LLaVA-1.5-7B scaled to the depth, and a split one."""
    return {
        "100%": Policy.full(layers),
        "28%": Policy.depthwise(layers, mha_depth=int(layers * 0.8), mlp_depth=int(layers * 0.6), visual_tokens=4),
        "split": Policy.depthwise(
            layers, mha_query_depth=layers // 4, mha_key_value_depth=int(0.8 * layers), mlp_depth=layers // 4
        ),
    }


def prompt(batch: int, padded: bool) -> dict[str, torch.Tensor]:
    """Four words, an image of 16 tokens and twelve words a row; every second row begins with padding if asked for."""
    torch.manual_seed(1)
    words = torch.randint(1, IMAGE, (batch, 16))
    ids = torch.cat([words[:, :4], torch.full((batch, 16), IMAGE), words[:, 4:]], dim=1)
    mask = torch.ones_like(ids)
    if padded:
        ids[::2, :2], mask[::2, :2] = 0, 0
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 56, 56), "attention_mask": mask}


def per_call(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    for call in contenders.values():
        with torch.inference_mode():
            for _ in range(3):
                call()
    return interleave(contenders, rounds, torch.device("cpu"))


def prefill_time(models: dict[str, Any], inputs: dict[str, torch.Tensor], rounds: int) -> dict[str, list[float]]:
    calls = {n: functools.partial(m, **inputs, use_cache=True, logits_to_keep=1) for n, m in models.items()}
    return per_call(calls, rounds)


def token_time(
    models: dict[str, Any], inputs: dict[str, torch.Tensor], rounds: int, **settings: Any
) -> dict[str, list[float]]:
    """Milliseconds per token of each contender in each round."""

    def answer(run: Any, tokens: int) -> Callable[[], Any]:
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        return functools.partial(run, **inputs, **lengths, do_sample=False, **settings)

    runs = {name: getattr(m, "generate", m) for name, m in models.items()}
    calls = {(name, tokens): answer(run, tokens) for name, run in runs.items() for tokens in (SHORT, LONG)}
    times = per_call({f"{n} {t}": call for (n, t), call in calls.items()}, rounds)
    both = {name: zip(times[f"{name} {SHORT}"], times[f"{name} {LONG}"], strict=True) for name in models}
    return {name: [(long - short) / (LONG - SHORT) for short, long in pairs] for name, pairs in both.items()}


def rows(part: str, case: str, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    made = []
    for name, values in times.items():
        row = {"part": part, "case": case, "contender": name, "ms": statistics.median(values)}
        made.append({**row, "ratio": ratio(values, times[BASE]).median})
        print(f"{part:>14} {case:>16} {name:>15}: {row['ms']:7.2f} ms {made[-1]['ratio']:6.3f}", flush=True)
    return made


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    original = model(options.layers)
    compiled = dop_compile(original, policies(options.layers), backend=options.backend)
    base = original
    if options.backend != "eager":  # what a user would do instead
        base = copy.deepcopy(original)
        base.model.language_model = torch.compile(base.model.language_model, dynamic=True)
    models = {BASE: base, "original again": base, **{name: compiled.tier(name) for name in compiled.tiers}}
    results = []
    for batch in options.batch:
        for padded in (False, True):
            case = f"batch {batch}, {'padded' if padded else 'unpadded'}"
            inputs = prompt(batch, padded)
            if "prefill" in options.parts:
                results += rows("prefill", case, prefill_time(models, inputs, options.rounds))
            if "token" in options.parts:
                results += rows("token", case, token_time(models, inputs, max(options.rounds // 2, 1)))
            if "static" in options.parts:
                static = token_time(models, inputs, max(options.rounds // 2, 1), cache_implementation="static")
                results += rows("static token", case, static)
    return results


def table(report: dict[str, Any]) -> str:
    lines = [f"{key}: {value}" for key, value in report["environment"].items()]
    lines += ["", "| call | rows | contender | ms | ratio |", "| --- | --- | --- | --- | --- |"]
    for row in report["results"]:
        cells = (row["part"], row["case"], row["contender"], f"{row['ms']:.2f}", f"{row['ratio']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", default=["prefill", "token"], choices=["prefill", "token", "static"])
    parser.add_argument("--out", type=Path, help="file name without suffix; writes .json and .md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = {"environment": environment(torch.device("cpu")), "results": measured(options)}
    print("\n" + table(report))
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
