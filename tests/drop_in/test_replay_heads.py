"""Models whose own forward cannot go on from the decoder's output: logits by the part of theirs that can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from dop_compile import Policy, UnsupportedUsageError, dop_compile
from dop_compile.replay import Replay
from dop_compile.search import measure_divergences
from dop_compile.search.metrics import METRICS
from tests.conformance.q_formers import Q_FORMERS
from tests.families import FAMILIES, Segment
from tests.support import ONE_IMAGE, assert_close, make_batch, reference, uniform_kept

NAMES = ("blip2_llama", "blip2_opt", "instructblip_llama", "instructblipvideo_llama")
ROW: list[list[Segment]] = [[("text", 3), ("image",), ("text", 3), ("image", 1), ("text", 4)]]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_a_whole_run(name: str) -> None:
    batch = make_batch(Q_FORMERS[name], ROW)
    layers = batch.family.num_layers
    compiled = dop_compile(batch.model, Policy.full(layers), backend="eager")
    replay = Replay(compiled, batch.inputs, depths=range(layers), rows=2)
    with torch.no_grad():
        assert torch.equal(replay.original, batch.model(**batch.inputs).logits[:, -2:])
    assert_close(replay.logits(Policy.full(layers)), replay.original)
    for policy in (
        Policy.depthwise(layers, mha_depth=1, mlp_depth=layers - 1),
        Policy.depthwise(layers, mlp_depth=1, visual_tokens=4),
    ):
        kept = None if policy.visual_tokens is None else uniform_kept(batch, policy.visual_tokens)
        expected = reference(batch, policy, kept)[:, -2:]
        assert_close(replay.logits(policy), expected)
        assert not torch.allclose(expected, replay.original, atol=1e-3), "nothing was pruned"


@pytest.mark.parametrize("metric", ["kl", "forced_kl", "accuracy_drop"])
@pytest.mark.parametrize("name", ["blip2_llama", "instructblip_llama"])
def test_divergences_are_measured(name: str, metric: str) -> None:
    batch = make_batch(Q_FORMERS[name], ROW)

    def decode(ids: Tensor) -> str:
        return " ".join(map(str, ids.tolist()))

    points: dict[str, tuple[int | float, ...]] = {"mlp_depth": (1,), "visual_tokens": (0.5,)}
    found = measure_divergences(
        batch.model,
        [{**batch.inputs, "answers": ["?"]}],
        axes=tuple(points),
        points=points,
        metric=metric,
        tokens=2,
        decode=decode,
    )
    assert found.counts[0][1] == batch.counts[0] == 10
    assert sum(found.counts[0]) == batch.inputs["input_ids"].shape[1]
    if metric == "kl":
        layers, compare = batch.family.num_layers, METRICS["kl"].compare
        assert compare is not None
        with torch.no_grad():
            original = batch.model(**batch.inputs).logits[0, -1]
        pruned = {
            "mlp_depth": reference(batch, Policy.depthwise(layers, mlp_depth=1)),
            "visual_tokens": reference(batch, Policy.full(layers).replace(visual_tokens=5), uniform_kept(batch, 5)),
        }
        for axis, logits in pruned.items():
            assert found.values[axis][0][0] == pytest.approx(compare(original, logits[0, -1]), rel=1e-4, abs=1e-6)
            assert found.values[axis][0][0] > 1e-3, "nothing was pruned"


def test_the_tower_runs_once() -> None:
    batch = make_batch(Q_FORMERS["blip2_llama"], ONE_IMAGE)
    compiled = dop_compile(batch.model, Policy.full(batch.family.num_layers), backend="eager")
    replay = Replay(compiled, batch.inputs)

    def forbidden(*_: Any) -> Any:
        raise AssertionError("this was not to run")

    hook = batch.model.vision_model.register_forward_pre_hook(forbidden)  # type: ignore[union-attr,operator]
    try:
        replay.logits(Policy.depthwise(batch.family.num_layers, mlp_depth=1))
    finally:
        hook.remove()


def test_logits_that_are_not_numbers_are_still_the_models() -> None:
    family = Q_FORMERS["blip2_llama"]
    batch = make_batch(family, ONE_IMAGE, model=family.build())
    with torch.no_grad():
        batch.model.language_model.lm_head.weight[3] = torch.nan  # type: ignore[union-attr,index,operator]
    replay = Replay(dop_compile(batch.model, Policy.full(family.num_layers), backend="eager"), batch.inputs)
    assert replay.original.isnan().any()


class Cooled(hf.Blip2ForConditionalGeneration):
    """It does something of its own to the logits of its language model."""

    def forward(self, pixel_values: Tensor, input_ids: Tensor, **kwargs: Any) -> Any:
        output = super().forward(pixel_values, input_ids, **kwargs)
        output.logits = output.logits / 2
        return output


class Asking(hf.LlavaForConditionalGeneration):
    """No part of it gives logits without pictures."""

    def forward(self, pixel_values: Tensor, input_ids: Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids, pixel_values, **kwargs)


def test_models_whose_logits_no_part_gives_are_refused() -> None:
    for family, kind, message in (
        (Q_FORMERS["blip2_llama"], Cooled, "Cooled changes the logits of its LlamaForCausalLM"),
        (FAMILIES["llava"], Asking, r"Asking .* asks for pixel_values, and no part"),
    ):
        model = family.build()
        model.__class__ = kind
        batch = make_batch(family, ONE_IMAGE, model=model)
        compiled = dop_compile(model, Policy.full(family.num_layers), backend="eager")
        with torch.no_grad():
            compiled(**batch.inputs)  # as it is, the model runs
        with pytest.raises(UnsupportedUsageError, match=message):
            Replay(compiled, batch.inputs)
