"""The drawing of a policy on the page of concepts, and the tradeoff in the README: `python docs/images/draw.py`.

The tradeoff is that of `examples/results/methods-llava.md`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
LAYERS = 6
SHOWN = {
    "split+visionzip": "split (queries and keys apart), VisionZip",
    "dop+visionzip": "dop (the paper's space), VisionZip",
    "visionzip": "VisionZip alone",
    "random": "random tokens",
    "fastv": "FastV",
}


def operations() -> str:
    """Which operations of which layer a policy keeps, of the visual and of the text tokens."""
    groups = (("visual tokens", 4, 2, 5, 2), ("text tokens", 3, LAYERS, LAYERS, LAYERS))
    parts, left = [], 70
    for name, tokens, queries, keys, mlp in groups:
        width = tokens * 3 * 14
        parts.append(f'<text x="{left + width / 2}" y="22" text-anchor="middle">{name}</text>')
        for layer in range(LAYERS):
            top = 48 + 24 * (LAYERS - 1 - layer)
            for token in range(tokens):
                for number, (letter, depth) in enumerate(zip("QKM", (queries, keys, mlp), strict=True)):
                    x = left + (3 * token + number) * 14
                    fill = "#2b6cb0" if layer < depth else "#e2e8f0"
                    frozen = letter == "K" and layer < depth and layer >= queries
                    parts.append(
                        f'<rect x="{x}" y="{top}" width="12" height="18" fill="{"#90cdf4" if frozen else fill}"/>'
                    )
                    if layer == LAYERS - 1:
                        parts.append(f'<text x="{x + 6}" y="42" text-anchor="middle" font-size="9">{letter}</text>')
        left += width + 30
    for layer in range(LAYERS):
        parts.append(f'<text x="8" y="{62 + 24 * (LAYERS - 1 - layer)}">layer {layer}</text>')
    height = 48 + 24 * LAYERS + 4
    style = 'font-family="sans-serif" font-size="12" fill="#1a202c"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left} {height}" {style}>{"".join(parts)}</svg>\n'


def tradeoff() -> None:
    lines = {line.split("|")[1].strip(): line.split("|") for line in _table().splitlines() if line.startswith("| ")}
    columns = [cell.strip() for cell in lines["method"]]
    flops, relative = columns.index("policy FLOPs"), columns.index("Rel. Avg.")
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.axhline(100, color="#718096", linewidth=1)
    axes.annotate("original", (100, 100), textcoords="offset points", xytext=(0, 4), ha="right", color="#718096")
    for method, label in SHOWN.items():
        points = [
            (float(cells[flops].split("%")[0]), float(cells[relative].split("%")[0]))
            for name, cells in lines.items()
            if name.rpartition(" ")[0] == method
        ]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(
        xlabel="policy FLOPs of the original's, %",
        ylabel="right answers of the original's, %",
        xlim=(20, 100),
        ylim=(50, 105),
    )
    axes.legend(frameon=False)
    figure.savefig(HERE / "tradeoff.png", dpi=110)


def _table() -> str:
    return (HERE.parents[1] / "examples" / "results" / "methods-llava.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    (HERE / "operations.svg").write_text(operations(), encoding="utf-8")
    tradeoff()
