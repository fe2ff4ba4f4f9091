"""What ``dop-compile export``, ``verify`` and ``trtexec`` do; `dop_compile.commands.options.onnx` has their options."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from PIL import Image

from dop_compile.commands.inputs import load_processor, load_vision_model
from dop_compile.commands.outputs import output_directory, output_file
from dop_compile.commands.policies import read_policies
from dop_compile.commands.usage import UsageError, one_line
from dop_compile.hf.prompts import prompt_inputs
from dop_compile.onnx import require_packages
from dop_compile.policy.policy import Policy
from dop_compile.reports.table import POLICY_FLOPS

__all__ = ["NOT_RUNNABLE", "export_command", "trtexec_command", "verify_command"]

NOT_RUNNABLE = 3
"""Exit code of `verify` where the provider does not run the graphs."""


def _require() -> None:
    try:
        require_packages()
    except ModuleNotFoundError as error:
        raise UsageError(one_line(error)) from error


def export_command(arguments: Namespace) -> None:
    """Export a model with the tiers that the command line names."""
    _require()
    from dop_compile.onnx.contract.manifest import MANIFEST
    from dop_compile.onnx.contract.workspace import check_target
    from dop_compile.onnx.deploy.triton import TRITON, check_layout
    from dop_compile.onnx.export.export import export_onnx
    from dop_compile.onnx.export.shapes import Shapes

    try:
        shapes = Shapes(
            batch=arguments.batch,
            text=arguments.text,
            new_tokens=arguments.new_tokens,
            visual_length=arguments.visual_length,
            static=arguments.static,
        )
        check_layout(arguments.layout, arguments.dtype)  # before a model is loaded
        check_target(arguments.out, force=arguments.force, mark=MANIFEST)
    except (FileExistsError, ValueError) as error:
        raise UsageError(one_line(error)) from error
    output_directory(str(Path(arguments.out).expanduser().resolve().parent))
    model = load_vision_model(arguments.model, "cpu", arguments.dtype)
    processor = load_processor(arguments.model)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    tiers = read_policies(arguments, layers) or {"100%": Policy.full(layers)}
    if arguments.tier is not None:  # the default tier is the first
        tiers = {arguments.tier: tiers[arguments.tier], **tiers}
    sizes = arguments.image_size or [(336, 336)]
    examples = [prompt_inputs(processor, "Describe.", [Image.new("RGB", size)]) for size in sizes]
    try:
        manifest = export_onnx(
            model,
            tiers,
            arguments.out,
            examples=examples,
            processor=processor,
            opset=arguments.opset,
            shapes=shapes,
            layout=arguments.layout,
            force=arguments.force,
            progress=True,
        )
    except (FileExistsError, ValueError, TypeError) as error:
        raise UsageError(one_line(error)) from error
    print(_table(manifest))
    system, visual, text = next(iter(manifest.tiers.values())).counts
    print(f"{POLICY_FLOPS} (eq. 11) and KV cache: of {system} system + {visual} visual + {text} text tokens")
    print(
        f"saved {len(manifest.graphs)} graphs and {manifest.weights.bytes / 1e6:,.1f} MB of weights to {arguments.out}"
    )
    if arguments.layout == TRITON:
        print(f"Triton: tritonserver --model-repository {Path(arguments.out) / TRITON}")


def _table(manifest: Any) -> str:
    lines = [f"{'tier':<12} {POLICY_FLOPS:>12} {'KV cache':>12}  prefill"]
    for name, tier in manifest.tiers.items():
        flops = "-" if tier.eq11_fraction is None else f"{tier.eq11_fraction:.1%}"
        stored = "-" if tier.kv_bytes is None else f"{tier.kv_bytes / 1e6:,.2f} MB"
        lines.append(f"{name:<12} {flops:>12} {stored:>12}  {manifest.graphs[tier.prefill].data.file}")
    return "\n".join(lines)


def trtexec_command(arguments: Namespace) -> None:
    """Print the commands that build TensorRT engines."""
    _require()
    from dop_compile.onnx.contract.manifest import Manifest
    from dop_compile.onnx.deploy.trtexec import trtexec_commands

    try:
        manifest = Manifest.load(arguments.directory)
    except (OSError, ValueError) as error:
        raise UsageError(one_line(error)) from error
    print("\n".join(trtexec_commands(manifest)))


def verify_command(arguments: Namespace) -> int:
    """Compare and print; returns the exit code."""
    _require()
    from dop_compile.onnx.check.verification import file_digest, verify
    from dop_compile.onnx.contract.manifest import MANIFEST, Manifest
    from dop_compile.search.samples import Samples, read_jsonl

    try:
        manifest = Manifest.load(arguments.directory)
        rows = read_jsonl(arguments.samples)[: arguments.max_samples]
    except (OSError, ValueError) as error:
        raise UsageError(one_line(error)) from error
    output_file(str(Path(arguments.directory) / MANIFEST), "DIRECTORY")
    source = arguments.model or manifest.model.source
    if not source:
        raise UsageError("--model: the manifest does not say where the model was loaded from; name it")
    model = load_vision_model(source, "cpu", manifest.model.dtype)
    samples = Samples(rows, load_processor(source), dtype=model.dtype)
    try:
        result = verify(
            arguments.directory,
            model,
            samples,
            new_tokens=arguments.max_new_tokens,
            provider=arguments.provider,
            tolerance=arguments.tolerance,
            samples_sha256=file_digest(arguments.samples),
            progress=True,
        )
    except (OSError, ValueError) as error:
        raise UsageError(one_line(error)) from error
    if not result.runnable:
        print(result.reason, file=sys.stderr)
        return NOT_RUNNABLE
    print(f"{'tier':<12} {'optimized':<10} {'logits':>9} {'of':>7} {'KL':>9} {'same text':>10}")
    for check in result.checks:
        same = f"{check.same_text}/{check.samples}"
        numbers = f"{check.logit_difference:>9.1e} {check.logit_scale:>7.1f} {check.kl:>9.1e} {same:>10}"
        print(
            f"{check.tier:<12} {'yes' if check.optimized else 'no':<10} {numbers}  {'' if check.passed else 'FAILED'}"
        )
    print("all tiers agree with PyTorch" if result.passed else "not all tiers agree with PyTorch")
    return 0 if result.passed else 1
