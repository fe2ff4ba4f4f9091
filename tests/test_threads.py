"""One compiled model, several threads: every answer is the one a single thread gets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch

from dop_compile import Policy
from tests.support import Batch, compile_eagerly, fixed_policies, make_batch

THREADS = 4


@pytest.mark.parametrize(("name", "warm"), [("llava", False), ("qwen2_5_vl", False), ("qwen2_5_vl", True)])
def test_tiers_and_inputs_of_four_threads_do_not_mix(name: str, warm: bool) -> None:
    """Cold: the threads also race to build the programs."""
    rows = (
        [[("text", 4), ("image",), ("text", 3)]],
        [[("image", 1), ("text", 2), ("image",), ("text", 5)], [("text", 3)]],
    )
    batches = [make_batch(name, row, seed=seed) for seed, row in enumerate(rows)]
    model = batches[0].model
    layers = batches[0].family.num_layers
    tiers = {
        "full": Policy.full(layers),
        "apart": Policy.depthwise(layers, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2),
        "given": fixed_policies(batches[0])["given_scattered"][0],
    }
    jobs = [(batch, tier) for batch in batches for tier in tiers]

    def answer(compiled: Any, batch: Batch, tier: str) -> tuple[torch.Tensor, torch.Tensor]:
        given = {"visual_indices": batch.random_kept(5)} if tier == "given" else {}
        with torch.no_grad():
            logits = compiled.tier(tier)(**batch.inputs, **given).logits
        tokens = compiled.generate(**batch.inputs, **given, tier=tier, max_new_tokens=3, do_sample=False)
        return logits, tokens

    alone = compile_eagerly(model, tiers, debug=False)
    expected = [answer(alone, *job) for job in jobs]
    compiled = alone if warm else compile_eagerly(model, tiers, debug=False)
    start = Barrier(THREADS)

    def work(thread: int) -> list[Any]:
        torch.set_num_threads(1)
        start.wait()
        order = jobs[thread:] + jobs[:thread]
        found = [answer(compiled, *job) for job in order]
        return found[len(jobs) - thread :] + found[: len(jobs) - thread]

    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(work, range(THREADS)):
            for (logits, tokens), (expected_logits, expected_tokens) in zip(found, expected, strict=True):
                assert torch.equal(tokens, expected_tokens)
                assert torch.equal(logits, expected_logits)
