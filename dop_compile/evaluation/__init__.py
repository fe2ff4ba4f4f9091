"""Methods compared on one model and one set of samples: accuracy, FLOPs, memory and times."""

from dop_compile.evaluation.intervals import Difference, paired_difference
from dop_compile.evaluation.measuring import count_tokens, evaluate
from dop_compile.evaluation.methods import Method, Planner, method_names
from dop_compile.evaluation.recommend import Recommendation, recommend
from dop_compile.evaluation.result import Evaluation, Row, Run

__all__ = [
    "Difference",
    "Evaluation",
    "Method",
    "Planner",
    "Recommendation",
    "Row",
    "Run",
    "count_tokens",
    "evaluate",
    "method_names",
    "paired_difference",
    "recommend",
]
