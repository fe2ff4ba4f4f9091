"""What the demo found out, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from dop_compile.drop_in.warmup import Warmup
from dop_compile.policy.policy import Policy
from dop_compile.reports.explain import TierCost
from dop_compile.reports.table import EXECUTED_FLOPS, POLICY_FLOPS, columns, show_bytes, show_flops, show_percent

__all__ = ["Answered", "DemoResult", "Question", "TierResult", "shorten"]

LONGEST_ANSWER = 16
"""Characters of an answer that the tables show; those of the trained models are shorter."""


@dataclass(frozen=True)
class Question:
    """A question about the picture; `answer` is None where nobody knows it (a picture of the user's own)."""

    kind: str
    text: str
    answer: str | None


@dataclass(frozen=True)
class Answered:
    """What one model says to each question, and the median milliseconds of its prefill, per batch that was timed."""

    name: str
    answers: tuple[str, ...]
    milliseconds: tuple[float, ...]


@dataclass(frozen=True)
class TierResult:
    """One tier of the compiled model; `cost` is that of the first question."""

    policy: Policy
    cost: TierCost
    answered: Answered


@dataclass(frozen=True)
class DemoResult:
    """The original and every tier on one picture; `print` it for the tables.

    Args:
        title: the model and its size, and what it runs on.
        image: the picture, as the models see it.
        questions: what was asked.
        system, visual, text: tokens of the first question's prompt, before reduction. Costs and times are for it.
        batches: how many copies of the first question's prompt were timed at once.
        warmed: the first calls of the compiled model, which were made before.
        original: the answers and the times of the untouched model.
        tiers: the same of the compiled model, the 100 % tier first.
        exact: whether the 100 % tier was found to give the original's logits bit for bit, else to rounding.
    """

    title: str
    image: Image.Image
    questions: tuple[Question, ...]
    system: int
    visual: int
    text: int
    batches: tuple[int, ...]
    warmed: Warmup
    original: Answered
    tiers: tuple[TierResult, ...]
    exact: bool

    @property
    def models(self) -> tuple[Answered, ...]:
        """The original, then the tiers."""
        return (self.original, *(tier.answered for tier in self.tiers))

    def right(self, answers: Sequence[str]) -> tuple[bool | None, ...]:
        """Per question, whether every word of an answer is right; None where the answer is not known."""
        return tuple(
            None if question.answer is None else answer == question.answer
            for question, answer in zip(self.questions, answers, strict=True)
        )

    def __str__(self) -> str:
        full = self.tiers[0].cost.tier
        parts = [
            [self.title],
            _answers(self),
            [
                f"The first question, of {self.system} system + {self.visual} visual + {self.text} text tokens, in the "
                "decoder:",
                "",
                *_costs(self),
            ],
            [_warmed(self.warmed)],
            [f"The {full} tier gives the original's logits{' bit for bit' if self.exact else ''} and its tokens."],
        ]
        return "\n\n".join("\n".join(lines) for lines in parts)


def _warmed(warmed: Warmup) -> str:
    """What was done before anything was timed."""
    tiers = ", ".join(dict.fromkeys(call.tier for call in warmed.calls))
    batches = " and ".join(map(str, dict.fromkeys(call.batch_size for call in warmed.calls)))
    return (
        f"Warmed first, in {warmed.seconds:.1f} s: {tiers} at batch {batches}; "
        f"{warmed.compilations or 'no'} graph{'' if warmed.compilations == 1 else 's'} compiled."
    )


def shorten(answer: str) -> str:
    """An answer as the tables show it."""
    return answer if len(answer) <= LONGEST_ANSWER else answer[: LONGEST_ANSWER - 3] + "..."


def _answers(result: DemoResult) -> list[str]:
    rows = [["question", "expected", *(model.name for model in result.models)]]
    marks = {True: " ok", False: " wrong", None: ""}
    judged = [result.right(model.answers) for model in result.models]
    for number, question in enumerate(result.questions):
        said = [
            shorten(model.answers[number]) + marks[right[number]]
            for model, right in zip(result.models, judged, strict=True)
        ]
        rows.append([question.text, "?" if question.answer is None else question.answer, *said])
    if None not in judged[0]:
        rows.append(["right answers", "", *(f"{sum(map(bool, right))} of {len(right)}" for right in judged)])
    return columns(rows, left=range(len(rows[0])))


def _costs(result: DemoResult) -> list[str]:
    timed = [name for count in result.batches for name in (f"prefill, batch {count}", "of original")]
    rows = [["tier", POLICY_FLOPS, EXECUTED_FLOPS, "KV cache", *timed]]
    first, whole = result.tiers[0].cost, result.original.milliseconds
    flops = show_flops(first.original_flops)
    took = [cell for time in whole for cell in (f"{time:.1f} ms", "")]
    rows.append(["original", flops, flops, show_bytes(first.original_kv_bytes), *took])
    for tier in result.tiers:
        cost = tier.cost
        share = [show_percent(cost.eq11_ratio), show_percent(cost.executed_ratio), show_bytes(cost.kv_bytes)]
        times = zip(tier.answered.milliseconds, whole, strict=True)
        took = [cell for time, base in times for cell in (f"{time:.1f} ms", show_percent(time / base))]
        rows.append([cost.tier, *share, *took])
    return columns(rows)
