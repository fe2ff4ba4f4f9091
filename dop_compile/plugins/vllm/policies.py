"""Which policies vLLM can run, and why it cannot run the others.

vLLM encodes a picture without the prompt that shows it, and keeps the result for others that do. So:
1. depths, and any operations of the visual group           2. reducers that look at the picture alone
Refused: system and text tokens; split visual tokens; rankings inside the decoder; compact positions; reducers that read
the instruction, merge tokens, or need what the vision tower does not give; no visual tokens at all.
"""

from __future__ import annotations

from dop_compile.errors import UnsupportedUsageError
from dop_compile.plugins.vllm.families import Family
from dop_compile.policy.policy import Policy

__all__ = ["CHOOSING", "FIXED", "check_policy", "reads_values"]

FIXED = ("uniform", "random")
"""Reducers that go by numbers of tokens alone: where kept tokens stand is known before the vision tower has run."""
CHOOSING = ("divprune", "visionzip", "vispruner")
"""Reducers that look at what the vision tower made of the picture."""
OF_CLASS_TOKEN = ("visionzip", "vispruner")


def reads_values(policy: Policy) -> bool:
    """Whether which tokens are kept depends on what a picture shows."""
    return policy.visual_tokens is not None and policy.reducer in CHOOSING


def check_policy(policy: Policy, family: Family, num_layers: int) -> None:
    """Raises UnsupportedUsageError for a policy that vLLM cannot run; ValueError for one of another depth."""
    policy.check_layers(num_layers)
    others = sorted({op.group for op in policy.pruned} - {"visual"})
    if policy.salient_fraction is not None:
        _refuse("salient_fraction", "visual tokens cannot be split there", "search a policy of the whole visual group")
    if others:
        _refuse("pruned", f"operations of {', '.join(others)} tokens cannot be left out", "prune visual tokens only")
    if policy.ranking is not None:
        _refuse(
            "ranking",
            "who leaves inside the decoder would have to be known when the cache is laid out",
            "use a reducer and depths (`Policy.depthwise`)",
        )
    if policy.visual_tokens is not None:
        _check_reduction(policy, family)


def _check_reduction(policy: Policy, family: Family) -> None:
    if policy.visual_tokens == 0:
        _refuse("visual_tokens", "a prompt keeps a place for each of its pictures", "keep at least 1, or send none")
    if policy.positions != "original":
        _refuse(
            "positions",
            "kept tokens keep their positions in vLLM",
            "search the policy with positions='original', which reads better too (docs/concepts.md)",
        )
    name = policy.reducer
    if name not in (*FIXED, *CHOOSING):
        _refuse(
            "reducer",
            f"{name!r} does not fit, since vLLM encodes a picture without its prompt and merges no tokens",
            f"use one of {', '.join((*FIXED, *CHOOSING))}",
        )
    if name == "visionzip" and policy.options.get("contextual") != 0:
        _refuse("reducer_options", "visionzip's contextual tokens are merged", "search it with contextual=0")
    if name in OF_CLASS_TOKEN and not family.has_class_token:
        _refuse("reducer", f"{name!r} needs the attention of [CLS], which {family.name} does not give", "use divprune")


def _refuse(field: str, why: str, instead: str) -> None:
    raise UnsupportedUsageError(f"{field}: this policy cannot run in vLLM: {why}; {instead}")
