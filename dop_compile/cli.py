"""The command line: ``dop-compile explain|run|bench|demo|profile|search|greedy|report|eval|export|verify|trtexec``.

Exit codes: 0 done; 2 wrong usage or bad input, with one line on stderr that says what; 1 any other failure. `verify`
adds 1 for a tier that differs, and 3 for graphs that cannot run here. 130: stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from dop_compile.commands.bench_options import add_bench_command
from dop_compile.commands.eval_options import add_eval_command
from dop_compile.commands.onnx_options import add_onnx_commands
from dop_compile.commands.search_options import add_search_commands, count, positive

__all__ = ["main"]

DESCRIPTION = """\
Compile a Hugging Face vision-language model so that its decoder skips the operations a policy prunes.

A policy says how many visual tokens enter the decoder, and in how many of its layers they take part in
attention and in the MLP. Each part is optional and keeps everything unless given:

  --visual-tokens 97         97 visual tokens per sample enter, chosen by --reducer
  --mha-depth 26             they take part in attention in layers 0 to 25
  --mlp-depth 19             they take part in the MLP in layers 0 to 18
  --mha-query-depth 8        from layer 8 on attention no longer updates them ...
  --mha-key-value-depth 28   ... but the text still reads them, up to layer 27

Text and generated tokens are always processed in full. Finer policies are written in Python
(Policy.from_operations) and saved as JSON files, which --policy reads.
"""
EXAMPLES = """\
examples:
  dop-compile demo --number 3 --out pictures
  dop-compile explain llava-hf/llava-1.5-7b-hf --mha-depth 26 --mlp-depth 19 --visual-tokens 97
  dop-compile explain ./my-model --mha-query-depth 8 --mha-key-value-depth 28 --save-policy policy.json
  dop-compile run ./my-model --image photo.jpg --prompt "What is this?" --policy policy.json --compare
  dop-compile bench ./my-model --policy 28%=policy.json --batch 1 --batch 4 --out bench
  dop-compile profile ./my-model --samples samples.jsonl --out divergences.json
  dop-compile search divergences.json --budget 0.37 --budget 0.28 --out policies
  dop-compile report divergences.json --policy policies/37.json --policy policies/28.json --out report
  dop-compile eval ./my-model --samples samples.jsonl --method random --budget 0.28 --out comparison
  dop-compile export ./my-model --policy 28%=policies/28.json --out exported
  dop-compile verify exported --samples samples.jsonl
"""
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
DEMO = """\
A small trained LLaVA reads handwritten digits. An image is composed of scans that it was not trained on,
and several questions about it are answered by the original and by three tiers of the compiled model:
100 % (checked to equal the original), and two pruned ones, of which the second prunes queries and
key-values apart. Printed are the answers, FLOPs, KV cache and measured prefill of each. The image is
saved as demo-input.png, and image, answers and each tier's operations as demo.png.

