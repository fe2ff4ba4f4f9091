"""How long the choice of visual tokens takes, against the prefill that it serves.

    python benchmarks/reducers.py                                  # LLaVA-1.5's tokens, on CPU
    python benchmarks/reducers.py --geometry llava-next-7b --device cuda --dtype bfloat16
    python benchmarks/reducer_sizes.py                             # time and memory against the number of tokens

A reducer's time is in three parts: its choice among features that are there; the row of attention and the keys, taken
from one layer of a CLIP tower; and the projector once more for merged tokens (part of the choice). The prefill is that
of the published 28 % (14 %) policy, compiled as `benchmarks/prefill.py` compiles it. Weights and features are random:
only time is measured. The aim is a choice of at most 5 % of the prefill.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import environment, synchronise
from prefill import GEOMETRIES, Bench, policies
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from dop_compile import dop_compile
from dop_compile.reducers import VisualContext, create, known, select_batch
from dop_compile.vision.rows import attention_rows

SERVED = {"small": "28%", "llava-1.5-7b": "28%", "llava-next-7b": "14%"}
TILE, VISION_HIDDEN = 576, 1024


def contexts(hidden: int, visual: int, batch: int, device: torch.device, dtype: torch.dtype) -> list[VisualContext]:
    """Random features of `batch` samples, in tiles of 576 tokens."""
    weight = torch.randn(VISION_HIDDEN, hidden, device=device, dtype=dtype) * VISION_HIDDEN**-0.5
    made = []
    for number in range(batch):
        features = torch.randn(visual, VISION_HIDDEN, device=device, dtype=dtype)
        made.append(
            VisualContext(
                projected=features @ weight,
                text=torch.randn(140, hidden, device=device, dtype=dtype),
                segments=torch.zeros(visual, dtype=torch.long),
                sample_index=number,
                features=features,
                cls_attention=torch.rand(visual, device=device),
                keys=torch.randn(visual, 64, device=device),
                project=lambda rows: rows @ weight,
                tiles=torch.arange(visual) // TILE,
                instruction_start=35,
            )
        )
    return made


def timed(call: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Median milliseconds."""
    times = []
    with torch.inference_mode():
        for _ in range(3):
            call()
        for _ in range(rounds):
            synchronise(device)
            started = time.perf_counter()
            call()
            synchronise(device)
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def tower_times(tiles: int, rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of a CLIP ViT-L/336 over all tiles, and of one layer's attention row and keys."""
    config = CLIPVisionConfig(
        hidden_size=VISION_HIDDEN,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device(device):
        tower = CLIPVisionModel._from_config(config, dtype=dtype).eval()
        pixels = torch.randn(tiles, 3, 336, 336, dtype=dtype)
        hidden = torch.randn(tiles, TILE + 1, VISION_HIDDEN, dtype=dtype)
    layers = next(m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 24)
    attention = layers[22].self_attn
    return {
        "tower": timed(lambda: tower(pixels), rounds, device),
        "attention row and keys": timed(lambda: attention_rows(attention, (hidden,), {}, True), rounds, device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small")
    parser.add_argument("--device", help="instead of the geometry's own")
    parser.add_argument("--dtype", help="instead of the geometry's own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--out", type=Path, help="folder for reducers-GEOMETRY.json and .md")
    options = parser.parse_args()
    chosen = {name: value for name in ("device", "dtype") if (value := getattr(options, name))}
    geometry = dataclasses.replace(GEOMETRIES[options.geometry], **chosen)
    device, dtype = torch.device(geometry.device), getattr(torch, geometry.dtype)
    served = SERVED[options.geometry]
    policy = policies(geometry)[served]
    count = policy.visual_tokens
    assert count is not None
    bench = Bench(geometry, "sdpa")
    compiled = dop_compile(bench.model, {served: policy}, backend=options.backend)
    prefill = timed(bench.tier(compiled, served), options.rounds, device)
    apart = tower_times(-(-geometry.visual // TILE), options.rounds, device, dtype)
    samples = contexts(geometry.config["hidden_size"], geometry.visual, options.batch, device, dtype)
    rows = {}
    for name in tqdm([name for name in known() if name not in ("given", "resize")], desc="reducers", leave=False):
        reducer = create(name)
        rows[name] = timed(
            lambda reducer=reducer: select_batch(reducer, samples, [count] * len(samples)), options.rounds, device
        )
    lines = [
        f"{count} of {geometry.visual} visual tokens, batch {options.batch}; "
        f"prefill ({served}, batch 1) {prefill:.1f} ms; "
        + ", ".join(f"{name} {value:.2f} ms" for name, value in apart.items()),
        "",
        "| reducer | choice, ms | of the prefill |",
        "| --- | --- | --- |",
        *(f"| {name} | {ms:.2f} | {ms / options.batch / prefill:.1%} |" for name, ms in rows.items()),
    ]
    around = environment(device)
    lines += ["", "; ".join(f"{name}: {value}" for name, value in around.items())]
    print("\n".join(lines))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = options.out / f"reducers-{options.geometry}"
        stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
        found = {"choice": rows, "prefill": prefill, "apart": apart, "count": count, "batch": options.batch, **around}
        stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
