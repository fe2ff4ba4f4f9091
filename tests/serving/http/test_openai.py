"""What OpenAI's own client sees."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

from tests.serving.served import NAME, Served, as_request, ask, data_url, picture, serving
from tests.serving.words import WordEngine, answer

TIER = f"{NAME}@28%"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(WordEngine()) as found:
        yield found


def test_an_answer_is_the_engines_with_usage_and_finish_reason(served: Served) -> None:
    text, finish, tokens = answer(as_request("Which colour is this?", picture()), "28%")
    messages = ask("Which colour is this?", data_url(picture()))
    found = served.openai().chat.completions.create(model=TIER, messages=messages)
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, finish)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (16 + 4, tokens)
    assert found.usage.total_tokens == 16 + 4 + tokens
    assert (found.object, found.model) == ("chat.completion", TIER)
    assert found.model_extra is not None
    assert found.model_extra["dop_compile"]["tier"] == "28%"
    assert 0 < found.model_extra["dop_compile"]["first_token_ms"] <= found.model_extra["dop_compile"]["total_ms"]


def test_pieces_of_a_stream_are_the_whole_answer(served: Served) -> None:
    text, finish, tokens = answer(as_request("Go on."), "100%")
    stream = served.openai().chat.completions.create(
        model=NAME, messages=ask("Go on."), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text
    assert sum(map(bool, pieces)) == tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, finish]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == tokens
    assert chunks[-1].choices == []


def test_a_stream_has_no_usage_unless_asked(served: Served) -> None:
    stream = served.openai().chat.completions.create(model=NAME, messages=ask("Go on."), stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in stream)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_length_ends_an_answer(served: Served, field: str) -> None:
    text, finish, _ = answer(as_request("Go on.", max_new_tokens=2), "100%")
    found = served.openai().chat.completions.create(model=NAME, messages=ask("Go on."), **{field: 2})
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (text, finish) == (text, "length")


def test_a_stop_string_ends_an_answer(served: Served) -> None:
    whole, _, _ = answer(as_request("Go on."), "100%")
    stop = whole[7:9]
    text, finish, tokens = answer(as_request("Go on.", stop=(stop,)), "100%")
    for given in (stop, [stop, "never said"]):
        found = served.openai().chat.completions.create(model=NAME, messages=ask("Go on."), stop=given)
        assert (found.choices[0].message.content, found.choices[0].finish_reason) == (text, finish) == (text, "stop")
        assert found.usage is not None
        assert found.usage.completion_tokens == tokens


def test_the_automatic_model_chooses_by_milliseconds(served: Served) -> None:
    client = served.openai()
    for milliseconds, tier in ((1000, "100%"), (20, "28%")):
        found = client.chat.completions.create(model=NAME, messages=ask("Go on."), extra_body={"max_ms": milliseconds})
        assert found.model == f"{NAME}@{tier}"
        assert found.choices[0].message.content == answer(as_request("Go on."), tier)[0]
    with pytest.raises(openai.BadRequestError, match="no tier fits"):
        client.chat.completions.create(model=NAME, messages=ask("Go on."), extra_body={"max_ms": 0.5})
    with pytest.raises(openai.BadRequestError, match="leave one of them out"):
        client.chat.completions.create(model=TIER, messages=ask("Go on."), extra_body={"max_ms": 20})


def test_every_tier_is_a_model(served: Served) -> None:
    client = served.openai()
    assert [model.id for model in client.models.list()] == [NAME, f"{NAME}@100%", TIER]
    assert client.models.retrieve(TIER).id == TIER
    for ask_for in (client.models.retrieve, lambda model: client.chat.completions.create(model=model, messages=[])):
        with pytest.raises(openai.APIStatusError) as failed:
            ask_for("gpt-4")
        assert failed.value.status_code in (400, 404)
    with pytest.raises(openai.NotFoundError, match="does not exist; expected one of words, words@100%"):
        client.chat.completions.create(model="gpt-4", messages=ask("Hi."))


def test_conversations_keep_their_roles(served: Served) -> None:
    messages = [
        {"role": "developer", "content": "Be short."},
        *ask("Hi.", data_url(picture())),
        {"role": "assistant", "content": "Hello."},
        *ask("And now?"),
    ]
    found = served.openai().chat.completions.create(model=NAME, messages=messages)  # type: ignore[arg-type]
    request = as_request("Hi.", picture())
    turns = [
        {"role": "system", "content": "Be short."},
        *request.messages,
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And now?"},
    ]
    expected = as_request("")
    object.__setattr__(expected, "messages", turns)
    assert found.choices[0].message.content == answer(expected, "100%")[0]


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "server.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    picture().save("photo.jpg")
    with serving(WordEngine(), name="my-model") as served:
        exec(source.replace("http://127.0.0.1:8000", served.url), {})
    expected, _, _ = answer(as_request("What is this?", Image.open("photo.jpg")), "100%")
    assert capsys.readouterr().out.startswith(f"my-model@100% {expected} ")


def test_a_key_is_asked_for_where_there_is_one() -> None:
    with serving(WordEngine(), api_key="open sesame") as served:
        assert served.openai("open sesame").chat.completions.create(model=NAME, messages=ask("Hi.")).choices
        for wrong in ("open sesam", "open sesame!", "none"):
            with pytest.raises(openai.AuthenticationError) as failed:
                served.openai(wrong).models.list()
            assert failed.value.code == "invalid_api_key"
        for header in (b"Bearer \xe9\xff", b"Basic open sesame", b"open sesame"):
            assert httpx.get(f"{served.url}/metrics", headers={"Authorization": header}).status_code == 401  # type: ignore[dict-item]
        assert httpx.get(f"{served.url}/v1/models").status_code == 401
        assert {httpx.get(f"{served.url}{path}").status_code for path in ("/", "/page.js", "/health")} == {200}


def test_what_would_silently_do_nothing_is_refused(served: Served) -> None:
    client = served.openai()
    client.chat.completions.create(model=NAME, messages=ask("Hi."), n=1, logprobs=False, frequency_penalty=0, user="me")
    for field, value in {"n": 2, "logprobs": True, "frequency_penalty": 0.5, "seed": 1.5, "tools": [{}]}.items():
        with pytest.raises(openai.BadRequestError) as failed:
            client.chat.completions.create(model=NAME, messages=ask("Hi."), extra_body={field: value})
        assert failed.value.param == field
