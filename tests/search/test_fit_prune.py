"""FitPrune: attention shares from full maps of the untouched model, and the fit by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dop_compile import Policy, prefill_flops
from dop_compile.search import AttentionShares, InfeasibleBudgetError, fit_prune, measure_attention
from tests.search.synthetic import dims_of
from tests.support import make_batch

GRID = 1001


def sample(row: int) -> dict[str, torch.Tensor]:
    batch = make_batch("llava")
    keep = batch.mask[row]
    pixels = batch.inputs["pixel_values"]
    first = sum(batch.counts[:row]) // 9
    return {
        "input_ids": batch.inputs["input_ids"][row : row + 1, keep],
        "attention_mask": torch.ones(1, int(keep.sum()), dtype=torch.long),
        "pixel_values": pixels[first : first + batch.counts[row] // 9],
    }


def test_shares_are_those_of_full_maps() -> None:
    batch = make_batch("llava")
    model = batch.model
    rows = [sample(1), sample(2)]
    found = measure_attention(model, rows, progress=False)
    expected = np.zeros((2, 3, GRID))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            for inputs in rows:
                maps = model(**inputs, output_attentions=True).attentions
                visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
                text = torch.arange(int(visual[0]), inputs["input_ids"].shape[1])
                text = text[~torch.isin(text, visual)]
                for layer, attention in enumerate(maps[:-1]):
                    most = attention[0].double().amax(0)
                    own, cross = most[visual][:, visual].sum(0).numpy(), most[text][:, visual].sum(0).numpy()
                    order = np.argsort(own * cross, kind="stable")
                    for number, mass in enumerate((own, cross)):
                        for place, fraction in enumerate(np.linspace(0, 1, GRID)):
                            whole = fraction * len(order)
                            gone = min(int(np.floor(whole + 1e-9)), len(order))
                            held = mass[order[:gone]].sum()
                            if gone < len(order):
                                held += (whole - gone) * mass[order[gone]]
                            expected[number, layer, place] += held / mass.sum() / len(rows)
    finally:
        model.set_attn_implementation(before)
    np.testing.assert_allclose(found.own, expected[0], atol=2e-5)
    np.testing.assert_allclose(found.cross, expected[1], atol=2e-5)
    assert found.samples == 2


def drawn(seed: int, layers: int = 6) -> AttentionShares:
    draw = np.random.default_rng(seed)
    powers = draw.uniform(1, 6, (2, layers - 1, 1))
    curves = np.linspace(0, 1, GRID) ** powers
    return AttentionShares(curves[0], curves[1], 3)


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_loss_that_meets_the_budget(seed: int) -> None:
    shares, dims, counts = drawn(seed), dims_of(6), [(3, 40, 9), (2, 17, 5)]
    whole = sum(prefill_flops(dims, Policy.full(6), *row) for row in counts)

    def cost(policy: Policy) -> float:
        return sum(prefill_flops(dims, policy, *row) for row in counts) / whole

    for budget in (0.9, 0.6, 0.4):
        found = fit_prune(shares, dims, counts, budget)
        assert cost(found) <= budget
        assert found.ranking is not None
        # Brute force over shares that may be lost: none that meets the budget keeps more
        kept = [stage.fraction for stage in found.ranking.stages]
        costs = [cost(shares.policy(alpha)) for alpha in np.linspace(0, 1, 1001)]
        assert max(spent for spent in costs if spent <= budget) <= cost(found)
        assert kept == sorted(kept, reverse=True)


def test_kept_never_grows_and_both_shares_are_respected() -> None:
    shares = drawn(7)
    for alpha in (0.0, 0.1, 0.5, 1.0):
        kept = shares.kept(alpha)
        assert (np.diff(kept) <= 0).all()
        for layer in range(5):
            removable = [
                n / (GRID - 1) for n in range(GRID) if shares.own[layer, n] <= alpha and shares.cross[layer, n] <= alpha
            ]
            assert kept[layer] <= 1 - max(removable) + 1e-12
    assert shares.policy(0.0).is_full


def test_refused() -> None:
    shares, dims = drawn(1), dims_of(6)
    with pytest.raises(InfeasibleBudgetError, match="the first layer has every token"):
        fit_prune(shares, dims, [(3, 40, 9)], 0.05)
    with pytest.raises(ValueError, match="0 < budget <= 1"):
        fit_prune(shares, dims, [(3, 40, 9)], 2.0)
    with pytest.raises(ValueError, match="at least one with visual tokens"):
        measure_attention(make_batch("llava").model, [], progress=False)
