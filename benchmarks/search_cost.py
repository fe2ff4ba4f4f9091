"""What measuring divergences costs, against running the model anew for every point.

    python benchmarks/search_cost.py                # FLOPs of the paper's geometries, seconds on the digits models
    python benchmarks/search_cost.py --samples 50 --out benchmarks/results

FLOPs are those of the decoder, in prefills of the original per sample; "whole runs" are the original and a whole pruned
prefill for each point. Seconds are of the shipped digits models, vision tower included: per sample the stored residual
streams (as `measure_divergences` uses them) and whole runs, one behind the other in random order; the first sample,
which warms both up, is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import environment
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from dop_compile import Policy, dop_compile, prefill_flops
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.reports.executed import SampleTokens, resumed_flops
from dop_compile.search.axes import DEPTH_AXES, DOP_AXES, SPLIT_AXES, axis_policy, default_points
from dop_compile.search.meter import SampleMeter
from dop_compile.search.metrics import top_k_kl

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

from digits_vlm import data, models  # noqa: E402

GEOMETRIES = {"LLaVA-1.5-7B": 576, "LLaVA-NeXT-7B": 2880}
SYSTEM, TEXT = 35, 100


def flops_rows() -> list[dict[str, Any]]:
    """Decoder FLOPs of the measurement, for Vicuna-7B with the visual tokens of two models."""
    config = LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
    with torch.device("meta"):
        compiled = dop_compile(LlamaForCausalLM(config).eval(), Policy.full(32), backend="eager")
    dims, full = DecoderDims.from_config(config), Policy.full(32)
    rows = []
    for name, visual in GEOMETRIES.items():
        for space, axes in (("dop", DOP_AXES), ("split", SPLIT_AXES)):
            prompt = SampleTokens(SYSTEM, visual, TEXT, rows=1, use_cache=False)
            whole = prefill_flops(dims, full, SYSTEM, visual, TEXT)
            spent = anew = whole
            count = 1
            for axis in axes:
                for point in default_points(axis, 32):
                    policy = axis_policy(axis, point, visual, full)
                    first = int(point) if axis in DEPTH_AXES else 0
                    spent += resumed_flops(compiled.dop, policy, prompt, dims, first)
                    anew += prefill_flops(dims, policy, SYSTEM, visual, TEXT)
                    count += 1
            rows.append({"model": name, "space": space, "runs": count, "prefills": spent / whole, "anew": anew / whole})
    return rows


def seconds_row(name: str, samples: int) -> dict[str, Any]:
    """Seconds per sample of the default measurement on a shipped model."""
    model, reader = models.load(ROOT / "examples" / "digits_vlm" / "checkpoints" / name)
    asked = [reader([e.image], [e.prompt]) for e in data.examples("train", samples + 1, seed=5)]
    layers = model.config.get_text_config().num_hidden_layers
    full = Policy.full(layers)
    compiled = dop_compile(model, full, backend="eager")
    visual = SampleMeter(compiled, asked[0]).counts[1]
    points = {axis: default_points(axis, layers) for axis in SPLIT_AXES}
    policies = [axis_policy(axis, point, visual, full) for axis, own in points.items() for point in own]
    depths = sorted({int(point) for axis, own in points.items() if axis in DEPTH_AXES for point in own} - {layers})
    tiers = dop_compile(model, {str(n): policy for n, policy in enumerate([full, *policies])}, backend="eager")

    @torch.no_grad()
    def resumed(inputs: dict[str, Any]) -> list[float]:
        meter = SampleMeter(compiled, inputs, depths=depths)
        return [meter.divergence(policy) for policy in policies]

    @torch.no_grad()
    def anew(inputs: dict[str, Any]) -> list[float]:
        original, *pruned = (
            tiers(**inputs, tier=str(n), logits_to_keep=1, use_cache=False).logits[0] for n in range(len(policies) + 1)
        )
        return [top_k_kl(original, one) for one in pruned]

    times: dict[str, list[float]] = {"resumed": [], "anew": []}
    shuffle, ways = random.Random(0), {"resumed": resumed, "anew": anew}
    apart = 0.0
    for number, inputs in enumerate(tqdm(asked, desc=name, leave=False)):
        order = list(ways)
        shuffle.shuffle(order)
        found = {}
        for way in order:
            started = time.perf_counter()
            found[way] = ways[way](inputs)
            if number:
                times[way].append(time.perf_counter() - started)
        apart = max(apart, *(abs(a - b) for a, b in zip(found["resumed"], found["anew"], strict=True)))
    ratios = [a / b for a, b in zip(times["resumed"], times["anew"], strict=True)]
    return {
        "model": f"digits {name}",
        "runs": len(policies) + 1,
        "resumed": statistics.median(times["resumed"]),
        "anew": statistics.median(times["anew"]),
        "ratio": statistics.median(ratios),
        "apart": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=25, help="per digits model (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for search-cost.json and .md")
    options = parser.parse_args()
    flops = flops_rows()
    lines = [
        "| model | space | runs | decoder FLOPs, in original prefills | whole runs | of runs x original |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['model']} | {row['space']} | {row['runs']} | {row['prefills']:.2f} | {row['anew']:.2f} | "
        f"{row['prefills'] / row['runs']:.3f} |"
        for row in flops
    ]
    shipped = [name for name in models.NAMES if (ROOT / "examples/digits_vlm/checkpoints" / name).is_dir()]
    seconds = [seconds_row(name, options.samples) for name in shipped]
    lines += [
        "",
        "| model | runs | resumed, s a sample | whole runs, s a sample | ratio | largest difference of a divergence |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['model']} | {row['runs']} | {row['resumed']:.3f} | {row['anew']:.3f} | {row['ratio']:.2f} | "
        f"{row['apart']:.1e} |"
        for row in seconds
    ]
    around = environment(torch.device("cpu"))
    lines += ["", "; ".join(f"{name}: {value}" for name, value in around.items())]
    text = "\n".join(lines)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "search-cost.md").write_text(text + "\n")
        record = {"flops": flops, "seconds": seconds, **around}
        (options.out / "search-cost.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
