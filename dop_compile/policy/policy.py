"""Which token group takes part in which module of which layer: the value every backend reads.

Cases, each normalised at the door to one canonical set of pruned operations:
1. depths (`Policy.depthwise`)   2. operations (`Policy.from_operations`), "mha" being both attention parts
3. the visual group split into a salient part and the rest (`salient_fraction`)
Refused: pruning the group "output"; a split group without `salient_fraction`; layers or names out of range.

Sources: DOP eq. 3-4 and 14 (depths), GSOP section 3 (query and key-value apart, salient split).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from dop_compile.checks import choice, finite, integer, pairs, store
from dop_compile.documents import write_atomic
from dop_compile.policy import shown
from dop_compile.policy import text as policy_text
from dop_compile.policy.operations import MODULE_SHORTHAND, MODULES, PROMPT_GROUPS, SPLIT_VISUAL_GROUPS, Operation
from dop_compile.policy.provenance import Provenance
from dop_compile.policy.ranking import Ranking
from dop_compile.zoo import lookup as zoo

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["JsonScalar", "Policy", "Positions"]

Positions = Literal["original", "compact"]
JsonScalar = str | int | float | bool | None
Pairs = Mapping[str, Any] | Iterable[tuple[str, Any]]


@dataclass(frozen=True, repr=False)
class Policy:
    """Pruned operations and visual token reduction for a decoder of `num_layers` layers.

    `visual_tokens`: visual tokens per sample that enter the decoder (None: all, 0: none). `salient_fraction`
    f, 0 < f < 1, splits the visual group into the f most salient tokens and the rest. `ranking`: visual tokens that
    leave inside the decoder, ranked there; what is pruned of `visual` is pruned of all of them. Hashable, equal by
    value. Raises TypeError or ValueError naming the field for anything that is not a policy.
    """

    num_layers: int
    pruned: frozenset[Operation] = frozenset()
    visual_tokens: int | None = None
    reducer: str = "uniform"
    reducer_options: tuple[tuple[str, JsonScalar], ...] = ()
    positions: Positions = "original"
    salient_fraction: float | None = None
    provenance: Provenance | None = None
    ranking: Ranking | None = None

    def __post_init__(self) -> None:
        store(self, "num_layers", integer("num_layers", self.num_layers, low=1))
        if self.visual_tokens is not None:
            store(self, "visual_tokens", integer("visual_tokens", self.visual_tokens, low=0, none="keeps all"))
        if not isinstance(self.reducer, str) or not self.reducer:
            raise TypeError(f"reducer: expected the name of a reducer such as 'uniform', got {self.reducer!r}")
        options = pairs("reducer_options", self.reducer_options)
        for name, value in options:
            if not isinstance(value, str | int | float | None):
                raise TypeError(f"reducer_options[{name!r}]: expected a JSON scalar, got {type(value).__name__}")
            if isinstance(value, float):
                finite(f"reducer_options[{name!r}]", value)
        store(self, "reducer_options", options)
        choice("positions", self.positions, get_args(Positions))
        if self.salient_fraction is not None:
            fraction = finite("salient_fraction", self.salient_fraction)
            if not 0 < fraction < 1:
                raise ValueError(f"salient_fraction: expected 0 < fraction < 1 or None (no split), got {fraction}")
            store(self, "salient_fraction", fraction)
        if self.provenance is not None and not isinstance(self.provenance, Provenance):
            raise TypeError(f"provenance: expected a Provenance or None, got {type(self.provenance).__name__}")
        store(self, "pruned", frozenset(self._canonical(self.pruned)))
        if self.ranking is not None:
            if not isinstance(self.ranking, Ranking):
                raise TypeError(f"ranking: expected a Ranking or None, got {type(self.ranking).__name__}")
            self.ranking.check(self)

    @classmethod
    def full(cls, num_layers: int) -> Policy:
        """Nothing pruned, every visual token kept: 100 % of the FLOPs."""
        return cls(num_layers)

    @classmethod
    def depthwise(
        cls,
        num_layers: int,
        *,
        mha_depth: int | None = None,
        mlp_depth: int | None = None,
        visual_tokens: int | None = None,
        reducer: str = "uniform",
        mha_query_depth: int | None = None,
        mha_key_value_depth: int | None = None,
        system_mha_depth: int | None = None,
        system_mlp_depth: int | None = None,
        reducer_options: Pairs = (),
        positions: Positions = "original",
        provenance: Provenance | None = None,
    ) -> Policy:
        """The paper's (d_A, d_P, n_v): a depth d keeps layers 0..d-1, None keeps all (DOP eq. 3-4, 14).

        `mha_query_depth` and `mha_key_value_depth` override `mha_depth` for their half of the attention.
        """
        layers = integer("num_layers", num_layers, low=1)
        first_pruned: dict[tuple[str, str], int] = {}
        # The specific query and key-value depths come after mha_depth, which they override.
        for group, module, field, given in (
            ("visual", "mha", "mha_depth", mha_depth),
            ("visual", "mha_query", "mha_query_depth", mha_query_depth),
            ("visual", "mha_key_value", "mha_key_value_depth", mha_key_value_depth),
            ("visual", "mlp", "mlp_depth", mlp_depth),
            ("system", "mha", "system_mha_depth", system_mha_depth),
            ("system", "mlp", "system_mlp_depth", system_mlp_depth),
        ):
            if given is not None:
                depth = integer(field, given, low=0, high=layers, none="keeps every layer")
                first_pruned |= {(group, part): depth for part in MODULE_SHORTHAND.get(module, (module,))}
        return cls.from_operations(
            layers,
            [(g, layer, m) for (g, m), depth in first_pruned.items() for layer in range(depth, layers)],
            visual_tokens=visual_tokens,
            reducer=reducer,
            reducer_options=reducer_options,
            positions=positions,
            provenance=provenance,
        )

    @classmethod
    def from_operations(
        cls,
        num_layers: int,
        pruned: Iterable[Operation | tuple[str, int, str]],
        *,
        visual_tokens: int | None = None,
        reducer: str = "uniform",
        reducer_options: Pairs = (),
        positions: Positions = "original",
        salient_fraction: float | None = None,
        provenance: Provenance | None = None,
    ) -> Policy:
        """Any (group, layer, module); "mha" is both attention parts, "visual" both parts of a split group."""
        return cls(
            num_layers,
            # The looser types at the door are what __post_init__ normalises.
            cast("frozenset[Operation]", pruned),
            visual_tokens,
            reducer,
            cast("tuple[tuple[str, JsonScalar], ...]", reducer_options),
            positions,
            salient_fraction,
            provenance,
        )

    @classmethod
    def published(cls, name: str, budget: str, config: PreTrainedConfig | None = None) -> Policy:
        """The policy that was published for a model at a budget: `Policy.published("llava-1.5-7b", "28%")`.

        `dop_compile.zoo.published_policies()` lists them, with sources and what they assume; `dop-compile zoo` too.
        `config`: of the model that it is for. ValueError where there is no such policy, or the model is another.
        """
        entry = zoo.find(name, budget)
        if config is not None:
            entry.check(config)
        found: Policy = policy_text.decode(entry.document, entry.reference, cls)
        return found

    @property
    def groups(self) -> tuple[str, ...]:
        """The prompt groups of this policy: system, visual (or its parts), text."""
        if self.ranking is not None:
            return ("system", "visual", *self.ranking.groups, "text")
        return self.prunable_groups

    @property
    def prunable_groups(self) -> tuple[str, ...]:
        """The groups whose operations a policy names; tokens that a ranking drops are `visual` until they leave."""
        return PROMPT_GROUPS if self.salient_fraction is None else ("system", *SPLIT_VISUAL_GROUPS, "text")

    @property
    def options(self) -> dict[str, JsonScalar]:
        """A new dict of `reducer_options`."""
        return dict(self.reducer_options)

    @property
    def is_full(self) -> bool:
        """True when no operation is pruned and every visual token is kept."""
        return not self.pruned and self.visual_tokens is None and self.ranking is None

    def keeps(self, group: str, layer: int, module: str) -> bool:
        """Whether tokens of `group` take part in `module` of `layer`; always true for "output"."""
        layer = integer("layer", layer, low=0, high=self.num_layers - 1)
        if self.ranking is not None and (last := self.ranking.last_layer(group)) is not None:
            if layer > last:
                return False
            group = "visual"
        self._check(group, module)
        return Operation(group, layer, module) not in self.pruned

    def pruned_layers(self, group: str, module: str) -> tuple[int, ...]:
        """Sorted layers in which `group` does not take part in `module`; none for "output"."""
        self._check(group, module)
        return tuple(sorted(op.layer for op in self.pruned if (op.group, op.module) == (group, module)))

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError when the model has another number of decoder layers than this policy."""
        if num_layers != self.num_layers:
            raise ValueError(
                f"num_layers: the policy is for {self.num_layers} layers, the model has {num_layers}; "
                "use a policy for this model"
            )

    def check_model(self, num_layers: int, fingerprint: str) -> None:
        """Raises ValueError when the policy was made for another depth or, by its provenance, for another model."""
        self.check_layers(num_layers)
        wanted = self.provenance.model_fingerprint if self.provenance is not None else None
        if wanted is not None and wanted != fingerprint:
            raise ValueError(
                f"the policy was made for another model (fingerprint {wanted[:12]}, this model has "
                f"{fingerprint[:12]}); use a policy for this model, or policy.replace(provenance=None)"
            )

    def replace(self, **changes: Any) -> Policy:
        """A copy with other field values, validated like a new policy."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Versioned JSON text, the inverse of `from_json`."""
        return policy_text.encode(self)

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """Strict reading of `to_json` text; ValueError naming the field for anything else."""
        found: Policy = policy_text.decode(text, "policy JSON", cls)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to `path` atomically: a failure leaves the previous file, and no other."""
        write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read what `save` wrote; ValueError naming the file and the field for anything else."""
        found: Policy = policy_text.read(path, cls)
        return found

    def __repr__(self) -> str:
        return shown.as_text(self)

    def _repr_html_(self) -> str:
        return shown.as_html(self)

    def _check(self, group: str, module: str) -> None:
        choice("module", module, MODULES)
        if group != "output":
            self._check_group(group)

    def _check_group(self, group: object, *also: str) -> str:
        if group == "output":
            raise ValueError(
                "group: 'output' cannot be pruned, generated tokens are always processed in full; "
                f"expected one of {', '.join(self.prunable_groups)}"
            )
        if group in SPLIT_VISUAL_GROUPS and self.salient_fraction is None:
            raise ValueError(f"group: {group!r} exists only with salient_fraction; set it or use 'visual'")
        if group == "visual" and "visual" not in (*self.prunable_groups, *also):
            raise ValueError(
                f"group: 'visual' is split by salient_fraction={self.salient_fraction}; "
                f"ask for {' or '.join(SPLIT_VISUAL_GROUPS)}"
            )
        return choice("group", group, (*self.prunable_groups, *also))

    def _canonical(self, operations: object) -> Iterator[Operation]:
        if isinstance(operations, str) or not isinstance(operations, Iterable):
            raise TypeError(f"pruned: expected (group, layer, module) operations, got {operations!r}")
        split = () if self.salient_fraction is None else ("visual",)
        for given in operations:
            if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 3:
                raise TypeError(f"pruned: expected a (group, layer, module) operation, got {given!r}")
            try:
                group = self._check_group(given[0], *split)
                layer = integer("layer", given[1], low=0, high=self.num_layers - 1)
                module = choice("module", given[2], (*MODULES, *MODULE_SHORTHAND))
            except (TypeError, ValueError) as error:
                raise type(error)(f"pruned: operation {tuple(given)!r}: {error}") from error
            for part in SPLIT_VISUAL_GROUPS if split and group == "visual" else (group,):
                for name in MODULE_SHORTHAND.get(module, (module,)):
                    yield Operation(part, layer, name)
