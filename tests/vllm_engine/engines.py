"""vLLM's engines under policies, and the compiled Hugging Face model as what they have to equal."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from digits_vlm import data, models
from dop_compile import Policy, dop_compile
from dop_compile.plugins.vllm.served import write_served

__all__ = ["LAYERS", "POLICIES", "Answer", "Prompt", "check", "engine", "prompts", "reference", "run", "scheduler"]

CHECKPOINTS = Path(models.__file__).parent / "checkpoints"
PLACEHOLDERS = {"llava": "<image>", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
LAYERS, VOCABULARY, NEW_TOKENS = 8, 47, 6
TOLERANCE = 1e-4
"""Of first-token log-probabilities, in float32: two implementations of the same model."""

depthwise = functools.partial(Policy.depthwise, LAYERS)
HOLES = [
    *(("visual", layer, "mha_key_value") for layer in (1, 2, 5)),
    *(("visual", layer, "mha_query") for layer in (3,)),
    *(("visual", layer, "mlp") for layer in (0, 2, 4, 6)),
]
POLICIES = {
    "full": Policy.full(LAYERS),
    "reduced": depthwise(visual_tokens=48),
    "random": depthwise(visual_tokens=40, reducer="random", mlp_depth=3),
    "joint": depthwise(mha_depth=5, mlp_depth=2),
    "joint reduced": depthwise(mha_depth=6, mlp_depth=3, visual_tokens=40),
    "split": depthwise(mha_query_depth=2, mha_key_value_depth=7, mlp_depth=1),
    "split reduced": depthwise(mha_query_depth=2, mha_key_value_depth=6, mlp_depth=1, visual_tokens=60),
    "MLP deeper": depthwise(mha_query_depth=2, mha_key_value_depth=6, mlp_depth=4),
    "frozen": depthwise(mha_query_depth=0, mha_key_value_depth=8, mlp_depth=0, visual_tokens=60),
    "no visual": depthwise(mha_depth=0, mlp_depth=0),
    "holes": Policy.from_operations(LAYERS, HOLES, visual_tokens=50),
    "divprune": depthwise(mha_query_depth=2, mha_key_value_depth=7, visual_tokens=40, reducer="divprune"),
    "vispruner": depthwise(mha_query_depth=2, mha_key_value_depth=7, visual_tokens=40, reducer="vispruner"),
    "visionzip": depthwise(mlp_depth=3, visual_tokens=40, reducer="visionzip", reducer_options={"contextual": 0}),
}


@dataclass(frozen=True)
class Prompt:
    """`text` with an `<image>` for each picture."""

    text: str
    pictures: tuple[Image.Image, ...] = ()

    def for_vllm(self, name: str) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt": self.text.replace("<image>", PLACEHOLDERS[name])}
        if self.pictures:
            prompt["multi_modal_data"] = {"image": list(self.pictures)}
        return prompt


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and log-probabilities (vocabulary,) of the first."""

    tokens: list[int]
    first: torch.Tensor


@functools.cache
def prompts(name: str, count: int = 5) -> tuple[Prompt, ...]:
    """Pictures of several sizes, where the model takes them; several pictures, turns, none, and a picture first."""
    examples = list(data.examples("validation", count=count))
    sides = [96] if name == "llava" else [96, 72, 120, 144, 84]
    pictures = [e.image.resize((sides[n % len(sides)],) * 2) for n, e in enumerate(examples)]
    system = data.SYSTEM
    return (
        *(Prompt(example.prompt, (picture,)) for example, picture in zip(examples, pictures, strict=True)),
        Prompt(f"{system} <image> <image> Read row 1. Answer:", tuple(pictures[:2])),
        Prompt(f"{system} Is there any 4? Answer:"),
        Prompt(f"{system} <image> Read row 1. Answer: 2 9 <image> Is there any 3? Answer:", tuple(pictures[1:3])),
        Prompt("<image> Read row 2. Answer:", (pictures[3],)),
    )


@functools.cache
def _original(name: str) -> Any:
    return models.load(CHECKPOINTS / name)


@functools.cache
def reference(name: str, label: str) -> tuple[Answer, ...]:
    """Of the compiled Hugging Face model, for `prompts(name)` one by one."""
    model, reader = _original(name)
    compiled = dop_compile(model, POLICIES[label], backend="eager")
    compiled.generation_config.eos_token_id = None
    return tuple(_answer(compiled, _inputs(reader, prompt)) for prompt in prompts(name))


def _answer(compiled: Any, inputs: dict[str, Any]) -> Answer:
    with torch.inference_mode():
        output = compiled.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return Answer(tokens, output.logits[0][0].float().log_softmax(-1))


def _inputs(reader: Any, prompt: Prompt) -> dict[str, Any]:
    """A prompt with any number of pictures, made of the reader's parts for one."""
    ones = [reader([picture], ["<image>"]) for picture in prompt.pictures]
    token = "<image>" if reader.name == "llava" else "<|image_pad|>"
    text = prompt.text
    for one in ones:
        visual = int((one["input_ids"] == models.IMAGE).sum())
        text = text.replace("<image>", PLACEHOLDERS[reader.name].replace(token, "\0" * visual), 1)
    text = text.replace("\0", token)
    inputs = dict(reader.tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    for key in ("pixel_values", "image_grid_thw"):
        if ones and key in ones[0]:
            inputs[key] = torch.cat([one[key] for one in ones])
    if reader.name == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == models.IMAGE).int()
    return inputs


def engine(name: str, label: str, folder: Path, **settings: Any) -> AbstractContextManager[LLM]:
    """An engine in this process, of a shipped model."""
    return engine_of(CHECKPOINTS / name, POLICIES[label], folder, **settings)


@contextmanager
def engine_of(checkpoint: Path, policy: Policy, folder: Path, **settings: Any) -> Iterator[LLM]:
    target = folder / "served"
    write_served(checkpoint, target, "tested", policy, force=target.exists())
    settings = {"enforce_eager": True, "max_model_len": 640, "max_num_seqs": 16, **settings}
    llm = LLM(model=str(target), dtype="float32", max_logprobs=VOCABULARY, disable_log_stats=True, seed=0, **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def run(
    llm: LLM, name: str, numbers: Sequence[int] | None = None, between: Callable[[int], object] = lambda steps: None
) -> dict[int, Answer]:
    """Answers to some of `prompts(name)` at once, by number. `between`: called after each step with their number."""
    chosen = list(range(len(prompts(name)))) if numbers is None else list(numbers)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=VOCABULARY, ignore_eos=True)
    inner, found, steps = llm.llm_engine, {}, 0
    for number in chosen:
        inner.add_request(str(number), prompts(name)[number].for_vllm(name), sampling)
    while inner.has_unfinished_requests():
        found.update(
            {int(output.request_id): _answered(output.outputs[0]) for output in inner.step() if output.finished}
        )
        steps += 1
        between(steps)
    return found


def _answered(output: Any) -> Answer:
    first = torch.tensor([output.logprobs[0][token].logprob for token in range(VOCABULARY)])
    return Answer(list(output.token_ids), first)


def check(found: dict[int, Answer], name: str, label: str) -> None:
    """Tokens are those of the compiled Hugging Face model, and log-probabilities as near as arithmetic allows."""
    for number, answer in found.items():
        wanted = reference(name, label)[number]
        torch.testing.assert_close(
            answer.first, wanted.first, rtol=0, atol=TOLERANCE, msg=lambda m, n=number: f"{n}: {m}"
        )
        assert answer.tokens == wanted.tokens, prompts(name)[number].text


def scheduler(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler
