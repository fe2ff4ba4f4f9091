"""Policies that papers have published for particular models, as files of this package; nothing was measured again.

    Policy.published("llava-1.5-7b", "28%")                    # one of them
    published_policies("llava-1.5-7b")                         # what there is, with sources and published numbers
    published_for(AutoConfig.from_pretrained("my-llava"))      # names of the models that a configuration is like

What they assume is said by each (`PublishedPolicy.assumes`) and by `dop-compile zoo`.
"""

from dop_compile.zoo.entries import PREFIX, Method, PublishedModel, PublishedPolicy
from dop_compile.zoo.geometry import Geometry
from dop_compile.zoo.lookup import find, published_for, published_policies, split_reference

__all__ = [
    "PREFIX",
    "Geometry",
    "Method",
    "PublishedModel",
    "PublishedPolicy",
    "find",
    "published_for",
    "published_policies",
    "split_reference",
]
