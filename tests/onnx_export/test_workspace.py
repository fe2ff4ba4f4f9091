"""A directory appears complete or not at all."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dop_compile.onnx.contract import workspace
from dop_compile.onnx.contract.workspace import new_directory


def write(target: Path, fail: Callable[[], object] = lambda: None, *, force: bool = False, needed: int = 0) -> None:
    """A directory with one file, "new"; `fail` is called before it is complete."""
    with new_directory(target, force=force, mark="*/ours", needed_bytes=needed) as folder:
        (folder / "new").write_text("new")
        fail()


def interrupt(error: BaseException) -> Callable[[], object]:
    def fail() -> None:
        raise error

    return fail


def fill_disk() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"1")


def test_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_directory(target, force=False, mark="ours") as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "a").read_text() == "1"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_interrupted_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write(tmp_path / "out", interrupt(error()))
    assert list(tmp_path.iterdir()) == []


def test_terminated_leaves_nothing(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        write(tmp_path / "out", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def earlier(folder: Path) -> Path:
    """A directory that was written by us."""
    target = folder / "out"
    (target / "old").mkdir(parents=True)
    (target / "old" / "ours").write_text("old")
    return target


def test_existing_is_replaced_only_with_force(tmp_path: Path) -> None:
    target = earlier(tmp_path)
    with pytest.raises(FileExistsError, match="--force"):
        write(target)
    with pytest.raises(ValueError, match="failed"):
        write(target, interrupt(ValueError("failed")), force=True)
    assert [path.name for path in target.iterdir()] == ["old"]
    write(target, force=True)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / ".git").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"no earlier export \(there is no \*/ours\)"):
        write(target, force=True)
    (target / ".git").rmdir()
    write(target, force=True)
    assert (target / "new").exists()


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(FileExistsError, match="a file is there"):
        write(tmp_path / "out", force=True)


def test_disk_too_small_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no space left to write the export .* are needed") as caught:
        write(tmp_path / "out", needed=1 << 60)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no space left to write the export .*another disk"):
        write(tmp_path / "out", fill_disk)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt("broken")])
def test_failed_rename_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = earlier(tmp_path)
    rename = os.replace

    def failing(source: Path, destination: Path) -> None:
        if Path(source).name.endswith(".partial"):
            raise error
        rename(source, destination)

    monkeypatch.setattr(workspace.os, "replace", failing)
    with pytest.raises(type(error), match="broken"):
        write(target, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "old" / "ours").read_text() == "old"
