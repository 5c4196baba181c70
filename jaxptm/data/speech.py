"""Batches of speech: which utterances of a prepared directory serve, and rows of samples with few shapes."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import eq
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32

from jaxptm.config import IGNORED, RATE, AudioData
from jaxptm.data.audio import normalized
from jaxptm.data.characters import Characters
from jaxptm.data.examples import LENGTH_STEP, Buckets, bucket_lengths
from jaxptm.data.labelled import found_labels
from jaxptm.data.recordings import Recordings
from jaxptm.errors import JaxptmError

log = logging.getLogger("jaxptm")

SAMPLE_STEP = RATE // 10
"""Lengths that rows are padded to are multiples of this, but for the longest."""
NAMED = 3
"""Utterances that are named for each reason why some are unusable."""
OUTSIDE = "with characters outside the vocabulary"


def usable(
    recordings: Recordings,
    data: AudioData,
    *,
    crop: bool = False,
    vocabulary: Characters | None = None,
    labels: Sequence[str] | None = None,
    frames: Callable[[int], int] | None = None,
) -> Recordings:
    """The utterances that serve; the others are counted and named in one line of the log, or refused.

    Args:
        crop: whether what is longer than `data.max_seconds` serves in part.
        vocabulary: that transcripts are written with, which all must have then.
        labels: the classes, one of which all must have then.
        frames: of so many samples, frames of the model's output. CTC needs one for each character, and one between two
            that are equal.

    Raises:
        JaxptmError: nothing is left; or something is not, and `data.unusable` is `error`.
    """
    found: dict[str, list[str]] = defaultdict(list)
    strange: set[str] = set()
    kept = []
    for at, samples in enumerate(recordings.lengths.tolist()):
        reason = recordings.reasons[at]
        if reason is not None:
            pass
        elif samples < data.min_seconds * RATE:
            reason = f"shorter than data.min_seconds: {data.min_seconds:g}"
        elif samples > data.max_seconds * RATE and not crop:
            reason = f"longer than data.max_seconds: {data.max_seconds:g}"
        elif vocabulary is not None:
            text = vocabulary.normal(recordings.texts[at] or "")
            outside = set(text) - vocabulary.ids.keys()
            strange |= outside
            if not text:
                reason = "without a transcript"
            elif outside:
                reason = OUTSIDE
            elif frames is not None and frames(samples) < len(text) + sum(map(eq, text, text[1:])):
                reason = "too short for the transcript"
        elif labels is not None and recordings.labels[at] is None:
            reason = "without a label"
        elif labels is not None and recordings.labels[at] not in labels:
            reason = "with a label that is not one of those to learn"
        if reason is None:
            kept.append(at)
        else:
            found[reason].append(recordings.ids[at])
    if found:
        message = _told(recordings, found, sorted(strange))
        if not kept:
            raise JaxptmError(f"{message}; nothing is left.")
        if data.unusable == "error":
            raise JaxptmError(f"{message}; mend or remove them, or set data.unusable: skip.")
        log.warning("%s.", message)
    return recordings.take(kept) if found else recordings


def _told(recordings: Recordings, found: dict[str, list[str]], strange: list[str]) -> str:
    parts = []
    for reason, names in sorted(found.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
        which = f" {' '.join(map(repr, strange))}" if reason == OUTSIDE else ""
        parts.append(f"{len(names)} {reason}{which} ({shown})")
    count = sum(map(len, found.values()))
    return f"{recordings.name}: {count} of {len(recordings)} utterances are unusable: {'; '.join(parts)}"


@dataclass(frozen=True)
class Speech:
    """The usable utterances of a prepared directory, and what is said of them.

    Attributes:
        vocabulary: of the transcripts, where there is one.
        labels: the classes, in the order of the head, where they are asked for.
    """

    train: Recordings
    held_out: Recordings | None
    vocabulary: Characters | None
    labels: list[str] | None


def open_speech(
    data: AudioData,
    directory: str | Path,
    *,
    crop: bool = False,
    labelled: bool = False,
    frames: Callable[[int], int] | None = None,
) -> Speech:
    """Opens what `prepare_audio` has made, parts train from eval, and leaves out what does not serve.

    Args:
        crop: whether what is longer than `data.max_seconds` serves in part.
        labelled: whether each utterance needs a label.
        frames: see `usable`.

    Raises:
        JaxptmError: see `usable`, `Recordings.open` and `Characters`.
    """
    train, held_out = Recordings.open(directory, "train"), None
    vocabulary, labels = None, None
    if data.vocabulary == "characters":
        vocabulary = Characters.of_texts(filter(None, train.texts), data.ignore_characters)
    elif data.vocabulary is not None:
        vocabulary = Characters.load(data.vocabulary, data.ignore_characters)
    if labelled:
        labels = data.labels or found_labels(label for label in train.labels if label is not None)
    serving = partial(usable, data=data, crop=crop, vocabulary=vocabulary, labels=labels, frames=frames)
    train = serving(train)
    if data.eval is not None:
        held_out = serving(Recordings.open(directory, "eval"))
    elif data.eval_fraction > 0:
        train, held_out = train.split(data.eval_fraction)
    return Speech(train, held_out, vocabulary, labels)


def transcripts(recordings: Recordings, vocabulary: Characters) -> list[Int32[np.ndarray, " _"]]:
    """The ids of each utterance's transcript."""
    return [vocabulary.encode(text or "") for text in recordings.texts]


