"""`max_ms`: the largest tier that is predicted to fit."""

from __future__ import annotations

import pytest

from dop_compile.onnx.run.latency import TierLatency, tier_tokens
from dop_compile.onnx.run.pipeline import OnnxPipeline
from tests.onnx_runtime.served import batch, picture, pipeline, served

CPU = ["CPUExecutionProvider"]


@pytest.fixture
def timed() -> OnnxPipeline:
    """With latencies that are made up: an image takes 2 ms, and tokens beyond 20 take 1 or 0.5 ms."""
    found = OnnxPipeline.load(served(), providers=CPU, tiers=["pruned", "100%"], measure=False)
    found.vision_ms = {"vision-image-0": 2.0}
    found.latencies = {
        "100%": TierLatency(((20, 10.0), (40, 30.0)), 1.0),
        "pruned": TierLatency(((20, 5.0), (40, 15.0)), 1.0),
    }
    return found


def test_prediction(timed: OnnxPipeline) -> None:
    inputs = batch()  # 3 rows, 2 images of 16 tokens
    text = int((inputs["attention_mask"] - (inputs["input_ids"] == 4).long()).sum(1).max())
    found = timed.predict_ms(inputs)
    assert found == {
        "100%": pytest.approx(4 + 10 + (3 * (text + 16) - 20) * 1.0),
        "pruned": pytest.approx(4 + 5 + (3 * (text + 6) - 20) * 0.5),
    }


def test_tokens_are_those_of_the_graph(timed: OnnxPipeline) -> None:
    """What is predicted for is what enters the prefill graph."""
    inputs = batch()
    seen: list[int] = []
    for name in timed.tiers:
        tier = timed.manifest.tiers[name]
        session = timed._stages.session(tier.prefill)
        original = session.run_in_place

        def noting(given: dict[str, object], original: object = original) -> object:
            seen.append(sum(t.numel() for n, t in given.items() if n.startswith("slots.")))  # type: ignore[attr-defined]
            return original(given)  # type: ignore[operator]

        session.run_in_place = noting  # type: ignore[method-assign, assignment]
        timed.generate(inputs, tier=name, max_new_tokens=1)
        visual = inputs["input_ids"] == 4
        assert tier_tokens(tier, inputs["attention_mask"].bool(), visual) == seen[-1]


def test_largest_that_fits(timed: OnnxPipeline) -> None:
    inputs = batch()
    ms = timed.predict_ms(inputs)
    assert ms["pruned"] < ms["100%"]
    assert timed.generate(inputs, max_ms=ms["100%"], max_new_tokens=1).tier == "100%"
    assert timed.generate(inputs, max_ms=ms["100%"] - 0.1, max_new_tokens=1).tier == "pruned"
    assert timed.generate(inputs, max_ms=ms["pruned"], max_new_tokens=1).tier == "pruned"
    with pytest.raises(ValueError, match=r"max_ms: no tier is predicted to fit 1 ms; the fastest, 'pruned', takes"):
        timed.generate(inputs, max_ms=1)
    assert timed(picture(), "a", max_ms=1e6, max_new_tokens=2) == pipeline()(picture(), "a", max_new_tokens=2)


def test_latencies_that_fall_with_length_predict_no_less() -> None:
    """Measurements are noisy."""
    assert TierLatency(((10, 5.0), (20, 4.0)), 1.0).prefill_ms(1000) == 5.0
    assert TierLatency(((10, 5.0),), 1.0).prefill_ms(20) == 10.0
    assert TierLatency(((10, 5.0), (20, 6.0)), 1.0).prefill_ms(1) == 5.0


def test_measured_at_load() -> None:
    found = OnnxPipeline.load(served(), providers=CPU)
    assert list(found.latencies) == ["100%", "pruned", "given"]
    for latency in found.latencies.values():
        (short, ms), (long, long_ms) = latency.points
        assert short < long
        assert min(ms, long_ms, latency.decode_ms) > 0
        assert latency.decode_ms > 0
    assert list(found.vision_ms) == ["vision-image-0"]
    assert found.generate(batch(), max_ms=1e9, max_new_tokens=1).tier == "100%"
    kept = [[0, 2, 3], [15], []]
    assert found.generate(batch(), max_ms=1e9, max_new_tokens=1, visual_indices=kept).tier == "given"


def test_named_tokens_that_no_tier_takes(timed: OnnxPipeline) -> None:
    with pytest.raises(ValueError, match="no tier takes this call's visual_indices"):
        timed.generate(batch(), max_ms=1e9, visual_indices=[[0], [0], []])


def test_not_measured() -> None:
    with pytest.raises(ValueError, match="max_ms: latencies were not measured; load with measure=True"):
        pipeline().generate(batch(), max_ms=5)
