"""The file of weights: each content once, in row-major order, without a second copy in memory."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dop_compile.onnx.export import weights
from dop_compile.onnx.export.weights import WeightStore


def read(path: Path, place: tuple[int, int], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    data = path.read_bytes()[place[0] : place[0] + place[1]]
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_stores_views_in_row_major_order(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6 * 5 * 4).view(6, 5, 4).to(dtype)
    views = [tensor, tensor.permute(2, 0, 1), tensor[1:4, ::2], tensor[0, 0, 0]]
    with WeightStore(tmp_path / "w") as store:
        places = [store.add(view, lasting=True) for view in views]
        file = store.finish()
    for view, place in zip(views, places, strict=True):
        assert torch.equal(read(tmp_path / "w", place, dtype, tuple(view.shape)), view)
    assert file.bytes == (tmp_path / "w").stat().st_size
    assert file.sha256 == hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    order=st.randoms(use_true_random=False),
    piece=st.integers(4, 64),
)
def test_pieces_are_the_whole(sizes: list[int], order: object, piece: int) -> None:
    tensor = torch.randn(*sizes).permute(*order.sample(range(len(sizes)), len(sizes)))  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "PIECE_BYTES", piece)
        pieces = list(weights._pieces(tensor))
    assert all(part.is_contiguous() for part in pieces)
    assert torch.equal(torch.cat([part.flatten() for part in pieces]), tensor.flatten())


def test_equal_content_is_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(64, 32)
    with WeightStore(tmp_path / "w") as store:
        first = store.add(weight, lasting=True)
        assert store.add(weight, lasting=True) == first
        assert store.add(weight.clone(), lasting=False) == first
        assert store.add(weight.t(), lasting=True) != first
        assert store.add(weight.t().contiguous().t().t(), lasting=True) == store.add(weight.t(), lasting=True)
        assert store.tensors == 2
        size = store.finish().bytes
    assert size <= 2 * weight.numel() * 4 + 2 * weights.PAGE


def test_places_are_aligned(tmp_path: Path) -> None:
    with WeightStore(tmp_path / "w") as store:
        small = [store.add(torch.randn(number), lasting=False) for number in (3, 5, 7)]
        large = store.add(torch.randn(weights.PAGE_ALIGNED_FROM), lasting=False)
    assert all(offset % weights.ALIGNMENT == 0 for offset, _ in small)
    assert large[0] % weights.PAGE == 0


LIMITED = """
import resource, sys
from pathlib import Path

import torch
import transformers as hf
from dop_compile import Policy
from dop_compile.onnx.export.export import export_onnx

def build(width):
    sizes = {"hidden_size": 256, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, **sizes)).eval()

folder, width = Path(sys.argv[1]), int(sys.argv[2])
export_onnx(build(64), Policy.full(1), folder / "first")  # what the exporter itself needs is in memory after this
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
weights = 3 * width * 256 * 4
resource.setrlimit(resource.RLIMIT_DATA, (used + weights * 3 // 2, used + weights * 3 // 2))
model = build(width)
if sys.argv[3] == "copy":
    copies = [p.clone() for p in model.parameters()]
export_onnx(model, Policy.full(1), folder / "second")
"""


@pytest.mark.conformance
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory limits of Linux")
@pytest.mark.parametrize("mode", ["export", "copy"])
def test_weights_of_two_thirds_of_the_memory(tmp_path: Path, mode: str) -> None:
    """A model is exported, most of it transposed, within 1.5 x its size; a copy of it does not fit."""
    width = 100_000
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(width), mode]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if mode == "copy":
        assert done.returncode != 0
        assert "memory" in done.stderr.lower()
    else:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "second" / "weights.bin").stat().st_size > 3 * width * 256 * 4
