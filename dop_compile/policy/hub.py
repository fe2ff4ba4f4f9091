"""Repositories of the hub that hold policies: known by a tag of their model card, and a file of tiers.

`push_policies(tiers, "me/tiers", tag=True)` adds the tag; `pushed_policies()` lists what has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

__all__ = ["TAG", "TIERS_FILE", "HubPolicies", "add_tag", "pushed_policies"]

TAG = "dop_compile"
TIERS_FILE = "dop_compile.json"


@dataclass(frozen=True)
class HubPolicies:
    """A repository with a file of tiers: its "owner/name", downloads as the hub counts them, day of the last change."""

    name: str
    downloads: int
    changed: str


def pushed_policies() -> tuple[HubPolicies, ...]:
    """The repositories with the tag and a file of tiers, most downloaded first.

    Raises:
        OSError: the hub cannot be asked; the message says why.
    """
    from huggingface_hub import HfApi, errors

    # Of the client that asks, which is another in each major version, and whose errors of the network are passed on
    network: Any = vars(errors)["HTTPError"]
    try:
        models = [one for one in HfApi().list_models(filter=TAG, full=True) if _has_tiers(one)]
    except (OSError, network) as error:
        raise OSError(
            f"the hub cannot be asked for repositories tagged {TAG} ({' '.join(str(error).split())}); try again with a "
            "connection to it, and without HF_HUB_OFFLINE"
        ) from error
    found = [HubPolicies(one.id, one.downloads or 0, _day(one.last_modified)) for one in models]
    return tuple(sorted(found, key=lambda one: (-one.downloads, one.name)))


def add_tag(repo_id: str, token: Any = None) -> None:
    """Add the tag to the repository's model card, whose other tags stay; a card is made where there is none."""
    from huggingface_hub import HfApi, metadata_update

    card = HfApi().model_info(repo_id, token=token).card_data
    tags = list((card and card.tags) or ())
    if TAG not in tags:
        metadata_update(repo_id, {"tags": [*tags, TAG]}, overwrite=True, token=token)


def _has_tiers(model: Any) -> bool:
    return any(file.rfilename == TIERS_FILE for file in model.siblings or ())


def _day(time: datetime | None) -> str:
    return "-" if time is None else time.date().isoformat()
