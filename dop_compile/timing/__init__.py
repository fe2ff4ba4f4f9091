"""How fast a model answers under each policy, against the original, in one interleaved run."""

from dop_compile.timing.measuring import bench
from dop_compile.timing.result import Benchmark, Contender, Setting, Timing

__all__ = ["Benchmark", "Contender", "Setting", "Timing", "bench"]
