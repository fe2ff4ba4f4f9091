"""The engine over a compiled model answers as `compiled.generate` does."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from PIL import Image

from dop_compile import Policy, dop_compile
from dop_compile.errors import UnsupportedUsageError
from dop_compile.serving.live import budget as budgets
from dop_compile.serving.live.budget import Line
from dop_compile.serving.live.engine import LiveEngine
from dop_compile.serving.live.group import Group
from dop_compile.serving.requests import Event, RequestError
from tests.local_llava import local_llava, local_processor
from tests.serving.live.digits import KEPT, LAYERS, QUESTIONS, compiled, engine, generated, question, run


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_mixed_requests_are_answered_as_alone(name: str) -> None:
    requests = [
        question(number, text, tier=tier, max_new_tokens=limit)
        for number, (text, tier, limit) in enumerate(itertools.product(QUESTIONS, ("100%", "34%"), (8, 2)))
    ]
    found = run(engine(name), requests)
    assert found == [generated(name, request) for request in requests]
    assert {finish for _, finish, _ in found} == {"stop", "length"}
    assert len({text for text, _, _ in found}) > 4


def test_draws_with_a_seed_are_generates_whatever_runs_beside_them() -> None:
    hot = {"temperature": 2.0, "max_new_tokens": 6}
    requests = [question(0, seed=seed, **hot) for seed in range(4)]
    requests += [question(1, seed=1, top_k=3, top_p=0.8, **hot), question(2, **hot)]
    before = torch.get_rng_state()
    found = run(engine(), requests)
    assert torch.equal(torch.get_rng_state(), before)
    expected = [generated("llava", request)[0] for request in requests[:5]]
    assert [text for text, _, _ in found[:5]] == expected
    assert len(set(expected)) > 2


def test_stop_strings_end_one_row_and_not_the_others() -> None:
    requests = [question(0), question(0, stop=("5",)), question(0, stop=(" ", "6"))]
    whole = generated("llava", requests[0])[0]
    assert whole == "7 5 6"
    assert [text for text, _, _ in run(engine(), requests)] == [whole, "7 ", "7"]


def test_requests_of_one_kind_are_one_batch_and_batches_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    begin = Group.__init__

    def noted(self: Group, model: Any, inputs: Any, settings: Any, rows: Any, draws: Any) -> None:
        sizes.append(len(rows))
        begin(self, model, inputs, settings, rows, draws)

    monkeypatch.setattr(Group, "__init__", noted)
    served = engine()
    for number, tier in enumerate(("100%", "34%", "100%", "34%", "100%")):
        served.admit(served.prepare(question(number, tier=tier)))
    order = [sorted({event.id for event in served.step()}) for _ in range(4)]
    assert order == [[1, 3, 5], [2, 4], [1, 3, 5], [2, 4]]
    assert sizes == [3, 2]
    served.close()


def test_a_cancelled_row_leaves_its_batch() -> None:
    served = engine()
    ids = [served.admit(served.prepare(question(number))) for number in range(3)]
    served.step()
    served.cancel(ids[1])
    assert served.running == 2
    events: list[Event] = []
    while served.running:
        events += served.step()
    assert {event.id for event in events} == {ids[0], ids[2]}
    waiting = served.admit(served.prepare(question(0)))
    served.cancel(waiting)
    assert (served.running, served.step()) == (0, [])


def test_nothing_is_left_of_what_was_cancelled_or_closed() -> None:
    before = threading.active_count()
    served = engine()
    first, second = (served.admit(served.prepare(question(0, tier=tier))) for tier in ("100%", "34%"))
    served.step()
    served.step()
    assert threading.active_count() == before + 2
    served.cancel(first)
    assert threading.active_count() == before + 1
    served.close()
    assert threading.active_count() == before
    served.cancel(second)


def test_a_model_that_takes_no_padding_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = compiled("llava")
    generate = model.generate

    def unpadded(**arguments: Any) -> Any:
        if not bool(arguments["attention_mask"].all()):
            raise UnsupportedUsageError("no padding")
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", unpadded)
    requests = [question(number, QUESTIONS[number % 2]) for number in range(4)]
    assert [text for text, _, _ in run(engine(), requests)] == [generated("llava", one)[0] for one in requests]


def test_a_failure_is_the_steps_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = compiled("llava")
    served = engine()

    def fails(**_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(model, "generate", fails)
        served.admit(served.prepare(question(0)))
        with pytest.raises(RuntimeError, match="out of memory"):
            served.step()
    assert served.running == 0
    assert run(served, [question(0)])[0][0] == "7 5 6"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_patches_are_those_that_the_policy_keeps(name: str) -> None:
    served = engine(name)
    full = served.patches(served.prepare(question(0, tier="100%")))
    rows, columns = full.grids[0]
    # The last layer's keys are needed for the answer, too
    assert full.read == (tuple(range(rows * columns)),) * LAYERS
    pruned = served.patches(served.prepare(question(0, tier="34%")))
    kept = pruned.read[0]
    assert len(kept) == len(set(kept)) == KEPT[name]
    assert pruned.read == (kept,) * 6 + ((),) * 2
    assert pruned.grids == full.grids


def test_text_has_no_patches() -> None:
    served = engine()
    request = question(0)
    object.__setattr__(request, "messages", [{"role": "user", "content": "Hello."}])
    with pytest.raises(RequestError, match="no picture"):
        served.patches(served.prepare(request))


def test_what_a_client_does_wrong_is_said() -> None:
    served = engine()
    with pytest.raises(RequestError, match="'<image>', which stands for a picture"):
        served.prepare(question(0, "What is in <image>?"))
    with pytest.raises(RequestError, match="157 tokens and 1000 new ones are more than the model's context of 1024"):
        served.prepare(question(0, max_new_tokens=1000))
    with pytest.raises(RequestError, match=r"tier '50%': expected one of 100%, 34%"):
        served.prepare(question(0, tier="50%"))
    with pytest.raises(RequestError, match="latencies were not measured"):
        served.prepare(question(0, max_ms=10.0))


def test_a_budget_chooses_the_largest_tier_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "RUNS", 1)
    served = engine(measure=True)
    budget = served._budget
    assert budget is not None
    assert all(ms > 0 for line in budget.lines.values() for _, ms in line.points)
    for pictures in (False, True):
        budget.lines["100%", pictures] = Line(((10, 50.0), (110, 100.0)))
        budget.lines["34%", pictures] = Line(((10, 20.0), (110, 40.0)))
    assert served.prepare(question(0, max_ms=1000.0)).tier == "100%"
    assert served.prepare(question(0, max_ms=123.0)).tier == "34%"  # 157 tokens: 123.5 and 49.4 ms
    assert served.prepare(question(0, max_ms=123.6)).tier == "100%"
    with pytest.raises(RequestError, match=r"the fastest, '34%', takes about 49\.4 ms"):
        served.prepare(question(0, max_ms=49.3))


def test_a_processor_without_a_template_takes_one_question() -> None:
    model = local_llava(layers=2, hidden=32, image_size=56)
    served = LiveEngine(dop_compile(model, Policy.full(2), backend="eager"), local_processor(56), measure=False)
    picture = Image.new("RGB", (60, 60))
    asked = question(0)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is on the table?"}]
    object.__setattr__(asked, "messages", [{"role": "user", "content": content}])
    assert len(run(served, [asked, asked])) == 2
    object.__setattr__(asked, "messages", [{"role": "system", "content": "Be short."}])
    with pytest.raises(RequestError, match="no chat template"):
        served.prepare(asked)


def test_tokens_that_callers_choose_cannot_be_served() -> None:
    model, processor = compiled("llava")
    given = dop_compile(
        model.dop.original.model, Policy.depthwise(LAYERS, visual_tokens=9, reducer="given"), backend="eager"
    )
    with pytest.raises(ValueError, match="given with each call"):
        LiveEngine(given, processor)