Nothing is downloaded. Model and data are in the repository, so this runs in a clone only; it needs
pip install -e '.[demo]' there.
"""

INTERRUPTED = 130
STOPPED = {
    **dict.fromkeys(("profile", "greedy", "eval"), "the same command goes on with what is finished"),
    "search": "no policy was kept; of measured latencies all or none",
}
NOTHING = "nothing was kept"
"""What Ctrl-C leaves behind, by command."""


def _policy_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("policy")
    group.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a policy saved as JSON; repeat for several tiers (the name is the file's unless given); instead of those "
        "that were saved with the model",
    )
    group.add_argument("--tier", metavar="NAME", help="which of the tiers to use; the first unless given")
    for flag, text in (
        ("--mha-depth", "layers in which visual tokens take part in attention"),
        ("--mha-query-depth", "layers in which attention updates visual tokens (overrides --mha-depth)"),
        ("--mha-key-value-depth", "layers in which visual tokens can be read (overrides --mha-depth)"),
        ("--mlp-depth", "layers in which visual tokens pass the MLP"),
        ("--system-mha-depth", "the same as --mha-depth for the tokens before the first visual one"),
        ("--system-mlp-depth", "the same as --mlp-depth for the tokens before the first visual one"),
        ("--visual-tokens", "visual tokens per sample that enter the decoder"),
    ):
        group.add_argument(flag, type=count, metavar="N", help=text)
    group.add_argument("--reducer", metavar="NAME", help="who chooses the visual tokens: uniform (default), random")
    group.add_argument("--positions", choices=("original", "compact"), help="positions of kept tokens")
    return parser


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("dop-compile", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show a traceback where something fails")
    policy = _policy_options()
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=text, epilog=EXAMPLES, formatter_class=raw, parents=[*parents, common]
        )

    dtypes = ("auto", "float32", "bfloat16", "float16")
    backend = "eager (default), inductor (compiles first, then faster), or any backend of torch.compile"

    one = command("explain", "what a policy costs, per layer", EXPLAIN, policy)
    one.add_argument("model", metavar="MODEL", help="model directory, config.json, or hub id")
    one.add_argument("--image", action="append", default=[], metavar="PATH", help="count this image; repeat")
    one.add_argument("--prompt", metavar="TEXT", help="count this prompt, with --image")
    one.add_argument("--samples", metavar="FILE", help="count these samples (JSON Lines, as for profile): their mean")
    for group, default in (("system", "a short prompt's"), ("visual", "one picture's"), ("text", "a short prompt's")):
        help_text = f"{group} tokens of the prompt, before reduction (default: {default})"
        one.add_argument(f"--{group}", type=count, metavar="N", help=help_text)
    one.add_argument("--rows", type=count, default=1, metavar="N", help="last rows of logits asked for; 0 for all")
    one.add_argument("--dtype", choices=dtypes, default="auto", help="for the size of the KV cache")
    one.add_argument("--json", action="store_true", help="print JSON instead of a table")
    one.add_argument("--save-policy", metavar="FILE", help="write the policy as JSON")
    one.add_argument("--plot", metavar="FILE", help="draw what every tier computes: FILE.svg, .png or .pdf")
    one.add_argument("--force", action="store_true", help="replace files that are there")

    two = command("run", "answer a prompt about an image with a pruned model", RUN, policy)
    two.add_argument("model", metavar="MODEL", help="model directory or hub id")
    two.add_argument("--image", action="append", default=[], metavar="PATH", help="an image; repeat for several")
    two.add_argument("--prompt", required=True, metavar="TEXT", help="what to ask")
    two.add_argument("--backend", default="eager", metavar="NAME", help=backend)
    two.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights; auto: as saved")
    two.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    two.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="length of the answer (64)")
    two.add_argument("--compare", action="store_true", help="also the original's answer, and times")

    three = command("demo", "a small trained model reads digits, in full and pruned; no downloads", DEMO)
    three.add_argument("--checkpoint", metavar="DIR", help="another checkpoint of examples/digits_vlm")
    three.add_argument("--out", default=".", metavar="DIR", help="where its pictures go and are replaced (here)")
    three.add_argument("--image", metavar="PATH", help="a picture of your own; answers are not marked right or wrong")
    three.add_argument("--number", type=count, default=0, metavar="N", help="which canvas, and questions (0)")
    three.add_argument("--seed", type=count, default=0, metavar="N", help="another series of canvases (0)")
    three.add_argument("--backend", default="eager", metavar="NAME", help=backend)
    three.add_argument("--repeats", type=positive, default=10, metavar="N", help="timed rounds (10)")
    add_bench_command(command, policy)
    add_search_commands(command)
    add_eval_command(command)
    add_onnx_commands(command, policy)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # --help, or wrong usage that argparse has already reported
        return int(stop.code or 0)
    try:
        return _run(arguments, argv)
    except KeyboardInterrupt:
        print(f"dop-compile {arguments.command}: stopped; {STOPPED.get(arguments.command, NOTHING)}", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    # Imported late: --help and typing errors are answered at once
    from transformers.utils import logging

    from dop_compile.commands import evaluate as evaluation
    from dop_compile.commands import export as onnx
    from dop_compile.commands import measuring as search
    from dop_compile.commands import run as commands
    from dop_compile.commands.search import search_command
    from dop_compile.commands.unused import check_unused, given_options
    from dop_compile.timing import commands as benchmark

    if not arguments.debug:
        logging.set_verbosity(40)  # errors only
    run: dict[str, Callable[[argparse.Namespace], int | None]] = {
        "explain": commands.explain_command,
        "run": commands.run_command,
        "bench": benchmark.bench_command,
        "demo": commands.demo_command,
        "profile": search.profile_command,
        "search": search_command,
        "greedy": search.greedy_command,
        "report": search.report_command,
        "eval": evaluation.eval_command,
        "export": onnx.export_command,
        "verify": onnx.verify_command,
        "trtexec": onnx.trtexec_command,
    }
    try:
        check_unused(arguments, given_options(_parser(), argv))
        code = run[arguments.command](arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `dop-compile explain ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except commands.UsageError as error:
        if arguments.debug:
            raise
        print(f"dop-compile {arguments.command}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if arguments.debug:
            raise
        message = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename is not None:  # a full disk, for example
            message = f"{error.filename}: {error.strerror}"
        print(f"dop-compile {arguments.command}: {type(error).__name__}: {message}", file=sys.stderr)
        return 1
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
