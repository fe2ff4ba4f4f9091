"""Canonical text of a graph, one line a node, for people, tests and diffs.

    L02_mlp_slice : [B, system_text, 64] = token_slice(L01_mlp_out, gather_system_text_in_all)

Sizes are B (batch), T (all tokens), P (packed visual tokens) or numbers; where a node holds the tokens of one set, the
set's name stands for T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dop_compile.tokens import TokenSet
from dop_compile.tracing.proxies import BATCH, PACKED, TOKENS

__all__ = ["diff_dumps", "dump"]


def dump(graph: fx.Graph) -> str:
    """The graph's canonical text."""
    return "\n".join(_line(node) for node in graph.nodes)


def diff_dumps(before: str, after: str) -> str:
    """Lines that went (-), came (+) or changed (~) from one dump to another; "unchanged" if none did."""
    old, new = _by_name(before), _by_name(after)
    lines = [f"- {line}" for name, line in old.items() if name not in new]
    for name, line in new.items():
        if name not in old:
            lines.append(f"+ {line}")
        elif old[name] != line:
            lines.append(f"~ {line}")
    return "\n".join(lines) or "unchanged"


def _by_name(text: str) -> dict[str, str]:
    return {line.partition(" ")[0]: line for line in text.splitlines()}


def _line(node: fx.Node) -> str:
    shape = _shape(node)
    if node.op == "placeholder":
        return f"{node.name} : {shape + ' = ' if shape else ''}input"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    arguments = [_argument(a) for a in node.args] + [f"{key}={_argument(a)}" for key, a in node.kwargs.items()]
    return f"{node.name} : {shape + ' = ' if shape else ''}{target}({', '.join(arguments)})"


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, tuple) and value:
        value = value[0]
    if not isinstance(value, Tensor):
        return ""
    tokens: TokenSet | None = node.meta.get("tokens")
    sizes = [_size(size, "T" if tokens is None or tokens.is_all else str(tokens)) for size in value.shape]
    return f"[{', '.join(sizes)}]"


def _size(size: int, tokens: str) -> str:
    factors = []
    for example, symbol in ((BATCH, "B"), (TOKENS, tokens), (PACKED, "P")):
        while size > 1 and size % example == 0:
            size //= example
            factors.append(symbol)
    if size != 1 or not factors:
        factors.append(str(size))
    return "*".join(factors)


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_argument(item) for item in value) + ")"
    if isinstance(value, slice):
        parts = (value.start, value.stop) if value.step is None else (value.start, value.stop, value.step)
        return ":".join("" if part is None else _argument(part) for part in parts)
    if isinstance(value, bool | int | float | str | None | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, TokenSet):
        return str(value)
    if value is Ellipsis:
        return "..."
    return getattr(value, "__name__", type(value).__name__)
