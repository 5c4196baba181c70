"""Trains the arms of an experiment, several seeds each, and puts them side by side.

    python experiments/arms.py FOLDER OUT [--seeds 3] [--jobs 1] [key.key=value ...]

FOLDER holds `config.yaml`, what all arms share, and `arms.yaml`: the figure that is compared, and of each arm the keys
that differ. Runs lie in OUT/<arm>_seed_<n>; what is finished is not run again, what was interrupted goes on. OUT gets
`arms.json` (every figure), `arms.md` (the table) and at the end `arms.png` (the curves). Keys on the command line hold
for all arms. With `--jobs` several runs go at once, each on its share of the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import yaml

from jaxptm.metrics import read_metrics


def command(what: str, folder: Path, run: Path, *overrides: str) -> list[str]:
    """How jaxptm is started."""
    return [sys.executable, "-m", "jaxptm.cli", what, str(folder / "config.yaml"), *overrides, f"out={run}"]


def prepare(folder: Path, out: Path, arms: Iterable[list[str]], overrides: list[str]) -> None:
    """Tokenises or decodes once what several runs at once would each."""
    for keys in {tuple(key for key in arm if key.startswith("data.")) for arm in arms}:
        subprocess.run(command("prepare", folder, out / "prepared", *keys, *overrides), check=True)


def finished(out: Path, arm: str) -> dict[int, Path]:
    """The directories of the runs of an arm that have come to their end, by seed."""
    found = (path.parent for path in out.glob("*/results.json"))
    seeds = {int(run.name.rpartition("_")[2]): run for run in found if run.name.rpartition("_seed_")[0] == arm}
    return dict(sorted(seeds.items()))


def summary(out: Path, experiment: dict[str, Any]) -> dict[str, Any]:
    """Of each arm its keys, the figure of every seed, their median, and seconds a run; versions and devices."""
    said: dict[str, Any] = {"figure": experiment["figure"], "arms": {}}
    for arm, keys in experiment["arms"].items():
        results = {seed: json.loads((run / "results.json").read_text()) for seed, run in finished(out, arm).items()}
        if not results:
            continue
        figures = {str(seed): result["eval"][experiment["figure"]] for seed, result in results.items()}
        said["arms"][arm] = {
            "keys": keys,
            "figures": figures,
            "median": statistics.median(figures.values()),
            "seconds": [round(result["seconds"]) for result in results.values()],
        }
        said |= {key: results[next(iter(results))][key] for key in ("versions", "devices")}
    return said


def table(said: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [f"| arm | {said['figure']}, median | each seed | seconds a run |", "|---|---|---|---|"]
    for arm, one in said["arms"].items():
        values = ", ".join(f"{value:.4f}" for value in one["figures"].values())
        lines.append(f"| {arm} | {one['median']:.4f} | {values} | {statistics.median(one['seconds']):.0f} |")
    return "\n".join(lines) + "\n"


def draw(out: Path, experiment: dict[str, Any], picture: Path) -> None:
    """The figure against the steps: of each arm the median of its seeds, and from the least to the largest."""
    name = f"eval/{experiment['figure']}"
    figure, panel = plt.subplots(figsize=(8, 4.5), layout="constrained")
    shown: list[float] = []
    for arm in experiment["arms"]:
        runs = [
            {line["step"]: line[name] for line in read_metrics(run / "metrics.jsonl") if name in line}
            for run in finished(out, arm).values()
        ]
        if not runs:
            continue
        steps = sorted(set.intersection(*map(set, runs)))
        values = [[run[step] for run in runs] for step in steps]
        medians = [statistics.median(each) for each in values]
        shown += medians
        (line,) = panel.plot(steps, medians, "o-", markersize=3, label=arm)
        panel.fill_between(
            steps, [min(each) for each in values], [max(each) for each in values], alpha=0.2, color=line.get_color()
        )
    panel.set(xlabel="Step", ylabel=experiment["figure"])
    if shown:  # and not one seed that went astray
        margin = 0.05 * (max(shown) - min(shown)) or 1.0
        panel.set_ylim(min(shown) - margin, max(shown) + margin)
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def main() -> None:
    """Runs what is missing, and writes what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.key=value")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_intermixed_args()
    if min(arguments.seeds, arguments.jobs) < 1:
        parser.error("--seeds and --jobs: at least 1.")
    if not (arguments.folder / "arms.yaml").is_file():
        parser.error(f"{arguments.folder}: holds no arms.yaml; name the folder of an experiment.")
    experiment = yaml.safe_load((arguments.folder / "arms.yaml").read_text())
    prepare(arguments.folder, arguments.out, experiment["arms"].values(), arguments.overrides)

    def run(arm: str, seed: int) -> str:
        directory = arguments.out / f"{arm}_seed_{seed}"
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "results.json").exists():
            keys = [*experiment["arms"][arm], *arguments.overrides, f"train.seed={seed}"]
            with (directory / "output.txt").open("a") as output:
                train = command("train", arguments.folder, directory, *keys)
                if subprocess.run(train, stdout=output, stderr=output).returncode:
                    raise RuntimeError(f"{arm}, seed {seed} failed: {directory / 'output.txt'} says why.")
        return f"{arm}, seed {seed}"

    # Seed by seed, so that what is there at any time compares all arms. A thread's cores are those of what it starts.
    runs = [(arm, seed) for seed in range(arguments.seeds) for arm in experiment["arms"]]
    shares: SimpleQueue[list[int]] = SimpleQueue()
    cores = sorted(os.sched_getaffinity(0))
    for job in range(arguments.jobs):
        shares.put(cores[job % len(cores) :: arguments.jobs])
    pool = ThreadPoolExecutor(arguments.jobs, initializer=lambda: os.sched_setaffinity(0, shares.get()))
    try:
        for done in [pool.submit(run, *each) for each in runs]:
            print(done.result(), flush=True)
            said = summary(arguments.out, experiment)
            (arguments.out / "arms.json").write_text(json.dumps(said, indent=2) + "\n")
            (arguments.out / "arms.md").write_text(table(said))
    except RuntimeError as error:
        sys.exit(str(error))
    finally:
        pool.shutdown(cancel_futures=True)
    print(table(said), end="")
    draw(arguments.out, experiment, arguments.out / "arms.png")


if __name__ == "__main__":
    main()
