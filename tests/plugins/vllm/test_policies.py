"""Which policies can be served, what layers do under them, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest

from dop_compile import Policy
from dop_compile.errors import UnsupportedModelError, UnsupportedUsageError
from dop_compile.plugins.vllm.families import FAMILIES, family_of
from dop_compile.plugins.vllm.policies import check_policy
from dop_compile.plugins.vllm.roles import Roles
from dop_compile.policy.ranking import Ranking, Stage

LLAVA, QWEN = FAMILIES["LlavaForConditionalGeneration"], FAMILIES["Qwen2_5_VLForConditionalGeneration"]


def kinds(policy: Policy) -> list[str]:
    return [role.attention + ("+mlp" if role.mlp else "") for role in Roles.of(policy).layers]


def test_roles_are_without_what_nobody_reads() -> None:
    assert kinds(Policy.full(3)) == ["full+mlp", "full+mlp", "frozen"]
    assert kinds(Policy.depthwise(4, mha_depth=2)) == ["full+mlp", "frozen", "absent", "absent"]
    split = Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)
    assert kinds(split) == ["full+mlp", "frozen+mlp", "frozen", "absent"]
    assert Roles.of(split).removed_from == 3
    assert not Roles.of(split).stores_every_key
    holes = Policy.from_operations(4, [("visual", 1, "mha_key_value"), ("visual", 2, "mlp")])
    assert kinds(holes) == ["full+mlp", "keyless+mlp", "full", "frozen"]
    assert Roles.of(Policy.depthwise(4, mha_depth=0)).removed_from == 0
    assert Roles.of(Policy.depthwise(4, mha_query_depth=0)).stores_every_key


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy.depthwise(4, system_mlp_depth=2), "system tokens cannot be left out"),
        (Policy.from_operations(4, [("text", 2, "mlp")]), "text tokens cannot be left out"),
        (Policy(4, salient_fraction=0.5), "salient_fraction"),
        (Policy.depthwise(4, visual_tokens=8, positions="compact"), "keep their positions"),
        (Policy.depthwise(4, visual_tokens=8, reducer="cdpruner"), "'cdpruner' does not fit"),
        (Policy.depthwise(4, visual_tokens=8, reducer="visionzip"), "contextual=0"),
        (Policy.depthwise(4, visual_tokens=0), "keep at least 1"),
    ],
)
def test_policies_that_cannot_run_say_why(policy: Policy, message: str) -> None:
    with pytest.raises(UnsupportedUsageError, match=message):
        check_policy(policy, LLAVA, 4)


def test_a_ranking_is_refused() -> None:
    ranking = Ranking("last_token", (Stage(1, 4),))
    with pytest.raises(UnsupportedUsageError, match="ranking"):
        check_policy(Policy(4, ranking=ranking), LLAVA, 4)


def test_another_depth_and_a_tower_without_a_class_token() -> None:
    with pytest.raises(ValueError, match="for 4 layers, the model has 5"):
        check_policy(Policy.full(4), LLAVA, 5)
    policy = Policy.depthwise(4, visual_tokens=8, reducer="vispruner")
    check_policy(policy, LLAVA, 4)
    with pytest.raises(UnsupportedUsageError, match=r"\[CLS\], which Qwen2\.5-VL does not give"):
        check_policy(policy, QWEN, 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["InternVLChatModel"]}, "ends in -hf"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "expected one of LlavaForConditionalGeneration"),
        ({"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "opt"}}, "kind 'opt'"),
        (
            {
                "architectures": ["LlavaForConditionalGeneration"],
                "text_config": {"model_type": "qwen2", "layer_types": ["sliding_attention"]},
            },
            "sliding_attention",
        ),
    ],
)
def test_models_that_cannot_be_served_say_why(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        family_of(config)
