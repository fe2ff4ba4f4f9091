"""A server that is asked two thousand times."""

from __future__ import annotations

import pytest

from tests.serving.soak import soak


@pytest.mark.conformance
def test_two_thousand_requests() -> None:
    soak(requests=2000)
