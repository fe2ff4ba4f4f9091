"""Options of the commands that show a policy at work: ``dop-compile explain|run|warmup|demo``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from dop_compile.commands.options.common import BACKEND, DTYPES, count, policy_options, positive

__all__ = ["ACTIONS", "add_model_commands"]

ACTIONS = {
    "explain": "dop_compile.commands.explain:explain_command",
    "run": "dop_compile.commands.run:run_command",
    "warmup": "dop_compile.commands.warmup:warmup_command",
    "demo": "dop_compile.commands.demo:demo_command",
}

EXPLAIN = """\
Print, per layer, how many tokens are queries, keys and in the MLP, the FLOPs and the KV cache, and a
summary against the original. No weights are read: a configuration will do.

Visual tokens are those of one picture where the configuration fixes their number. Where it depends on the
picture, say it by --image, --samples or --visual. The table says which numbers were used.

  policy FLOPs    eq. 11: every operation that the policy keeps, at these token counts
  executed FLOPs  what is left when work that reaches no requested output is removed

--plot draws the same as a picture: which tokens each operation of each layer processes, in every tier.
"""
RUN = """\
Answer a prompt about an image with a pruned model. The chat template of the model's processor is used
where there is one; else the image token is put before the prompt, unless the prompt holds it.
Several policies are tiers of one compiled model; the first is used unless --tier names another. A model that
was saved with its tiers (dop_compile.json) needs no policies.
"""
WARMUP = """\
Compile ahead of time what answers with these tiers need: for each tier, batch size and text length a prompt
is read and three tokens are generated with the inductor backend. What is compiled is kept in torch's cache
folder, and a later process that runs with TORCHINDUCTOR_CACHE_DIR set to it starts with that: on the same
kind of machine and with the same versions of torch, transformers and dop_compile.

One text length stands for all, and two batch sizes, 1 and a larger one, for all batch sizes. Without --image
a picture of noise is asked about.

The folder holds code that torch runs. Use one that nobody else can write to.
"""
DEMO = """\
A small trained LLaVA reads handwritten digits. An image is composed of scans that it was not trained on,
and several questions about it are answered by the original and by three tiers of the compiled model:
100 % (checked to equal the original), and two pruned ones, of which the second prunes queries and
key-values apart. Printed are the answers, FLOPs, KV cache and measured prefill of each. The image is
saved as demo-input.png, and image, answers and each tier's operations as demo.png.

Nothing is downloaded. Model and data are in the repository, so this runs in a clone only; it needs
pip install -e '.[demo]' there.
"""


def add_model_commands(command: Callable[..., argparse.ArgumentParser], policy: argparse.ArgumentParser) -> None:
    """Add the commands by `command(name, summary, text, *parents)`, which makes a subparser."""
    one = command("explain", "what a policy costs, per layer", EXPLAIN, policy)
    one.add_argument("model", metavar="MODEL", help="model directory, config.json, or hub id")
    one.add_argument("--image", action="append", default=[], metavar="PATH", help="count this image; repeat")
    one.add_argument("--prompt", metavar="TEXT", help="count this prompt, with --image")
    one.add_argument("--samples", metavar="FILE", help="count these samples (JSON Lines, as for profile): their mean")
    for group, default in (("system", "a short prompt's"), ("visual", "one picture's"), ("text", "a short prompt's")):
        help_text = f"{group} tokens of the prompt, before reduction (default: {default})"
        one.add_argument(f"--{group}", type=count, metavar="N", help=help_text)
    one.add_argument("--rows", type=count, default=1, metavar="N", help="last rows of logits asked for; 0 for all")
    one.add_argument("--dtype", choices=DTYPES, default="auto", help="for the size of the KV cache")
    one.add_argument("--json", action="store_true", help="print JSON instead of a table")
    one.add_argument("--save-policy", metavar="FILE", help="write the policy as JSON")
    one.add_argument("--plot", metavar="FILE", help="draw what every tier computes: FILE.svg, .png or .pdf")
    one.add_argument("--force", action="store_true", help="replace files that are there")

    two = command("run", "answer a prompt about an image with a pruned model", RUN, policy)
    two.add_argument("model", metavar="MODEL", help="model directory or hub id")
    two.add_argument("--image", action="append", default=[], metavar="PATH", help="an image; repeat for several")
    two.add_argument("--prompt", required=True, metavar="TEXT", help="what to ask")
    two.add_argument("--backend", default="eager", metavar="NAME", help=BACKEND)
    two.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as saved")
    two.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    two.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="length of the answer (64)")
    two.add_argument("--compare", action="store_true", help="also the original's answer, and times")
    two.add_argument("--show-kept", metavar="FILE", help="draw which patches each layer reads (.png, .svg, .pdf)")
    two.add_argument("--force", action="store_true", help="replace a picture that is there")

    four = command("warmup", "compile ahead of time", WARMUP, policy_options(one_tier=False))
    four.add_argument("model", metavar="MODEL", help="model directory or hub id")
    four.add_argument("--tiers", nargs="+", metavar="NAME", help="which of the tiers to warm; all unless given")
    four.add_argument("--batch-sizes", nargs="+", type=positive, default=[1], metavar="N", help="rows (1)")
    four.add_argument(
        "--text-lengths", nargs="+", type=positive, metavar="N", help="text tokens behind the picture; the prompt's"
    )
    four.add_argument("--padded", action="store_true", help="also batches of prompts of different lengths")
    four.add_argument("--image", action="append", default=[], metavar="PATH", help="an image; repeat for several")
    four.add_argument("--prompt", default="Describe the picture.", metavar="TEXT", help="what to ask")
    four.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as saved")
    four.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    four.add_argument(
        "--cache", metavar="DIR", help="where compiled code is kept; TORCHINDUCTOR_CACHE_DIR, or torch's own folder"
    )

    three = command("demo", "a small trained model reads digits, in full and pruned; no downloads", DEMO)
    three.add_argument("--checkpoint", metavar="DIR", help="another checkpoint of examples/digits_vlm")
    three.add_argument("--out", default=".", metavar="DIR", help="where its pictures go and are replaced (here)")
    three.add_argument("--image", metavar="PATH", help="a picture of your own; answers are not marked right or wrong")
    three.add_argument("--number", type=count, default=0, metavar="N", help="which canvas, and questions (0)")
    three.add_argument("--seed", type=count, default=0, metavar="N", help="another series of canvases (0)")
    three.add_argument("--backend", default="eager", metavar="NAME", help=BACKEND)
    three.add_argument("--repeats", type=positive, default=10, metavar="N", help="timed rounds (10)")
