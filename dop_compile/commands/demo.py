"""`dop-compile demo`: a small trained model reads digits, in full and pruned."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from tqdm import tqdm

from dop_compile.commands.inputs import (
    check_backend,
    compile_model,
    read_images,
    write_file,
)
from dop_compile.commands.outputs import output_directory
from dop_compile.commands.usage import UsageError, one_line
from dop_compile.demo.picture import draw
from dop_compile.demo.run import compose, demo_policies, open_checkpoint, require_packages, run_demo

__all__ = ["demo_command"]


def demo_command(arguments: Namespace) -> None:
    """Run the demo: compose a picture, ask about it, print the tables and draw them."""
    require_packages()
    check_backend(arguments.backend)
    own = read_images([arguments.image])[0] if arguments.image is not None else None
    out = output_directory(arguments.out)
    checkpoint = None if arguments.checkpoint is None else Path(arguments.checkpoint).expanduser()
    try:
        model, reader = open_checkpoint(checkpoint)
    except (OSError, ValueError) as error:
        raise UsageError(one_line(error)) from error
    image, questions = compose(arguments.number, arguments.seed, own)
    compiled = compile_model(model, demo_policies(), arguments.backend)
    exact = arguments.backend == "eager"
    result = run_demo(model, compiled, reader, image, questions, exact=exact, repeats=arguments.repeats)
    write_file(out / "demo-input.png", lambda file: image.save(file, format="png"))
    with tqdm(desc="drawing", total=1, leave=False, file=sys.stderr) as bar:
        figure = draw(result)
        write_file(out / "demo.png", lambda file: figure.savefig(file, format="png", dpi=100))
        bar.update()
    print(result)
    print(
        f"\nSaved {out / 'demo.png'} (answers, and the operations that each tier keeps) and {out / 'demo-input.png'}."
    )
