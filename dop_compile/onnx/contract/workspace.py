"""A new directory that appears under its name only once it is complete."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["check_target", "new_directory"]


@contextmanager
def new_directory(target: str | os.PathLike[str], *, force: bool, mark: str, needed_bytes: int = 0) -> Iterator[Path]:
    """A scratch directory beside `target`, renamed to it at the end and removed if anything fails.

    Args:
        force: whether to replace a directory that is there.
        mark: pattern of a file in every directory that may be replaced.
        needed_bytes: at least so much will be written.

    Raises:
        FileExistsError: `target` exists, and not `force`; or it is a file, or holds something else.
        OSError: the disk is full or cannot be written; the message names the directory.
    """
    path = Path(target)
    check_target(path, force=force, mark=mark)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < needed_bytes:
            raise OSError(errno.ENOSPC, f"about {_mb(needed_bytes)} are needed, {_mb(free)} are free")
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        scratch.mkdir()
    except OSError as error:
        raise _named(error, path) from error
    with _terminated():
        try:
            yield scratch
            _replace(scratch, path)
        except OSError as error:
            raise _named(error, path) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def check_target(target: str | os.PathLike[str], *, force: bool, mark: str) -> None:
    """Raises FileExistsError where `new_directory` would."""
    path = Path(target)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: a file is there; name another directory")
    if path.exists() and not force:
        raise FileExistsError(f"{path}: exists; name another directory, or replace it with --force (force=True)")
    if path.exists() and any(path.iterdir()) and not any(path.glob(mark)):
        raise FileExistsError(
            f"{path}: is not replaced, since it is no earlier export (there is no {mark}); remove it, or name another"
        )


def _replace(scratch: Path, path: Path) -> None:
    if not path.exists():
        os.replace(scratch, path)
        return
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    os.replace(path, old)
    try:
        os.replace(scratch, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _named(error: OSError, path: Path) -> OSError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason = f"no space left to write the export ({reason}); free some, or name a directory on another disk"
    return type(error)(error.errno or errno.EIO, reason, str(path))


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
