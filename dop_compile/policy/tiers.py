"""Tiers of policies on disk and on the hub, with a model or alone.

    save_policies({"100%": full, "28%": policy}, "tiers")      # dop_compile.json alone
    push_policies({"100%": full, "28%": policy}, "me/tiers")   # the same, to a repository of the hub
    compiled = dop_compile(model, load_policies("me/tiers"))

`dop_compile.json` holds the tiers by name, in order, each as `Policy.to_json` writes it.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from dop_compile.documents import Format, parse, write_atomic
from dop_compile.policy.hub import TIERS_FILE, add_tag
from dop_compile.policy.policy import Policy

__all__ = ["TIERS_FILE", "load_policies", "push_policies", "save_policies"]

FORMAT = Format("dop_compile.tiers", (1,), "a file of tiers", "save the tiers again")

hf: Any = transformers


def save_policies(tiers: Mapping[str, Policy] | Policy, directory: str | os.PathLike[str]) -> Path:
    """Write tiers as `dop_compile.json` into a directory, atomically; returns the file's path.

    Raises:
        TypeError, ValueError: no tiers, or something that is not a policy.
        OSError: the directory cannot be written.
    """
    text = _encode(tiers)
    path = Path(directory) / TIERS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return path


def push_policies(tiers: Mapping[str, Policy] | Policy, repo_id: str, *, tag: bool = False, **settings: Any) -> Any:
    """Upload tiers as `dop_compile.json` to a hub repository; returns huggingface_hub's commit.

    Args:
        repo_id: "owner/name" of an existing model repository, which may hold a model.
        tag: add the tag `dop_compile` to its model card, in a commit of its own, so that `dop-compile zoo --hub`
            finds it.
        settings: of `huggingface_hub.HfApi.upload_file`, for example `token`, `revision` or `create_pr`.
    """
    from huggingface_hub import HfApi

    content = io.BytesIO(_encode(tiers).encode())
    settings = {"commit_message": "Policies of dop_compile", **settings}
    commit = HfApi().upload_file(path_or_fileobj=content, path_in_repo=TIERS_FILE, repo_id=repo_id, **settings)
    if tag:
        add_tag(repo_id, settings.get("token"))
    return commit


def load_policies(name_or_directory: str | os.PathLike[str], **settings: Any) -> dict[str, Policy]:
    """The tiers of a directory, or of a hub repository.

    Args:
        settings: of `transformers.utils.cached_file`, for example `revision`, `token` or `cache_dir`.

    Raises:
        OSError: there is no `dop_compile.json`, or it cannot be read.
        ValueError: it holds something else; the message names the field.
    """
    path = Path(hf.utils.cached_file(os.fspath(name_or_directory), TIERS_FILE, **settings))
    try:
        return _decode(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _encode(tiers: Mapping[str, Policy] | Policy) -> str:
    named = {"default": tiers} if isinstance(tiers, Policy) else dict(tiers)
    if not named:
        raise ValueError("tiers: expected at least one policy, got none")
    for name, policy in named.items():
        if not isinstance(policy, Policy):
            raise TypeError(f"tiers[{name!r}]: expected a Policy, got {type(policy).__name__}")
    written = {str(name): json.loads(policy.to_json()) for name, policy in named.items()}
    return json.dumps({**FORMAT.header(), "tiers": written}, indent=1) + "\n"


def _decode(text: str) -> dict[str, Policy]:
    document = FORMAT.open(parse(text)).take(["tiers"], keeps=False)
    if wrong := set(document).symmetric_difference({"tiers"}):
        raise ValueError(f"{', '.join(sorted(wrong))}: unknown or missing")
    tiers = document["tiers"]
    if not isinstance(tiers, dict) or not tiers:
        raise ValueError("tiers: expected policies by name")
    found = {}
    for name, policy in tiers.items():
        try:
            found[name] = Policy.from_json(json.dumps(policy))
        except ValueError as error:
            raise ValueError(f"tiers[{name!r}]: {error}") from error
    return found
