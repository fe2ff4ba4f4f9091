"""Where commands write: whether they can, and whether something is there already, is asked before anything is measured.

Nothing is left behind: folders are made when the first file is written.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from dop_compile.commands.usage import UsageError, one_line

__all__ = ["PLOT_DPI", "check_new", "output_directory", "output_file", "picture_file"]

PICTURES = (".svg", ".png", ".pdf")
PLOT_DPI = 120

PROBE = b"\0" * 65536
"""So much is written and removed again: an empty file fits onto a full disk."""


def output_directory(name: str, option: str = "--out") -> Path:
    """The path of a directory that files can be written into.

    Raises:
        UsageError: they cannot, for example because the disk is full; the message names option, path and reason.
    """
    path = Path(name).expanduser()
    _probe(path, path, option)
    return path


def output_file(name: str, option: str = "--out") -> Path:
    """The path of a file that can be written; errors as `output_directory`."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise UsageError(f"{option} {str(path)!r}: is a directory; name a file")
    if path.exists() and not path.is_file():  # a device would be replaced
        raise UsageError(f"{option} {str(path)!r}: is not a file that can be replaced; name another")
    _probe(path.resolve().parent, path, option)
    return path


def picture_file(option: str, name: str | None) -> Path | None:
    """The path of a picture that can be drawn here; None where none is asked for. Errors as `output_directory`."""
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.suffix not in PICTURES:
        raise UsageError(f"{option} {name!r}: expected a name that ends in {', '.join(PICTURES)}")
    if find_spec("matplotlib") is None:
        raise UsageError(f"{option}: matplotlib is not installed; pip install 'dop_compile[search]'")
    return output_file(name, option)


def check_new(paths: Iterable[Path], force: bool, option: str = "--out") -> None:
    """Raises UsageError where a file is there already, unless it may be replaced."""
    there = [path for path in paths if path.exists()]
    if there and not force:
        names = ", ".join(path.name for path in there)
        raise UsageError(
            f"{option} {str(there[0].parent)!r}: {names}: there already; name another place, or replace "
            f"{'it' if len(there) == 1 else 'them'} with --force"
        )


def _probe(folder: Path, path: Path, option: str) -> None:
    """Write into a folder, or into the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(f"{option} {str(path)!r}: cannot write there: {error.strerror or one_line(error)}") from error
