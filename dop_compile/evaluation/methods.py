"""What is compared: methods by name, each brought to a budget by computing its FLOPs, not by a number of tokens.

`original` is the untouched model, and `full` the compiled one with nothing pruned. A reducer's name is that reducer
alone, `fastv` and its like rank tokens inside the decoder, `dop` and `split` are policies found in measured
divergences, `dop+REDUCER` the same depths and number of tokens with another reducer; policies and GSOP orders come by
their own names.

A budget is a fraction of the original's eq. 11 FLOPs on the samples that are evaluated. One policy is made for all of
them, so that single samples may cost more than the budget, and their sum does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dop_compile.checks import choice, finite
from dop_compile.evaluation.in_decoder import FITPRUNE, IN_DECODER, RANKED
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.policy.costs import prefill_flops
from dop_compile.policy.policy import JsonScalar, Policy
from dop_compile.reducers import create, known
from dop_compile.search.candidates import SPACES
from dop_compile.search.divergences import Divergences
from dop_compile.search.fit_prune import AttentionShares, fit_prune
from dop_compile.search.optimize import InfeasibleBudgetError, optimize
from dop_compile.search.order import OperationOrder
from dop_compile.search.transfer import transfer

__all__ = ["FULL", "ORIGINAL", "RESIZE", "Counts", "Method", "Planner", "check_name", "method_names"]

ORIGINAL, FULL, RESIZE = "original", "full", "resize"
_STEPS = 1000
TOLERANCE = 1 + 1e-12
Counts = Sequence[tuple[int, int, int]]
Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Args:
        name: of the method.
        budget: fraction of FLOPs that it was brought to; None where it is as it is.
        policy: what the compiled model runs; None is the untouched model.
        samples: inputs in place of the common ones, for methods that change the pictures (`Planner.resized`).
        counts: system, visual and text tokens of those.
    """

    name: str
    budget: float | None = None
    policy: Policy | None = None
    samples: Sequence[Sample] | None = field(default=None, repr=False, compare=False)
    counts: tuple[tuple[int, int, int], ...] | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        """Name and budget: what tells rows apart."""
        return self.name if self.budget is None else f"{self.name} {100 * self.budget:g}%"


def method_names() -> tuple[str, ...]:
    """What `Planner.named` takes, but for `dop+REDUCER` and `split+REDUCER`."""
    return (ORIGINAL, FULL, *SPACES, *IN_DECODER, *(name for name in known() if name != "given"))


def check_name(name: str) -> None:
    """ValueError, with the nearest, for a name that `Planner.named` does not take."""
    space, plus, reducer = name.partition("+")
    if plus and space in SPACES:
        choice("reducer of the method", reducer, [n for n in known() if n != "given"])
    else:
        choice("method", name, (*method_names(), *(f"{n}+REDUCER" for n in SPACES)))


