"""The model against lmms-eval's real base class and requests, on the digits model.

lmms-eval's core (base class, requests, registry, tasks, evaluator) does without torchvision, so that nothing of it is
replaced here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is not installed: pip install lmms-eval")

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelRegistryV2
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from digits_vlm import data
from dop_compile.plugins.lmms_eval.manifest import manifest
from tests.local_llava import local_llava, local_processor

CHECKPOINT = Path(__file__).parents[3] / "examples" / "digits_vlm" / "checkpoints" / "llava"
TASK, SPLIT = "digits", "validation"
QUESTIONS = ("Read row 1.", "Which digit is in row 2 column 3? a 4, b 7, c 0, d 9.", "Is there any 4?", "Read row 3.")
PRUNED = {"mha_query_depth": 3, "mlp_depth": 2, "visual_tokens": 100}
LIKE_CPU = {"device": "cpu", "backend": "eager"}
OFTEN = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_class(simple: bool = False) -> Any:
    """By lmms-eval's own registry, which checks it."""
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    return registry.get_model_class("dop_compile", force_simple=simple)


def documents() -> list[dict[str, Any]]:
    """The second has two pictures, the last none."""
    images = [data.canvas("validation", number, seed=3, full=True).image for number in range(4)]
    own = [[images[0]], [images[1], images[2]], [images[3]], []]
    return [{"question": text, "images": pictures} for text, pictures in zip(QUESTIONS, own, strict=True)]


def make(simple: bool = False, **arguments: Any) -> Any:
    given = {"pretrained": str(CHECKPOINT), **LIKE_CPU, **arguments}
    model = model_class(simple)(**given)
    model.task_dict[TASK] = {SPLIT: documents()}
    return model


def to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]


def request(kind: str, number: int, *arguments: Any) -> Instance:
    metadata = {"task": TASK, "doc_id": number, "repeats": 1}
    return Instance(request_type=kind, arguments=(*arguments, number, TASK, SPLIT), idx=0, metadata=metadata)


def chat_requests(*settings: dict[str, Any]) -> list[Instance]:
    given = settings or (OFTEN,) * len(QUESTIONS)
    return [
        request("generate_until", number, QUESTIONS[number], to_messages, dict(own)) for number, own in enumerate(given)
    ]


def simple_requests() -> list[Instance]:
    return [
        request("generate_until", number, text, dict(OFTEN), lambda doc: doc["images"])
        for number, text in enumerate(QUESTIONS)
    ]


def untouched() -> tuple[Any, Any]:
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval(), AutoProcessor.from_pretrained(CHECKPOINT)


def inputs_of(processor: Any, doc: dict[str, Any]) -> Any:
    """By transformers alone, in one step."""
    content = [{"type": "image", "image": image} for image in doc["images"]]
    return processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def said(answers: list[GenerationResult]) -> list[str]:
    return [answer.text for answer in answers]


def test_an_uncompiled_and_a_full_model_say_what_transformers_says() -> None:
    model, processor = untouched()
    expected = []
    for doc in documents():
        inputs = inputs_of(processor, doc)
        output = model.generate(**inputs, **OFTEN)
        expected.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert len(set(expected)) > 2
    original = make(policy="original", batch_size=3)
    assert isinstance(original, lmms)
    assert said(original.generate_until(chat_requests())) == expected
    assert said(make(True, policy="full").generate_until(simple_requests())) == expected


def test_answers_of_a_batch_are_those_of_single_requests() -> None:
    alone, together = make(**PRUNED), make(**PRUNED, batch_size=4)
    assert alone.reader.tokenizer.padding_side == "left"
    single = alone.generate_until(chat_requests())
    batch = together.generate_until(chat_requests())
    assert batch == single  # texts and token counts
    assert all(0 < answer.token_counts.output_tokens <= 5 for answer in batch)


