"""Finished samples on disk: whatever moment the last write was cut off at, what was finished is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dop_compile.search.progress import Progress

HEADER: dict[str, Any] = {"fingerprint": "abc", "samples": 9, "points": {"mha_depth": [3, 0]}, "metric": ["kl"]}
ROWS = [{"digest": f"{number:02x}", "values": {"mha_depth": [0.1 / (number + 1), 1e-300]}} for number in range(4)]


def numbered(*numbers: int) -> dict[int, dict[str, Any]]:
    return {number: {"number": number, **ROWS[number]} for number in numbers}


def filled(path: Path | None, *numbers: int, rank: int = 0) -> Progress:
    progress = Progress(path, HEADER, rank)
    for number in numbers:
        progress.add(number, ROWS[number])
    return progress


def test_rows_are_there_again_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    assert filled(path, 2, 0).rows == numbered(2, 0)
    assert Progress(path, HEADER).rows == numbered(2, 0)
    assert not path.exists()


@pytest.mark.parametrize("mark", ["\u2028", "\u0085"])
def test_only_line_feeds_end_a_line(tmp_path: Path, mark: str) -> None:
    path, row = tmp_path / "d.json", {"number": 0, "answer": f"a{mark}b"}
    lines = [json.dumps(value, ensure_ascii=False) + "\n" for value in (HEADER, row)]
    (tmp_path / "d.json.progress-0").write_text("".join(lines), encoding="utf-8")
    assert Progress(path, HEADER, writes=False).rows == {0: row}


def test_without_a_path_rows_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    progress = filled(None, 1)
    progress.remove()
    assert progress.rows == numbered(1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_off_anywhere_gives_the_whole_lines_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # for speed
    path = tmp_path / "d.json"
    filled(path, 0, 1)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content) + 1):
        file.write_bytes(content[:length])
        kept = numbered(*range(max(sum(end <= length for end in ends) - 1, 0)))
        progress = Progress(path, HEADER)
        assert progress.rows == kept
        progress.add(3, ROWS[3])
        assert Progress(path, HEADER).rows == kept | numbered(3)


def test_each_row_is_on_disk_when_add_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "d.json", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    progress = Progress(path, HEADER)
    for number in range(3):
        progress.add(number, ROWS[number])
        assert synced[-1] == (tmp_path / "d.json.progress-0").stat().st_size
    assert len(synced) == 3


def test_all_processes_rows_are_read_by_any_number_of_processes(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    first, second = Progress(path, HEADER, 0), Progress(path, HEADER, 1)
    first.add(0, ROWS[0])
    second.add(1, ROWS[1])
    assert Progress(path, HEADER, 0).rows == Progress(path, HEADER, 7).rows == numbered(0, 1)
    filled(path, 2)
    assert Progress(path, HEADER, 1).rows == numbered(0, 1, 2)


def test_only_the_own_files_are_read_and_removed(tmp_path: Path) -> None:
    for name in ("d.json", "d[1].json", "*.json", "sub/d.json"):
        filled(tmp_path / name, 1)
    path = tmp_path / "d[1].json"
    assert Progress(path, HEADER).rows == numbered(1)
    filled(path, 2, rank=1).remove()
    assert Progress(path, HEADER).rows == {}
    Progress(tmp_path / "*.json", HEADER).remove()
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"d.json.progress-0", "sub"}
    assert Progress(tmp_path / "sub/d.json", HEADER).rows == numbered(1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "abd"}, r"fingerprint differ"),
        ({"samples": 8, "metric": ["top_k_kl"]}, r"metric, samples differ"),
        ({"points": {"mha_depth": [3]}}, "points differ"),
        ({"seed": 0}, "seed differ"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_rows_of_another_measurement_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], named: str, rank: int
) -> None:
    path = tmp_path / "d.json"
    filled(path, 1)
    before = (tmp_path / "d.json.progress-0").read_bytes()
    with pytest.raises(ValueError, match=rf"d\.json\.progress-0 belongs to another measurement \({named}\)"):
        Progress(path, HEADER | change, rank)
    assert (tmp_path / "d.json.progress-0").read_bytes() == before


@pytest.mark.parametrize("line", [b"{", b"[1]", b"3", b"{}", b"\xff\xfe", b'{"number": "x"}'])
def test_a_damaged_line_is_no_reason_to_measure_again_unasked(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "d.json"
    filled(path, 0)
    with (tmp_path / "d.json.progress-0").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ValueError, match=r"d\.json\.progress-0: damaged \(.*remove it"):
        Progress(path, HEADER)
