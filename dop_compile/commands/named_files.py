"""Files that options name as `[NAME=]FILE`, and what is read from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from dop_compile.commands.usage import UsageError, one_line

__all__ = ["named_files", "read_file"]

Read = TypeVar("Read")


def named_files(option: str, given: Iterable[str], load: Callable[[str], Read]) -> Iterator[tuple[str, Read]]:
    """Of `[NAME=]FILE`, the name (the file's unless given) and what is read from the file.

    Raises:
        UsageError: two of the same name, or a file that cannot be read.
    """
    names = set()
    for text in given:
        name, separator, file = text.partition("=")
        if not separator or Path(text).exists():
            name, file = Path(text).stem, text
        if name in names:
            raise UsageError(f"{option}: the name {name!r} is given twice; name files apart with NAME=FILE")
        names.add(name)
        yield name, read_file(option, file, load)


def read_file(option: str, file: str, load: Callable[[str], Read]) -> Read:
    """What a function reads from a file; UsageError where it cannot."""
    try:
        return load(str(Path(file).expanduser()))
    except OSError as error:
        raise UsageError(f"{option} {file!r}: {error.strerror or one_line(error)}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{option} {file!r}: {one_line(error)}") from error
