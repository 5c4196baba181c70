"""What a fine-tuning config leaves to the model and the data: weights, labels, the problem, the tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxptm.architectures import read_family
from jaxptm.config import (
    AudioData,
    FineTuningConfig,
    GlueData,
    SequenceClassificationConfig,
    TableData,
    TextData,
    TokenClassificationConfig,
    TrainConfig,
)
from jaxptm.data.glue import GLUE
from jaxptm.data.labelled import found_labels, labels_in
from jaxptm.data.recordings import Recordings
from jaxptm.data.table import read_table
from jaxptm.data.tokenizer import load_tokenizer
from jaxptm.data.utterances import find_utterances
from jaxptm.directories import prepared_directory
from jaxptm.hf import files
from jaxptm.models import PRESETS
from jaxptm.types import JaxptmError

log = logging.getLogger("jaxptm")


def resolve(config: TrainConfig, source: str | None = None) -> TrainConfig:
    """Fills in what a fine-tuning config leaves to the model and the data: its weights, its labels, its problem.

    Args:
        source: the model that is evaluated, instead of what the config begins with.

    Raises:
        JaxptmError: model or data cannot be read.
    """
    objective, data = config.objective, config.data
    if not isinstance(objective, FineTuningConfig):
        return config
    weights = _weights(config) if source is None else source
    if weights is not None and (Path(weights) / "model" / "config.json").exists():
        weights = str(Path(weights) / "model")
    model = weights if config.model in (config.init_from, source) and weights is not None else config.model
    if isinstance(objective, SequenceClassificationConfig) and objective.problem_type is None:
        glue_regression = isinstance(data, GlueData) and GLUE[data.task].labels == ()
        problem = "regression" if glue_regression else "single_label_classification"
        objective = objective.model_copy(update={"problem_type": problem})
    if isinstance(data, GlueData | TableData | AudioData) and objective.name != "ctc":
        own = None if objective.new_head else _labels_of(weights, objective.name)
        measured = source is not None
        labels = _labels(config, objective, data, own, weights, measured) if data.labels is None else data.labels
        if data.labels is None:
            _refuse_to_guess(labels, own, weights, data, measured=measured)
        _refuse_other_labels(labels, own, weights, measured=measured)
        data = data.model_copy(update={"labels": labels})
    return config.model_copy(update={"init_from": weights, "model": model, "objective": objective, "data": data})


def count_labels(config: TrainConfig) -> int | None:
    """Outputs of the head that a resolved config trains; None where the task decides."""
    match config.objective, config.data:
        case SequenceClassificationConfig(problem_type="regression"), GlueData():
            return 1
        case SequenceClassificationConfig(problem_type="regression"), TableData(label_column=columns):
            return 1 if isinstance(columns, str) else len(columns)
        case (
            SequenceClassificationConfig() | TokenClassificationConfig(),
            GlueData() | TableData() | AudioData() as data,
        ):
            return len(data.labels or ()) or None
        case FineTuningConfig(name="question-answering"), _:
            return 2  # start and end
    return None


def hf_labels(config: TrainConfig) -> dict[str, Any]:
    """What config.json says of the head that a resolved config trains."""
    said: dict[str, Any] = {}
    if isinstance(config.objective, SequenceClassificationConfig):
        said["problem_type"] = config.objective.problem_type
    if isinstance(config.data, GlueData | TableData | AudioData) and config.data.labels:
        said["id2label"] = {str(i): name for i, name in enumerate(config.data.labels)}
        said["label2id"] = {name: i for i, name in enumerate(config.data.labels)}
    return said


def task_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer that a resolved fine-tuning config names, or that of its model.

    Raises:
        JaxptmError: there is none.
    """
    assert not isinstance(config.data, TextData | AudioData)
    name = config.data.tokenizer or config.init_from or _named(config.model)
    if name is None:
        raise JaxptmError("data.tokenizer: is missing; `model` names no directory that would have one.")
    return load_tokenizer(name, config.data.lowercase)


def _weights(config: TrainConfig) -> str | None:
    return config.init_from if "init_from" in config.model_fields_set else _named(config.model)


def _named(model: str | Mapping[str, Any]) -> str | None:
    """The directory or hub name that `model` takes its config from, if any."""
    name = model if isinstance(model, str) else model.get("preset")
    return None if name in PRESETS else name


