"""Visual token reducers: which visual tokens of a sample enter the decoder."""

from dop_compile.reducers.base import OPTIONAL_FIELDS, Reducer, Selection, VisualContext
from dop_compile.reducers.cdpruner import CDPrunerReducer
from dop_compile.reducers.divprune import DivPruneReducer
from dop_compile.reducers.given import GivenReducer
from dop_compile.reducers.prumerge import PruMergePlusReducer, PruMergeReducer
from dop_compile.reducers.quotas import quotas
from dop_compile.reducers.random import RandomReducer
from dop_compile.reducers.registry import ENTRY_POINT_GROUP, create, fitting, known, register
from dop_compile.reducers.relevance import ClipRelevance, InstructionRelevance
from dop_compile.reducers.resize import ResizeReducer, resize_processor
from dop_compile.reducers.select import needs, select_batch, select_tokens
from dop_compile.reducers.trim import TrimReducer
from dop_compile.reducers.uniform import UniformReducer
from dop_compile.reducers.visionzip import VisionZipReducer
from dop_compile.reducers.vispruner import VisPrunerReducer

__all__ = [
    "ENTRY_POINT_GROUP",
    "OPTIONAL_FIELDS",
    "CDPrunerReducer",
    "ClipRelevance",
    "DivPruneReducer",
    "GivenReducer",
    "InstructionRelevance",
    "PruMergePlusReducer",
    "PruMergeReducer",
    "RandomReducer",
    "Reducer",
    "ResizeReducer",
    "Selection",
    "TrimReducer",
    "UniformReducer",
    "VisPrunerReducer",
    "VisionZipReducer",
    "VisualContext",
    "create",
    "fitting",
    "known",
    "needs",
    "quotas",
    "register",
    "resize_processor",
    "select_batch",
    "select_tokens",
]
