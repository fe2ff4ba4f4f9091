"""A compiled model in PyTorch as an engine of `dop_compile.serving`."""
