"""Every family that the suite runs, in the order of the table of docs/models.md, and those that are refused."""

from __future__ import annotations

from tests.conformance.documents import DOCUMENTS
from tests.conformance.hybrid import HYBRID
from tests.conformance.llava_like import LLAVA_LIKE
from tests.conformance.merging import MERGING
from tests.conformance.others import OTHERS
from tests.conformance.patch_grids import PATCH_GRIDS
from tests.conformance.q_formers import Q_FORMERS
from tests.conformance.qwen_like import QWEN_LIKE
from tests.conformance.refused import REFUSED, Refusal
from tests.conformance.text_only import TEXT_ONLY
from tests.families import FAMILIES, Family

__all__ = ["EXACT", "REFUSED", "Refusal"]

_ALL: dict[str, Family] = (
    FAMILIES | LLAVA_LIKE | QWEN_LIKE | PATCH_GRIDS | Q_FORMERS | DOCUMENTS | MERGING | OTHERS | HYBRID | TEXT_ONLY
)
EXACT: dict[str, Family] = {
    family.name: family for family in sorted(_ALL.values(), key=lambda f: f.is_text_only) if family.name not in REFUSED
}
"""What has to pass every check: multimodal families first."""
