"""Exported tiers in ONNX Runtime against PyTorch, interleaved in one run.

    python benchmarks/onnx.py                                      # 16 layers x 1024 on CPU, four tiers
    python benchmarks/onnx.py --opset 18 --rounds 5 --out benchmarks/results
    python benchmarks/onnx.py --layers 2 --rounds 2 --no-inductor  # does it run?

Every round times each contender once, in a new random order. "100% again" is a contender a second time: its ratio shows
what the machine can resolve. Ratios are to the 100 % tier in ONNX Runtime, of latency and of executed FLOPs: a tier is
as fast as its FLOPs say where the last column is 1. ONNX Runtime's prefill computes the last row's logits, too.
Decoding hands caches over as arrays from call to call: `OnnxPipeline`, which keeps them in bound buffers, is faster.

Load time and memory are of fresh processes, one for each row, with the files in the page cache; memory is that after
one run of every graph: weights, as they are or packed, and buffers. PSS counts pages that processes share in
proportion. Weights are random, so only time and memory are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# This script's folder comes first on the path, where `import onnx` would find the script itself
sys.path.append(sys.path.pop(0))

import onnxruntime as ort
import torch
from common import environment, interleave
from prefill import GEOMETRIES, Bench, policies
from torch import Tensor

from dop_compile import dop_compile, explain, export_onnx
from dop_compile.onnx.contract.manifest import Manifest
from dop_compile.onnx.export.shapes import Shapes
from dop_compile.onnx.run.sessions import GraphSession

TIERS = ("100%", "37%", "28%", "28% split")
MEMORY = """
import sys, time
from pathlib import Path
import torch
from dop_compile.onnx.contract.manifest import Manifest
from dop_compile.onnx.run.sessions import GraphSession

folder, shared, tiers = Path(sys.argv[1]), sys.argv[2] == "shared", sys.argv[3].split(",")

def pss():
    line = next(l for l in open("/proc/self/smaps_rollup") if l.startswith("Pss:"))
    return int(line.split()[1]) / 1024

manifest = Manifest.load(folder)
before, started = pss(), time.perf_counter()
graphs = [manifest.graphs[n] for n in ["decode", manifest.embed] + [manifest.tiers[t].prefill for t in tiers]]
kept = [GraphSession(folder / g.data.file, "CPUExecutionProvider", True, shared) for g in graphs]
seconds = time.perf_counter() - started
inputs = [{i.name: torch.zeros(i.opt, dtype=getattr(torch, i.dtype)) for i in graph.inputs} for graph in graphs]
for given, session in zip(inputs, kept):  # mapped weights are in memory once they were read
    session.run(given)
memory, times = pss() - before, []
for _ in range(5):
    started = time.perf_counter()
    kept[2].run(inputs[2])
    times.append(1e3 * (time.perf_counter() - started))
print(seconds, memory, sorted(times)[2])
"""


def prefill_inputs(manifest: Manifest, tier: str, bench: Bench) -> dict[str, Tensor]:
    """One prompt of the geometry: system and text in one section, the kept visual tokens in another."""
    geometry, info = bench.geometry, manifest.tiers[tier]
    visual = min(info.policy.visual_tokens or geometry.visual, geometry.visual)
    start = geometry.system
    kept = start + torch.linspace(0, geometry.visual - 1, visual).long()
    last = torch.arange(start + geometry.visual, start + geometry.visual + geometry.text)
    columns = {"visual": kept, "text": torch.cat([torch.arange(start), last])}
    order = torch.cat([columns["text"], kept]).sort().values
    inputs = {}
    for section in info.sections:
        chosen = columns[section.name]
        inputs[f"embeds.{section.name}"] = bench.embeds[:, chosen]
        inputs[f"position_ids.{section.name}"] = chosen[None]
        inputs[f"slots.{section.name}"] = torch.searchsorted(order, chosen)[None]
    return inputs


def decode_inputs(manifest: Manifest, tier: str, prefilled: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> Any:
    """The first decoding step after a prefill."""
    total = sum(value.shape[1] for value in slots.values())
    one = torch.tensor([[total]])
    inputs = {"input_ids": torch.tensor([[5]]), "position_ids": one, "slots": one}
    for number, group in enumerate(manifest.past_classes):
        inputs[f"past_slots.{number}"] = torch.cat([slots[name] for name in group.tiers[tier]], 1)
        for layer in group.layers:
            for part in ("key", "value"):
                inputs[f"past_key_values.{layer}.{part}"] = prefilled[f"present.{layer}.{part}"]
    return inputs


def calls(folder: Path, manifest: Manifest, bench: Bench) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prefill and decode of each tier in ONNX Runtime."""
    prefills: dict[str, Callable[[], Any]] = {}
    decodes: dict[str, Callable[[], Any]] = {}

    def session(name: str) -> GraphSession:
        return GraphSession(folder / manifest.graphs[name].data.file, "CPUExecutionProvider", True)

    decode = session("decode")
    for tier, info in manifest.tiers.items():
        graph, inputs = session(info.prefill), prefill_inputs(manifest, tier, bench)
        prefills[tier] = lambda graph=graph, inputs=inputs: graph.run(inputs)
        slots = {s.name: inputs[f"slots.{s.name}"] for s in info.sections}
        step = decode_inputs(manifest, tier, graph.run(inputs), slots)
        decodes[tier] = lambda step=step: decode.run(step)
    return prefills, decodes


