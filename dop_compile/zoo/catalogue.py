"""The published policies: of which model, where they stand in which paper, and what was published of them.

Each has its JSON file in `policies/`. Sources: DOP ("Fine-grained Token Allocation Via Operation Pruning for Efficient
MLLMs", arXiv 2507.02909), Tables 15 and 16 (policies) and 8 to 13 (accuracy: "Rel. Avg.", rows DOP_CD and DOP_R).
ShortV (arXiv 2504.00502), table "Replaced Layers" of github.com/icip-cas/ShortV: visual tokens are not updated in these
layers, and are read there.
"""

from __future__ import annotations

from dop_compile.zoo.entries import Method, PublishedModel, PublishedPolicy
from dop_compile.zoo.geometry import Geometry

__all__ = ["LEFT_OUT", "METHODS", "MODELS", "POLICIES"]

_DOP = "DOP, arXiv 2507.02909"
_WEIGHTS = "The weights are the original ones, in their precision; a fine-tune or a quantised model is another."
DOP_CDPRUNER = Method(
    "DOP + CDPruner",
    _DOP,
    "Visual tokens are chosen by CDPruner with the relevance of the original's CLIP text model. Checkpoints of "
    "transformers have none, and `cdpruner` takes the instruction's own embeddings in its place, unless a reducer with "
    "ClipRelevance is registered (docs/reducers.md): other tokens are kept. Positions of what is kept are re-numbered "
    f"(compact), as in the published code. {_WEIGHTS}",
)
DOP_RESIZE = Method(
    "DOP + resize",
    _DOP,
    "Pictures are made smaller before the vision tower (`resize`), to so many tokens: resize_processor does it, and "
    "`dop-compile run|bench|eval`. Positions are those of the smaller picture. Of InternVL3 the tiles are made "
    f"smaller, to no more tokens than published; how the paper did it, it does not say. {_WEIGHTS}",
)
SHORTV = Method(
    "ShortV",
    "ShortV, arXiv 2504.00502",
    "All visual tokens enter, at their own positions; in the layers named no visual token is updated, and all are "
    f"read. {_WEIGHTS}",
)
METHODS = (DOP_CDPRUNER, DOP_RESIZE, SHORTV)

_LLAVA_7B = (32, 4096, 32, 32, 11008, 576)
_LLAVA_13B = (40, 5120, 40, 40, 13824, 576)
_ONE, _TILES = "any picture", "a picture of 672 x 672: five tiles, newlines not counted"
LLAVA_7B = PublishedModel(
    "llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", Geometry("llava", *_LLAVA_7B), visual_tokens=576, picture=_ONE
)
LLAVA_13B = PublishedModel(
    "llava-1.5-13b", "llava-hf/llava-1.5-13b-hf", Geometry("llava", *_LLAVA_13B), visual_tokens=576, picture=_ONE
)
NEXT_7B = PublishedModel(
    "llava-next-7b",
    "llava-hf/llava-v1.6-vicuna-7b-hf",
    Geometry("llava_next", *_LLAVA_7B),
    visual_tokens=2880,
    picture=_TILES,
)
NEXT_13B = PublishedModel(
    "llava-next-13b",
    "llava-hf/llava-v1.6-vicuna-13b-hf",
    Geometry("llava_next", *_LLAVA_13B),
    visual_tokens=2880,
    picture=_TILES,
)
QWEN_7B = PublishedModel(
    "qwen2.5-vl-7b",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    Geometry("qwen2_5_vl", 28, 3584, 28, 4, 18944),
    visual_tokens=1296,
    picture="a picture of 1008 x 1008",
)
INTERN_8B = PublishedModel(
    "internvl3-8b",
    "OpenGVLab/InternVL3-8B-hf",
    Geometry("internvl", 28, 3584, 28, 4, 18944, 256),
    visual_tokens=1280,
    picture="a picture of 896 x 896: five tiles",
)
MODELS = (LLAVA_7B, LLAVA_13B, NEXT_7B, NEXT_13B, QWEN_7B, INTERN_8B)


def _dop(model: PublishedModel, table: int, percent: int, accuracy_table: int, accuracy: float) -> PublishedPolicy:
    return PublishedPolicy(
        model,
        f"{percent}%",
        DOP_CDPRUNER if table == 15 else DOP_RESIZE,
        f"DOP, Table {table}",
        percent / 100,
        accuracy / 100,
        f"DOP, Table {accuracy_table}",
    )


def _shortv(model: PublishedModel, flops: float | None = None) -> PublishedPolicy:
    return PublishedPolicy(model, "shortv", SHORTV, "ShortV's code, Replaced Layers", flops)


POLICIES = (
    _dop(LLAVA_7B, 15, 37, 8, 98.8),
    _dop(LLAVA_7B, 15, 28, 8, 97.9),
    _dop(LLAVA_7B, 15, 23, 8, 96.1),
    _shortv(LLAVA_7B),
    _dop(LLAVA_13B, 15, 37, 9, 97.9),
    _dop(LLAVA_13B, 15, 28, 9, 96.9),
    _dop(LLAVA_13B, 15, 23, 9, 95.6),
    _shortv(LLAVA_13B),
    _dop(NEXT_7B, 15, 23, 10, 99.8),
    _dop(NEXT_7B, 15, 14, 10, 99.0),
    _dop(NEXT_7B, 15, 9, 10, 97.2),
    _shortv(NEXT_7B),
    _dop(NEXT_13B, 15, 14, 11, 98.2),
    _dop(NEXT_13B, 15, 9, 11, 96.7),
    _shortv(NEXT_13B, flops=0.5),  # the abstract's "50 % reduction"; of the others it gives none
    _dop(QWEN_7B, 16, 43, 12, 99.5),
    _dop(QWEN_7B, 16, 26, 12, 97.7),
    _dop(QWEN_7B, 16, 16, 12, 92.1),
    _dop(INTERN_8B, 16, 27, 13, 95.0),
    _dop(INTERN_8B, 16, 18, 13, 89.8),
)
LEFT_OUT = {
    ("llava-next-13b", "23%"): "DOP's Table 15 prints an MHA depth of 340 for its 40 layers, a misprint: 34 "
    "and 40 are as likely"
}
"""What was published and cannot be used, and why."""
