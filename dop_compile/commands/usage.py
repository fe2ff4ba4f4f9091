"""Wrong usage: an error of one line that says what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UsageError", "one_line", "usage_errors"]


class UsageError(Exception):
    """The command was given something wrong; the message says what, in one line."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def usage_errors() -> Iterator[None]:
    """Wrong input, whoever finds it, ends the command with one line and exit code 2."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(one_line(error)) from error
