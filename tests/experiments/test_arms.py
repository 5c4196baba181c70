"""Arms side by side: every seed of every arm is in the table, and what is finished is not run again."""

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

FOLDER = Path(arms.__file__).parent / "optimizers"
ARMS = {"slow": ["optimizer.learning_rate=1e-4"], "LAMB, fast": ["optimizer.name=lamb", "optimizer.learning_rate=0.1"]}


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was trained; in the place of `jaxptm train`, its config is read and results are made up of it."""
    (tmp_path / "config.yaml").write_text((FOLDER / "config.yaml").read_text())
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump({"figure": "mlm_loss", "arms": ARMS}))
    done: list[str] = []

    def run(words: list[str], **_: Any) -> Any:
        what, *rest = words[words.index("jaxptm.cli") + 1 :]
        config = load_config(rest[0], rest[1:])
        if what == "train":
            assert config.train.steps == 7
            if config.optimizer.learning_rate > 1:
                return SimpleNamespace(returncode=1)
            out, loss = Path(config.out), config.optimizer.learning_rate + config.train.seed
            lines = [{"step": step, "eval/mlm_loss": loss + 1 / step} for step in (1, 2)]
            (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            said = {"eval": {"mlm_loss": loss}, "seconds": 3.2, "versions": {"jax": "0"}, "devices": ["cpu"]}
            (out / "results.partial").write_text(json.dumps(said))
            (out / "results.partial").replace(out / "results.json")
            done.append(out.name)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return done


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> Path:
    monkeypatch.setattr(sys, "argv", ["arms.py", str(folder), str(folder / "out"), *words, "train.steps=7"])
    (folder / "out").mkdir(exist_ok=True)
    arms.main()
    return folder / "out"


def test_every_seed_of_every_arm(trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = start(monkeypatch, tmp_path, "--seeds", "2", "--jobs", "2")
    assert sorted(trained) == ["LAMB, fast_seed_0", "LAMB, fast_seed_1", "slow_seed_0", "slow_seed_1"]
    said = json.loads((out / "arms.json").read_text())
    assert said["figure"] == "mlm_loss" and said["devices"] == ["cpu"]
    assert said["arms"]["slow"] == {
        "keys": ARMS["slow"],
        "figures": {"0": 1e-4, "1": 1.0001},
        "median": 0.5001,
        "seconds": [3, 3],
    }
    assert "| LAMB, fast | 0.6000 | 0.1000, 1.1000 | 3 |" in (out / "arms.md").read_text()
    assert (out / "arms.png").stat().st_size > 5000
    start(monkeypatch, tmp_path, "--seeds", "3")
    assert sorted(trained[4:]) == ["LAMB, fast_seed_2", "slow_seed_2"]


def test_a_run_that_fails_is_named(trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"slow": ARMS["slow"], "mad": ["optimizer.learning_rate=10"], "LAMB": ARMS["LAMB, fast"]}
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump({"figure": "mlm_loss", "arms": broken}, sort_keys=False))
    with pytest.raises(SystemExit, match=r"mad, seed 0 failed: .*output\.txt says why"):
        start(monkeypatch, tmp_path)
    assert trained[0] == "slow_seed_0"
    assert json.loads((tmp_path / "out/arms.json").read_text())["arms"].keys() == {"slow"}
