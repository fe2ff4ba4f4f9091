"""Python reads this file first where its folder is on the path, in each of vLLM's processes.

torchvision's compiled half is for CUDA on PyPI and does not load beside a CPU torch; its Python half asks torch for two
operators while it is imported. They are declared just before, if they are not there.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

OPERATORS = ("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor", "qnms(Tensor boxes) -> Tensor")


class BeforeTorchvision(MetaPathFinder):
    """Is asked for every module that is imported, and finds none."""

    library: Any = None  # its operators go when it does

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname != "torchvision" or self.library is not None:
            return
        import torch

        self.library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in OPERATORS:
            if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
                self.library.define(schema)


sys.meta_path.insert(0, BeforeTorchvision())
