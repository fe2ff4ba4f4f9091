"""Compiled models from disk or from the hub.

compiled.save_pretrained("my-model")    # the untouched model, and dop_compile.json
compiled = from_pretrained("my-model")  # the compiled model again
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from dop_compile.compiler import dop_compile
from dop_compile.drop_in.typed import CompiledModel
from dop_compile.policy.policy import Policy
from dop_compile.policy.tiers import load_policies

__all__ = ["from_pretrained"]

hf: Any = transformers


def from_pretrained(
    name_or_directory: str | os.PathLike[str],
    *,
    tiers: Mapping[str, Policy] | Policy | None = None,
    backend: str = "inductor",
    cuda_graphs: bool = False,
    **settings: Any,
) -> CompiledModel:
    """Load a model and compile it.

    Args:
        name_or_directory: of a model, or of an adapter of peft that names its model, local or on the hub.
        tiers: in place of those saved with the model.
        backend, cuda_graphs: as in `dop_compile`.
        settings: of the model class's `from_pretrained`, for example `dtype`, `revision` or `attn_implementation`.

    Raises:
        OSError: there is no model, or no `dop_compile.json` and no `tiers`.
        ValueError: policies that are not for this model.
    """
    shared = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    of_hub = {name: settings[name] for name in shared if name in settings}
    if tiers is None:
        tiers = load_policies(name_or_directory, **of_hub)
    name = os.fspath(name_or_directory)
    config = hf.AutoConfig.from_pretrained(_with_config(name, of_hub), **of_hub)
    model = _model_class(config).from_pretrained(name, **settings).eval()
    return dop_compile(model, tiers, backend=backend, cuda_graphs=cuda_graphs)


def _with_config(name: str, of_hub: Mapping[str, Any]) -> str:
    """Where the model's configuration is: of an adapter alone, with the model that it was made for."""
    adapter = hf.utils.peft_utils.find_adapter_config_file(name, **of_hub)
    if adapter is None or os.path.exists(os.path.join(name, hf.utils.CONFIG_NAME)):
        return name
    return str(json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"])


def _model_class(config: Any) -> Any:
    """The class that wrote the checkpoint, or the one that generates with such a configuration."""
    for architecture in config.architectures or ():
        if hasattr(hf, architecture):
            return getattr(hf, architecture)
    for auto in (hf.AutoModelForImageTextToText, hf.AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            return auto
    raise ValueError(f"{type(config).__name__} is not the configuration of a model that generates text")
