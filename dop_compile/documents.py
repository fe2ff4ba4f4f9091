"""JSON documents: strict text, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from pathlib import Path
from typing import NoReturn

__all__ = ["named", "parse", "write_atomic"]


def write_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file at `path` by `text` in one step; a failure leaves the previous file, and no other.

    Raises:
        OSError: naming `path`, not the file that is written beside it.
    """
    # Resolved so that a symbolic link keeps pointing at the file, rather than being replaced by one.
    target = Path(path).resolve()
    # Not tempfile: its 0600 would override the user's umask for the final file.
    scratch = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with scratch.open("x", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, target)
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a folder that is no folder, or read-only
            scratch.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise named(error, path) from error
        raise


def named(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The same error of the file or folder that the caller named."""
    return OSError(error.errno or errno.EIO, error.strerror or str(error), os.fspath(path))


def parse(text: str) -> object:
    """JSON text in which no field is given twice and every number is finite; ValueError for anything else."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error


def _unique(items: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in items]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(repeated)}: the field is given twice")
    return dict(items)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, got {name}; JSON has no such number")
