"""Arms side by side: every figure of every seed of every arm is in the table, and what is finished is not run again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from experiments import arms
from jaxptm.config import load_config

EXPERIMENTS = Path(arms.__file__).parent
ARMS = {"slow": ["optimizer.learning_rate=1e-4"], "LAMB, fast": ["optimizer.name=lamb", "optimizer.learning_rate=0.1"]}
COMPARED: dict[str, Any] = {
    "held out": {"figure": "mlm_loss"},
    "words": {"figure": "mlm_loss", "evaluate": ["objective.masking=words"]},
    "CoLA": {"figure": "score", "train": "task.yaml", "keys": ["data.task=cola"]},
}


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was run; in the place of a command of jaxptm, its config is read and results are made up of it."""
    (tmp_path / "config.yaml").write_text((EXPERIMENTS / "optimizers/config.yaml").read_text())
    (tmp_path / "task.yaml").write_text((EXPERIMENTS / "fine_tuning/glue.yaml").read_text())
    describe(tmp_path, ARMS)
    done: list[str] = []

    def run(words: list[str], **_: Any) -> Any:
        what, *rest = words[words.index("jaxptm.cli") + 1 :]
        evaluated = Path(rest.pop(0)) if what == "evaluate" else None
        config = load_config(rest[0], rest[1:])
        answer = ""
        if what == "evaluate":
            assert evaluated is not None
            done.append(f"evaluate {evaluated.name}")
            loss = config.optimizer.learning_rate + config.train.seed
            answer = f"loss      9\nmlm_loss  {loss + (10 if config.objective.masking == 'words' else 0):.6g}\n"
        elif what == "train":
            if config.optimizer.learning_rate > 1:
                return SimpleNamespace(returncode=1, stdout="")
            out = Path(config.out)
            out.mkdir(parents=True, exist_ok=True)
            if config.objective.name == "masked-lm":
                assert config.train.steps == 7
                loss = config.optimizer.learning_rate + config.train.seed
                lines = [{"step": step, "eval/mlm_loss": loss + 1 / step} for step in (1, 2)]
                figures = {"mlm_loss": loss}
            else:
                assert config.init_from == str(out.parent / "model") and config.data.task == "cola"
                assert config.data.path == "elsewhere"
                lines, figures = [], {"score": 0.25 * config.train.seed}
            (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            said = {"eval": figures, "seconds": 3.2, "versions": {"jax": "0"}, "devices": ["cpu"]}
            (out / "results.partial").write_text(json.dumps(said))
            (out / "results.partial").replace(out / "results.json")
            done.append(f"train {out.relative_to(tmp_path / 'out')}")
        return SimpleNamespace(returncode=0, stdout=answer)

    monkeypatch.setattr(subprocess, "run", run)
    return done


def describe(folder: Path, given: dict[str, list[str]], **more: Any) -> None:
    said = {"arms": given, "compared": COMPARED, **more}
    (folder / "arms.yaml").write_text(yaml.safe_dump(said, sort_keys=False))


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> Path:
    monkeypatch.setattr(
        sys,
        "argv",
        ["arms.py", str(folder), str(folder / "out"), *words, "--tuning", "data.path=elsewhere", "train.steps=7"],
    )
    arms.main()
    return folder / "out"


def test_every_figure_of_every_seed_of_every_arm(
    done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = start(monkeypatch, tmp_path, "--seeds", "2", "--jobs", "2")
    runs = [f"{arm}_seed_{seed}" for arm in ARMS for seed in range(2)]
    assert sorted(done) == sorted(
        line for run in runs for line in (f"train {run}", f"train {run}/CoLA", f"evaluate {run}")
    )
    said = json.loads((out / "arms.json").read_text())
    assert said["devices"] == ["cpu"]
    assert said["arms"]["slow"] == {
        "keys": ARMS["slow"],
        "figures": {
            "held out": {"0": 1e-4, "1": 1.0001},
            "words": {"0": 10.0001, "1": 11.0001},
            "CoLA": {"0": 0.0, "1": 0.25},
        },
        "medians": {"held out": 0.5001, "words": 10.5001, "CoLA": 0.125},
        "seconds": [3, 3],
    }
    said_of_lamb = "| LAMB, fast | 0.6000 (0.1000, 1.1000) | 10.6000 (10.1000, 11.1000) | 0.1250 (0.0000, 0.2500) | 3 |"
    assert said_of_lamb in (out / "arms.md").read_text().splitlines()
    assert (out / "arms.png").stat().st_size > 5000


def test_only_what_is_missing_is_run(done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, tmp_path, "--seeds", "1")
    (tmp_path / "out/slow_seed_0/compared.json").write_text('{"held out": 1.0}')  # stopped before it was measured
    del done[:]
    out = start(monkeypatch, tmp_path, "--seeds", "2")
    again = [line for line in done if "seed_0" in line]
    assert again == ["evaluate slow_seed_0"]  # the fine-tuning was done, and what was known stays as it is
    assert json.loads((out / "arms.json").read_text())["arms"]["slow"]["figures"]["held out"]["0"] == 1.0
    assert len(done) == 1 + 3 * len(ARMS)


def test_a_run_that_fails_is_named(done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe(tmp_path, {"slow": ARMS["slow"], "mad": ["optimizer.learning_rate=10"], "LAMB, fast": ARMS["LAMB, fast"]})
    with pytest.raises(SystemExit, match=r"mad_seed_0 failed: .*output\.txt says why"):
        start(monkeypatch, tmp_path)
    assert done[0] == "train slow_seed_0"
    assert json.loads((tmp_path / "out/arms.json").read_text())["arms"].keys() == {"slow"}


def test_what_arms_yaml_must_not_say_is_named(
    done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    describe(tmp_path, ARMS, figure="wer")
    with pytest.raises(SystemExit):
        start(monkeypatch, tmp_path)
    said = capsys.readouterr().err
    assert "arms.yaml" in said and "figure" in said and not done
    for wrong, message in (
        ({"train": "task.yaml", "evaluate": []}, "`evaluate` and `train` are two figures"),
        ({"keys": ["data.task=cola"]}, "name its config, `train`"),
    ):
        describe(tmp_path, ARMS, compared={"wrong": {"figure": "score", **wrong}})
        with pytest.raises(SystemExit):
            start(monkeypatch, tmp_path)
        assert message in capsys.readouterr().err and not done


@pytest.mark.parametrize("name", COMPARED)
def test_a_figure_that_a_run_does_not_have_is_named(
    name: str, done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(tmp_path, ARMS, compared={name: COMPARED[name] | {"figure": "bleu"}})
    with pytest.raises(SystemExit, match=rf"slow_seed_0, '{name}': has no 'bleu', only .*(mlm_loss|score)"):
        start(monkeypatch, tmp_path)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*/arms.yaml")), ids=lambda path: path.parent.name)
def test_the_arms_of_each_experiment_are_configs(path: Path) -> None:
    experiment = arms.read(path.parent)
    for arm in experiment.arms:
        config, *keys = experiment.of(arm)
        load_config(config, keys)
        for compared in experiment.compared.values():
            if compared.evaluate is not None:
                load_config(config, [*keys, *compared.evaluate])
    for compared in experiment.compared.values():
        if compared.train is not None:
            load_config(path.parent / compared.train, compared.keys)
