"""Exports are kept where the export's own tests keep theirs."""

from tests.onnx_export.conftest import exports_folder

__all__ = ["exports_folder"]
