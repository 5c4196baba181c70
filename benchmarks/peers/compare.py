"""Training steps of jaxptm and of its peers: the same work, in turns, on one machine.

    python benchmarks/peers/compare.py OUT.json [--environments DIR] [--sides SIDE ...] [--work WORK ...] \
        [--repeats R] [--rows ROWS ...] [--steps S] [--dtype bfloat16] [--together]

Run it with jaxptm's own Python; `environments.py` makes DIR. Without it, only what this Python can import takes part.
Each side is a process that holds its model and steps when it is told to, so that one computes at a time. A ratio is
the median, over the rounds, of the seconds of jaxptm's turn by those of the peer's. A side that is named and does not
take part, or begins and breaks off, is told at the end, and makes the command fail.

    python benchmarks/peers/compare.py --check benchmarks/peers/ratios*.json [...]

measures again what the table of this kind of machine has, as far as the environments are here, and fails where a ratio
is more than 15% higher. Ratios are one machine's: where no table is of this kind, it says so and takes the first.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from turns import Side
from work import WORK

TOLERANCE = 0.15


class Peer(NamedTuple):
    """How a side is started.

    Attributes:
        place: name of its environment; empty for jaxptm's own.
        package: tells whether this Python can take the side; empty where none but its own environment can.
        objectives: that it has.
        dtypes: of the computation.
        variables: of its process.
    """

    script: str
    place: str
    package: str
    objectives: tuple[str, ...]
    dtypes: tuple[str, ...]
    variables: dict[str, str]


class Job(NamedTuple):
    """How one kind of work is measured: `steps` in a turn, of batches of `rows`."""

    sides: list[str]
    steps: int
    rows: int
    dtype: str


BOTH = ("float32", "bfloat16")
EVERYTHING = tuple({work.objective for work in WORK.values()})
SIDES = {
    "jaxptm": Peer("with_jaxptm.py", "", "jaxptm", EVERYTHING, BOTH, {}),
    "jaxptm, attention by XLA": Peer("with_jaxptm.py", "", "jaxptm", EVERYTHING, BOTH[1:], {"XLA_ATTENTION": "1"}),
    "torch": Peer("with_torch.py", "transformers", "torch", EVERYTHING, BOTH, {}),
    "torch compiled": Peer("with_torch.py", "transformers", "torch", EVERYTHING, BOTH, {"COMPILE": "1"}),
    "flax": Peer("with_flax.py", "flax", "", ("masked-lm", "causal-lm"), BOTH[:1], {}),
    "keras": Peer("with_keras.py", "keras", "keras_hub", ("masked-lm",), BOTH[:1], {}),
}


def python_of(peer: Peer, environments: Path | None) -> str | None:
    """The interpreter of a side; None where it is not here."""
    if environments is not None and peer.place and (environments / peer.place).is_dir():
        return str(environments / peer.place / "bin/python")
    return sys.executable if peer.package and importlib.util.find_spec(peer.package) is not None else None


def start(name: str, side: str, environments: Path | None, rows: int, dtype: str) -> Side | str:
    """A side with its first step taken, or why it cannot take part."""
    peer = SIDES[side]
    python = python_of(peer, environments)
    if python is None:
        return "its packages are not here; environments.py makes them, and --environments names the place"
    if WORK[name].objective not in peer.objectives or dtype not in peer.dtypes:
        return f"it has no {WORK[name].objective} in {dtype} here"
    print(f"{name}: {side} begins", file=sys.stderr, flush=True)
    clean = {key: value for key, value in os.environ.items() if key not in ("COMPILE", "XLA_ATTENTION")}
    # On a GPU jax would take three quarters of the memory before torch is asked what it needs.
    settings = {"DTYPE": dtype, "ROWS": str(rows), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        return Side(python, peer.script, name, clean | peer.variables | settings)
    except RuntimeError as error:
        return str(error)


def compare(name: str, started: dict[str, Side | str], repeats: int, job: Job, *, together: bool) -> dict[str, Any]:
    """What each side of one kind of work took, and the ratios of jaxptm to the others. The sides end with it."""
    running = {side: process for side, process in started.items() if isinstance(process, Side)}
    absent = {side: why for side, why in started.items() if isinstance(why, str)}
    devices = {side: process.about["device"] for side, process in running.items()}
    if "jaxptm" not in running or len(set(devices.values())) > 1:
        for process in running.values():
            process.close()
        sys.exit(
            f"{name}: the sides have to run beside jaxptm on one kind of device, and they are on {devices}"
            + "".join(f"; {side}: {why}" for side, why in absent.items())
        )
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in running}
    for _ in range(repeats + 1):
        for side, process in running.items():
            turns[side].append(process.steps(job.steps))
    seconds = {side: [turn["seconds"] for turn in taken[1:]] for side, taken in turns.items()}  # the first warms up
    for process in running.values():
        process.close()
    return {
        "work": WORK[name]._asdict() | {"rows": job.rows, "dtype": job.dtype, "steps": job.steps},
        "machine": machine(),
        "date": f"{datetime.date.today()}",
        "sides": {
            side: process.about
            | {
                "seconds": statistics.median(seconds[side]),
                "all_seconds": seconds[side],
                "ready_seconds": None if together else process.ready_seconds,
                "last_loss": turns[side][-1]["loss"],
                "peak_bytes": turns[side][-1]["peak"],
            }
            for side, process in running.items()
        },
        "ratios": {
            side: statistics.median(ours / theirs for ours, theirs in zip(seconds["jaxptm"], values, strict=True))
            for side, values in seconds.items()
            if side != "jaxptm"
        },
        "absent": absent,
    }


def machine() -> dict[str, Any]:
    """What ratios depend on besides the versions."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {"processor": model, "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()}


