"""GLUE as one table: chosen tasks, several seeds each, their medians and spreads, and what they were trained with."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxptm.config import GlueData, TrainConfig
from jaxptm.data.glue import GLUE
from jaxptm.resolving import resolve
from jaxptm.storage import is_remote
from jaxptm.training import train
from jaxptm.types import JaxptmError

log = logging.getLogger("jaxptm")

OWN = ("data.task", "data.labels", "objective.problem_type", "train.seed", "out")
"""Keys that differ from task to task, or from seed to seed, by what they are."""


def run_glue(config: TrainConfig, tasks: Sequence[str], seeds: int) -> dict[str, Any]:
    """Fine-tunes on each task with each seed, in `out/<task>/seed_<n>`, and writes `out/glue.json` and `out/glue.md`.

    The table is of all finished runs under `out`, written anew after each of them: call it again with other tasks and
    settings to add to it. What is finished is not run again; what was interrupted goes on.

    Args:
        config: of any task; `data.task` is put in.
        seeds: how many; the first is `train.seed`.

    Returns:
        What `glue.json` says: see `summary`.

    Raises:
        JaxptmError: an unknown task, or whatever a run cannot do; the runs before are in the table.
    """
    if not isinstance(config.data, GlueData):
        raise JaxptmError("the config is not of GLUE: give one with `data.task`, such as configs/finetune/glue.yaml.")
    unknown = [task for task in tasks if task not in GLUE]
    if unknown or not tasks:
        raise JaxptmError(f"there is no task {', '.join(unknown) or 'given'}; there is {', '.join(GLUE)}.")
    if config.data.eval_split == "test":
        raise JaxptmError("data.eval_split: the test sets have no labels to measure with; the table is of dev.")
    if seeds < 1:
        raise JaxptmError(f"{seeds} seeds: give at least 1.")
    if is_remote(config.out):
        raise JaxptmError(f"{config.out}: the table of several runs is kept on a disk; set `out` to a directory.")
    out = Path(config.out)
    runs = [(task, config.train.seed + number) for task in dict.fromkeys(tasks) for number in range(seeds)]
    for number, (task, seed) in enumerate(runs, 1):
        one = config.model_copy(
            update={
                "data": config.data.model_copy(update={"task": task}),
                "train": config.train.model_copy(update={"seed": seed}),
                "out": str(out / task / f"seed_{seed}"),
            }
        )
        if _is_done(one):
            log.info("run %d of %d: %s is finished", number, len(runs), one.out)
            continue
        log.info("run %d of %d: %s, seed %d", number, len(runs), task, seed)
        if not train(one)["finished"]:  # a signal; what is there is saved
            break
        _write(out)
    return _write(out)


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table of finished runs.

    Args:
        results: of each run what its `results.json` says.

    Returns:
        `tasks`: by name `score` and `figures` (each `median`, `std` over the seeds with n - 1, None of one seed, and
        the `values`), `seeds`, `config` and `seconds`; `average`: of the medians of the tasks' scores. A task's score
        is the mean of its figures, of MNLI over its two sets (Wang et al. 2018, section 4).

    Raises:
        JaxptmError: runs of one task differ in more than their seed.
    """
    tasks: dict[str, Any] = {}
    for task in GLUE:
        runs = sorted(
            (run for run in results if run["config"]["data"]["task"] == task),
            key=lambda run: run["config"]["train"]["seed"],
        )
        if not runs:
            continue
        settings = [_settings(run["config"]) for run in runs]
        for run, other in zip(runs, settings, strict=True):
            differing = [key for key in {**other, **settings[0]} if other.get(key) != settings[0].get(key)]
            if differing:
                raise JaxptmError(
                    f"{run['config']['out']}: differs from {runs[0]['config']['out']} in {', '.join(differing)}; runs "
                    "of one task differ in their seed alone: move one of them elsewhere."
                )
        evaluations = [{name: value for name, value in run["eval"].items() if "loss" not in name} for run in runs]
        scores = [
            statistics.mean(value for name, value in said.items() if name.split("/")[-1] == "score")
            for said in evaluations
        ]
        figures = [name for name in evaluations[0] if name.split("/")[-1] != "score"]
        tasks[task] = {
            "score": _spread(scores),
            "figures": {name: _spread([said[name] for said in evaluations]) for name in figures},
            "seeds": [run["config"]["train"]["seed"] for run in runs],
            "seconds": [run["seconds"] for run in runs],
            "config": settings[0],
        }
    average = statistics.mean(row["score"]["median"] for row in tasks.values()) if tasks else None
    return {"tasks": tasks, "average": average}


def markdown(table: Mapping[str, Any]) -> str:
    """A table of `summary` as Markdown, figures in hundredths, and below it every setting."""
    tasks = table["tasks"]
    lines = ["| task | score | figures | seeds | minutes a run |", "|---|---|---|---|---|"]
    for task, row in tasks.items():
        figures = ", ".join(f"{name} {_hundredths(spread)}" for name, spread in row["figures"].items())
        minutes = statistics.median(row["seconds"]) / 60
        seeds = ", ".join(map(str, row["seeds"]))
        lines.append(f"| {task} | {_hundredths(row['score'])} | {figures} | {seeds} | {minutes:.1f} |")
    if table["average"] is not None:
        lines.append(f"| **average of {len(tasks)}** | **{100 * table['average']:.1f}** | | | |")
    lines += ["", "Median over the seeds ± standard deviation, times 100, on the development set.", ""]
    lines += ["| setting | value |", "|---|---|"]
    for key in dict.fromkeys(key for row in tasks.values() for key in row["config"]):
        values = {task: row["config"].get(key) for task, row in tasks.items()}
        shared = len({json.dumps(value) for value in values.values()}) == 1
        said = str(next(iter(values.values()))) if shared else ", ".join(f"{t}: {v}" for t, v in values.items())
        lines.append(f"| {key} | {said} |")
    return "\n".join(lines) + "\n"


def _is_done(config: TrainConfig) -> bool:
    said = _read(Path(config.out) / "results.json")
    return bool(said) and said["config"] == resolve(config).model_dump(mode="json")


def _write(out: Path) -> dict[str, Any]:
    table = summary([said for path in sorted(out.glob("*/seed_*/results.json")) if (said := _read(path))])
    out.mkdir(parents=True, exist_ok=True)
    (out / "glue.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (out / "glue.md").write_text(markdown(table), encoding="utf-8")
    return table


def _read(path: Path) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise JaxptmError(f"{path}: is no results of a run ({error}); move it away.") from error
    return said


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config by dotted keys, without `OWN`."""
    flat = {
        f"{name}.{key}" if isinstance(part, Mapping) else name: value
        for name, part in config.items()
        for key, value in (part.items() if isinstance(part, Mapping) else [("", part)])
    }
    return {key: value for key, value in flat.items() if key not in OWN}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"median": statistics.median(values), "std": std, "values": list(values)}


def _hundredths(spread: Mapping[str, Any]) -> str:
    median = f"{100 * spread['median']:.1f}"
    return median if spread["std"] is None else f"{median} ± {100 * spread['std']:.1f}"
