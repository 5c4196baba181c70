"""How long each side takes from the start of its process to the end of its first step, cold and with its cache filled.

    python benchmarks/peers/first_step.py OUT.json [--environments DIR] [--sides SIDE ...] [--work WORK] \
        [--repeats R] [--rows ROWS] [--dtype bfloat16]

Cold is with an empty directory for what compilers keep (XLA's compilation cache, torch's Inductor), and the next start
finds there what the cold one left. Imports, the parameters' initial values and the step itself are counted in both.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from compare import BOTH, SIDES, machine, start
from turns import Side
from work import WORK


def first_step(side: str, arguments: argparse.Namespace, cache: str) -> Side | str:
    """The process, which has ended, or why this side takes no part."""
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": cache,
    }
    rows = arguments.rows or WORK[arguments.work].rows
    process = start(arguments.work, side, arguments.environments, rows, arguments.dtype)
    if isinstance(process, Side):
        process.close()
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--environments", type=Path)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--work", choices=WORK, default="bert-base-128")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--dtype", choices=BOTH, default="float32")
    arguments = parser.parse_args()
    if min(arguments.repeats, arguments.rows or 1) < 1:
        parser.error("--repeats and --rows are 1 or more.")
    taken: dict[str, dict[str, list[float]]] = {}
    versions: dict[str, dict[str, str]] = {}
    for _ in range(arguments.repeats):
        for side in arguments.sides:
            with tempfile.TemporaryDirectory() as cache:
                cold = first_step(side, arguments, cache)
                cached = first_step(side, arguments, cache) if isinstance(cold, Side) else cold
            if isinstance(cold, str) or isinstance(cached, str):
                print(f"{side} takes no part: {cached}", file=sys.stderr)
                continue
            versions[side] = cold.about["versions"]
            seconds = taken.setdefault(side, {"cold": [], "cached": []})
            seconds["cold"].append(cold.ready_seconds)
            seconds["cached"].append(cached.ready_seconds)
    if not taken:
        sys.exit("no side took part; benchmarks/peers/environments.py makes their environments.")
    said = {
        "work": arguments.work,
        "rows": arguments.rows or WORK[arguments.work].rows,
        "dtype": arguments.dtype,
        "machine": machine(),
        "date": f"{datetime.date.today()}",
        "versions": versions,
        "seconds": taken,
    }
    arguments.out.write_text(json.dumps(said, indent=1) + "\n")
    print("| side | cold, s | with its cache, s |\n|---|---|---|")
    for side, states in taken.items():
        print(f"| {side} | {statistics.median(states['cold']):.1f} | {statistics.median(states['cached']):.1f} |")


if __name__ == "__main__":
    main()
