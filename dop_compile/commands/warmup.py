"""`dop-compile warmup`: first calls in a process of their own, whose compiled code later ones take from a folder.

The folder is torch's own cache of compiled code. It is read by whoever runs with `TORCHINDUCTOR_CACHE_DIR` set to it,
and what it holds is run, unpickled first: nobody else may be able to write there.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch._dynamo.utils import counters

from dop_compile.commands.inputs import (
    compile_model,
    load_processor,
    load_vision_config,
    load_vision_model,
    noise_picture,
    read_images,
    read_prompt,
    resized_processor,
)
from dop_compile.commands.outputs import output_directory
from dop_compile.commands.policies import NO_POLICY, read_policies
from dop_compile.commands.usage import UsageError, usage_errors
from dop_compile.drop_in.warmup import Warmup
from dop_compile.policy.policy import Policy

__all__ = ["warmup_command"]

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
BACKEND = "inductor"
"""The one whose code is kept."""


def warmup_command(arguments: Namespace) -> None:
    """Compile what answers of these kinds need, into a folder; print what was warmed, and how to use it."""
    folder = _cache_folder(arguments.cache)
    images = read_images(arguments.image) or [noise_picture()]
    config = load_vision_config(arguments.model)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    tiers = _chosen(read_policies(Namespace(**vars(arguments), tier=None), layers), arguments.tiers)
    processor = load_processor(arguments.model)
    model = load_vision_model(arguments.model, arguments.device, arguments.dtype)
    compiled = compile_model(model, tiers, BACKEND)

    def read(policy: Policy) -> dict[str, Any]:
        small = resized_processor(processor, policy, len(images))
        return dict(read_prompt(small, model, arguments.prompt, images))

    own = {tier: read(policy) for tier, policy in tiers.items()}
    with usage_errors():
        records = [
            compiled.warmup(
                batch_sizes=arguments.batch_sizes,
                text_lengths=arguments.text_lengths,
                tiers=[tier],
                padded=arguments.padded,
                inputs=inputs,
            )
            for tier, inputs in own.items()
        ]
    print(Warmup(tuple(call for record in records for call in record.calls)))
    found = counters["inductor"]
    print(
        f"{found['fxgraph_cache_miss']} graphs were compiled, {found['fxgraph_cache_hit']} were there already\n"
        f"the next process starts with them by {VARIABLE}={folder}"
    )


def _cache_folder(name: str | None) -> Path:
    """Where compiled code is kept: of the option, of the environment, or torch's own.

    Raises:
        UsageError: caches are turned off, or the folder cannot be written.
    """
    from torch._inductor import config as inductor  # a second's import
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    if inductor.force_disable_caches or not inductor.fx_graph_cache:
        raise UsageError(
            "torch's caches of compiled code are turned off (TORCHINDUCTOR_FORCE_DISABLE_CACHES or "
            "TORCHINDUCTOR_FX_GRAPH_CACHE), and nothing would be kept; leave these variables unset"
        )
    folder = output_directory(cache_dir() if name is None else name, "--cache").resolve()
    os.environ[VARIABLE] = str(folder)
    return folder


def _chosen(tiers: Mapping[str, Policy], names: list[str] | None) -> dict[str, Policy]:
    if not tiers:
        raise UsageError(NO_POLICY)
    for name in names or ():
        if name not in tiers:
            raise UsageError(f"--tiers: {name!r} is not one of the tiers ({', '.join(tiers)})")
    return {name: policy for name, policy in tiers.items() if not names or name in names}
