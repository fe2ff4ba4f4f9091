"""An answer's text while it grows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dop_compile.serving.live.rows import Row

PIECES = ["Hel", "lo", " wor", "ld", "", "!"]
END = 5


def decode(ids: Sequence[int]) -> str:
    return "".join(PIECES[id] for id in ids if id != END)


def texts(ids: Sequence[int], stops: tuple[str, ...] = (), limit: int = 100) -> tuple[list[str], str | None]:
    row = Row(7, limit, stops, {END}, decode)
    events = [row.add(id) for id in ids if row.is_open]
    assert all(event.finish is None for event in events[:-1])
    assert {event.id for event in events} == {7}
    return [event.text for event in events], events[-1].finish


def test_pieces_come_as_they_are_made() -> None:
    assert texts([0, 1, 2]) == (["Hel", "lo", " wor"], None)
    assert texts([0, 1, END]) == (["Hel", "lo", ""], "stop")
    assert texts([0, 1, 2, 3], limit=2) == (["Hel", "lo"], "length")


@pytest.mark.parametrize(
    ("stop", "shown"),
    [("lo", ["He", "l"]), ("o w", ["Hel", "l", ""]), ("world", ["Hel", "lo", " ", ""]), (" ", ["Hel", "lo", ""])],
)
def test_nothing_of_a_stop_string_is_shown(stop: str, shown: list[str]) -> None:
    found, finish = texts([0, 1, 2, 3, END], (stop,))
    assert finish == "stop"
    assert "".join(found) == "Hello world".partition(stop)[0]
    assert found == shown


def test_what_could_have_been_a_stop_string_is_shown_at_the_end() -> None:
    found, finish = texts([0, 1, 2, END], ("worse",))
    assert ("".join(found), finish) == ("Hello wor", "stop")
    assert found == ["Hel", "lo", " ", "wor"]


def test_the_first_of_several_stop_strings_counts() -> None:
    found, _ = texts([0, 1, 2, 3], ("ld", "o", "wor"))
    assert "".join(found) == "Hell"


def test_half_a_character_waits_for_its_other_half() -> None:
    encoded = "é€".encode()

    def halves(ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    row = Row(1, 100, (), set(), halves)
    assert [row.add(byte).text for byte in encoded] == ["", "é", "", "", "€"]
