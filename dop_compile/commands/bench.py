"""`dop-compile bench`: from a model and policies to tables of times and memory."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from dop_compile.commands.inputs import (
    check_backend,
    load_processor,
    load_vision_config,
    load_vision_model,
    noise_picture,
    read_images,
    read_prompt,
    resized_processor,
    write_file,
)
from dop_compile.commands.outputs import check_new, output_directory
from dop_compile.commands.policies import NO_POLICY, read_policies
from dop_compile.commands.usage import UsageError, one_line
from dop_compile.timing.measuring import bench
from dop_compile.timing.report import markdown
from dop_compile.timing.result import AGAIN, FULL, ORIGINAL

__all__ = ["bench_command"]


def bench_command(arguments: Namespace) -> None:
    """Measure the original and policies; print Markdown, write it and JSON."""
    backends, batches = arguments.backend or ["eager"], arguments.batch or [1]
    for name, given in (("--backend", backends), ("--batch", batches)):
        if len(set(given)) < len(given):
            raise UsageError(f"{name}: {', '.join(map(str, given))}: name each once")
    for backend in backends:
        check_backend(backend)
    out = None if arguments.out is None else output_directory(arguments.out)
    if out is not None:
        check_new([out / "bench.json", out / "bench.md"], arguments.force)
    images = read_images(arguments.image) or [noise_picture()]
    config = load_vision_config(arguments.model)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    tiers = read_policies(arguments, layers, taken=(ORIGINAL, AGAIN, FULL))
    if not tiers:
        raise UsageError(NO_POLICY)
    if arguments.tier is not None:
        tiers = {arguments.tier: tiers[arguments.tier]}
    processor = load_processor(arguments.model)
    model = load_vision_model(arguments.model, arguments.device, arguments.dtype)

    def read(given: Any) -> dict[str, Any]:
        return dict(read_prompt(given, model, arguments.prompt, images))

    small = {name: resized_processor(processor, policy, len(images)) for name, policy in tiers.items()}
    try:
        result = bench(
            model,
            tiers,
            read(processor),
            tier_inputs={name: read(own) for name, own in small.items() if own is not processor},
            batches=batches,
            backends=backends,
            rounds=arguments.rounds,
            new_tokens=arguments.new_tokens,
        )
    except torch.OutOfMemoryError as error:
        raise UsageError(f"--batch {max(batches)}: too much for {arguments.device}: {one_line(error)}") from error
    except (TypeError, ValueError) as error:  # another depth, another model, a class that cannot be pruned
        raise UsageError(one_line(error)) from error
    text = markdown(result)
    print(text)
    if out is not None:
        write_file(out / "bench.json", result.to_json())
        write_file(out / "bench.md", text + "\n")
        print(f"\nsaved bench.json and bench.md in {out}")