def test_only_requests_with_the_same_arguments_share_a_batch() -> None:
    short = {"max_new_tokens": 1, "do_sample": False}
    model, asked = make(**PRUNED, batch_size=4), []
    answers = model._answers
    model._answers = lambda own, given: asked.append((len(own), given)) or answers(own, given)
    found = model.generate_until(chat_requests(OFTEN, short, OFTEN, {**OFTEN, "until": [" "]}))
    assert sorted(count for count, _ in asked) == [1, 1, 2]
    assert found[1].token_counts.output_tokens == 1
    whole = said(make(**PRUNED).generate_until(chat_requests()))
    assert said(found)[0] == whole[0]
    assert said(found)[2] == whole[2]


def test_an_answer_ends_at_its_stop_string() -> None:
    whole = said(make(**PRUNED).generate_until(chat_requests()))
    assert " " in whole[0]
    stopped = [{**OFTEN, "until": [" ", "?"]}] * len(QUESTIONS)
    for size in (1, 4):
        found = make(**PRUNED, batch_size=size).generate_until(chat_requests(*stopped))
        assert said(found) == [text.partition(" ")[0] for text in whole]
        assert found[0].token_counts.output_tokens < 5


def test_answers_are_handed_to_the_cache_of_lmms_eval() -> None:
    model, noted = make(**PRUNED, batch_size=2), []
    model.cache_hook.add_partial = lambda kind, asked, answer: noted.append((kind, asked[0], answer))
    found = said(model.generate_until(chat_requests()))
    assert sorted(noted) == sorted(("generate_until", text, own) for text, own in zip(QUESTIONS, found, strict=True))


def test_the_system_prompt_stands_before_everything() -> None:
    model = make(**PRUNED, system_prompt="Read row 2.")
    asked = model._conversation(to_messages(documents()[0]))
    prompt = model.reader.prompts([asked])[0]
    assert prompt.index("Read row 2.") < prompt.index("<image>") < prompt.index("Read row 1.")


def test_frames_of_a_video_are_pictures_on_demand() -> None:
    docs = documents()
    frames = [*docs[1]["images"], *docs[0]["images"]]
    asked = [{"role": "user", "content": [{"type": "video", "url": frames}, {"type": "text", "text": "Read row 1."}]}]
    model = make(**PRUNED, frames_as_images=True, max_num_frames=2)
    found = model._answers([model._conversation(asked)], OFTEN)
    same = {"question": "Read row 1.", "images": [frames[0], frames[2]]}
    assert found == model._answers([model._conversation(to_messages(same))], OFTEN)
    other = make(**PRUNED)
    conversation = other._conversation(asked)
    with pytest.raises(ValueError, match="takes no videos; frames_as_images=True"):
        other._answers([conversation], OFTEN)


# --- likelihoods ------------------------------------------------------------------------------------------------------

FIRST_ROW = " ".join(map(str, data.canvas("validation", 0, seed=3, full=True).digits[0]))
CONTINUATIONS = (f" {FIRST_ROW}", " 4 7", " b", "")


def likelihood_requests() -> list[Instance]:
    """A continuation as text, and one as a function of the document."""
    found = []
    for number, text in enumerate(CONTINUATIONS):
        target = text if number % 2 else (lambda doc, own=text: own)
        found.append(request("loglikelihood", number, QUESTIONS[number], target, lambda doc: doc["images"]))
    return found


@torch.no_grad()
def expected_losses(model: Any, processor: Any) -> list[tuple[float, bool]]:
    """Of all tokens in one forward pass, with transformers' own mean of cross entropy."""
    found = []
    for doc, text in zip(documents(), CONTINUATIONS, strict=True):
        inputs = dict(inputs_of(processor, doc))
        own = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
        inputs["input_ids"] = torch.cat([inputs["input_ids"], own], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = model(**inputs).logits[0, -own.shape[1] - 1 : -1]
        loss = float(F.cross_entropy(logits.double(), own[0])) if text else 0.0
        found.append((loss, bool((logits.argmax(dim=-1) == own[0]).all())))
    return found


@pytest.mark.parametrize("arguments", [{"policy": "original"}, {"policy": "full"}, PRUNED])
@pytest.mark.parametrize("size", [1, 4])
def test_losses_are_those_of_one_forward_pass(arguments: dict[str, Any], size: int) -> None:
    model = make(True, **arguments, batch_size=size)
    found = [result.text for result in model.loglikelihood(likelihood_requests())]
    plain, processor = untouched()
    expected = expected_losses(plain if arguments.get("policy") else model.model, processor)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({greedy for _, greedy in found[:3]}) == 2
    for (loss, _), (right, _) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right, rel=1e-4, abs=1e-6)


def test_a_reducer_that_reads_the_question_does_not_see_the_continuation() -> None:
    """The first token's loss is that of the prompt alone, whatever follows it."""
    model = make(True, visual_tokens=20, reducer="cdpruner")
    asked = [request("loglikelihood", 0, QUESTIONS[0], text, lambda doc: doc["images"]) for text in (" 4", " 4 4 4 4")]
    given = model._inputs([model._continuation(asked[0].args)[0]])
    output = model.model.generate(
        **given, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    token = model.tokenizer("4", add_special_tokens=False)["input_ids"][0]
    expected = -float(output.logits[0][0].double().log_softmax(dim=-1)[token])
    short, long = (model.loglikelihood([own])[0].text[0] for own in asked)
    assert short == pytest.approx(expected, rel=1e-6)
    one = model.reader.continuation_ids(model.reader.prompts([model._continuation(asked[1].args)[0]])[0], " 4 4 4 4")
    assert len(one) == 4
    assert long != pytest.approx(short)


def test_a_continuation_that_merges_with_the_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = make(True, **PRUNED).reader
    with pytest.raises(ValueError, match="merges with the end of the prompt"):
        reader.continuation_ids("How many", "4s are there")  # one word, for this tokenizer


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_refused(tmp_path: Path) -> None:
    chat = make(**PRUNED)
    with pytest.raises(NotImplementedError, match="--force_simple"):
        chat.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        chat.generate_until_multi_round([])
    with pytest.raises(TypeError, match="unknown argument 'max_pixel'; did you mean 'max_pixels'"):
        make(**PRUNED, max_pixel=3)
    with pytest.raises(ValueError, match="makes pictures of one size"):
        make(**PRUNED, max_pixels=3)
    with pytest.raises(ValueError, match="no limit on tiles"):
        make(**PRUNED, max_tiles=3)
    resizing = make(visual_tokens=20, reducer="resize")
    with pytest.raises(ValueError, match="makes pictures of one size"):
        resizing.generate_until(chat_requests())
    local_llava(layers=2, hidden=32, image_size=56).save_pretrained(tmp_path)
    local_processor(56).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        make(pretrained=str(tmp_path), mha_depth=1)
    with pytest.raises(ValueError, match=r"chat_template=.*no such file"):
        make(pretrained=str(tmp_path), mha_depth=1, chat_template="nothing.jinja")
    template = tmp_path / "mine.jinja"
    template.write_text("USER: <image> {{ messages[0]['content'][-1]['text'] }} ASSISTANT:")
    given = make(pretrained=str(tmp_path), mha_depth=1, chat_template=str(template))
    asked = given._conversation(to_messages(documents()[0]))
    assert given.reader.prompts([asked]) == ["USER: <image> Read row 1. ASSISTANT:"]


def test_arguments_come_from_a_string_as_lmms_eval_passes_them() -> None:
    given = f"pretrained={CHECKPOINT},mha_depth=6,visual_tokens=40,reducer=random,backend=eager"
    model = model_class().create_from_arg_string(
        given + ',reducer_options={"seed":3}', {"batch_size": "2", "max_batch_size": None, "device": "cpu"}
    )
    assert model.policy.options == {"seed": 3}
    assert (model.batch_size, model.device, model.rank, model.world_size) == (2, torch.device("cpu"), 0, 1)
    model.clean()
    assert "_model" not in vars(model)
    assert os.environ.get("WORLD_SIZE") is None
