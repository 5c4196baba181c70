"""The runner of GLUE: two tasks, two seeds, the table of their runs, and what may not be mixed in it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxptm.config import TrainConfig, validate
from jaxptm.data.tokenizer import train_wordpiece
from jaxptm.glue import markdown, run_glue, summary
from jaxptm.types import JaxptmError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    home = tmp_path_factory.mktemp("glue")
    rng = np.random.default_rng(0)
    words = "the film was good bad long short warm cold and".split()

    def text() -> str:
        return " ".join(rng.choice(words, 4))  # of one length: one program a task

    train_wordpiece([" ".join(words)] * 4, 80).save_pretrained(home / "tokenizer")
    columns = ["index", *"bcdefg", "sentence1", "sentence2", "score"]
    for name, count in (("train", 20), ("dev", 12)):
        sst2 = ["sentence\tlabel", *(f"{text()}\t{i % 2}" for i in range(count))]
        stsb = ["\t".join(columns), *("\t".join(["0"] * 7 + [text(), text(), f"{i % 5}.5"]) for i in range(count))]
        for task, lines in (("SST-2", sst2), ("STS-B", stsb)):
            (home / "data" / task).mkdir(parents=True, exist_ok=True)
            (home / "data" / task / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    fields = {
        "model": {"preset": "bert-tiny", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
        "objective": {"name": "sequence-classification"},
        "data": {"task": "sst2", "path": str(home / "data"), "tokenizer": str(home / "tokenizer"), "max_length": 24},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"epochs": 1, "batch_size": 8, "seed": 3, "eval_every": "epoch", "checkpoint_every": "epoch"},
        "parallel": {"data": 1},
        "init_from": None,
        "out": str(home / "runs"),
    }
    return validate(TrainConfig, fields, "test")


def test_tasks_and_seeds_become_a_table(config: TrainConfig) -> None:
    out = Path(config.out)
    table = run_glue(config, ["stsb", "sst2"], 2)
    assert json.loads((out / "glue.json").read_text()) == table
    assert list(table["tasks"]) == ["sst2", "stsb"]  # in the order of the paper's table
    for task, row in table["tasks"].items():
        runs = [json.loads((out / task / f"seed_{seed}/results.json").read_text()) for seed in (3, 4)]
        for name, spread in row["figures"].items():
            values = [run["eval"][name] for run in runs]
            assert spread == {
                "median": statistics.median(values),
                "std": pytest.approx(np.std(values, ddof=1)),
                "values": values,
            }
        assert row["score"]["values"] == [run["eval"]["score"] for run in runs]
        assert row["seeds"] == [3, 4]
        assert row["config"]["optimizer.learning_rate"] == 1e-3 and row["config"]["train.batch_size"] == 8
    assert set(table["tasks"]["stsb"]["figures"]) == {"pearson", "spearman"}
    scores = [row["score"]["median"] for row in table["tasks"].values()]
    assert table["average"] == pytest.approx(sum(scores) / 2)
    said = (out / "glue.md").read_text()
    assert "| sst2 |" in said and "| optimizer.learning_rate | 0.001 |" in said and "average of 2" in said

    # Nothing is run again; a further seed is added to the table.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/results.json")}
    assert run_glue(config, ["sst2"], 3)["tasks"]["sst2"]["seeds"] == [3, 4, 5]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    # Another rate for the runs of one task is no matter of chance.
    other = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"learning_rate": 1e-4})})
    later = other.model_copy(update={"train": other.train.model_copy(update={"seed": 9})})
    with pytest.raises(JaxptmError, match=r"seed_9: differs from .*seed_3 in optimizer\.learning_rate"):
        run_glue(later, ["sst2"], 1)


def result(task: str, seed: int, evaluation: dict[str, float], **settings: Any) -> dict[str, Any]:
    fields = {"data": {"task": task}, "train": {"seed": seed, "epochs": 3} | settings, "out": f"{task}/{seed}"}
    return {"eval": evaluation, "seconds": 60.0, "config": fields}


def test_the_table_of_given_figures() -> None:
    mnli = {"accuracy": 0.8, "score": 0.8, "mismatched/accuracy": 0.9, "mismatched/score": 0.9, "loss": 1.0}
    mnli["mismatched/loss"] = 1.0
    runs = [result("mnli", 0, mnli)]
    runs += [result("rte", seed, {"accuracy": value, "score": value}) for seed, value in enumerate((0.6, 0.7, 0.5))]
    table = summary(runs)
    assert table["tasks"]["mnli"]["score"] == {
        "median": pytest.approx(0.85),
        "std": None,
        "values": [pytest.approx(0.85)],
    }
    assert list(table["tasks"]["mnli"]["figures"]) == ["accuracy", "mismatched/accuracy"]
    assert table["tasks"]["rte"]["score"]["median"] == 0.6
    assert table["tasks"]["rte"]["score"]["std"] == pytest.approx(0.1)
    assert table["average"] == pytest.approx((0.85 + 0.6) / 2)
    said = markdown(table)
    assert "| rte | 60.0 ± 10.0 | accuracy 60.0 ± 10.0 | 0, 1, 2 | 1.0 |" in said
    assert "| mnli | 85.0 | accuracy 80.0, mismatched/accuracy 90.0 | 0 | 1.0 |" in said
    assert "| train.epochs | 3 |" in said
    assert "| train.epochs | mnli: 3, rte: 2 |" in markdown(
        summary([runs[0], result("rte", 0, runs[1]["eval"], epochs=2)])
    )
    assert summary([]) == {"tasks": {}, "average": None}


@pytest.mark.parametrize(
    ("tasks", "seeds", "message"),
    [
        (["rte", "squad"], 1, "there is no task squad; there is cola, sst2"),
        ([], 1, "there is no task given"),
        (["rte"], 0, "0 seeds: give at least 1"),
        (["rte"], 1, "RTE"),
    ],
)
def test_what_cannot_be_run(config: TrainConfig, tasks: list[str], seeds: int, message: str) -> None:
    with pytest.raises(JaxptmError, match=message):
        run_glue(config, tasks, seeds)


def test_only_glue_and_only_its_labelled_sets(config: TrainConfig) -> None:
    test = config.model_copy(update={"data": config.data.model_copy(update={"eval_split": "test"})})
    with pytest.raises(JaxptmError, match="the test sets have no labels"):
        run_glue(test, ["sst2"], 1)
    with pytest.raises(JaxptmError, match="gs://b/runs: the table of several runs is kept on a disk"):
        run_glue(config.model_copy(update={"out": "gs://b/runs"}), ["sst2"], 1)
