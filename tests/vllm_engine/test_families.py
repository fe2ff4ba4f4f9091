"""Families without a shipped model: small random ones, against the compiled Hugging Face model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm import SamplingParams

from digits_vlm import data
from dop_compile import Policy, dop_compile
from tests.vllm_engine.engines import NEW_TOKENS, PLACEHOLDERS, TOLERANCE, VOCABULARY, engine_of
from tests.vllm_engine.tiny import KINDS, LAYERS, save

SIZES = ((96, 96), (120, 60), (48, 90))


@pytest.mark.parametrize("reducer", ["uniform", "divprune"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_compiled_model(kind: str, reducer: str, tmp_path: Path) -> None:
    model, processor = save(kind, tmp_path / "model")
    policy = Policy.depthwise(
        LAYERS, mha_query_depth=3, mha_key_value_depth=6, mlp_depth=2, visual_tokens=20, reducer=reducer
    )
    compiled = dop_compile(model, policy, backend="eager")
    compiled.generation_config.eos_token_id = None
    places = {"llava_next": PLACEHOLDERS["llava"], "internvl": "<|image_pad|>"}
    place = places.get(kind, PLACEHOLDERS["qwen2_5_vl"])
    examples = list(data.examples("validation", count=len(SIZES)))
    prompts = [
        (example.prompt.replace("<image>", place), example.image.resize(size))
        for example, size in zip(examples, SIZES, strict=True)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=VOCABULARY, ignore_eos=True)
    with engine_of(tmp_path / "model", policy, tmp_path) as llm:
        given = [{"prompt": text, "multi_modal_data": {"image": picture}} for text, picture in prompts]
        outputs = [output.outputs[0] for output in llm.generate(given, sampling, use_tqdm=False)]
    for (text, picture), output in zip(prompts, outputs, strict=True):
        inputs = processor(images=[picture], text=[text], return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            wanted = compiled.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        first = torch.tensor([output.logprobs[0][token].logprob for token in range(VOCABULARY)])
        torch.testing.assert_close(first, wanted.logits[0][0].log_softmax(-1), rtol=0, atol=TOLERANCE)
        assert list(output.token_ids) == wanted.sequences[0, inputs["input_ids"].shape[1] :].tolist()
