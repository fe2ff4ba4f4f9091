"""Many clients for some time: answers stay those of single requests, and nothing piles up.

The long one is among the conformance tests (`tests/conformance/test_soak.py`).
"""

from __future__ import annotations

from tests.serving.soak import soak


def test_eight_clients_with_mixed_tiers() -> None:
    soak(requests=240)
