"""vLLM with and without a policy on the CPU: tokens per second, and time to the first token, of 1, 8 and 32 clients.

    PYTHONPATH=tests/vllm_engine/site .venv-vllm/bin/python benchmarks/vllm_serving.py --out build/vllm.md

in the environment of `make test-vllm`. A LLaVA with random weights, 576 visual tokens to a picture; each client sends
its next request when the last is answered, each with a picture of its own. Both engines are there at once, in processes
of their own, and take turns: ratios are of neighbouring rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dop_compile import Policy
from dop_compile.plugins.vllm.served import write_served

SIDE, PATCH = 192, 8
IMAGE, WORDS = 3, 64
PROMPT_TOKENS, NEW_TOKENS = 48, 16


@dataclass(frozen=True)
class Round:
    """`tokens_per_second`: generated ones. `first`: seconds to the first token of each request."""

    tokens_per_second: float
    first: list[float]


def save_model(directory: Path, layers: int, hidden: int) -> None:
    """A LLaVA-1.5 whose words are numbers."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    hf: Any = transformers
    text = hf.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    vision = hf.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = hf.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=(SIDE // PATCH) ** 2
    )
    torch.manual_seed(0)
    hf.LlavaForConditionalGeneration(config).save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    older = {n.replace("vision_tower.", "vision_tower.vision_model."): w for n, w in weights.items()}
    save_file(older, directory / "model.safetensors", {"format": "pt"})  # vLLM's own class knows no other names
    known = ["<pad>", "<s>", "</s>", "<image>", *map(str, range(WORDS - 4))]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(known)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": SIDE, "width": SIDE}
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    hf.LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(directory)


def serve(model: str, pipe: Connection) -> None:
    """One engine: answers (clients, requests, seed) with a `Round` until it is sent None."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="3", VLLM_CPU_OMP_THREADS_BIND="nobind")
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, dtype="float32", max_model_len=1024, max_num_seqs=32, enforce_eager=True, seed=0)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        pipe.send(run(llm.llm_engine, sampling, *task))


def run(engine: Any, sampling: Any, clients: int, requests: int, seed: int) -> Round:
    draw = np.random.default_rng(seed)
    prompts = [
        {
            "prompt": "<image> " + " ".join(map(str, draw.integers(0, WORDS - 4, PROMPT_TOKENS))),
            "multi_modal_data": {"image": Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))},
        }
        for _ in range(requests)
    ]
    sent: dict[str, float] = {}
    first: dict[str, float] = {}
    begun = time.perf_counter()

    def send() -> None:
        name = f"{seed}-{len(sent)}"
        sent[name] = time.perf_counter()
        engine.add_request(name, prompts[len(sent) - 1], sampling)

    for _ in range(min(clients, requests)):
        send()
    while engine.has_unfinished_requests():
        for output in engine.step():
            first.setdefault(output.request_id, time.perf_counter() - sent[output.request_id])
            if output.finished and len(sent) < requests:
                send()
    return Round(requests * NEW_TOKENS / (time.perf_counter() - begun), list(first.values()))


def table(rounds: dict[int, dict[str, list[Round]]], names: tuple[str, str]) -> str:
    base, pruned = names
    lines = [
        "| clients | tokens/s, original | pruned | ratio | first token p50, original | pruned | ratio | p95 ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def ratio(pairs: list[tuple[float, float]]) -> str:
        return f"{statistics.median(new / old for old, new in pairs):.2f}"

    for clients, found in rounds.items():
        speed = {name: [one.tokens_per_second for one in found[name]] for name in names}
        half = {name: [float(np.percentile(one.first, 50)) for one in found[name]] for name in names}
        most = {name: [float(np.percentile(one.first, 95)) for one in found[name]] for name in names}
        numbers = [f"{statistics.median(speed[n]):.1f}" for n in names]
        firsts = [f"{statistics.median(half[n]):.2f} s" for n in names]
        ratios = [ratio(list(zip(values[base], values[pruned], strict=True))) for values in (speed, half, most)]
        cells = [str(clients), *numbers, ratios[0], *firsts, *ratios[1:]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    layers = arguments.layers
    policy = Policy.depthwise(
        layers,
        mha_query_depth=layers // 4,
        mha_key_value_depth=layers * 7 // 8,
        mlp_depth=layers // 8,
        visual_tokens=384,
    )
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "original"
        save_model(model, layers, arguments.hidden)
        write_served(model, Path(folder) / "pruned", "pruned", policy)
        pipes: dict[str, Connection] = {}
        for name in ("original", "pruned"):
            here, there = context.Pipe()
            context.Process(target=serve, args=(str(Path(folder) / name), there), daemon=True).start()
            there.close()  # an engine that fails is then noticed
            assert here.recv() == "ready"
            pipes[name] = here
        found: dict[int, dict[str, list[Round]]] = {n: {name: [] for name in pipes} for n in arguments.clients}
        for number in range(arguments.rounds + 1):  # the first warms up
            for clients in arguments.clients:
                for name, pipe in pipes.items():
                    pipe.send((clients, max(4, clients), 1000 * number + clients))
                    one = pipe.recv()
                    if number:
                        found[clients][name].append(one)
        for pipe in pipes.values():
            pipe.send(None)
    text = table(found, ("original", "pruned"))
    size = f"{layers} layers x {arguments.hidden}, float32; {os.cpu_count()} cores, {arguments.rounds} rounds"
    text += f"\n\n{size}; {policy}"
    print(text)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
