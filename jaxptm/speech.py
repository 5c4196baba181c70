"""What recorded speech asks of a model: how it is heard, what it is written with, and what transcripts are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxptm import scoring
from jaxptm.architectures import model_config
from jaxptm.config import RATE, AudioData, CtcConfig, TrainConfig
from jaxptm.data.audio import Preprocessor
from jaxptm.data.characters import Characters
from jaxptm.data.labelled import label_of
from jaxptm.data.recordings import Recordings
from jaxptm.data.speech import SpeechBuckets, open_speech, transcripts
from jaxptm.hf import files
from jaxptm.nn.audio_config import AudioConfig
from jaxptm.pretrained import Model
from jaxptm.resolving import has_head
from jaxptm.tasks import Outputs, Score, class_weights
from jaxptm.transcription import written
from jaxptm.types import JaxptmError


@dataclass(frozen=True)
class Listener:
    """What stands before a speech model and behind it, and is saved with it.

    Attributes:
        preprocessor: what is done to audio.
        characters: what CTC writes with.
    """

    preprocessor: Preprocessor
    characters: Characters | None = None

    @classmethod
    def load(cls, directory: str | Path, *, writes: bool) -> Listener:
        """Opens what `save_pretrained` has written, or a checkpoint of transformers.

        Args:
            writes: whether there has to be a vocabulary.

        Raises:
            JaxptmError: there is none, or a file is damaged.
        """
        return cls(Preprocessor.load(directory), Characters.load(directory) if writes else None)

    def __len__(self) -> int:
        """Symbols of CTC; none where nothing is written."""
        return 0 if self.characters is None else len(self.characters)

    @property
    def pad_token_id(self) -> int | None:
        """The blank of CTC."""
        return None if self.characters is None else self.characters.blank

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the files that transformers' Wav2Vec2Processor opens."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.preprocessor.save(directory)
        if self.characters is not None:
            self.characters.save(directory)


@dataclass(frozen=True)
class Heard:
    """Recorded speech, opened for an objective.

    Attributes:
        train: batches to learn from.
        held_out: batches to evaluate on, in the order of the files within each length; None where nothing is.
        score: what is said of them is worth; None where the objective's own terms and scores tell.
        class_weights: of each class in the loss.
    """

    train: SpeechBuckets
    held_out: SpeechBuckets | None
    score: Score | None
    listener: Listener
    class_weights: list[float] | None


def hear(config: TrainConfig, prepared: Path, evaluated: Model | None = None) -> Heard:
    """Opens the prepared speech of a resolved config.

    Args:
        evaluated: a model that is not to be trained. It hears and writes as its own files say; one that is begun with
            hears so, too, and writes with its vocabulary unless `data.vocabulary` says otherwise.

    Raises:
        JaxptmError: nothing usable is left, the checkpoint's files do not fit, or `data.vocabulary` is not that of the
            head of CTC that is begun with.
    """
    data, name, loop = config.data, config.objective.name, config.train
    assert isinstance(data, AudioData)
    _, model = model_config(config.model, None)
    if not isinstance(model, AudioConfig):
        raise JaxptmError("model: reads text, and `data.train` is speech; name one of audio, such as wav2vec2-base.")
    source = config.init_from if evaluated is None else evaluated.source
    directory = None if source is None else files.resolve(source)
    # A model that normalises over time has heard its padding when it learned.
    usual = Preprocessor(True, model.feat_extract_norm == "layer")
    preprocessor = (None if directory is None else Preprocessor.find(directory)) or usual
    asked, writes = data.vocabulary, name == "ctc"
    own = directory if directory is not None and (directory / "vocab.json").exists() else None
    if writes and own is not None and (asked is None or evaluated is not None):
        data = data.model_copy(update={"vocabulary": str(own)})
    elif writes and asked is None and evaluated is not None:
        raise JaxptmError(
            f"{source}: has no vocab.json, so nobody knows which character each of its outputs is; name the file in "
            "data.vocabulary."
        )
    elif writes and asked is None:
        data = data.model_copy(update={"vocabulary": "characters"})
    crop = name == "contrastive"
    speech = open_speech(data, prepared, crop=crop, labelled=name == "sequence-classification", frames=model.frames)

    if evaluated is not None and speech.vocabulary is not None:
        check_outputs(speech.vocabulary, evaluated, f"{data.vocabulary}", "name its own in data.vocabulary")
    if evaluated is None and isinstance(config.objective, CtcConfig) and not config.objective.new_head:
        _check_spelling(asked, speech.vocabulary, own)

    def targets(recordings: Recordings) -> Any:
        if speech.vocabulary is not None:
            return transcripts(recordings, speech.vocabulary)
        if speech.labels is not None:
            places = {label: i for i, label in enumerate(speech.labels)}
            return np.array([places[label_of(label)] for label in recordings.labels], np.int32)
        return None

    def buckets(recordings: Recordings, seed: int | None) -> SpeechBuckets:
        return SpeechBuckets(
            recordings,
            loop.batch_size,
            normalize=preprocessor.do_normalize,
            targets=targets(recordings),
            longest=round(data.max_seconds * RATE) if crop else None,
            by_samples=data.batches == "samples",
            seed=seed,
        )

    held_out = speech.held_out
    score: Score | None = None
    if held_out is not None and speech.vocabulary is not None:
        score = partial(score_transcripts, characters=speech.vocabulary, texts=list(map(str, held_out.texts)))
    elif held_out is not None and speech.labels is not None:
        right = targets(held_out)

        def score(outputs: Outputs) -> dict[str, float]:
            return scoring.one_label(np.stack(outputs["logits"]), right)

    return Heard(
        train=buckets(speech.train, loop.seed),
        held_out=None if held_out is None else buckets(held_out, None),
        score=score,
        listener=Listener(preprocessor, speech.vocabulary),
        class_weights=None if speech.labels is None else class_weights(config, speech.labels, targets(speech.train)),
    )


def check_outputs(characters: Characters, model: Model, name: str, remedy: str) -> None:
    """Raises JaxptmError where a model has too few outputs to write with a vocabulary of this name."""
    if characters.outputs > model.config.vocab_size:
        raise JaxptmError(
            f"{name}: has {characters.outputs} entries, and {model.source} tells {model.config.vocab_size} apart; "
            f"{remedy}."
        )


def _check_spelling(asked: str | None, vocabulary: Characters | None, own: Path | None) -> None:
    """Raises JaxptmError where a head would go on with another vocabulary than that of its directory `own`."""
    if asked is None or vocabulary is None or own is None or not has_head(own, "ctc"):
        return
    if vocabulary.ids != Characters.load(own).ids:
        raise JaxptmError(
            f"data.vocabulary: {asked} is not the vocabulary that the head of {own} writes with; leave it out to "
            "keep that one, or set objective.new_head=true to begin with a fresh head."
        )


def score_transcripts(outputs: Outputs, *, characters: Characters, texts: Sequence[str]) -> dict[str, float]:
    """`wer` and `cer`: words and characters that are wrong, over those of the right transcripts (jiwer).

    Special tokens, such as the start of a sentence, spell nothing.

    Args:
        outputs: `path` [F] of each utterance: the likeliest symbol of each frame.
        texts: what was said.
    """
    said = [written(np.asarray(path), characters.blank, characters.spelling) for path in outputs["path"]]
    right = [characters.normal(text) for text in texts]
    return scoring.transcripts(list(map(characters.decoded, said)), list(map(characters.decoded, right)))
