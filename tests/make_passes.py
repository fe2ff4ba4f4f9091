"""The pages of the passes: `python -m tests.make_passes` writes `docs/internals/passes/*.md`.

Each has what its module says of the pass, and what it does to the graph of a small decoder.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaModel

from dop_compile.compiler import trace
from dop_compile.passes import PIPELINE, DecoderGraph, Pass, dump, run_passes
from dop_compile.policy import Policy
from dop_compile.policy.keep import KeepTable
from dop_compile.tokens import Universe

FOLDER = Path(__file__).parents[1] / "docs" / "internals" / "passes"
GROUPS = ("visual", "text")
POLICY = Policy.depthwise(3, mha_query_depth=1, mha_key_value_depth=2, mlp_depth=1)
EXAMPLE = """\
A Llama of three layers under `Policy.depthwise(3, mha_query_depth=1, mha_key_value_depth=2, mlp_depth=1)`, for a prompt
of visual and text tokens of which the logits of one text token are asked for."""
LINES = 60
"""Of a graph or of its changes that a page shows."""


def _graph() -> DecoderGraph:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    decoder = LlamaModel(LlamaConfig(num_hidden_layers=3, vocab_size=32, **sizes)).eval()
    keep = KeepTable.from_policy(POLICY, GROUPS)
    return DecoderGraph(trace(decoder), keep, Universe(GROUPS, frozenset({"text"})), cached=True)


@functools.cache
def pages() -> dict[str, str]:
    """The text of each page by the pass's name."""
    graph = _graph()
    texts = {"": dump(graph.graph)}
    made = {}
    for item in PIPELINE:
        run_passes(graph, (item,), diff=True)
        before = texts[next(reversed(texts))]
        texts[item.name] = dump(graph.graph)
        made[item.name] = _page(item, before, graph)
    return made


def _page(item: Pass, before: str, graph: DecoderGraph) -> str:
    report = graph.reports[-1]
    lines = [f"# {item.name}", "", inspect.getdoc(inspect.getmodule(item.run)) or "", "", "## Example", "", EXAMPLE]
    lines += ["", f"{report.rewritten} rewritten; {report.nodes_before} nodes before, {report.nodes_after} after."]
    if item is PIPELINE[0]:
        lines += ["", "The graph before:", "", *_block(before)]
    changes = graph.diffs[item.name]
    lines += ["", "What it changed (`-` gone, `+` new, `~` different):", "", *_block(changes)]
    if kept := report.kept:
        lines += ["", "What it left, and why:", "", *_block("\n".join(kept))]
    return "\n".join(lines) + "\n"


def _block(text: str) -> list[str]:
    lines = text.splitlines()
    more = [f"... and {len(lines) - LINES} lines more"] if len(lines) > LINES else []
    return ["```text", *lines[:LINES], *more, "```"]


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
