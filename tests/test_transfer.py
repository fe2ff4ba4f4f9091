"""Arrays and masks across the border: shapes, kinds and values survive being one buffer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dop_compile.transfer import read_back, to_device

ARRAYS = [
    np.arange(6).reshape(2, 3),
    np.array([[True, False, True]]),
    np.zeros((0, 4), dtype=np.int64),
    np.arange(12).reshape(3, 4)[:, ::2],
]


def test_on_the_cpu_arrays_are_shared() -> None:
    there = to_device(ARRAYS, torch.device("cpu"))
    assert [tensor.tolist() for tensor in there] == [array.tolist() for array in ARRAYS]


def test_one_buffer_has_views_of_every_shape_and_kind() -> None:
    there = to_device(ARRAYS, torch.device("meta"))
    assert [tuple(tensor.shape) for tensor in there] == [array.shape for array in ARRAYS]
    assert [tensor.dtype for tensor in there] == [torch.long, torch.bool, torch.long, torch.long]


def test_kept_tensors_are_of_use_in_training() -> None:
    with torch.inference_mode():
        (index,) = to_device([np.array([0])], torch.device("cpu"))
    assert not index.is_inference()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    there = to_device(ARRAYS, torch.device("cuda"))
    assert [tensor.tolist() for tensor in there] == [array.tolist() for array in ARRAYS]
    masks = [torch.tensor([[True], [False]], device="cuda"), torch.tensor([True]), torch.tensor(False, device="cuda")]
    assert [mask.tolist() for mask in read_back(masks)] == [[[True], [False]], [True], False]