class Planner:
    """Makes methods for one model and the samples that they will be compared on.

    Args:
        dims: the decoder's sizes (`DecoderDims.from_config`).
        counts: system, visual and text tokens of every sample, before reduction (`count_tokens`).
        model_type, fingerprint: of the model (`model.config.model_type`, `model_fingerprint`).
        divergences: for `dop` and `split`.
        shares: for `fitprune` (`measure_attention`).
        positions: of the tokens that reducers keep, as in `Policy`.

    Raises:
        ValueError: no samples, none with visual tokens, or divergences of another model.
    """

    def __init__(
        self,
        dims: DecoderDims,
        counts: Counts,
        *,
        model_type: str,
        fingerprint: str,
        divergences: Divergences | None = None,
        shares: AttentionShares | None = None,
        positions: str = "original",
    ):
        if not counts:
            raise ValueError("counts: expected at least one sample, got none")
        self.largest = max(visual for _, visual, _ in counts)
        if not self.largest:
            raise ValueError("counts: no sample has visual tokens, and there is nothing to reduce")
        self.dims, self.counts = dims, tuple(counts)
        self._shares = shares
        self._model_type, self._fingerprint, self._positions = model_type, fingerprint, positions
        self._alike = Counter(self.counts)
        self._whole = self._total(Policy.full(dims.num_layers), self._alike)
        self._divergences = None
        if divergences is not None:
            self._check_model("divergences", divergences.model_fingerprint)
            # The measured curves, at the evaluated samples' token counts: as if transferred to the same model
            self._divergences = transfer(
                divergences, dims, self.counts, model_type=model_type, model_fingerprint=fingerprint
            )

    @classmethod
    def of(cls, model: Any, counts: Counts, **settings: Any) -> Planner:
        """For a model; `settings` are `divergences`, `shares` and `positions`."""
        return cls(
            DecoderDims.from_config(model.config),
            counts,
            model_type=model.config.model_type,
            fingerprint=model_fingerprint(model),
            **settings,
        )

    def flops(self, policy: Policy | None) -> float:
        """Eq. 11 FLOPs of a policy as a fraction of the original's, both summed over the samples."""
        return 1.0 if policy is None else self._total(policy, self._alike) / self._whole

    def named(self, name: str, budget: float | None) -> Method:
        """The method of that name, at a budget where it takes one.

        Raises:
            TypeError: it takes a budget and has none; `resize`, which `resized` makes.
            ValueError: an unknown name (the message suggests the nearest), or a budget that cannot be met.
        """
        if name == ORIGINAL:
            return Method(ORIGINAL)
        if name == FULL:
            return Method(FULL, None, Policy.full(self.dims.num_layers))
        check_name(name)
        if name == RESIZE:
            raise TypeError(f"method {RESIZE!r}: it takes other pictures; make it with Planner.resized")
        space, _, reducer = name.partition("+")
        if budget is None:
            raise TypeError(f"method {name!r}: it is made for a budget, a fraction of FLOPs kept; give one")
        if space in SPACES:
            return self.searched(space, budget, reducer or None)
        return self.ranked(name, budget) if name in IN_DECODER else self.reduced(name, budget)

    def reduced(self, reducer: str, budget: float, options: Mapping[str, JsonScalar] | None = None) -> Method:
        """A reducer alone: as many visual tokens as the budget allows, and nothing pruned.

        Raises:
            ValueError: the budget is less than the text alone costs.
        """
        create(reducer, options)
        base = Policy.full(self.dims.num_layers).replace(
            reducer=reducer, reducer_options=tuple(sorted((options or {}).items())), positions=self._positions
        )
        count = _largest(self.largest, lambda n: self._fits(base.replace(visual_tokens=n), budget))
        if count is None:
            least = self.flops(base.replace(visual_tokens=0))
            raise InfeasibleBudgetError(
                f"{reducer}: no number of visual tokens meets the budget (budget: {budget:.4g} asked for, the other "
                f"tokens alone cost {least:.4g})"
            )
        return Method(reducer, budget, base.replace(visual_tokens=None if count == self.largest else count))

    def ranked(self, name: str, budget: float) -> Method:
        """A method that ranks visual tokens inside the decoder, with as many of them as the budget allows.

        The published depths (scaled to the decoder's) and shapes stay; one number is made to fit: the fraction that the
        first stage keeps, or for `sparsevlm` which of its published schedules it is, or between or beyond which.
        `fitprune` fits its own to measured attention.

        Raises:
            TypeError: `fitprune` without attention shares.
            ValueError: what comes before the first stage costs more than the budget.
        """
        layers = self.dims.num_layers
        if name == FITPRUNE:
            if self._shares is None:
                raise TypeError("method 'fitprune': it is fitted to measured attention; give shares")
            return Method(name, budget, fit_prune(self._shares, self.dims, self.counts, budget))
        make = RANKED[name]
        step = _largest(_STEPS, lambda n: self._fits(make(layers, n / _STEPS), budget))
        if step is None:
            raise InfeasibleBudgetError(
                f"{name}: no number of visual tokens meets the budget (budget: {budget:.4g} asked for, "
                f"{self.flops(make(layers, 0.0)):.4g} is the least: the first layers have every token)"
            )
        return Method(name, budget, make(layers, step / _STEPS))

    def searched(
        self, space: str, budget: float, reducer: str | None = None, *, alpha: float | str | None = "auto"
    ) -> Method:
        """The best policy of a space by the divergences, with their reducer or another; "dop" as it was published.

        Raises:
            TypeError: no divergences were given.
            ValueError: no policy meets the budget.
        """
        if self._divergences is None:
            raise TypeError(f"method {space!r}: it is found in measured divergences; give them")
        policy = optimize(self._divergences, _checked(budget), space=space, alpha=alpha, faithful=space == "dop")
        if reducer is None:
            return Method(space, budget, policy)
        if reducer != policy.reducer:
            policy = policy.replace(reducer=reducer, reducer_options=())
        return Method(f"{space}+{reducer}", budget, policy)

    def ordered(self, name: str, order: OperationOrder, budget: float) -> Method:
        """The shortest prefix of a GSOP order that meets the budget on these samples.

        Raises:
            ValueError: an order of another model, or that costs more as a whole.
        """
        self._check_model(f"order {name!r}", order.model_fingerprint)
        policies = order.policies()
        # A prefix costs less than those before it, on any samples
        longest = _largest(len(policies) - 1, lambda n: self._fits(policies[len(policies) - 1 - n], budget))
        if longest is None:
            raise InfeasibleBudgetError(
                f"order {name!r}: no prefix meets the budget (budget: {budget:.4g} asked for, "
                f"{self.flops(policies[-1]):.4g} is the least)"
            )
        return Method(name, budget, policies[len(policies) - 1 - longest])

    def given(self, name: str, policy: Policy) -> Method:
        """A policy as it is.

        Raises:
            ValueError: it is for another model, or its visual tokens are chosen by the caller of each call.
        """
        policy.check_layers(self.dims.num_layers)
        if policy.reducer == "given":
            raise ValueError(f"policy {name!r}: its reducer is 'given', and samples do not say which tokens to keep")
        if policy.provenance is not None and policy.provenance.model_fingerprint is not None:
            self._check_model(f"policy {name!r}", policy.provenance.model_fingerprint)
        return Method(name, None, policy)

    def resized(
        self, budget: float, samples: Callable[[int], Sequence[Sample]], count: Callable[[Any], Counts]
    ) -> Method:
        """Smaller pictures for the untouched model: the largest whose FLOPs meet the budget.

        Args:
            samples: the inputs, of at most so many visual tokens a sample (`resize_processor`).
            count: system, visual and text tokens of each of those.

        Raises:
            ValueError: the smallest pictures cost more than the budget.
        """
        full, bound = Policy.full(self.dims.num_layers), _checked(budget) * self._whole * TOLERANCE

        def fits(fewer: int) -> bool:
            return self._total(full, Counter(count(samples(fewer + 1)))) <= bound

        found = _largest(self.largest - 1, fits)
        if found is None:
            raise InfeasibleBudgetError(
                f"resize: no size of pictures meets the budget (budget: {budget:.4g} asked for); pictures keep at "
                "least one visual token"
            )
        own = samples(found + 1)
        return Method(RESIZE, budget, None, own, tuple(count(own)))

    def _fits(self, policy: Policy, budget: float) -> bool:
        return self._total(policy, self._alike) <= _checked(budget) * self._whole * TOLERANCE

    def _total(self, policy: Policy, alike: Mapping[tuple[int, int, int], int]) -> int:
        return sum(times * prefill_flops(self.dims, policy, *counts) for counts, times in alike.items())

    def _check_model(self, what: str, fingerprint: str) -> None:
        if fingerprint != self._fingerprint:
            raise ValueError(
                f"{what}: made for another model (fingerprint {fingerprint[:12]}, this model has "
                f"{self._fingerprint[:12]}); make it for this one"
            )


def _largest(high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number from 0 to `high` that fits, where every smaller one fits too; None if 0 does not."""
    if not fits(0):
        return None
    low, above = 0, high + 1
    while above - low > 1:
        middle = (low + above) // 2
        low, above = (middle, above) if fits(middle) else (low, middle)
    return low


def _checked(budget: float) -> float:
    if not 0 < finite("budget", budget) <= 1:
        raise ValueError(f"budget: expected a fraction of FLOPs kept, 0 < budget <= 1, got {budget}")
    return budget