class SpeechBuckets(Buckets):
    """Batches of utterances of similar length, each utterance once an epoch.

    A row that is longer than `longest` is a crop, which is drawn from (seed, epoch, utterance); without a seed it is
    the beginning.
    """

    def __init__(
        self,
        recordings: Recordings,
        batch_size: int,
        *,
        normalize: bool,
        targets: Sequence[np.ndarray] | Int32[np.ndarray, " N"] | None = None,
        longest: int | None = None,
        by_samples: bool = True,
        seed: int | None = None,
    ):
        """Plans nothing yet.

        Args:
            batch_size: rows of a batch of the longest utterances.
            normalize: each utterance, as a whole, to zero mean and unit variance.
            targets: for CTC a list of ids for each utterance; for classification [N] ids.
            longest: samples of a row, at most.
            by_samples: batches of shorter rows have as many times more of them as have no more samples.
            seed: of the order of utterances and batches, and of the crops.
        """
        sizes = recordings.lengths if longest is None else np.minimum(recordings.lengths, longest)
        lengths = bucket_lengths(sizes, step=SAMPLE_STEP)
        times = [lengths[-1] // length if by_samples else 1 for length in lengths]
        lengths[-1] = int(sizes.max(initial=1))  # so that crops of one length have no padding
        super().__init__(sizes, lengths, batch_size, seed, times)
        self.recordings = recordings
        self._normalize = normalize
        self._targets = targets
        # A batch may hold what is left of shorter ones, so labels are as wide as the widest up to its length.
        self._widths: Int[np.ndarray, " K"] | None = None
        if targets is not None and not isinstance(targets, np.ndarray):
            widths = np.zeros(len(lengths), np.int64)
            np.maximum.at(widths, self._bucket, [len(ids) for ids in targets])
            self._widths = -(-np.maximum.accumulate(np.maximum(widths, 1)) // LENGTH_STEP) * LENGTH_STEP

    def _batch(self, chosen: np.ndarray, length: int, epoch: int) -> dict[str, np.ndarray]:
        """`input_values` [B, T] float32, `attention_mask` [B, T], and `labels`: [B, U] with -100 behind, or [B]."""
        values = np.zeros((len(chosen), length), np.float32)
        mask = np.zeros((len(chosen), length), np.int32)
        batch: dict[str, np.ndarray] = {"input_values": values, "attention_mask": mask}
        if self._widths is not None:
            width = int(self._widths[self.lengths.index(length)])
            batch["labels"] = np.full((len(chosen), width), IGNORED, np.int32)
        elif self._targets is not None:
            batch["labels"] = np.zeros(len(chosen), np.int32)
        for row, index in enumerate(chosen.tolist()):
            if index < 0:
                continue
            samples = self.recordings.samples(index)
            samples = normalized(samples) if self._normalize else samples
            first, count = self.crop(index, epoch), int(self._sizes[index])
            values[row, :count] = samples[first : first + count]
            mask[row, :count] = 1
            if self._widths is not None and self._targets is not None:
                batch["labels"][row, : len(self._targets[index])] = self._targets[index]
            elif self._targets is not None:
                batch["labels"][row] = self._targets[index]
        return batch

    def crop(self, index: int, epoch: int) -> int:
        """The first sample of an utterance's row in an epoch."""
        spare = int(self.recordings.lengths[index] - self._sizes[index])
        if spare == 0 or self.seed is None:
            return 0
        # One more than the number: numpy takes no notice of zeros at the end.
        return int(np.random.default_rng([self.seed, epoch, index + 1]).integers(spare + 1))
