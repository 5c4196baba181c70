"""Models that answer: text in, results out, with the arguments and result dictionaries of `transformers.pipeline`."""

from __future__ import annotations

import os
from typing import Any

from jaxptm.pipelines.base import Pipeline
from jaxptm.pipelines.classification import NextSentence, ReplacedToken, TextClassification, TokenClassification
from jaxptm.pipelines.features import FeatureExtraction
from jaxptm.pipelines.language import FillMask, TextGeneration
from jaxptm.pipelines.questions import QuestionAnswering
from jaxptm.pipelines.speech import AudioClassification, SpeechRecognition
from jaxptm.pretrained import from_pretrained
from jaxptm.types import JaxptmError

PIPELINES: dict[str, type[Pipeline]] = {
    "fill-mask": FillMask,
    "text-generation": TextGeneration,
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "feature-extraction": FeatureExtraction,
    "next-sentence": NextSentence,
    "replaced-token": ReplacedToken,
    "automatic-speech-recognition": SpeechRecognition,
    "audio-classification": AudioClassification,
}


def pipeline(task: str, path: str | os.PathLike[str], **options: Any) -> Any:
    """Opens a model for a task and returns a function of texts.

    Args:
        task: a name in `PIPELINES`, whose class says what it takes and gives.
        path: a Hugging Face directory, a hub name, or the `model/` of a jaxptm run.
        **options: of `from_pretrained`.

    Raises:
        JaxptmError: an unknown task, a model that cannot be opened, or one without a trained head for the task.
    """
    kind = pipeline_kind(task)
    model = from_pretrained(path, kind.task, **options)
    model.refuse_random_heads()
    return kind(model)


def pipeline_kind(task: str) -> type[Pipeline]:
    """The class of a task.

    Raises:
        JaxptmError: there is none.
    """
    if task not in PIPELINES:
        raise JaxptmError(f"there is no pipeline {task!r}; there is {', '.join(PIPELINES)}.")
    return PIPELINES[task]
