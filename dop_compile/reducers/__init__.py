"""Visual token reducers: which visual tokens of a sample enter the decoder."""

from dop_compile.reducers.base import OPTIONAL_FIELDS, Reducer, Selection, VisualContext
from dop_compile.reducers.given import GivenReducer
from dop_compile.reducers.quotas import quotas
from dop_compile.reducers.random import RandomReducer
from dop_compile.reducers.registry import ENTRY_POINT_GROUP, create, known, register
from dop_compile.reducers.select import select_tokens
from dop_compile.reducers.uniform import UniformReducer

__all__ = [
    "ENTRY_POINT_GROUP",
    "OPTIONAL_FIELDS",
    "GivenReducer",
    "RandomReducer",
    "Reducer",
    "Selection",
    "UniformReducer",
    "VisualContext",
    "create",
    "known",
    "quotas",
    "register",
    "select_tokens",
]