def table(measured: dict[str, Any]) -> str:
    lines = [
        "| step | side | seconds | of jaxptm's turn in theirs | from the start to the first step, s | memory, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in measured.items():
        for side, figures in result["sides"].items():
            ratio = f"{result['ratios'][side]:.2f}" if side in result["ratios"] else ""
            ready = "" if figures["ready_seconds"] is None else f"{figures['ready_seconds']:.1f}"
            lines.append(
                f"| {name} | {side} | {figures['seconds']:.3f} | {ratio} | {ready} "
                f"| {figures['peak_bytes'] / 2**30:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--environments", type=Path)
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="default: those that are here")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--rows", type=int, nargs="+", help="of a batch, for all or for each --work; default those that suit a CPU"
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="compile all at once, and hold all in memory, before any is measured; first steps are then not timed",
    )
    parser.add_argument("--steps", type=int, default=1, help="in a turn; one is little where a step takes milliseconds")
    parser.add_argument("--dtype", choices=BOTH, default="float32")
    parser.add_argument("--check", type=Path, nargs="+", help="tables; the one of this kind of machine, or the first")
    arguments = parser.parse_args()
    if (arguments.out is None) == (arguments.check is None):
        parser.error("name the file to write, or the one to --check.")
    rows_of_all = arguments.rows or [WORK[name].rows for name in arguments.work]
    if min(arguments.steps, arguments.repeats, *rows_of_all) < 1:
        parser.error("--steps, --repeats and --rows are 1 or more.")
    if len(rows_of_all) == 1:
        rows_of_all *= len(arguments.work)
    if len(rows_of_all) != len(arguments.work):
        parser.error(
            f"--rows has {len(rows_of_all)} numbers for {len(arguments.work)} of --work; one for all, or each."
        )
    absent_tables = [path for path in arguments.check or [] if not path.is_file()]
    if absent_tables:
        parser.error(f"{absent_tables[0]}: there is no such file; measure it first.")
    tables = {path: json.loads(path.read_text()) for path in arguments.check or []}
    here = machine()
    path, committed = next(
        ((path, said) for path, said in tables.items() if all(result["machine"] == here for result in said.values())),
        next(iter(tables.items()), (None, {})),
    )
    for elsewhere in {json.dumps(result["machine"]) for result in committed.values() if result["machine"] != here}:
        print(f"{path} was measured on {elsewhere}, this is {json.dumps(here)}", file=sys.stderr)
    measured: dict[str, Any] = {}
    jobs: dict[str, Job] = {}
    for name, rows in zip(arguments.work, rows_of_all, strict=True):
        if arguments.check and name not in committed:
            continue
        sides = ["jaxptm", *(side for side in arguments.sides or SIDES if side != "jaxptm")]
        if arguments.check:
            sides = [side for side in sides if side in committed[name]["sides"]]
        # What is checked is measured as it was.
        as_before = committed[name]["work"] if arguments.check else {}
        jobs[name] = Job(
            sides,
            as_before.get("steps", arguments.steps),
            as_before.get("rows", rows),
            as_before.get("dtype", arguments.dtype),
        )
    count = sum(len(job.sides) for job in jobs.values()) if arguments.together else 1
    threads = ThreadPoolExecutor(max(1, count))

    def begun(name: str) -> dict[str, Future[Side | str]]:
        job = jobs[name]
        return {
            side: threads.submit(start, name, side, arguments.environments, job.rows, job.dtype) for side in job.sides
        }

    early = {name: begun(name) for name in jobs} if arguments.together else {}
    for futures in early.values():
        wait(futures.values())
    for name, job in jobs.items():
        started = {side: future.result() for side, future in (early.get(name) or begun(name)).items()}
        measured[name] = compare(name, started, arguments.repeats, job, together=arguments.together)
        if arguments.out:
            arguments.out.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))
    slower = [
        f"{name}: {ratio:.2f} of {side}, {committed[name]['ratios'][side]:.2f} in {path}"
        for name, result in measured.items()
        for side, ratio in result["ratios"].items()
        if arguments.check and ratio > (1 + TOLERANCE) * committed[name]["ratios"][side]
    ]
    absent = [
        f"{name}: {side} took no part: {why}"
        for name, result in measured.items()
        for side, why in result["absent"].items()
    ]
    for line in absent:
        print(line, file=sys.stderr)
    if slower:
        sys.exit("\n".join(["slower than it was:", *slower]))
    if absent and arguments.sides:
        sys.exit("not all of --sides were measured.")
    if arguments.check and not any(result["ratios"] for result in measured.values()):
        sys.exit("no peer is here to compare with; benchmarks/peers/environments.py makes their environments.")


if __name__ == "__main__":
    main()
