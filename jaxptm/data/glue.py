"""GLUE (Wang et al. 2018): nine tasks, as the original TSV files or from the Hugging Face hub."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxptm import scoring
from jaxptm.config import GlueData
from jaxptm.data.table import Table, from_dataset, read_delimited, read_text
from jaxptm.errors import JaxptmError

log = logging.getLogger("jaxptm")

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        directory: of its original files.
        texts: columns with its one or two texts; `hub_texts` those on the hub, where they differ.
        label: column of the label.
        labels: in the order of the hub; none where it is a number.
        figures: what is published for it.
        named: whether the server takes names of labels, and not their numbers.
        dev, test: what is evaluated and what is handed in, as name -> (file, split on the hub). The first name of `dev`
            is empty, those of `test` are the server's.
        header: whether the first line of the files with labels names the columns.
    """

    directory: str
    texts: tuple[str, ...]
    label: str = "label"
    labels: tuple[str, ...] = ("0", "1")
    figures: tuple[str, ...] = ("accuracy",)
    named: bool = False
    hub_texts: tuple[str, ...] | None = None
    dev: dict[str, tuple[str, str]] = field(default_factory=lambda: {"": ("dev.tsv", "validation")})
    test: dict[str, tuple[str, str]] = field(default_factory=dict)
    header: tuple[str, ...] | None = None


ENTAILMENT = ("entailment", "not_entailment")
GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(
        "CoLA",
        ("sentence",),
        figures=("matthews_correlation",),
        test={"CoLA": ("test.tsv", "test")},
        header=("source", "label", "star", "sentence"),
    ),
    "sst2": GlueTask("SST-2", ("sentence",), test={"SST-2": ("test.tsv", "test")}),
    "mrpc": GlueTask(
        "MRPC",
        ("#1 String", "#2 String"),
        label="Quality",
        figures=("f1", "accuracy"),
        hub_texts=("sentence1", "sentence2"),
        test={"MRPC": ("test.tsv", "test")},
    ),
    "stsb": GlueTask(
        "STS-B",
        ("sentence1", "sentence2"),
        label="score",
        labels=(),
        figures=("pearson", "spearman"),
        test={"STS-B": ("test.tsv", "test")},
    ),
    "qqp": GlueTask(
        "QQP",
        ("question1", "question2"),
        label="is_duplicate",
        figures=("f1", "accuracy"),
        test={"QQP": ("test.tsv", "test")},
    ),
    "mnli": GlueTask(
        "MNLI",
        ("sentence1", "sentence2"),
        label="gold_label",
        labels=("entailment", "neutral", "contradiction"),
        named=True,
        hub_texts=("premise", "hypothesis"),
        dev={
            "": ("dev_matched.tsv", "validation_matched"),
            "mismatched": ("dev_mismatched.tsv", "validation_mismatched"),
        },
        test={"MNLI-m": ("test_matched.tsv", "test_matched"), "MNLI-mm": ("test_mismatched.tsv", "test_mismatched")},
    ),
    "qnli": GlueTask(
        "QNLI", ("question", "sentence"), labels=ENTAILMENT, named=True, test={"QNLI": ("test.tsv", "test")}
    ),
    "rte": GlueTask(
        "RTE", ("sentence1", "sentence2"), labels=ENTAILMENT, named=True, test={"RTE": ("test.tsv", "test")}
    ),
    "wnli": GlueTask("WNLI", ("sentence1", "sentence2"), test={"WNLI": ("test.tsv", "test")}),
}


@dataclass(frozen=True)
class GlueSplit:
    """One file of a task: its texts, and its labels or, of a test set, the numbers of its rows."""

    table: Table
    texts: list[list[str]]
    label: str | None
    index: list[int]


def read_glue(data: GlueData, split: str) -> dict[str, GlueSplit]:
    """The train, dev or test files of a task, by the names that its `dev` and `test` have; train by "".

    Test files that are not there are left out.

    Raises:
        JaxptmError: a file is missing, or a line does not fit.
    """
    task = GLUE[data.task]
    wanted = {"train": {"": ("train.tsv", "train")}, "dev": task.dev, "test": task.test}[split]
    found = {}
    for name, (file, hub_split) in wanted.items():
        if data.path is None:
            table, texts = _from_hub(data.task, hub_split), list(task.hub_texts or task.texts)
            label = None if split == "test" else "label"
            index = "idx"
        else:
            path = _find(Path(data.path), task.directory, file)
            if path is None and split == "test":
                continue
            if path is None:
                raise JaxptmError(
                    f"data.path: {data.path} holds neither {file} nor {task.directory}/{file}, which {data.task} needs."
                )
            names = task.header if split != "test" else None
            # QQP was released with a few broken rows.
            text = read_text(path)
            table = read_delimited(str(path), text, quoted=False, names=names, skip_ragged=data.task == "qqp")
            texts, label, index = list(task.texts), None if split == "test" else task.label, "index"
        numbers = table.columns.get(index) if split == "test" else None
        rows = [int(number) for number in numbers] if numbers is not None else list(range(len(table)))
        found[name] = GlueSplit(table, [table.texts(column) for column in texts], label, rows)
    return found


def glue_scores(task: str, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """The published figures of a task, and `score`, their mean, which is its part of the GLUE average.

    Args:
        logits: [N, K], or [N, 1] of numbers.
        targets: [N] ids, or numbers.
    """
    judge = scoring.one_label(logits, targets) if GLUE[task].labels else scoring.numbers(logits[:, 0], targets)
    figures = {name: judge[name] for name in GLUE[task].figures}
    return figures | {"score": float(np.mean(list(figures.values())))}


def write_submission(
    task: str, directory: Path, name: str, index: Sequence[int], logits: np.ndarray, labels: Sequence[str]
) -> Path:
    """`<name>.tsv` as the GLUE server takes it: the numbers of the rows, and labels or scores.

    Args:
        labels: of the head, in its order; they may be spelt in capitals.
    """
    if not GLUE[task].labels:
        said = [f"{min(max(float(value), 0.0), 5.0):.3f}" for value in logits[:, 0]]
    else:
        said = [labels[i].lower() for i in logits.argmax(axis=1)]
    path = directory / f"{name}.tsv"
    lines = ["index\tprediction", *(f"{number}\t{value}" for number, value in zip(index, said, strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _find(path: Path, directory: str, file: str) -> Path | None:
    """The file in the task's directory or the one above; a part of it (`dev_subset.tsv`) where the whole is missing."""
    places = (path / directory, path)
    for place in places:
        if (place / file).is_file():
            return place / file
    for place in places:
        parts = sorted(place.glob(f"{Path(file).stem}_*.tsv"))
        if len(parts) == 1 and not file.startswith(("dev_", "test_")):
            log.info("%s is not there, and %s is taken for it", file, parts[0])
            return parts[0]
    return None


def _from_hub(task: str, split: str) -> Table:
    import datasets

    try:
        loaded = datasets.load_dataset(HUB, task, split=split)
    except Exception as error:  # datasets and huggingface_hub raise their own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JaxptmError(
            f"data.path: is not given, and the Hugging Face hub does not give {HUB} ({task}, {split}): {reason}"
        ) from error
    table = from_dataset(f"{HUB}/{task}/{split}", loaded, unlabelled=True)
    if GLUE[task].labels and not split.startswith("test"):  # it has names of its own for some, in the same order
        table.columns["label"] = [GLUE[task].labels[i] for i in loaded["label"]]
    return table
