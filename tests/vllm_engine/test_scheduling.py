"""Whatever vLLM's scheduler does with requests, answers are those of each prompt alone."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams

from tests.vllm_engine.engines import check, engine, prompts, run, scheduler

BLOCK = 32


@pytest.mark.parametrize(("name", "label"), [("llava", "split reduced"), ("qwen2_5_vl", "holes")])
def test_a_prompt_may_be_cut_anywhere_in_its_picture(name: str, label: str, tmp_path: Path) -> None:
    """Chunks of n tokens end n tokens into the prompt, and at every multiple."""
    with engine(name, label, tmp_path) as llm:
        for tokens in (*range(3, 75, 1), 100):
            scheduler(llm).max_num_scheduled_tokens = tokens
            check(run(llm, name, [0]), name, label)


@pytest.mark.parametrize("label", ["split", "joint reduced", "divprune"])
def test_chunks_of_several_prompts_and_decoding_share_steps(label: str, tmp_path: Path) -> None:
    with engine("llava", label, tmp_path) as llm:
        for tokens in (24, 40, 100):
            scheduler(llm).max_num_scheduled_tokens = tokens
            check(run(llm, "llava"), "llava", label)


@pytest.mark.parametrize("label", ["split", "joint reduced", "divprune"])
def test_preempted_requests_are_computed_again(label: str, tmp_path: Path) -> None:
    """Some in the middle of a picture, others while they answer."""
    with engine("llava", label, tmp_path) as llm:
        own, preempted = scheduler(llm), []
        own.max_num_scheduled_tokens = 100

        def preempt(steps: int) -> None:
            if steps in (2, 5, 9):
                preempted.extend(own.running)
                own.reset_prefix_cache(reset_running_requests=True)

        check(run(llm, "llava", between=preempt), "llava", label)
        assert len({request.request_id for request in preempted}) >= 3


def test_cached_prefixes_serve_frozen_policies(tmp_path: Path) -> None:
    """Without being asked for: it is vLLM's default, and layers hold every token's keys."""
    with engine("qwen2_5_vl", "frozen", tmp_path, block_size=BLOCK) as llm:
        check(run(llm, "qwen2_5_vl"), "qwen2_5_vl", "frozen")
        check(run(llm, "qwen2_5_vl"), "qwen2_5_vl", "frozen")
        again = prompts("qwen2_5_vl")[0].for_vllm("qwen2_5_vl")
        output = llm.generate(again, SamplingParams(max_tokens=1), use_tqdm=False)[0]
        assert (output.num_cached_tokens or 0) >= BLOCK


def test_an_aborted_request_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    with engine("llava", "joint", tmp_path) as llm:
        scheduler(llm).max_num_scheduled_tokens = 100  # the aborted one is in the middle of its picture
        found = run(llm, "llava", between=lambda steps: steps == 2 and llm.llm_engine.abort_request(["1"]))
        assert 1 not in found
        check(found, "llava", "joint")
        assert scheduler(llm).kv_cache_manager.block_pool.get_usage() == 0


def test_compiled_decoding(tmp_path: Path) -> None:
    """vLLM compiles the decoder's own loop for steps without pictures, unless it is told to run eagerly."""
    with engine("llava", "split reduced", tmp_path, enforce_eager=False) as llm:
        check(run(llm, "llava"), "llava", "split reduced")


def test_nothing_stays_of_requests_that_are_answered(tmp_path: Path) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())

    with engine("llava", "divprune", tmp_path) as llm:
        run(llm, "llava")
        run(llm, "llava")
        before = tensors()
        for _ in range(3):
            run(llm, "llava")
        assert tensors() == before
        assert not scheduler(llm).requests
