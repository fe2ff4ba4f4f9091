"""Graph passes: from a traced decoder and a keep table to a decoder that computes only what the policy keeps."""

from dop_compile.passes.annotate import ANNOTATE
from dop_compile.passes.dump import dump
from dop_compile.passes.graph import DecoderGraph
from dop_compile.passes.infra import Pass, describe_passes, run_passes
from dop_compile.passes.narrow_residual import NARROW_RESIDUAL
from dop_compile.passes.remove_dead import REMOVE_DEAD
from dop_compile.passes.report import PassReport
from dop_compile.passes.resume import RESUME
from dop_compile.passes.share_frozen import SHARE_FROZEN
from dop_compile.passes.slice_operations import SLICE_OPERATIONS
from dop_compile.passes.verify import VERIFY, check_graph

__all__ = [
    "PIPELINE",
    "DecoderGraph",
    "Pass",
    "PassReport",
    "check_graph",
    "describe_passes",
    "dump",
    "run_passes",
]

PIPELINE: tuple[Pass, ...] = (
    ANNOTATE,  # find the blocks: everything after works on them
    RESUME,  # only with `first_layer`: what comes before that layer goes before anything is done to it
    REMOVE_DEAD,  # only shrinks sets, so it comes before the sets are turned into slices
    SLICE_OPERATIONS,  # each block computes for its own tokens; the residual stream still holds all
    NARROW_RESIDUAL,  # needs the slices to know who reads the stream when
    SHARE_FROZEN,  # needs the frozen streams that narrowing sets aside
    VERIFY,  # always last: what leaves the pipeline is legal
)
