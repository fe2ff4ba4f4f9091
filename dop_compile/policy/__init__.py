"""Policies: who takes part in which module of which layer, how many visual tokens enter, and what that costs."""

from dop_compile.policy.operations import Operation
from dop_compile.policy.policy import Policy
from dop_compile.policy.provenance import Provenance
from dop_compile.policy.ranking import Ranking, Stage

__all__ = ["Operation", "Policy", "Provenance", "Ranking", "Stage"]
