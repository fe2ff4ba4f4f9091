"""What compiling costs: trace and rewrite, memory, and cold torch.compile against the number of layers.

python benchmarks/compile_time.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from dop_compile import Policy, dop_compile
from dop_compile.compiler import build_graph
from dop_compile.policy.keep import KeepTable
from dop_compile.tokens import Universe

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 1000}


def trace_and_rewrite() -> float:
    """Seconds for a 32-layer 7B decoder on the meta device, best of three."""
    with torch.device("meta"):
        decoder = LlamaModel(LlamaConfig(num_hidden_layers=32)).eval()
    policy = Policy.depthwise(32, mha_query_depth=6, mha_key_value_depth=26, mlp_depth=5)
    keep = KeepTable.from_policy(policy, policy.groups)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        build_graph(decoder, keep, Universe(keep.groups, frozenset({"text"})))
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_share() -> tuple[float, float]:
    """MiB of weights, and what `dop_compile` adds to the resident memory as a share of them."""
    config = LlamaConfig(hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16)
    model = LlamaForCausalLM(config).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    warm = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=2)).eval()
    dop_compile(warm, Policy.full(2))
    before = _resident()
    compiled = dop_compile(model, Policy.depthwise(24, mha_depth=20, mlp_depth=14))
    added = _resident() - before
    assert compiled is not None
    return weights / 2**20, added / weights


def cold_compile(layers: int) -> float:
    """Seconds of the first prefill under inductor without any cache, in this process."""
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=layers)).eval()
    policy = Policy.depthwise(layers, mha_depth=3 * layers // 4, mlp_depth=layers // 2)
    compiled = dop_compile(model, policy)
    ids = torch.randint(0, 1000, (1, 64))
    groups = torch.zeros_like(ids)
    groups[:, 8:40] = 1
    started = time.perf_counter()
    with torch.inference_mode():
        compiled(ids, token_groups=groups, logits_to_keep=1)
    return time.perf_counter() - started


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--cold":
        cold_compile(2)  # starts the compiler itself: what is compared is the work per model
        torch._dynamo.reset()
        print(cold_compile(int(sys.argv[2])))
        return
    print(f"trace + rewrite, 32-layer 7B decoder on meta: {trace_and_rewrite():.2f} s")
    weights, share = memory_share()
    print(f"dop_compile adds {100 * share:.2f} % of {weights:.0f} MiB of weights")
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    seconds = {}
    for layers in (8, 32):
        command = [sys.executable, __file__, "--cold", str(layers)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        seconds[layers] = float(result.stdout.split()[-1])
        print(f"cold inductor compile, {layers} layers: {seconds[layers]:.1f} s")
    print(f"ratio 32 / 8 layers: {seconds[32] / seconds[8]:.2f}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; python {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
