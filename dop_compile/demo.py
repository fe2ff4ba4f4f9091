"""`dop-compile demo`: a LLaVA with random weights answers about a photograph, in full and pruned.

Everything but the weights is real: the model class, a CLIP tower that turns 336 x 336 pixels into 576 visual tokens,
the processor and the photograph. The answers mean nothing; what is shown is that the compiled model equals the
original at 100 %, and what a policy saves.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dop_compile.compiler import dop_compile
from dop_compile.costs import prefill_flops_ratio
from dop_compile.explain import TierCost, explain
from dop_compile.explain_table import columns, show_bytes, show_percent
from dop_compile.policy import Policy

# Typed loosely: transformers annotates only a part of what is used here
hf: Any = transformers

__all__ = ["PROMPT", "DemoRow", "demo_model", "demo_policies", "demo_processor", "photograph", "run_demo"]

PROMPT = (
    "A chat between a curious human and an assistant. The assistant gives helpful, detailed and polite answers. "
    "USER: <image> What is on the table in this picture, and which colour is it? ASSISTANT:"
)
_WORDS = (
    PROMPT.replace("<image>", "")
    + """ of with there are two one small large red blue green white black brown cup coffee saucer spoon plate wood
    water cat dog person woman man room window light from above left right side behind front next to by its full
    empty warm hot old new made at I see can not very some other"""
)
PAD, BOS, EOS, UNKNOWN, IMAGE = range(5)
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table; `milliseconds` is the median time of one decoder prefill."""

    tier: str
    cost: TierCost
    milliseconds: float
    answer: str


def demo_processor(image_size: int = 336, patch_size: int = 14) -> Any:
    """A LLaVA processor with a tokenizer of whole words, built without downloading anything."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = dict.fromkeys(re.findall(r"\w+|[^\w\s]", _WORDS))
    vocabulary = {word: number for number, word in enumerate((*_SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    # The variant that needs no torchvision, where transformers has it
    images = getattr(hf, "CLIPImageProcessorPil", None) or hf.CLIPImageProcessor
    size = {"height": image_size, "width": image_size}
    return hf.LlavaProcessor(
        image_processor=images(size={"shortest_edge": image_size}, crop_size=size),
        tokenizer=fast,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def demo_model(
    *, layers: int = 8, hidden: int = 512, image_size: int = 336, patch_size: int = 14, seed: int = 0
) -> Any:
    """A randomly initialised `LlavaForConditionalGeneration` with the vocabulary of `demo_processor`."""
    heads = max(hidden // 64, 2)
    text = hf.LlamaConfig(
        vocab_size=len(demo_processor(image_size, patch_size).tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=hidden**-0.5,
    )
    tower = hf.CLIPVisionConfig(
        hidden_size=hidden // 2,
        intermediate_size=hidden * 2,
        num_hidden_layers=max(layers // 2, 2),
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
    )
    config = hf.LlavaConfig(
        text_config=text,
        vision_config=tower,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_()
    return model


def photograph() -> Image.Image:
    """A cup of coffee (600 x 400), which scikit-image ships with its package.

    Raises:
        ModuleNotFoundError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the demo's photograph comes with scikit-image: pip install scikit-image, or name one with --image"
        ) from error
    coffee: Any = data.coffee
    return Image.fromarray(coffee())


def demo_policies(config: Any, system: int, visual: int, text: int) -> dict[str, Policy]:
    """100 %, and about 37 % and 23 % of the original's FLOPs (eq. 11); the last with queries and key-values apart."""
    layers: int = config.get_text_config().num_hidden_layers

    def within(budget: float, **depths: Any) -> Policy:
        """As many visual tokens as the budget allows."""
        for count in range(visual, -1, -1):
            policy = Policy.depthwise(layers, visual_tokens=count, **depths)
            if prefill_flops_ratio(config, policy, system, visual, text) <= budget:
                break
        return policy

    def share(fraction: float) -> int:
        return max(round(fraction * layers), 1)

    joint = {"mha_depth": share(0.8), "mlp_depth": share(0.6)}
    apart = {"mha_query_depth": share(0.25), "mha_key_value_depth": share(0.875), "mlp_depth": share(0.25)}
    return {
        "100%": Policy.full(layers),
        "37%": within(0.37, **joint),
        "23%": within(0.23, **joint),
        "37% split": within(0.37, **apart),
    }


