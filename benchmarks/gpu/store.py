"""One JSON and one Markdown file for all parts, written again after every figure, so that a cut-off run keeps them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import environment

__all__ = ["Store"]

COLUMNS = {
    "eq11": ("eq. 11 FLOPs", "{:.1%}"),
    "ms": ("ms", "{:.2f}"),
    "ratio": ("of the original", "{:.3f}"),
    "per_request_ms": ("ms per request", "{:.2f}"),
    "host_ms": ("host ms", "{:.2f}"),
    "device_ms": ("CUDA events ms", "{:.2f}"),
    "kernel_ms": ("in kernels ms", "{:.2f}"),
    "launches": ("kernels", "{}"),
    "copies": ("copies", "{}"),
    "syncs": ("host waits", "{}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
    "first_s": ("first call s", "{:.1f}"),
    "attention": ("attention kernels", "{}"),
    "slower": ("", "{}"),
    "error": ("not measured", "{}"),
}


def card(device: torch.device) -> str:
    """The device's name as part of a file's name: "h100-80gb-hbm3"."""
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device).lower().replace("nvidia", "")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


class Store:
    """The results of one run, of which every process adds a part.

    Args:
        folder: holds `gpu-CARD.json` and `.md`.
        device: names the card.
        command: what repeats the run.
    """

    def __init__(self, folder: Path, device: torch.device, command: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._json = folder / f"gpu-{card(device)}.json"
        known = json.loads(self._json.read_text()) if self._json.exists() else {"parts": {}}
        self._document: dict[str, Any] = {**_around(device, command), "parts": known["parts"]}

    def add(self, part: str, title: str, rows: Sequence[Mapping[str, Any]], **notes: Any) -> None:
        """Set a table of a part: rows with a `name` and figures of `COLUMNS`; notes are written below it."""
        self._document["parts"].setdefault(part, {})[title] = {"rows": list(rows), **notes}
        self._write()

    def note(self, part: str, **notes: Any) -> None:
        """Set what a part says beside its tables, such as how it ended."""
        self._document["parts"].setdefault(part, {}).setdefault("notes", {}).update(notes)
        self._write()

    def _write(self) -> None:
        for path, text in ((self._json, json.dumps(self._document, indent=1)), (self._markdown, self.markdown())):
            unfinished = path.with_suffix(path.suffix + ".new")
            unfinished.write_text(text + "\n")
            os.replace(unfinished, path)

    @property
    def _markdown(self) -> Path:
        return self._json.with_suffix(".md")

    def markdown(self) -> str:
        lines = ["; ".join(f"{name}: {value}" for name, value in self._document.items() if name != "parts")]
        for part, tables in self._document["parts"].items():
            lines += ["", f"## {part}"]
            for title, table in tables.items():
                if title == "notes":
                    lines += ["", *(f"- {name}: {_plain(value)}" for name, value in table.items())]
                    continue
                lines += ["", f"### {title}", "", *_table(table["rows"])]
                notes = {name: value for name, value in table.items() if name != "rows"}
                lines += ["", *(f"- {name}: {_plain(value)}" for name, value in notes.items())] if notes else []
        return "\n".join(lines)


def _around(device: torch.device, command: str) -> dict[str, Any]:
    around = {**environment(device), "command": command}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        around |= {"memory_gib": round(found.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return around


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    used = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = ["| | " + " | ".join(COLUMNS[name][0] for name in used) + " |", "| --- |" + " --- |" * len(used)]
    for row in rows:
        cells = (_cell(row, name) for name in used)
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return lines


def _cell(row: Mapping[str, Any], name: str) -> str:
    if row.get(name) is None:
        return ""
    value = row[name]
    text = COLUMNS[name][1].format(_plain(value) if isinstance(value, list) else value).replace("|", "/")
    if name == "ratio" and "quartiles" in row:
        low, high = row["quartiles"]
        text += f" ({low:.3f}-{high:.3f})"
    return text
