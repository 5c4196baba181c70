"""Labelled data, opened: its examples, and what predictions of them are worth."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxptm import scoring
from jaxptm.config import (
    IGNORED,
    GlueData,
    SequenceClassificationConfig,
    SquadData,
    TableData,
    TokenClassificationConfig,
    TrainConfig,
)
from jaxptm.data import squad
from jaxptm.data.examples import Examples
from jaxptm.data.glue import GlueSplit, glue_scores, read_glue, write_submission
from jaxptm.data.labelled import (
    LabelledWords,
    encode_choices,
    encode_texts,
    encode_words,
    label_ids,
    label_of,
    label_sets,
    numbers,
    words_said,
)
from jaxptm.data.table import Table, read_table
from jaxptm.types import JaxptmError

Outputs = dict[str, list[np.ndarray]]
"""What a model says of each example, in the order of the file: rows of `Objective.predict`."""
Score = Callable[[Outputs], dict[str, float]]
Write = Callable[[Outputs, Path], None]
NOTHING = Examples.of({"input_ids": []})


@dataclass(frozen=True)
class Part:
    """Examples of a task, and what to do with what a model says of them.

    Attributes:
        score: figures by name; None where there are no labels.
        write: writes the predictions into a directory.
    """

    examples: Examples
    score: Score | None
    write: Write | None = None


@dataclass(frozen=True)
class Task:
    """Labelled data, opened.

    Attributes:
        train: what is learned from; empty where nothing is to be trained.
        held_out: what is evaluated, by the name that its figures begin with.
        class_weights: of each label in the loss.
    """

    train: Examples
    held_out: Mapping[str, Part]
    class_weights: Sequence[float] | None = None

    @property
    def examples(self) -> list[Examples]:
        """All of them."""
        return [self.train, *(part.examples for part in self.held_out.values())]

    @property
    def fingerprint(self) -> str:
        """Names the data, learned from and held out, by its content."""
        digest = hashlib.sha256()
        for examples in self.examples:
            for values in (*examples.tokens.values(), examples.ends, *examples.targets.values()):
                digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()[:12]


def open_task(config: TrainConfig, tokenizer: Any, *, training: bool) -> Task:
    """Reads and encodes the examples of a resolved fine-tuning config.

    Args:
        training: also what is learned from.

    Raises:
        JaxptmError: a file is missing, a line does not fit, or a label is unknown.
    """
    # What weighs labels by how often they are learned from needs what is learned from, also to evaluate.
    training = training or getattr(config.objective, "class_weights", None) is not None
    match config.data:
        case GlueData() as data:
            return _open_glue(config, data, tokenizer, training)
        case SquadData() as data:
            return _open_squad(data, tokenizer, training)
        case TableData() as data:
            return _open_table(config, data, tokenizer, training)
    raise TypeError(f"{type(config.data).__name__} has no labels")


def _open_glue(config: TrainConfig, data: GlueData, tokenizer: Any, training: bool) -> Task:
    labels = data.labels or []

    def encode(split: GlueSplit) -> Examples:
        if split.label is None:  # nothing to compare with
            targets = np.zeros(len(split.table), np.int32 if labels else np.float32)
        elif labels:
            lower = replace(split.table, columns={"label": [str(v).lower() for v in split.table.column(split.label)]})
            targets = label_ids(lower, "label", [label.lower() for label in labels])
        else:
            targets = numbers(split.table, split.label)
        return encode_texts(tokenizer, split.texts, data.max_length, labels=targets)

    def part(name: str, split: GlueSplit) -> Part:
        examples = encode(split)

        def score(outputs: Outputs) -> dict[str, float]:
            return glue_scores(data.task, np.stack(outputs["logits"]), examples.targets["labels"])

        def write(outputs: Outputs, directory: Path) -> None:
            write_submission(data.task, directory, name, split.index, np.stack(outputs["logits"]), labels)

        return Part(examples, None, write) if split.label is None else Part(examples, score)

    held_out = read_glue(data, "dev") if data.eval_split == "dev" else {}
    if training or data.eval_split == "test":
        held_out |= read_glue(data, "test")
    parts = {name: part(name, split) for name, split in held_out.items()}
    if not training:
        return Task(NOTHING, parts)
    train = encode(read_glue(data, "train")[""])
    return Task(train, parts, class_weights(config, labels, train.targets["labels"]))


def _open_table(config: TrainConfig, data: TableData, tokenizer: Any, training: bool) -> Task:
    objective, labels = config.objective, data.labels or []
    multiple = isinstance(objective, SequenceClassificationConfig) and objective.problem_type
    train_table, held_out = _tables(data, training)

    def texts(table: Table) -> list[list[str]]:
        return [table.texts(name) for name in data.texts]

    def targets(table: Table) -> np.ndarray:
        match multiple:
            case "regression":
                return numbers(table, data.label_column)
            case "multi_label_classification":
                return label_sets(table, data.label_column, labels)
        return label_ids(table, _one(data.label_column), labels)

    def rows(table: Table) -> Examples:
        if data.choice_columns is None:
            return encode_texts(tokenizer, texts(table), data.max_length, labels=targets(table))
        endings = _endings(table, data.choice_columns)
        right = label_ids(table, _one(data.label_column), [str(i) for i in range(len(endings))])
        return encode_choices(tokenizer, texts(table), endings, data.max_length, labels=right)

    def words(table: Table) -> tuple[LabelledWords, list[list[int]]]:
        name = _one(data.label_column)
        sentences, tags = table.column(data.texts[0]), table.column(name)
        known = {label: i for i, label in enumerate(labels)}
        ids = []
        for at, (sentence, row) in enumerate(zip(sentences, tags, strict=True)):
            if not isinstance(sentence, list) or not isinstance(row, list) or len(sentence) != len(row):
                raise JaxptmError(
                    f"{table.where(at)}: {data.texts[0]!r} and {name!r} are no lists of equal length, a label a word."
                )
            names = [label_of(tag) for tag in row]
            unknown = [tag for tag in names if tag not in known]
            if unknown:
                raise JaxptmError(
                    f"{table.where(at)}: the label {unknown[0]!r} is not one of {', '.join(labels[:20])}."
                )
            ids.append([known[tag] for tag in names])
        return encode_words(tokenizer, sentences, ids, data.max_length), ids

    def part(table: Table) -> Part:
        if isinstance(objective, TokenClassificationConfig):
            encoded, ids = words(table)
            silent = labels.index("O") if "O" in labels else 0

            def score_words(outputs: Outputs) -> dict[str, float]:
                tags = [logits.argmax(axis=-1) for logits in outputs["logits"]]
                said = words_said(encoded, tags, [len(row) for row in ids], silent)
                return scoring.entities(*([[labels[i] for i in row] for row in rows] for rows in (said, ids)))

            return Part(encoded.examples, score_words)
        examples = rows(table)

        def score(outputs: Outputs) -> dict[str, float]:
            logits, right = np.stack(outputs["logits"]), examples.targets["labels"]
            match multiple:
                case "regression" if right.ndim > 1:
                    columns = [scoring.numbers(logits[:, i], right[:, i]) for i in range(right.shape[1])]
                    return {name: float(np.mean([column[name] for column in columns])) for name in columns[0]}
                case "regression":
                    return scoring.numbers(logits[:, 0], right)
                case "multi_label_classification":
                    return scoring.several_labels(logits, right)
            return scoring.one_label(logits, right) if multiple else scoring.choices(logits, right)

        return Part(examples, score)

    parts = {} if held_out is None else {"": part(held_out)}
    if train_table is None:
        return Task(NOTHING, parts)
    if isinstance(objective, TokenClassificationConfig):
        train = words(train_table)[0].examples
        marks = train.tokens["labels"]
        return Task(train, parts, class_weights(config, labels, marks[marks != IGNORED]))
    train = rows(train_table)
    return Task(train, parts, class_weights(config, labels, train.targets["labels"]))


def _tables(data: TableData, training: bool) -> tuple[Table | None, Table | None]:
    """What is learned from, and what is held out."""
    if data.eval_file is not None:
        if training and _same(data.train_file, data.eval_file):
            raise JaxptmError(
                f"data.eval_file: {data.eval_file} is what is learned from, too; hold a part of it out instead: "
                "data.eval_file=null data.eval_fraction=0.1."
            )
        return read_table(data.train_file) if training else None, read_table(data.eval_file)
    whole = read_table(data.train_file)
    if not data.eval_fraction:
        return whole if training else None, None
    order = np.random.default_rng(0).permutation(len(whole))
    count = max(1, round(data.eval_fraction * len(whole)))
    if training and count >= len(whole):
        raise JaxptmError(
            f"data.eval_fraction: {data.eval_fraction} of the {len(whole)} rows of {data.train_file} leaves none to "
            "learn from; lower it."
        )
    kept, held = sorted(order[count:].tolist()), sorted(order[:count].tolist())
    return whole.take(kept) if training else None, whole.take(held)


def _same(name: str, other: str) -> bool:
    """Whether two names are those of one file."""
    return name == other or (os.path.exists(name) and os.path.exists(other) and os.path.samefile(name, other))


def _endings(table: Table, columns: str | Sequence[str]) -> list[list[str]]:
    if not isinstance(columns, str):
        return [table.texts(name) for name in columns]
    lists = table.column(columns)
    for at, endings in enumerate(lists):
        if not isinstance(endings, list) or len(endings) != len(lists[0]):
            raise JaxptmError(f"{table.where(at)}: {columns!r} holds {endings!r}, expected {len(lists[0])} choices.")
    return [[str(endings[i]) for endings in lists] for i in range(len(lists[0]))]


def _one(columns: str | Sequence[str]) -> str:
    if isinstance(columns, str):
        return columns
    raise JaxptmError(
        "data.label_column: names several columns, which is for objective.problem_type: multi_label_classification or "
        "regression."
    )


def class_weights(config: TrainConfig, labels: Sequence[str], targets: np.ndarray) -> list[float] | None:
    """How much each label counts in the loss, as `objective.class_weights` says; None where it says nothing.

    Args:
        targets: of what is learned from: [N] ids, or [N, K] of 0 and 1.

    Raises:
        JaxptmError: there are other labels than weights.
    """
    asked = getattr(config.objective, "class_weights", None)
    if asked is None:
        return None
    if isinstance(asked, list):
        if len(asked) != len(labels):
            raise JaxptmError(f"objective.class_weights: has {len(asked)} weights for {len(labels)} labels.")
        return asked
    counts = targets.sum(axis=0) if targets.ndim > 1 else np.bincount(targets, minlength=len(labels))
    balanced: list[float] = (len(targets) / (len(labels) * np.maximum(counts, 1))).tolist()
    return balanced


def _open_squad(data: SquadData, tokenizer: Any, training: bool) -> Task:
    if training and data.eval_file is not None and _same(data.train_file, data.eval_file):
        raise JaxptmError(f"data.eval_file: {data.eval_file} is what is learned from, too; name other questions.")
    train = (
        squad.encode(squad.read_squad(data.train_file, data.version_2), tokenizer, data).examples
        if training
        else NOTHING
    )
    if data.eval_file is None:
        return Task(train, {})
    questions = squad.read_squad(data.eval_file, data.version_2)
    windows = squad.encode(questions, tokenizer, data)

    def answers(outputs: Outputs) -> list[squad.Answers]:
        return squad.decode(questions, windows, outputs["start_logits"], outputs["end_logits"], data)

    def score(outputs: Outputs) -> dict[str, float]:
        found = answers(outputs)
        figures = squad.squad_scores(questions, squad.chosen(questions, found, data), version_2=data.version_2)
        if not data.version_2:
            return figures
        # The best threshold is looked for among all of them, whatever the one of the predictions is.
        every = data.model_copy(update={"null_threshold": float("inf")})
        odds = {question.id: answer.null_odds for question, answer in zip(questions, found, strict=True)}
        return squad.squad_scores(questions, squad.chosen(questions, found, every), odds, version_2=True) | figures

    def write(outputs: Outputs, directory: Path) -> None:
        squad.write_predictions(directory, questions, answers(outputs), data)

    return Task(train, {"": Part(windows.examples, score, write)})
