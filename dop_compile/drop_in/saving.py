"""A compiled model on disk: the model as transformers reads it, an adapter beside it, and the tiers.

    config.json, model.safetensors                  the model without adapters
    adapter_config.json, adapter_model.safetensors  the active adapter, which transformers adds to it
    dop_compile.json                                the tiers

What could not be read back with the same numbers is refused before anything is there: files are written into a folder
of their own, and moved when all of them are.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from dop_compile.drop_in.readable import check_adapter_file, check_structure, check_values, saved_adapter
from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.adapters import effective_names, without_adapters
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.hf.names import ADAPTER_FILES
from dop_compile.policy.policy import Policy
from dop_compile.policy.tiers import TIERS_FILE, save_policies

__all__ = ["check_push", "save_compiled"]


def save_compiled(view: Any, state: Any, first: str, directory: Any, *args: Any, **kwargs: Any) -> None:
    """Save a compiled model, as `PreTrainedModel.save_pretrained` with the same arguments saves the original.

    Args:
        view: the compiled model.
        state: its `CompiledState`.
        first: the tier that is the default when it is read back.

    Raises:
        UnsupportedUsageError: transformers would read back another model; a policy was made for other weights.
        OSError: the directory cannot be written.
    """
    method = state.model_class.save_pretrained
    settings = _settings(method, view, directory, args, kwargs)
    _check_settings(settings)
    given: Mapping[str, Any] | None = settings.pop("state_dict", None)
    adapter = saved_adapter(view, state.original.model)
    base: Any = without_adapters(view)
    weights = base.state_dict() if given is None else _without_adapters(view, base, given)
    check_values(base, weights)
    check_structure(base, weights, complete=given is None)
    tiers = {first: state.tiers[first], **state.tiers}
    _check_provenance(view, tiers, given)
    with _staged(Path(directory), settings.get("variant")) as folder:
        with _as_model(base):
            method(base, folder, **settings, state_dict=None if given is None else dict(weights))
        if adapter is not None:
            method(adapter[1], folder, **settings, state_dict=given)
        if (folder / "config.json").exists():  # in the one process that writes
            if adapter is not None:
                name, model = adapter
                check_adapter_file(model, name, folder)
            save_policies(tiers, folder)


def check_push(view: Any, state: Any) -> None:
    """UnsupportedUsageError where a repository of the hub would be read back as another model."""
    if saved_adapter(view, state.original.model) is not None:
        raise UnsupportedUsageError(
            "push_to_hub: from a repository with an adapter transformers takes the adapter alone, and the model from "
            "where adapter_config.json says; merge it first (merge_and_unload of peft's model), or push the adapter "
            "with peft and the tiers with push_policies"
        )


def _settings(method: Callable[..., Any], view: Any, directory: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    arguments = inspect.signature(method).bind(view, directory, *args, **kwargs).arguments
    more: dict[str, Any] = arguments.pop("kwargs", {})
    return dict(list(arguments.items())[2:]) | more


def _check_settings(settings: Mapping[str, Any]) -> None:
    if settings.get("push_to_hub"):
        raise UnsupportedUsageError("push_to_hub: call push_to_hub of the compiled model, which sends its tiers too")
    if settings.get("distributed_checkpoint"):
        raise UnsupportedUsageError(
            "distributed_checkpoint: its files are to go on training from and from_pretrained does not read them; "
            "save it from the original model, and the tiers by save_policies"
        )


def _without_adapters(view: nn.Module, base: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Weights that a caller gives, under the names that they have in the model without adapters."""
    own, all_names = base.state_dict().keys(), view.state_dict().keys()
    named = effective_names(view, all_names)
    of_adapters = {name for name in all_names if named.get(name) not in own}
    return {named.get(name, name): value for name, value in given.items() if name not in of_adapters}


def _check_provenance(view: Any, tiers: Mapping[str, Policy], given: Mapping[str, Any] | None) -> None:
    """The model has to be the one that its policies were made for, or reading it back would be refused."""
    provenances = {name: policy.provenance for name, policy in tiers.items() if policy.provenance is not None}
    made_for = {name: p.model_fingerprint for name, p in provenances.items() if p.model_fingerprint is not None}
    found = model_fingerprint(view, given) if made_for else ""
    for name, fingerprint in made_for.items():
        if fingerprint != found:
            raise UnsupportedUsageError(
                f"tier {name!r}: the policy was made for the model with fingerprint {fingerprint[:12]}, and the "
                f"weights to be saved have {found[:12]}, since they or the adapters were changed after "
                "dop_compile; from_pretrained would refuse it. Search a policy for the model as it is now, or call "
                "dop_compile again with policy.replace(provenance=None), which applies it all the same, and save that"
            )


@contextmanager
def _as_model(base: Any) -> Iterator[None]:
    """`base` is saved as a model, and not as the adapter that it says to have."""
    own = {name: value for name, value in vars(base).items() if name == "_hf_peft_config_loaded"}
    base._hf_peft_config_loaded = False
    try:
        yield
    finally:
        del base._hf_peft_config_loaded
        vars(base).update(own)


@contextmanager
def _staged(directory: Path, variant: str | None) -> Iterator[Path]:
    """A folder whose files go into `directory` if nothing fails, in place of those that a former save left there."""
    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        yield folder
        written = {path.name for path in folder.iterdir()}
        if TIERS_FILE in written:
            for path in list(directory.iterdir()):
                if path.name not in written and _is_weights(path.name, variant):
                    path.unlink()
            for name in sorted(written, key=lambda name: name == TIERS_FILE):
                os.replace(folder / name, directory / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if new and not any(directory.iterdir()):
            directory.rmdir()


def _is_weights(name: str, variant: str | None) -> bool:
    """Whether a file would be read in place of, or on top of, those of a new save."""
    tail = "" if variant is None else re.escape(f".{variant}")
    model = rf"model{tail}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{tail}\.json"
    return name in ADAPTER_FILES or re.fullmatch(model, name) is not None
