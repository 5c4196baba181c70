"""Trains the arms of an experiment, several seeds each, and puts them side by side.

    python experiments/arms.py FOLDER OUT [--seeds 3] [--jobs 1] [--tuning key.key=value] [key.key=value ...]

FOLDER holds `config.yaml`, what all arms share, and `arms.yaml`: of each arm the keys that differ (`arms`), another
config than the one beside it (`config`), keys of all arms (`keys`), and what is compared (`compared`, by name), each
time one figure of a run:

    held-out loss: {figure: mlm_loss}                              # as the run itself ends
    at 15%: {figure: mlm_loss, evaluate: [objective.mask_probability=0.15]}    # `jaxptm evaluate` with other keys
    CoLA: {figure: score, train: glue.yaml, keys: [data.task=cola]}            # a fine-tuning of the run's model

Runs lie in OUT/<arm>_seed_<n>; what is finished is not run again, what was interrupted goes on. OUT gets `arms.json`
(every figure), `arms.md` (the table) and at the end `arms.png`. Keys on the command line hold for all arms, those of
`--tuning` for all fine-tunings. With `--jobs` several runs go at once, each on its share of the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import yaml
from matplotlib.axes import Axes
from pydantic import BaseModel, ValidationError, model_validator

from jaxptm.metrics import read_metrics


class Compared(BaseModel, extra="forbid"):
    """One figure of a run: its own, or of `evaluate`, or of `train`, not of both."""

    figure: str
    evaluate: list[str] | None = None
    """Keys of `jaxptm evaluate`."""
    train: str | None = None
    """The config of a fine-tuning, from the folder of the experiment."""
    keys: list[str] = []
    """Its keys."""

    @model_validator(mode="after")
    def _check(self) -> Compared:
        if self.keys and self.train is None:
            raise ValueError("`keys` are those of a fine-tuning: name its config, `train`")
        if self.train is not None and self.evaluate is not None:
            raise ValueError("`evaluate` and `train` are two figures: give each a name")
        return self


class Experiment(BaseModel, extra="forbid"):
    """What an arms.yaml says."""

    folder: Path
    config: str = "config.yaml"
    """From the folder."""
    keys: list[str] = []
    arms: dict[str, list[str]]
    compared: dict[str, Compared]

    def of(self, arm: str) -> tuple[Path | str, ...]:
        """Config and keys of an arm."""
        return self.folder / self.config, *self.keys, *self.arms[arm]


def read(folder: Path) -> Experiment:
    """The experiment in a folder."""
    said = yaml.safe_load((folder / "arms.yaml").read_text())
    return Experiment(**said, folder=folder)


def jaxptm(output: Path, *words: str | Path) -> str:
    """What a command of jaxptm writes to its standard output; that and its errors go behind `output` as well."""
    with output.open("a") as log:
        command = [sys.executable, "-m", "jaxptm.cli", *map(str, words)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True)
        log.write(done.stdout)
    if done.returncode:
        raise RuntimeError(f"{output.parent.name} failed: {output} says why.")
    return done.stdout


def prepare(experiment: Experiment, out: Path, overrides: list[str]) -> None:
    """Tokenises or decodes once what several runs at once would each."""
    out.mkdir(parents=True, exist_ok=True)
    different = {tuple(key for key in keys if key.startswith("data.")): arm for arm, keys in experiment.arms.items()}
    for arm in different.values():
        jaxptm(out / "prepare.txt", "prepare", *experiment.of(arm), *overrides, f"out={out / 'prepared'}")


def results(run: Path) -> dict[str, Any]:
    """What a finished run says of itself."""
    said: dict[str, Any] = json.loads((run / "results.json").read_text())
    return said


def run_once(experiment: Experiment, arm: str, seed: int, run: Path, overrides: list[str], tuning: list[str]) -> None:
    """One run, and what is compared of it, in `compared.json`; each part only where it is missing."""
    run.mkdir(parents=True, exist_ok=True)
    output, settings = run / "output.txt", (*experiment.of(arm), *overrides)
    if not (run / "results.json").exists():
        jaxptm(output, "train", *settings, f"train.seed={seed}", f"out={run}")
    path = run / "compared.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    for name, compared in experiment.compared.items():
        if name in figures:
            continue
        if compared.evaluate is not None:
            said = jaxptm(output, "evaluate", run, *settings, *compared.evaluate, f"train.seed={seed}")
            had = {figure: float(value) for figure, value in map(str.split, said.splitlines())}
        elif compared.train is not None:
            task = run / name
            if not (task / "results.json").exists():
                tuned = experiment.folder / compared.train
                begin = f"init_from={run / 'model'}"
                jaxptm(output, "train", tuned, begin, *compared.keys, *tuning, f"train.seed={seed}", f"out={task}")
            had = results(task)["eval"]
        else:
            had = results(run)["eval"]
        if compared.figure not in had:
            raise RuntimeError(f"{run.name}, '{name}': has no '{compared.figure}', only {', '.join(had)}.")
        figures[name] = had[compared.figure]
        unfinished = path.with_suffix(".partial")  # another job may be reading
        unfinished.write_text(json.dumps(figures, indent=2) + "\n")
        unfinished.replace(path)


def finished(out: Path, arm: str) -> dict[int, Path]:
    """The directories of the runs of an arm that have come to their end, by seed."""
    found = (path.parent for path in out.glob("*/compared.json"))
    seeds = {int(run.name.rpartition("_")[2]): run for run in found if run.name.rpartition("_seed_")[0] == arm}
    return dict(sorted(seeds.items()))


def summary(out: Path, experiment: Experiment) -> dict[str, Any]:
    """Of each arm its keys, each figure of every seed and their median, and seconds a run; versions and devices."""
    said: dict[str, Any] = {"arms": {}}
    for arm, keys in experiment.arms.items():
        runs = {
            seed: (json.loads((run / "compared.json").read_text()), results(run))
            for seed, run in finished(out, arm).items()
        }
        figures = {
            name: {str(seed): compared[name] for seed, (compared, _) in runs.items() if name in compared}
            for name in experiment.compared
        }
        if not all(figures.values()):
            continue
        said["arms"][arm] = {
            "keys": keys,
            "figures": figures,
            "medians": {name: statistics.median(values.values()) for name, values in figures.items()},
            "seconds": [round(result["seconds"]) for _, result in runs.values()],
        }
        said |= {key: next(iter(runs.values()))[1][key] for key in ("versions", "devices")}
    return said


def table(said: dict[str, Any]) -> str:
    """The summary as Markdown."""
    names = list(next(iter(said["arms"].values()))["figures"]) if said["arms"] else []
    lines = ["| arm | " + " | ".join(f"{name}: median (each seed)" for name in names) + " | seconds a run |"]
    lines += ["|---" * (len(names) + 2) + "|"]
    for arm, one in said["arms"].items():
        cells = [
            f"{one['medians'][name]:.4f} ({', '.join(f'{value:.4f}' for value in one['figures'][name].values())})"
            for name in names
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} | {statistics.median(one['seconds']):.0f} |")
    return "\n".join(lines) + "\n"


def draw(out: Path, experiment: Experiment, said: dict[str, Any], picture: Path) -> None:
    """A panel for each figure, three in a row.

    Where it is the run's own, against the steps: of each arm the median of its seeds, and from the least to the
    largest. Otherwise every seed of every arm, and the medians.
    """
    columns = min(3, len(experiment.compared))
    rows = -(-len(experiment.compared) // columns)
    size = (3 + 5 * columns, 4.5 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for panel in panels.flat[len(experiment.compared) :]:
        panel.remove()
    for panel, (name, compared) in zip(panels.flat, experiment.compared.items(), strict=False):
        panel.set_title(name)
        panel.grid(alpha=0.3)
        if compared.evaluate is None and compared.train is None:
            curves(panel, out, experiment, compared.figure)
            panel.legend()
            continue
        arms = said["arms"]
        for at, one in enumerate(arms.values()):
            panel.plot([at] * len(one["figures"][name]), list(one["figures"][name].values()), "o", alpha=0.5)
            panel.plot([at], [one["medians"][name]], "_", markersize=20, color="black")
        panel.set_xticks(range(len(arms)), list(arms), rotation=30, ha="right")
        panel.set_ylabel(compared.figure)
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def curves(panel: Axes, out: Path, experiment: Experiment, figure: str) -> None:
    """A figure of the runs against their steps."""
    shown: list[float] = []
    for arm in experiment.arms:
        runs = [
            {
                line["step"]: line[f"eval/{figure}"]
                for line in read_metrics(run / "metrics.jsonl")
                if f"eval/{figure}" in line
            }
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
    panel.set(xlabel="Step", ylabel=figure)
    if shown:  # and not one seed that went astray
        margin = 0.05 * (max(shown) - min(shown)) or 1.0
        panel.set_ylim(min(shown) - margin, max(shown) + margin)


def main() -> None:
    """Runs what is missing, and writes what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.key=value")
    parser.add_argument("--tuning", action="append", default=[], metavar="key.key=value")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_intermixed_args()
    if min(arguments.seeds, arguments.jobs) < 1:
        parser.error("--seeds and --jobs: at least 1.")
    if not (arguments.folder / "arms.yaml").is_file():
        parser.error(f"{arguments.folder}: holds no arms.yaml; name the folder of an experiment.")
    try:
        experiment = read(arguments.folder)
    except (ValidationError, yaml.YAMLError, TypeError) as error:
        parser.error(f"{arguments.folder / 'arms.yaml'}: {error}")
    out = arguments.out
    # Seed by seed, so that what is there at any time compares all arms. A thread's cores are those of what it starts.
    runs = [(arm, seed) for seed in range(arguments.seeds) for arm in experiment.arms]
    shares: SimpleQueue[list[int]] = SimpleQueue()
    cores = sorted(os.sched_getaffinity(0))
    for job in range(arguments.jobs):
        shares.put(cores[job % len(cores) :: arguments.jobs])
    pool = ThreadPoolExecutor(arguments.jobs, initializer=lambda: os.sched_setaffinity(0, shares.get()))
    try:
        print(f"what runs say while they go on: {out}/*/output.txt; before that: {out}/prepare.txt", flush=True)
        prepare(experiment, out, arguments.overrides)

        def run(arm: str, seed: int) -> str:
            run_once(experiment, arm, seed, out / f"{arm}_seed_{seed}", arguments.overrides, arguments.tuning)
            return f"{arm}, seed {seed}"

        for done in [pool.submit(run, *each) for each in runs]:
            print(done.result(), flush=True)
            said = summary(out, experiment)
            (out / "arms.json").write_text(json.dumps(said, indent=2) + "\n")
            (out / "arms.md").write_text(table(said))
    except RuntimeError as error:
        sys.exit(str(error))
    finally:
        pool.shutdown(cancel_futures=True)
    said = summary(out, experiment)
    print(table(said), end="")
    draw(out, experiment, said, out / "arms.png")


if __name__ == "__main__":
    main()
