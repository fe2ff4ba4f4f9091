"""Requests that run as one batch through Hugging Face's `generate`, one token at a time.

`generate` runs on a thread of its own, and only while `advance` waits for it: its streamer hands over after every
token. So several batches take turns on one device, and no two of them compute at once.

Rows leave by a stopping criterion: at their own limit or stop string, or when they are cancelled. `generate` goes on
with the others, and ends with the last one. No row joins: what `generate` holds of a batch cannot be made longer.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from dop_compile.serving.live.draws import Draws
from dop_compile.serving.live.rows import Row
from dop_compile.serving.requests import Event

__all__ = ["Group"]


class _Abandoned(BaseException):
    """Ends `generate` of a batch that nobody wants any more."""


class Group:
    """A batch that runs.

    Args:
        model: a compiled model.
        inputs: of the batch, where the model is.
        settings: of `generate`.
        rows: one for each row of `inputs`.
        draws: what is drawn from.
    """

    def __init__(
        self, model: Any, inputs: Mapping[str, Any], settings: Mapping[str, Any], rows: Sequence[Row], draws: Draws
    ):
        self.rows = list(rows)
        self._draws = draws
        self._model, self._inputs = model, inputs
        self._settings = {
            **settings,
            "streamer": _Streamer(self._put),
            "stopping_criteria": StoppingCriteriaList([self._ended]),
            "max_new_tokens": max(row.limit for row in rows),
        }
        self._begin, self._handed_over = threading.Semaphore(0), threading.Semaphore(0)
        self._events: list[Event] = []
        self._error: BaseException | None = None
        self._abandoned = self._finished = False
        self._thread = threading.Thread(target=self._generate, name="dop_compile generate", daemon=True)
        self._thread.start()

    @property
    def has_begun(self) -> bool:
        """Whether any token has come."""
        return any(row.ids for row in self.rows)

    @property
    def is_open(self) -> bool:
        return not self._finished and any(row.is_open for row in self.rows)

    def advance(self) -> list[Event]:
        """The next token of every open row.

        Raises:
            Exception: what `generate` raised; nothing more comes.
        """
        with self._draws.used():
            self._turn()
        if self._error is not None:
            raise self._error
        events, self._events = self._events, []
        if not self.is_open:
            self.close()
        return events

    def close(self) -> None:
        """End, whatever is still open."""
        self._abandoned = True
        while not self._finished:
            self._turn()
        self._thread.join()

    def _turn(self) -> None:
        """Let the other thread work until it hands over."""
        if not self._finished:
            self._begin.release()
            self._handed_over.acquire()

    # --- the other thread -----------------------------------------------------------------------------------------

    def _generate(self) -> None:
        self._begin.acquire()
        try:
            if not self._abandoned:
                self._model.generate(**self._inputs, **self._settings)
        except _Abandoned:
            pass
        except BaseException as error:  # raised where the batch is waited for
            self._error = error
        finally:
            self._finished = True
            self._model = self._inputs = self._settings = None  # type: ignore[assignment]
            self._handed_over.release()

    def _put(self, tokens: Tensor) -> None:
        """(batch,) of every row; a row that has ended gets padding."""
        self._events = [row.add(token) for row, token in zip(self.rows, tokens.tolist(), strict=True) if row.is_open]
        self._handed_over.release()
        self._begin.acquire()
        if self._abandoned:
            raise _Abandoned

    def _ended(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(batch,) of rows that have ended; asked after each token."""
        return torch.tensor([not row.is_open for row in self.rows], device=input_ids.device)


class _Streamer:
    """What `generate` tells of its tokens: first the prompt's, then those of each step."""

    def __init__(self, put: Any):
        self._put = put
        self._prompt = True

    def put(self, tokens: Tensor) -> None:
        if self._prompt:
            self._prompt = False
        else:
            self._put(tokens)

    def end(self) -> None:
        pass