def load_and_memory(folder: Path, manifest: Manifest, tiers: list[str]) -> list[dict[str, Any]]:
    """Disk, time to load, PSS and the first tier's prefill, for one tier and for all, in both modes."""
    rows = []
    for mode in ("fast", "shared"):
        for chosen in (tiers[:1], tiers):
            command = [sys.executable, "-c", MEMORY, str(folder), mode, ",".join(chosen)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, megabytes, ms = map(float, done.stdout.split())
            found = {"disk_mb": disk_mb(manifest, chosen), "seconds": seconds, "pss_mb": megabytes, "prefill_ms": ms}
            rows.append({"mode": mode, "tiers": len(chosen), **found})
    return rows


def table(times: Mapping[str, list[float]], executed: Mapping[str, float], base: str) -> list[dict[str, Any]]:
    """Per contender: median ms, median ratio to `base` within a round, and executed FLOPs as a ratio to `base`."""
    rows = []
    for name, values in times.items():
        ratios = [value / first for value, first in zip(values, times[base], strict=True)]
        quartiles = tuple(statistics.quantiles(ratios, n=4)[::2])
        median = {"ms": statistics.median(values), "ratio": statistics.median(ratios)}
        flops = executed[name] / executed[base] if name in executed else None
        rows.append({"name": name, **median, "quartiles": quartiles, "executed": flops})
    return rows


def prefill_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| prefill | ms | ratio (quartiles) | executed FLOPs | latency / FLOPs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = row["quartiles"]
        flops = "| |" if row["executed"] is None else f"{row['executed']:.3f} | {row['ratio'] / row['executed']:.2f} |"
        lines.append(f"| {row['name']} | {row['ms']:.1f} | {row['ratio']:.3f} ({low:.3f}-{high:.3f}) | {flops}")
    return lines


def decode_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| decode, batch 1 | ms | tokens/s | ratio (quartiles) |", "| --- | --- | --- | --- |"]
    for row in rows:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['name']} | {row['ms']:.2f} | {1e3 / row['ms']:.1f} | {row['ratio']:.3f} ({low:.3f}-{high:.3f}) |"
        )
    return lines


def memory_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| memory | tiers | disk MB | load s | PSS MB | prefill of the first, ms |", "| --- |" + " --- |" * 5]
    for row in rows:
        numbers = f"{row['disk_mb']:.1f} | {row['seconds']:.2f} | {row['pss_mb']:.0f} | {row['prefill_ms']:.1f}"
        lines.append(f"| {row['mode']} | {row['tiers']} | {numbers} |")
    return lines


def disk_mb(manifest: Manifest, tiers: Sequence[str]) -> float:
    """Weights and graphs of some tiers."""
    names = {manifest.embed}.union(*(manifest.tiers[name].graphs for name in tiers))
    return (manifest.weights.bytes + sum(manifest.graphs[name].data.bytes for name in names)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=[n for n, g in GEOMETRIES.items() if g.device == "cpu"], default="small")
    parser.add_argument("--opset", type=int, choices=(18, 23), default=23)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, help="fewer than the geometry's")
    parser.add_argument("--no-inductor", action="store_true", help="eager alone: compiling takes minutes")
    parser.add_argument("--out", type=Path, help="folder for onnx-GEOMETRY.json and .md")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    geometry = GEOMETRIES[options.geometry]
    if options.layers:
        geometry = replace(geometry, config={**geometry.config, "num_hidden_layers": options.layers})
    bench = Bench(geometry, "sdpa")
    every = policies(geometry)
    tiers = {name: every[name] for name in TIERS}
    backends = {"eager": dop_compile(bench.model, tiers, backend="eager")}
    if not options.no_inductor:
        backends["inductor"] = dop_compile(bench.model, tiers)
    shapes = Shapes(visual_length=geometry.visual, text=(2, geometry.system + geometry.text, 1024))
    first = TIERS[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export"
        manifest = export_onnx(bench.model, tiers, folder, opset=options.opset, shapes=shapes, progress=True)
        prefills, decodes = calls(folder, manifest, bench)
        contenders = {f"onnx {name}": call for name, call in prefills.items()}
        contenders[f"onnx {first} again"] = prefills[first]
        for backend, compiled in backends.items():
            contenders |= {f"{backend} {name}": bench.tier(compiled, name) for name in tiers}
        prefill_times = interleave(contenders, options.rounds, bench.device)
        steps = {**decodes, f"{first} again": decodes[first]}
        decode_times = interleave(steps, 3 * options.rounds, bench.device)
        memory = load_and_memory(folder, manifest, list(tiers))
    counts = {"system": geometry.system, "visual": geometry.visual, "text": geometry.text}
    executed = {n: explain(backends["eager"], n, **counts).summary.executed_ratio for n in tiers}
    flops = {name: executed[tier] for name in contenders for tier in tiers if name.split(" ", 1)[1] == tier}
    prefill = table(prefill_times, flops, f"onnx {first}")
    decode = table(decode_times, {}, first)
    around = {**environment(bench.device), "onnxruntime": ort.__version__, "opset": options.opset}
    parts = (prefill_table(prefill), decode_table(decode), memory_table(memory))
    text = "\n\n".join("\n".join(part) for part in (*parts, ["; ".join(f"{n}: {v}" for n, v in around.items())]))
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = options.out / f"onnx-{options.geometry}"
        stem.with_suffix(".md").write_text(text + "\n")
        document = {"prefill": prefill, "decode": decode, "memory": memory, **around}
        stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
