"""The largest batch that a training step of jaxptm, and of its peers, fits into memory: tried, not computed.

    python benchmarks/peers/largest_batch.py OUT.json --gib 8 [--environments DIR] [--sides SIDE ...] [--work WORK] \
        [--dtype bfloat16] [--multiple 4]

Every try is a process of its own that takes two steps. On a GPU a batch fits if they run, and --gib says what the GPU
has, which saves tries. On a CPU nothing refuses a batch, so there it fits if the process never held more than --gib.
Rows are multiples of --multiple: the answer fits, and one multiple more does not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from compare import BOTH, SIDES, machine, start
from turns import Side
from work import WORK


def largest(
    peak: Callable[[int], float | None], first: int, limit: float, multiple: int
) -> tuple[int, dict[int, float]]:
    """The most rows that fit (0: not even one multiple does), and the peaks of all that did.

    Memory grows about evenly with rows: the next try is where the line through the first and the last meets the limit.

    Args:
        peak: bytes at so many rows; None where they do not fit.
        first: rows to begin with, enough to tell what a row takes from what all take.
        limit: bytes.
    """
    peaks: dict[int, float] = {}
    fits, fails, back = 0, None, 1  # in multiples
    while fails is None or fails - fits > 1:
        guess = 2 * fits or first // multiple
        if len(peaks) > 1:
            (rows, held), (more_rows, more_held) = min(peaks.items()), max(peaks.items())
            slope = max((more_held - held) / (more_rows - rows), 1.0)
            guess = int((more_rows + (limit - more_held) / slope) // multiple)
        guess = max(guess, fits + 1)
        if fails is not None and guess >= fails:  # the line lies a little too low
            guess, back = max(fails - back, (fits + fails) // 2), 2 * back
        held_now = peak(guess * multiple)
        if held_now is None:
            fails = guess
        else:
            fits, peaks[guess * multiple] = guess, held_now
    return fits * multiple, peaks


def tried(
    side: str, begin: Callable[[int], Side | str], limit: float, about: dict[str, Any], rows: int
) -> float | None:
    """The peak of a process that takes two steps of so many rows; None where they do not fit.

    Args:
        about: gets what the side says of itself; as long as it is empty, a side that does not begin ends the program.
    """
    process = begin(rows)
    if isinstance(process, str) and not about:
        sys.exit(f"{side}, {rows} rows: {process}")
    try:
        if isinstance(process, str):
            raise RuntimeError(process)
        held = process.steps(1)["peak"]
    except RuntimeError:
        print(f"{side}: {rows} rows do not run", file=sys.stderr, flush=True)
        return None
    about |= process.about
    process.close()
    print(f"{side}: {rows} rows take {held / 2**30:.2f} GiB", file=sys.stderr, flush=True)
    return held if held <= limit or about["device"] != "cpu" else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gib", type=float, required=True, help="memory that may be taken")
    parser.add_argument("--environments", type=Path)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["jaxptm", "torch"])
    parser.add_argument("--work", choices=WORK, default="bert-base-128")
    parser.add_argument("--dtype", choices=BOTH, default="float32")
    parser.add_argument("--multiple", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.gib <= 0 or arguments.multiple < 1:
        parser.error("--gib is above 0, and --multiple 1 or more.")
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"  # torch takes what there is
    limit, found = arguments.gib * 2**30, {}
    for side in arguments.sides:
        about: dict[str, Any] = {}
        begin = partial(start, arguments.work, side, arguments.environments, dtype=arguments.dtype)
        rows, peaks = largest(
            partial(tried, side, begin, limit, about), WORK[arguments.work].rows, limit, arguments.multiple
        )
        found[side] = about | {"rows": rows, "peak_bytes": peaks}
        settings = {"work": arguments.work, "dtype": arguments.dtype, "gib": arguments.gib, "machine": machine()}
        result = settings | {"date": f"{datetime.date.today()}", "multiple": arguments.multiple, "sides": found}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print("| side | rows |\n|---|---|")
    for side, figures in found.items():
        print(f"| {side} | {figures['rows']} |")


if __name__ == "__main__":
    main()
