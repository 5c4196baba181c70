"""Arms side by side: every seed of every arm is in the table, and what is finished is not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from test_training import write_corpus

ROOT = Path(__file__).resolve().parents[2]


def test_two_arms_with_two_seeds(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.txt")
    config = yaml.safe_load((ROOT / "experiments/optimizers/config.yaml").read_text())
    config["model"] |= {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    config["data"] |= {"files": str(tmp_path / "corpus.txt"), "vocab_size": 120, "eval_fraction": 0.2}
    config["train"] |= {"steps": 2, "batch_size": 4, "log_every": 1, "eval_every": 1, "checkpoint_every": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    arms = {
        "slow": ["optimizer.learning_rate=1e-4"],
        "LAMB, fast": ["optimizer.name=lamb", "optimizer.learning_rate=0.1"],
    }
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump({"figure": "mlm_loss", "arms": arms}))
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(ROOT / "experiments/arms.py"),
        str(tmp_path),
        str(out),
        "--seeds",
        "2",
        "train.eval_batches=2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment)
    said = json.loads((out / "arms.json").read_text())
    for arm, keys in arms.items():
        one = said["arms"][arm]
        assert one["keys"] == keys and one["figures"].keys() == {"0", "1"}
        for seed, value in one["figures"].items():
            results = json.loads((out / f"{arm}_seed_{seed}/results.json").read_text())
            assert value == results["eval"]["mlm_loss"] and results["config"]["train"]["eval_batches"] == 2
            assert arm in (out / "arms.md").read_text() and f"{value:.4f}" in (out / "arms.md").read_text()
    assert (out / "arms.png").stat().st_size > 5000
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/results.json")}
    subprocess.run(command, check=True, env=environment)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/results.json")} == written
