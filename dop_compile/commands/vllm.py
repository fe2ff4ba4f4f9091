"""`dop-compile vllm`: a directory that vLLM serves under a policy."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from huggingface_hub import snapshot_download

from dop_compile.commands.inputs import load_vision_config, load_vision_model, located
from dop_compile.commands.outputs import output_directory
from dop_compile.commands.policies import NO_POLICY, read_policies
from dop_compile.commands.usage import UsageError, one_line, usage_errors
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.plugins.vllm.served import write_served
from dop_compile.policy.policy import Policy

__all__ = ["vllm_command"]


def vllm_command(arguments: Namespace) -> None:
    """Write the directory, and print how it is served."""
    target = Path(arguments.out).expanduser()
    output_directory(str(target.resolve().parent))
    layers = load_vision_config(arguments.model).get_text_config(decoder=True).num_hidden_layers
    tiers = read_policies(arguments, layers)
    if not tiers:
        raise UsageError(NO_POLICY)
    name = arguments.tier or next(iter(tiers))
    source = _directory(arguments.model)
    _check_model(arguments.model, tiers[name], layers)
    try:
        with usage_errors():
            copied = write_served(source, target, name, tiers[name], force=arguments.force)
    except OSError as error:
        raise UsageError(f"--out: {one_line(error)}") from error
    if copied:
        print(f"no links can be made there: copied {', '.join(copied)}", file=sys.stderr)
    if len(tiers) > 1:
        print(f"an engine serves one policy: of {', '.join(tiers)} it is {name}", file=sys.stderr)
    print(f"saved {name} to {target}\nvllm serve {target}")


def _directory(model: str) -> Path:
    path = Path(located(model))
    if path.is_file():
        raise UsageError(f"model {model!r}: is a file; name the model's directory")
    return path if path.is_dir() else Path(snapshot_download(model))


def _check_model(model: str, policy: Policy, layers: int) -> None:
    """A policy that says for which weights it was made is for no others; weights are read only then."""
    wanted = policy.provenance.model_fingerprint if policy.provenance is not None else None
    with usage_errors():
        policy.check_layers(layers)
        if wanted is not None:
            policy.check_model(layers, model_fingerprint(load_vision_model(model, "cpu", "auto")))
