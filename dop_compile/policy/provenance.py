"""Where a policy comes from."""

from __future__ import annotations

from dataclasses import dataclass

from dop_compile.checks import finite, integer, pairs, store

__all__ = ["Provenance"]


@dataclass(frozen=True)
class Provenance:
    """Where a policy comes from. Does not change what is executed, but is part of the policy's value.

    `budget`: fraction of policy FLOPs kept, in (0, 1]. `divergence`: the predicted one, a sum of measured curves;
    `measured_divergence`: that of the policy as a whole, run on samples. `versions`: package names and versions, given
    as a mapping or as pairs.
    """

    model_fingerprint: str | None = None
    budget: float | None = None
    divergence: float | None = None
    samples: int | None = None
    versions: tuple[tuple[str, str], ...] = ()
    measured_divergence: float | None = None

    def __post_init__(self) -> None:
        fingerprint = self.model_fingerprint
        if fingerprint is not None and not (isinstance(fingerprint, str) and fingerprint):
            raise TypeError(f"model_fingerprint: expected a non-empty string or None, got {fingerprint!r}")
        if self.budget is not None:
            budget = finite("budget", self.budget)
            if not 0 < budget <= 1:
                raise ValueError(f"budget: expected a fraction of FLOPs kept, 0 < budget <= 1, got {budget}")
            store(self, "budget", budget)
        for field in ("divergence", "measured_divergence"):
            if getattr(self, field) is not None:
                store(self, field, finite(field, getattr(self, field)))
        if self.samples is not None:
            store(self, "samples", integer("samples", self.samples, low=1))
        versions = pairs("versions", self.versions)
        for name, version in versions:
            if not isinstance(version, str):
                raise TypeError(f"versions[{name!r}]: expected a version string, got {version!r}")
        store(self, "versions", versions)
