"""What the compiler does, for whoever asks: ``DOP_COMPILE_LOGS=trace,passes,compile`` (or ``all``) shows it on stderr.

    trace      decoders that were traced
    passes     what every pass did to a graph, and why it left what it left
    compile    pieces that torch.compile was given, and again for which arguments

They are the loggers `dop_compile.trace`, `dop_compile.passes` and `dop_compile.compile`, at level INFO; an application
may as well set them up by the logging module. Loggers of torch and transformers are not touched, but for commands.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

__all__ = ["COMPILE", "PASSES", "TRACE", "configure", "quiet_transformers"]

VARIABLE = "DOP_COMPILE_LOGS"
TRACE, PASSES, COMPILE = (logging.getLogger(f"dop_compile.{name}") for name in ("trace", "passes", "compile"))
_LOGGERS = {"trace": TRACE, "passes": PASSES, "compile": COMPILE}
logging.getLogger("dop_compile").addHandler(logging.NullHandler())


def configure(names: str) -> None:
    """Show logs by their names, with commas between them; what is no name is warned of."""
    wanted = {name.strip() for name in names.split(",")} - {""}
    if unknown := wanted - {*_LOGGERS, "all"}:
        warnings.warn(
            f"{VARIABLE}: {', '.join(sorted(unknown))}: no such log; known are {', '.join(_LOGGERS)} and all",
            stacklevel=2,
        )
    for name, logger in _LOGGERS.items():
        if wanted & {name, "all"}:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
            logger.handlers[:] = [handler]
            logger.setLevel(logging.INFO)
            logger.propagate = False


def quiet_transformers() -> None:
    """Let transformers say what went wrong and nothing else, as commands do."""
    from transformers.utils import logging as hf_logging  # late: it takes seconds

    hf_logging.set_verbosity(logging.ERROR)


configure(os.environ.get(VARIABLE, ""))
