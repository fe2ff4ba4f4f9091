"""One part of what `benchmarks/gpu.sh` measures; see there.

    python benchmarks/gpu/run.py prefill-llava --out results --seconds 80
    python benchmarks/gpu/run.py host --out results --tiny --device cpu   # does it run?

A part that is stopped by SIGTERM leaves what it has measured in the files.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# `benchmarks` comes last on the path, where its `onnx.py` hides no package
sys.path.pop(0)
sys.path.append(str(Path(__file__).parents[1]))

import torch

from gpu.correctness import correctness
from gpu.decoding import LLAVA, LLAVA_NEXT, host, prefill, sweep, tokens
from gpu.exported import exported
from gpu.first_token import first_token
from gpu.originals import originals
from gpu.selection import selection
from gpu.setting import Setting
from gpu.store import Store
from gpu.timing import Clock, reason

PARTS: dict[str, Callable[[Setting], None]] = {
    "correctness": correctness,
    "prefill-llava": lambda setting: prefill(setting, LLAVA, (1, 8)),
    "prefill-llava-next": lambda setting: prefill(setting, LLAVA_NEXT, (1,)),
    "first-token": first_token,
    "host": host,
    "tokens": tokens,
    "sweep": sweep,
    "reducers": selection,
    "onnx": exported,
    "originals": originals,
}
LEFT_FOR_ENDING = 5
"""Seconds before the hard limit at which a part begins nothing more."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON and Markdown files")
    parser.add_argument("--seconds", type=float, default=3600, help="the part's time limit")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="sizes for trying the script on a processor")
    options = parser.parse_args()
    device = torch.device(options.device)
    store = Store(options.out, device, "bash benchmarks/gpu.sh OUTDIR")
    signal.signal(signal.SIGTERM, _stop)
    started = time.monotonic()
    clock = Clock(options.seconds - LEFT_FOR_ENDING)
    ended = "as planned"
    try:
        PARTS[options.part](Setting(device, options.tiny, options.rounds, clock, store))
        if clock.left <= 0:
            ended = "early, for its time limit"
    except SystemExit:
        ended = "stopped at its time limit"
        raise
    except Exception as error:
        ended = reason(error)
        raise
    finally:
        store.note("parts", **{options.part: f"ended {ended}, after {time.monotonic() - started:.0f} s"})


def _stop(*_: Any) -> None:
    raise SystemExit("time limit")


if __name__ == "__main__":
    main()
