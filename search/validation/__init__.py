"""Whether the assumptions of the search hold on a model: the studies of DOP's appendices E.1, F.1, F.3, F.4 and F.7,
and of its Table 4.

    measure = functools.partial(measure_policies, model, samples)
    study = rank_correlation(divergences, measure)
    print(study.table())
    study.figure().savefig("ranks.png")

Every study takes the losses of policies from a callable (`Measure`), so that any metric will do: the joint divergence
of `measure_policies`, or one minus the accuracies of `measure_accuracy`.
"""

from dop_compile.search.validation.additive import joint_grid, rank_correlation
from dop_compile.search.validation.depthwise import consecutive_operations, swapped_operations
from dop_compile.search.validation.stability import stability
from dop_compile.search.validation.study import Measure, Study
from dop_compile.search.validation.tasks import cross_task

__all__ = [
    "Measure",
    "Study",
    "consecutive_operations",
    "cross_task",
    "joint_grid",
    "rank_correlation",
    "stability",
    "swapped_operations",
]