def _embeddings(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(1, tokens, hidden): what the original hands to its decoder."""
    found: list[Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        model(**inputs, logits_to_keep=1)
    finally:
        hook.remove()
    return found[0]


def _measure(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call; interleaved, so that a slow moment of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in tqdm(range(repeats + 1), desc="measuring prefill", leave=False, file=sys.stderr):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:  # the first round compiles
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def run_demo(
    *, backend: str = "eager", repeats: int = 4, max_new_tokens: int = 8, image: Path | None = None, **sizes: int
) -> tuple[DemoRow, ...]:
    """Compile the demo's model under several tiers, compare them with the original, and print a table.

    Raises:
        RuntimeError: the 100 % tier does not give the original's logits.
    """
    picture = photograph() if image is None else Image.open(image).convert("RGB")
    model = demo_model(**sizes)
    tower = model.config.vision_config
    processor = demo_processor(tower.image_size, tower.patch_size)
    inputs = dict(processor(images=picture, text=PROMPT, return_tensors="pt"))
    ids = inputs["input_ids"]
    groups = torch.where(ids == IMAGE, 1, torch.where((ids == IMAGE).cumsum(1) == 0, 2, 0))
    system, visual, text = (int((groups == code).sum()) for code in (2, 1, 0))
    counts: dict[str, Any] = {"system": system, "visual": visual, "text": text}
    policies = demo_policies(model.config, **counts)
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{type(model).__name__}: {model.config.text_config.num_hidden_layers} layers of "
        f"{model.config.text_config.hidden_size}, {weights:.0f} M random weights (the answers mean nothing); "
        f"prompt {system} system + {visual} visual + {text} text tokens; backend {backend}\n"
    )
    compiled = dop_compile(model, policies, backend=backend)
    _check_equal(compiled(**inputs).logits, model(**inputs).logits, exact=backend == "eager")

    embeds = _embeddings(model, inputs)
    calls: dict[str, Callable[[], Any]] = {"original": lambda: model(inputs_embeds=embeds, logits_to_keep=1)}
    for tier in policies:
        calls[tier] = lambda tier=tier: compiled(  # type: ignore[misc]
            inputs_embeds=embeds, token_groups=groups, logits_to_keep=1, tier=tier
        )
    milliseconds = _measure(calls, repeats)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False}
    answers = {"original": model.generate(**inputs, **settings)}
    for tier in tqdm(policies, desc="generating", leave=False, file=sys.stderr):
        answers[tier] = compiled.generate(**inputs, **settings, tier=tier)
    if not torch.equal(answers["original"], answers["100%"]):
        raise RuntimeError("the 100 % tier does not generate the original's tokens")
    rows = [
        DemoRow(
            cost.tier,
            cost,
            milliseconds[cost.tier],
            processor.decode(answers[cost.tier][0, ids.shape[1] :], skip_special_tokens=True),
        )
        for cost in explain(compiled, **counts).tiers
    ]
    print("\n".join(_table(rows, milliseconds["original"])))
    print(f"\nThe 100% tier gives the original's logits{' bit for bit' if backend == 'eager' else ''} and its tokens.")
    return tuple(rows)


def _check_equal(actual: Tensor, expected: Tensor, *, exact: bool) -> None:
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    if error > (0 if exact else 1e-4):
        raise RuntimeError(f"the 100 % tier's logits differ from the original's by {error:.1e} (relative)")


def _table(rows: list[DemoRow], original: float) -> list[str]:
    lines = [["tier", "FLOPs (eq. 11)", "executed", "KV cache", "prefill", "of original", "answer"]]
    first = rows[0].cost
    lines.append(["original", "", "", show_bytes(first.original_kv_bytes), f"{original:.0f} ms", "", rows[0].answer])
    for row in rows:
        share = [show_percent(row.cost.eq11_ratio), show_percent(row.cost.executed_ratio)]
        took = [f"{row.milliseconds:.0f} ms", show_percent(row.milliseconds / original)]
        lines.append([row.tier, *share, show_bytes(row.cost.kv_bytes), *took, row.answer])
    return columns([[*line[:-1], line[-1][:48]] for line in lines], left=(0, 6))
