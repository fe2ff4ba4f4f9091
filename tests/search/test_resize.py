"""Pictures made smaller before the model, as an axis and in whole policies, on the trained Qwen2.5-VL."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from digits_vlm import data, models
from dop_compile import Policy, dop_compile
from dop_compile.reducers import resize_processor
from dop_compile.search import measure_accuracy, measure_divergences, measure_policies
from dop_compile.search.metrics import top_k_kl
from tests.support import compile_eagerly

LAYERS, WHOLE = 8, 64
CHECKPOINT = Path(models.__file__).parent / "checkpoints" / "qwen2_5_vl"


@functools.cache
def trained() -> tuple[Any, models.Reader]:
    return models.load(CHECKPOINT)


class Questions(Sequence[dict[str, Any]]):
    """Questions about canvases, which can be made smaller; notes how often."""

    def __init__(self, count: int):
        self.examples = list(data.examples("validation", count, seed=4))
        self.made: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: Any) -> dict[str, Any]:
        return self._read(number, trained()[1])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def resized(self, number: int, visual_tokens: int) -> dict[str, Any]:
        self.made.append((number, visual_tokens))
        small = models.Reader(CHECKPOINT)
        small.images = resize_processor(small.images, visual_tokens)
        return self._read(number, small)

    def _read(self, number: int, reader: models.Reader) -> dict[str, Any]:
        example = self.examples[number]
        return {**reader([example.image], [example.prompt]), "answers": [example.answer]}


def visual(sample: dict[str, Any]) -> int:
    return int(sample["mm_token_type_ids"].sum())


def inputs(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name != "answers"}


@torch.no_grad()
def last(model: Any, sample: dict[str, Any]) -> Tensor:
    return model(**inputs(sample)).logits[:, -1]


def decode(ids: Tensor) -> str:
    return str(trained()[1].tokenizer.decode(ids, skip_special_tokens=True))


def test_the_axis_is_the_original_on_smaller_pictures() -> None:
    model, samples = trained()[0], Questions(3)
    points = {"visual_tokens": (0.75, 0.25), "mlp_depth": (2,)}
    found = measure_divergences(model, samples, axes=tuple(points), points=points, reducer="resize")
    assert samples.made == [(n, round(part * WHOLE)) for n in range(3) for part in (0.75, 0.25)], "once a point"
    for row, part in enumerate((0.75, 0.25)):
        for number in range(3):
            small = samples.resized(number, round(part * WHOLE))
            assert 0 < visual(small) <= round(part * WHOLE) < visual(samples[number]) == WHOLE
            expected = top_k_kl(last(model, samples[number]), last(model, small))
            assert found.values["visual_tokens"][row][number] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    plain = measure_divergences(model, samples, axes=("mlp_depth",), points={"mlp_depth": (2,)})
    assert found.values["mlp_depth"] == plain.values["mlp_depth"]


def test_whole_policies_run_on_smaller_pictures() -> None:
    model, samples = trained()[0], Questions(2)
    policy = Policy.depthwise(LAYERS, mha_depth=6, mlp_depth=3, visual_tokens=36, reducer="resize")
    compiled = compile_eagerly(model, policy)
    found = measure_policies(model, samples, [policy])
    for number in range(2):
        expected = top_k_kl(last(model, samples[number]), last(compiled, samples.resized(number, 36)))
        assert found[0, number] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_forced_tokens_are_those_of_the_whole_picture() -> None:
    model, samples = trained()[0], Questions(2)
    policy = Policy.full(LAYERS).replace(visual_tokens=36, reducer="resize")
    found = measure_policies(model, samples, [policy], metric="forced_kl", tokens=3)
    for number in range(2):
        output = model.generate(**inputs(samples[number]), max_new_tokens=2, min_new_tokens=2, do_sample=False)[:, -2:]
        rows = []
        for sample in (samples[number], samples.resized(number, 36)):
            longer = inputs(sample)
            longer["input_ids"] = torch.cat([longer["input_ids"], output], dim=1)
            for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
                longer[name] = torch.nn.functional.pad(longer[name], (0, 2), value=value)
            with torch.no_grad():
                rows.append(model(**longer).logits[0, -3:])
        assert found[0, number] == pytest.approx(top_k_kl(*rows), rel=1e-3, abs=1e-6)


def test_answers_are_those_to_smaller_pictures() -> None:
    model, samples = trained()[0], Questions(6)
    policies = [Policy.full(LAYERS), Policy.full(LAYERS).replace(visual_tokens=9, reducer="resize")]
    found = measure_accuracy(model, samples, policies, decode)
    for number, whole in enumerate(samples):
        for row, sample in enumerate((whole, samples.resized(number, 9))):
            output = model.generate(**inputs(sample), do_sample=False)
            answer = decode(output[0, sample["input_ids"].shape[1] :]).strip()
            assert found[row, number] == (answer in whole["answers"])
    assert (found[0] != found[1]).any()


def test_samples_that_cannot_be_resized_are_refused() -> None:
    with pytest.raises(TypeError, match=r"need a method resized\(number, visual_tokens\)"):
        measure_divergences(trained()[0], [Questions(1)[0]], axes=("visual_tokens",), reducer="resize")


def test_pictures_that_were_not_made_smaller_are_refused() -> None:
    model, sample = trained()[0], Questions(1)[0]
    compiled = dop_compile(model, Policy.full(LAYERS).replace(visual_tokens=36, reducer="resize"), backend="eager")
    with pytest.raises(ValueError, match=r"has 64 visual tokens, .* at most 36; make its inputs with resize_processor"):
        compiled(**inputs(sample))
