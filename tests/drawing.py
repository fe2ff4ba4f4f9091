"""How property tests draw their examples: always the same ones, or at random under `make fuzz`."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.internal.conjecture import providers

__all__ = ["FUZZ", "examples", "register_profiles", "same_constants", "seed"]

SAME, FUZZ = "same", "fuzz"
USUAL, MANY = 100, 500
"""Examples of a test that does not say how many; under `make fuzz` every test draws as many times more."""


def register_profiles() -> None:
    """`same` is the default. No test depends on how fast the machine is, nor on the variables that say it is CI."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    no_clock: dict[str, Any] = {"deadline": None, "suppress_health_check": checks}
    settings.register_profile(SAME, max_examples=USUAL, derandomize=True, database=None, **no_clock)
    remembered = DirectoryBasedExampleDatabase(".hypothesis/examples")
    settings.register_profile(
        FUZZ, max_examples=MANY, derandomize=False, database=remembered, print_blob=True, **no_clock
    )
    settings.load_profile(SAME)


def same_constants() -> None:
    """Let Hypothesis not draw constants of the source.

    It takes them from the modules that happen to be loaded, so that even derandomised examples depend on the tests that
    ran before in the same process, and on the folder that the checkout is in.
    """
    empty = providers._local_constants
    providers._get_local_constants = lambda: empty


def examples(count: int) -> settings:
    """Settings of a property test whose examples take their time: so many, and more under `make fuzz`."""
    return settings(max_examples=count * settings().max_examples // USUAL)


def seed() -> None:
    """The same state of every global generator."""
    random.seed(0)
    np.random.seed(0)  # of the libraries that use it
    torch.manual_seed(0)
