"""Finished samples on disk: append-only, one JSON line each, so that a kill at any moment loses at most one sample.

Each process writes a file of its own beside the result; all of them are read when a measurement goes on, whatever the
number of processes then is.
"""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

from dop_compile.documents import write_atomic

__all__ = ["Progress", "check_header", "check_sample"]


def check_header(file: Path, header: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises ValueError where a file's header is that of another measurement; the message names what differs."""
    header, expected = json.loads(json.dumps(header)), json.loads(json.dumps(expected))
    different = sorted(name for name in {*header, *expected} if header.get(name) != expected.get(name))
    if different:
        raise ValueError(
            f"{file} belongs to another measurement ({', '.join(different)} differ); go on with the settings it was "
            "begun with, choose another file, or remove it"
        )


def check_sample(number: int, digest: str, measured: str) -> None:
    """Raises ValueError where a sample's digest is not that of the one that was measured under its number."""
    if digest != measured:
        raise ValueError(
            f"sample {number} is not the one that was measured before; go on with the same samples, or choose another "
            "file"
        )


class Progress:
    """Rows by number, kept beside `path`; without a path in memory alone.

    Args:
        path: where the result will be.
        header: what the rows belong to, as JSON values; rows of anything else are refused.
        rank: this process's number.
        writes: whether new rows are kept on disk; if not, files are read only.

    Raises:
        ValueError: rows of another measurement are there.
    """

    def __init__(self, path: Path | None, header: dict[str, Any], rank: int = 0, *, writes: bool = True):
        self._own = None if path is None or not writes else path.with_name(f"{path.name}.progress-{rank}")
        self._header = json.loads(json.dumps(header))
        self._path = path
        self.rows: dict[int, dict[str, Any]] = {}
        for file in self._files():
            self.rows |= self._read(file)
        if self._own is not None and self._own.exists():
            # Without the line that a kill cut off
            own = self._read(self._own)
            write_atomic(self._own, "\n".join(map(json.dumps, (self._header, *own.values()))))

    def _files(self) -> list[Path]:
        if self._path is None:
            return []
        return sorted(self._path.parent.glob(f"{glob.escape(self._path.name)}.progress-*"))

    def _read(self, file: Path) -> dict[int, dict[str, Any]]:
        # What follows the last end of a line was cut off. Not splitlines(), as in `samples.read_jsonl`
        *whole, _ = file.read_text(encoding="utf-8", errors="replace").split("\n")
        if not whole:
            return {}
        try:
            header, *rows = (dict(json.loads(line)) for line in whole)
            numbered = {int(row["number"]): row for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: damaged ({error}); remove it to measure its samples again") from error
        check_header(file, header, self._header)
        return numbered

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Keep a finished row; it is on disk when this returns."""
        row = {"number": number, **row}
        self.rows[number] = row
        if self._own is None:
            return
        self._own.parent.mkdir(parents=True, exist_ok=True)
        lines = [row] if self._own.exists() else [self._header, row]
        with self._own.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Forget the files of all processes, once the result is saved."""
        for file in self._files():
            file.unlink()
