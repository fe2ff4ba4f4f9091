"""What a served directory's `config.json` says under "dop_compile": the policy, and what it was written for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dop_compile.documents import Format
from dop_compile.policy.policy import Policy

__all__ = ["KEY", "Section"]

KEY = "dop_compile"
FORMAT = Format("dop_compile.vllm", (1,), "a directory that `dop-compile vllm` wrote", "write it again")
FIELDS = ("tier", "policy", "architecture")


@dataclass(frozen=True)
class Section:
    """One served policy.

    Args:
        tier: its name.
        policy: operations, visual tokens, reducer with options, and position convention.
        architecture: the checkpoint's own.
    """

    tier: str
    policy: Policy
    architecture: str

    def to_dict(self) -> dict[str, Any]:
        policy = json.loads(self.policy.to_json())
        return {**FORMAT.header(), "tier": self.tier, "policy": policy, "architecture": self.architecture}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Section:
        """Of a `config.json`.

        Raises:
            ValueError: there is none, or one that this release does not read; the message names the field.
        """
        if KEY not in config:
            raise ValueError(f"config.json has no field {KEY!r}; write the directory with `dop-compile vllm`")
        try:
            document = FORMAT.open(config[KEY]).take(FIELDS, keeps=False)
            if wrong := set(document).symmetric_difference(FIELDS):
                raise ValueError(f"{', '.join(sorted(wrong))}: unknown or missing")
            policy = Policy.from_json(json.dumps(document["policy"]))
        except ValueError as error:
            raise ValueError(f"config.json: {KEY}: {error}") from error
        return cls(str(document["tier"]), policy, str(document["architecture"]))
