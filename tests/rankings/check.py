"""A ranked policy against the oracle: logits of all rows, of the last ones, and greedy tokens."""

from __future__ import annotations

import torch

from dop_compile import Policy
from tests.families import Family
from tests.rankings.oracle import leaving
from tests.reference import reference_generate, reference_logits
from tests.support import assert_rows_match, compile_eagerly, make_batch, padded, without


def check(name: str | Family, policy: Policy, padding: str = "left", tokens: int = 3) -> None:
    batch = make_batch(name, padding=padding)
    gone = leaving(batch, policy)
    logits = reference_logits(batch.model, batch.inputs, policy, None, batch.groups, None, batch.towers, gone)
    expected = padded(logits, batch.mask)
    compiled = compile_eagerly(batch.model, policy)
    inputs = batch.inputs | batch.call_arguments()
    one_axis = "mrope" not in str(batch.model.config.get_text_config(decoder=True))
    rotated = policy.ranking is not None and policy.ranking.criterion == "pivots"
    if rotated and "position_ids" not in inputs and one_axis:  # rows are alike where positions are
        inputs["position_ids"] = (batch.mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        assert_rows_match(compiled(**inputs).logits, expected, batch.mask)
        if padding == "right":
            return
        last = compiled(**inputs, logits_to_keep=1).logits
        found = compiled.generate(
            **without(batch.inputs, "position_ids"),
            **batch.call_arguments(),
            max_new_tokens=tokens,
            do_sample=False,
        )
    assert_rows_match(last, expected[:, -1:], torch.ones(len(last), 1, dtype=torch.bool))
    answer = reference_generate(batch.model, batch.inputs, policy, tokens, None, batch.groups, None, batch.towers, gone)
    # Some models' generate gives no positions: those of padded rows are then shifted, and with them what is rotated
    rows = [row for row in range(len(answer)) if not rotated or bool(batch.mask[row].all())]
    told = found[:, batch.mask.shape[1] :].tolist()
    assert [told[row] for row in rows] == [answer[row] for row in rows]
