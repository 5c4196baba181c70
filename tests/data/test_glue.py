"""GLUE's files as they are, and what its server takes."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest

from jaxptm.config import GlueData
from jaxptm.data.glue import GLUE, glue_scores, read_glue, write_submission
from jaxptm.types import JaxptmError


def files(path: Path, **texts: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (path / f"{name}.tsv").write_text(text)
    return path


def test_cola_has_a_header_in_its_test_file_alone(tmp_path: Path) -> None:
    files(tmp_path / "CoLA", train='x\t1\t\t"Yes.\n', dev="x\t0\t*\tNo.\n", test="index\tsentence\n7\tWhat?\n")
    for path in (tmp_path, tmp_path / "CoLA"):
        data = GlueData(task="cola", path=str(path))
        train, test = read_glue(data, "train")[""], read_glue(data, "test")["CoLA"]
        assert train.texts == [['"Yes.']] and train.table.columns["label"] == ["1"]
        assert test.texts == [["What?"]] and test.index == [7] and test.label is None


def test_mnli_has_two_of_each(tmp_path: Path) -> None:
    row = "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tneutral\t{}\n"
    files(
        tmp_path / "MNLI",
        train=row.format("neutral"),
        dev_matched=row.format("entailment"),
        dev_mismatched=row.format("contradiction"),
    )
    dev = read_glue(GlueData(task="mnli", path=str(tmp_path)), "dev")
    assert {name: split.table.columns["gold_label"] for name, split in dev.items()} == {
        "": ["entailment"],
        "mismatched": ["contradiction"],
    }
    assert read_glue(GlueData(task="mnli", path=str(tmp_path)), "test") == {}


def test_broken_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    files(tmp_path / "QQP", train=f"{header}1\t2\t3\ta\tb\t1\n1\t2\t3\n4\t5\t6\tc\td\t0\n")
    split = read_glue(GlueData(task="qqp", path=str(tmp_path)), "train")[""]
    assert split.texts == [["a", "c"], ["b", "d"]]
    assert "1 row(s) without all of their fields are passed over: lines 3" in caplog.text
    files(tmp_path / "RTE", train="index\tsentence1\tsentence2\tlabel\n0\ta\tentailment\n")
    with pytest.raises(JaxptmError, match=r"train.tsv:2: has 3 fields, expected 4"):
        read_glue(GlueData(task="rte", path=str(tmp_path)), "train")
    with pytest.raises(JaxptmError, match=r"holds neither dev.tsv nor RTE/dev.tsv"):
        read_glue(GlueData(task="rte", path=str(tmp_path)), "dev")


def test_the_hub_has_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
            "idx": datasets.Value("int32"),
        }
    )

    def load_dataset(name: str, config: str, split: str) -> datasets.Dataset:
        assert (name, config) == ("nyu-mll/glue", "mnli")
        label = -1 if split.startswith("test") else 2
        return datasets.Dataset.from_dict(
            {"premise": ["a"], "hypothesis": ["b"], "label": [label], "idx": [5]}, features=features
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = GlueData(task="mnli")
    assert read_glue(data, "train")[""].table.column("label") == ["contradiction"]
    test = read_glue(data, "test")
    assert set(test) == {"MNLI-m", "MNLI-mm"} and test["MNLI-m"].index == [5] and test["MNLI-m"].label is None


def test_submissions(tmp_path: Path) -> None:
    logits = np.array([[0.0, 1.0], [2.0, 1.0]])
    path = write_submission("rte", tmp_path, "RTE", [3, 4], logits, ["ENTAILMENT", "NOT_ENTAILMENT"])
    assert path.read_text() == "index\tprediction\n3\tnot_entailment\n4\tentailment\n"
    assert write_submission("cola", tmp_path, "CoLA", [0, 1], logits, ["0", "1"]).read_text().endswith("0\t1\n1\t0\n")
    scores = write_submission("stsb", tmp_path, "STS-B", [0, 1], np.array([[5.3], [2.25]]), [])
    assert scores.read_text() == "index\tprediction\n0\t5.000\n1\t2.250\n"


def test_figures_are_those_that_are_published() -> None:
    logits, labels = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), np.array([1, 0, 0])
    assert glue_scores("mrpc", logits, labels) == pytest.approx({"f1": 2 / 3, "accuracy": 2 / 3, "score": 2 / 3})
    assert glue_scores("cola", logits, labels)["matthews_correlation"] == pytest.approx(0.5)
    assert set(glue_scores("stsb", logits[:, :1], np.array([1.0, 2.0, 3.0]))) == {"pearson", "spearman", "score"}


@pytest.mark.parametrize(
    ("task", "train", "dev"),
    [("cola", 8551, 522), ("sst2", 67349, 436), ("stsb", 5749, 1500), ("qqp", 19496, 2000), ("qnli", 2187, 274),
     ("rte", 2490, 139), ("wnli", 635, 71)],
)  # fmt: skip
def test_the_real_files(task: str, train: int, dev: int, shared_data: Path) -> None:
    data = GlueData(task=task, path=str(shared_data / "glue"))
    for split, rows in (("train", train), ("dev", dev)):
        (found,) = read_glue(data, split).values()
        assert len(found.table) == rows and all(len(texts) == rows for texts in found.texts)
        labels = GLUE[task].labels
        assert not labels or set(found.table.column(GLUE[task].label)) == set(labels)
