"""Options of the commands for ONNX: ``dop-compile export|verify|trtexec``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from dop_compile.commands.options.common import positive

__all__ = ["ACTIONS", "add_onnx_commands"]

ACTIONS = {
    "export": "dop_compile.commands.export:export_command",
    "verify": "dop_compile.commands.export:verify_command",
    "trtexec": "dop_compile.commands.export:trtexec_command",
}

EXPORT = """\
Write a model and budget tiers as ONNX graphs: a prefill graph per tier, one decode graph, embedding and
vision graphs, and one file with each weight once. manifest.json describes them. Needs
pip install dop_compile[onnx].

Tiers are the policies given, or those saved with the model; without any the one tier is 100 %. Visual
tokens have a static number, taken from the images of --image-size (a vision graph is made for each size
whose layout of pixels differs), or --visual-length.

--layout triton adds a model repository for Triton Inference Server, in the folder DIR/triton. ONNX Runtime
GenAI (--layout genai) cannot run pruned tiers: docs/serving.md.
"""
TRTEXEC = """\
Print one trtexec command per graph of an exported directory, with its profiles of sizes, for a shell in that
directory. docs/tensorrt.md says which versions of TensorRT know the operators.
"""
VERIFY = """\
Compare an exported directory with the PyTorch model on samples: for every tier, with ONNX Runtime's graph
optimisations on and off, the largest difference of first-token logits, KL of the first token, and the
generated texts. The result is kept in the manifest. Samples are a JSON Lines file, as for profile.

Exit code 0: all tiers pass; 1: one does not; 3: not runnable here (bfloat16 on the CPU).
"""


def _size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, such as 336x336, got {text!r}")
    return int(width), int(height)


def _bounds(text: str) -> tuple[int, int, int]:
    """MIN,OPT,MAX."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"expected MIN,OPT,MAX, such as 1,1,8, got {text!r}")
    low, common, high = map(int, parts)
    return low, common, high


def _length(text: str) -> int | str:
    """A number, or "dynamic"."""
    if text != "dynamic" and not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a number >= 1 or 'dynamic', got {text!r}")
    return text if text == "dynamic" else int(text)


def add_onnx_commands(command: Callable[..., argparse.ArgumentParser], policy: argparse.ArgumentParser) -> None:
    """Add the commands to a parser by its own way of making one."""
    one = command("export", "write a model's tiers as ONNX graphs", EXPORT, policy)
    one.add_argument("model", metavar="MODEL", help="model directory or hub id")
    one.add_argument("--out", required=True, metavar="DIR", help="directory to make")
    one.add_argument("--force", action="store_true", help="replace DIR if it exists")
    one.add_argument("--opset", type=int, choices=(18, 23), default=23, help="23 (default), or 18 for older runtimes")
    one.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: as saved"
    )
    one.add_argument(
        "--image-size", type=_size, action="append", metavar="WxH", help="images to serve (336x336); repeat for several"
    )
    one.add_argument("--visual-length", type=_length, metavar="N", help="visual tokens of a prompt at most, or dynamic")
    one.add_argument("--batch", type=_bounds, default=(1, 1, 8), metavar="MIN,OPT,MAX", help="rows (1,1,8)")
    one.add_argument("--text", type=_bounds, default=(2, 64, 1024), metavar="MIN,OPT,MAX", help="text (2,64,1024)")
    one.add_argument("--new-tokens", type=positive, default=256, metavar="N", help="generated at most (256)")
    one.add_argument("--static", action="store_true", help="no dynamic sizes (embed's tokens apart): each is its OPT")

    one.add_argument("--layout", choices=("triton", "genai"), help="also arrange the graphs for a server")

    two = command("verify", "compare exported graphs with the PyTorch model", VERIFY)
    two.add_argument("directory", metavar="DIRECTORY", help="what export wrote")
    two.add_argument("--samples", required=True, metavar="FILE", help="JSON Lines, as for profile")
    two.add_argument("--max-samples", type=positive, metavar="N", help="use the first N")
    two.add_argument("--model", metavar="MODEL", help="the exported model, if it is elsewhere now")
    two.add_argument("--max-new-tokens", type=positive, default=16, metavar="N", help="texts compared (16)")
    two.add_argument("--provider", default="CPUExecutionProvider", metavar="NAME", help="of ONNX Runtime (CPU)")
    two.add_argument("--tolerance", type=float, metavar="X", help="relative; by dtype unless given")

    three = command("trtexec", "commands that build TensorRT engines of exported graphs", TRTEXEC)
    three.add_argument("directory", metavar="DIRECTORY", help="what export wrote")