def _refuse_to_guess(
    labels: list[str], own: list[str] | None, weights: str | None, data: Any, *, measured: bool
) -> None:
    """Says that a head tells its outputs by number alone, and the data its labels by name.

    Raises:
        JaxptmError: the head is measured, and all depends on the order.
    """
    if isinstance(data, GlueData) or not isinstance(data.label_column, str):  # whose order is said
        return
    if not own or not all(re.fullmatch(r"LABEL_\d+", label) for label in own):
        return
    if all(re.fullmatch(r"\d+", label) for label in labels):
        return
    order = (
        f"the head of {weights} names its outputs {own[0]} to {own[-1]}, and the data its labels {', '.join(labels)}"
    )
    if measured:
        raise JaxptmError(f"data.labels: {order}; list them in the order of the outputs.")
    log.warning("data.labels: %s, which are taken in this order; list them if that of the head is another.", order)


def _refuse_other_labels(labels: list[str], own: list[str] | None, weights: str | None, *, measured: bool) -> None:
    """Raises JaxptmError where the outputs of a head would be taken for other labels than it has learned.

    Args:
        own: of the head, if there is one.
        measured: the head is not trained any further, so that it has to have these labels and no others.
    """
    if not own or not labels or own == labels or all(label.startswith("LABEL_") for label in own):
        return
    if measured or sorted(own) == sorted(labels):
        raise JaxptmError(
            f"data.labels: {', '.join(labels[:20])} are asked for, and the head of {weights} has "
            f"{', '.join(own[:20])}, in this order; leave data.labels out"
            + (", or name a model of this task." if measured else ", or set objective.new_head=true.")
        )


def _labels(
    config: TrainConfig,
    objective: FineTuningConfig,
    data: GlueData | TableData | AudioData,
    own: list[str] | None,
    weights: str | None,
    measured: bool,
) -> list[str]:
    """The labels in the order of the head: `own`, of the model's head for them, or else those of the data."""
    if isinstance(data, AudioData):
        return _checked(own, _spoken_labels(config, data), data.label_column, weights)
    if isinstance(data, GlueData):
        task = list(GLUE[data.task].labels)
        return own if own and sorted(map(str.lower, own)) == sorted(task) else task
    if isinstance(objective, SequenceClassificationConfig) and objective.problem_type == "regression":
        return []
    if data.choice_columns is not None:
        return []
    if not isinstance(data.label_column, str):
        return list(data.label_column)
    try:
        table = read_table(data.train_file)
    except JaxptmError:
        if not measured or data.eval_file is None:
            raise
        table = read_table(data.eval_file)  # whoever measures need not have what was learned from
    return _checked(own, labels_in(table, data.label_column), data.label_column, weights)


def _spoken_labels(config: TrainConfig, data: AudioData) -> list[str]:
    try:
        labels = [utterance.label for utterance in find_utterances(data.train, data)]
    except JaxptmError:
        prepared = prepared_directory(config)
        if not (prepared / "manifest.json").exists():
            raise
        labels = list(Recordings.open(prepared).labels)  # the recordings are elsewhere by now
    return found_labels(label for label in labels if label is not None)


def _checked(own: list[str] | None, found: list[str], column: str, weights: str | None) -> list[str]:
    if own and not set(found) <= set(own):
        if len(own) == len(found) and all(label.startswith("LABEL_") for label in own):
            return found
        raise JaxptmError(
            f"data.label_column: {column!r} has the labels {', '.join(found[:20])}, and the head of "
            f"{weights} {', '.join(own[:20])}; set objective.new_head=true to begin with a fresh head."
        )
    return own or found


def has_head(weights: str | Path | None, task: str) -> bool:
    """Whether a model directory or hub name has a head for the task."""
    if weights is None:
        return False
    family, hf_config = read_family(files.resolve(weights))
    return family.architectures.get(task) in (hf_config.get("architectures") or [])


def _labels_of(weights: str | None, task: str) -> list[str] | None:
    """The labels of a model that has a head for the task."""
    if weights is None or not has_head(weights, task):
        return None
    names = read_family(files.resolve(weights))[1].get("id2label")
    return [names[key] for key in sorted(names, key=int)] if names else None
