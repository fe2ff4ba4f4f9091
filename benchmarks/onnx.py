"""Exported tiers in ONNX Runtime against PyTorch, interleaved in one run.

    python benchmarks/onnx.py                                      # 16 layers x 1024 on CPU
    python benchmarks/onnx.py --opset 18 --rounds 9 --out benchmarks/results

Every round times each contender once, in a new random order. "100% again" is a contender a second time: its ratio shows
what the machine can resolve. Load time and memory are of fresh processes: PSS counts pages that processes share in
proportion. Weights are random, so only time and memory are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# This script's folder comes first on the path, where `import onnx` would find the script itself
sys.path.append(sys.path.pop(0))

import torch
from common import environment, interleave
from prefill import GEOMETRIES, Bench, policies
from torch import Tensor

from dop_compile import dop_compile, explain, export_onnx
from dop_compile.onnx.manifest import Manifest
from dop_compile.onnx.sessions import GraphSession
from dop_compile.onnx.shapes import Shapes

MEMORY = """
import sys, time
from pathlib import Path
from dop_compile.onnx.manifest import Manifest
from dop_compile.onnx.sessions import GraphSession

folder, shared, tiers = Path(sys.argv[1]), sys.argv[2] == "shared", sys.argv[3].split(",")

def pss():
    line = next(l for l in open("/proc/self/smaps_rollup") if l.startswith("Pss:"))
    return int(line.split()[1]) / 1024

manifest = Manifest.load(folder)
before, started = pss(), time.perf_counter()
names = [manifest.tiers[t].prefill for t in tiers] + ["decode", manifest.embed]
kept = [GraphSession(folder / manifest.graphs[n].data.file, "CPUExecutionProvider", True, shared) for n in names]
seconds = time.perf_counter() - started
print(seconds, pss() - before)
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


def load_and_memory(folder: Path, tiers: list[str]) -> list[dict[str, Any]]:
    """Seconds to load and MB of PSS for one tier and for all, in both modes."""
    rows = []
    for mode in ("fast", "shared"):
        for chosen in (tiers[:1], tiers):
            command = [sys.executable, "-c", MEMORY, str(folder), mode, ",".join(chosen)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, megabytes = map(float, done.stdout.split())
            rows.append({"mode": mode, "tiers": len(chosen), "seconds": seconds, "pss_mb": megabytes})
    return rows


def table(times: Mapping[str, list[float]], executed: Mapping[str, float], base: str) -> list[dict[str, Any]]:
    rows = []
    for name, values in times.items():
        ratios = [value / first for value, first in zip(values, times[base], strict=True)]
        quartiles = tuple(statistics.quantiles(ratios, n=4)[::2])
        median = {"ms": statistics.median(values), "ratio": statistics.median(ratios)}
        rows.append({"name": name, **median, "quartiles": quartiles, "executed": executed.get(name)})
    return rows


def markdown(parts: Mapping[str, list[dict[str, Any]]], memory: list[dict[str, Any]], around: Mapping[str, Any]) -> str:
    lines = []
    for title, rows in parts.items():
        lines += [f"| {title} | ms | ratio to the first (quartiles) | executed FLOPs |", "| --- | --- | --- | --- |"]
        for row in rows:
            flops = "" if row["executed"] is None else f"{row['executed']:.3f}"
            low, high = row["quartiles"]
            lines.append(f"| {row['name']} | {row['ms']:.2f} | {row['ratio']:.3f} ({low:.3f}-{high:.3f}) | {flops} |")
        lines.append("")
    lines += ["| memory | tiers | load s | PSS MB |", "| --- | --- | --- | --- |"]
    lines += [f"| {r['mode']} | {r['tiers']} | {r['seconds']:.2f} | {r['pss_mb']:.0f} |" for r in memory]
    lines += ["", "; ".join(f"{name}: {value}" for name, value in around.items())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=[n for n, g in GEOMETRIES.items() if g.device == "cpu"], default="small")
    parser.add_argument("--opset", type=int, choices=(18, 23), default=23)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-inductor", action="store_true", help="eager alone: compiling takes minutes")
    parser.add_argument("--out", type=Path, help="folder for onnx-GEOMETRY.json and .md")
    options = parser.parse_args()
    geometry = GEOMETRIES[options.geometry]
    bench = Bench(geometry, "sdpa")
    tiers = policies(geometry)
    backends = {"eager": dop_compile(bench.model, tiers, backend="eager")}
    if not options.no_inductor:
        backends["inductor"] = dop_compile(bench.model, tiers)
    shapes = Shapes(visual_length=geometry.visual, text=(2, geometry.system + geometry.text, 1024))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export"
        manifest = export_onnx(bench.model, tiers, folder, opset=options.opset, shapes=shapes, progress=True)
        prefills, decodes = calls(folder, manifest, bench)
        first = next(iter(tiers))
        contenders = {f"onnx {name}": call for name, call in prefills.items()} | {
            f"onnx {first} again": prefills[first]
        }
        for backend, compiled in backends.items():
            contenders |= {f"{backend} {name}": bench.tier(compiled, name) for name in tiers}
        with torch.no_grad():
            prefill_times = interleave(contenders, options.rounds, bench.device)
        steps = {**decodes, f"{first} again": decodes[first]}
        decode_times = interleave(steps, 3 * options.rounds, bench.device)
        memory = load_and_memory(folder, list(tiers)[:4])
    counts = {"system": geometry.system, "visual": geometry.visual, "text": geometry.text}
    executed = {f"onnx {n}": explain(backends["eager"], n, **counts).summary.executed_ratio for n in tiers}
    parts = {
        "prefill": table(prefill_times, executed, f"onnx {first}"),
        "decode, one token": table(decode_times, {}, first),
    }
    around = {**environment(bench.device), "opset": options.opset, "disk MB": round(_disk(manifest) / 1e6, 1)}
    text = markdown(parts, memory, around)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = options.out / f"onnx-{options.geometry}"
        stem.with_suffix(".md").write_text(text + "\n")
        stem.with_suffix(".json").write_text(json.dumps({**parts, "memory": memory, **around}, indent=1) + "\n")


def _disk(manifest: Manifest) -> int:
    return sum({data.file: data.bytes for data in manifest.data_files}.values())


if __name__ == "__main__":
    main()
