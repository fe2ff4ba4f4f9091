"""Where commands write: found out at the start, by a probe that leaves nothing behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from dop_compile.commands.outputs import check_new, output_directory, output_file
from dop_compile.commands.usage import UsageError


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    assert output_directory(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert output_file(str(tmp_path / "a" / "c.json")) == tmp_path / "a" / "c.json"
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for ask in (output_directory, output_file):
        with pytest.raises(UsageError, match=r"^--out '.*/file/x': cannot write there: Not a directory$"):
            ask(str(tmp_path / "file" / "x"))
    with pytest.raises(UsageError, match=r"^--plot '.*': is a directory; name a file$"):
        output_file(str(tmp_path), "--plot")
    with pytest.raises(UsageError, match=r"^--out '/dev/null': is not a file that can be replaced"):
        output_file("/dev/null")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=rf"^--out '{tmp_path}/new': cannot write there: {os.strerror(code)}$"):
        output_directory(str(tmp_path / "new"))
    assert not list(tmp_path.iterdir())


def test_the_target_of_a_link_is_what_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link.json").symlink_to(tmp_path / "file" / "real.json")
    with pytest.raises(UsageError, match="Not a directory"):
        output_file(str(tmp_path / "link.json"))


def test_files_that_are_there_are_named(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    check_new(paths, False)
    for path in paths[1:]:
        path.write_text("x")
    check_new(paths, True)
    with pytest.raises(UsageError, match=r"b, c: there already; .* replace them with --force"):
        check_new(paths, False)
