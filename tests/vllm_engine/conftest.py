"""These tests run inside vLLM's own environment (`make test-vllm`); elsewhere they are not collected."""

from __future__ import annotations

import os
from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") is not None else ["test_*.py"]

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # engines in the tests' own process
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
)

if os.environ.get("ANY_VLLM") and not collect_ignore_glob:  # `make test-vllm-newest`: does what is new work as well?
    import vllm

    from dop_compile.plugins.vllm import internals

    internals.SEEN = (*internals.SEEN, ".".join(vllm.__version__.split(".")[:2]))
