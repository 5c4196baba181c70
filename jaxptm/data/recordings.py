"""Recordings on disk: shards of 16 kHz samples, and what is said of them.

A prepared directory holds

    shards/<split>-<key>/      samples.npy, ends.npy and scales.npy of some utterances, and record.json
    <split>.jsonl              a line for each utterance: its id, path, seconds, text and label, or why it is unusable
    manifest.json              written last: the shards of each split in order, and their counts

Samples are int16, each utterance with the scale that makes them floats: half the bytes of float32. Speech that comes
as 16-bit audio at 16 kHz (LibriSpeech) is kept exactly, by the scale 1 / 32768. What is resampled, mixed or of more
bits is scaled to its own peak, so that nothing is clipped and the error stays 96 dB below it, however quiet it is.

An utterance is read from its file when it is asked for. Memory maps would gain nothing, for it is read as a whole and
becomes floats, and each would hold a file open, of which a process may have a thousand and a large corpus has more.

What a shard holds depends on the audio alone. Limits of length, transcripts and vocabularies apply when it is read, and
changing them decodes nothing again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from jaxptm.config import RATE
from jaxptm.data.shards import damage_of, disk, read_json
from jaxptm.errors import JaxptmError

FORMAT = 1
"""Version of the layout and of the way audio is decoded; another version is prepared anew."""


@dataclass(frozen=True)
class AudioSplit:
    """What a split of a prepared directory holds.

    Attributes:
        utterances: all that were found.
        unusable: those of them that could not be decoded.
        samples: at 16 kHz.
        digest: of the audio and all that is said of it, wherever the files lie.
    """

    shards: list[str]
    utterances: int
    unusable: int
    samples: int
    digest: str


@dataclass(frozen=True)
class AudioManifest:
    """What a prepared directory holds.

    Attributes:
        request: the settings that it was prepared from.
    """

    request: dict[str, Any]
    splits: dict[str, AudioSplit]
    format: int = FORMAT

    @classmethod
    def load(cls, directory: str | Path) -> AudioManifest:
        """Raises JaxptmError where there is none, or one of another format."""
        path = Path(directory) / "manifest.json"
        if not path.exists():
            raise JaxptmError(f"{directory}: holds no prepared audio (no manifest.json): run `jaxptm prepare`.")
        try:
            fields = read_json(path)
            splits = {split: AudioSplit(**rows) for split, rows in fields.pop("splits").items()}
            manifest = cls(**fields, splits=splits)
        except (KeyError, TypeError, AttributeError) as error:
            raise JaxptmError(f"{path}: is damaged: remove it and run `jaxptm prepare` again.") from error
        if manifest.format != FORMAT:
            raise JaxptmError(f"{path}: has format {manifest.format}, this jaxptm reads {FORMAT}: prepare it again.")
        return manifest

    def summary(self, split: str) -> str:
        """What the split holds, for people."""
        part = self.splits[split]
        hours = f"{part.utterances - part.unusable:,} utterances, {part.samples / RATE / 3600:.2f} hours"
        return f"{hours}, {part.unusable:,} unusable" if part.unusable else hours


@dataclass(frozen=True)
class Recordings:
    """Utterances of a prepared split, or some of them; the samples stay on disk until they are asked for.

    Attributes:
        name: for messages, as `data.train`.
        files: of samples, one a shard.
        file: [N] which of them an utterance is in.
        places: [N] where it begins there, in bytes.
        lengths: [N] in samples.
        scales: [N] what a sample of 1 stands for.
        ids: of each utterance.
        texts: transcripts as they were written, where there are any.
        labels: classes, where there are any.
        reasons: why an utterance is unusable.
    """

    name: str
    files: tuple[str, ...]
    file: Int[np.ndarray, " N"]
    places: Int[np.ndarray, " N"]
    lengths: Int[np.ndarray, " N"]
    scales: Float32[np.ndarray, " N"]
    ids: Sequence[str]
    texts: Sequence[str | None]
    labels: Sequence[str | None]
    reasons: Sequence[str | None]

    @classmethod
    def open(cls, directory: str | Path, split: str = "train") -> Recordings:
        """Opens a prepared split, unusable utterances included.

        Raises:
            JaxptmError: nothing is prepared there, it has no such split, or a shard is damaged.
        """
        directory, manifest = Path(directory), AudioManifest.load(directory)
        if split not in manifest.splits:
            raise JaxptmError(f"{directory}: holds no {split!r} speech, only: {', '.join(manifest.splits)}.")
        shards = [directory / "shards" / name for name in manifest.splits[split].shards]
        arrays = [_open_shard(path) for path in shards]
        counts = [len(scales) for _, _, scales in arrays]
        path = directory / f"{split}.jsonl"
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except (OSError, ValueError) as error:
            raise JaxptmError(f"{path}: is missing or damaged: run `jaxptm prepare` again.") from error
        if len(lines) != sum(counts):
            raise JaxptmError(f"{path}: does not go with its shards: remove {directory}, and prepare it again.")
        return cls(
            name=f"data.{split}",
            files=tuple(str(path / "samples.npy") for path in shards),
            file=np.repeat(np.arange(len(counts)), counts),
            places=np.concatenate([places for places, _, _ in arrays]),
            lengths=np.concatenate([lengths for _, lengths, _ in arrays]),
            scales=np.concatenate([scales for _, _, scales in arrays]),
            ids=[line["id"] for line in lines],
            texts=[line.get("text") for line in lines],
            labels=[line.get("label") for line in lines],
            reasons=[line.get("unusable") for line in lines],
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def seconds(self) -> float:
        """Of all utterances."""
        return float(self.lengths.sum() / RATE)

    def samples(self, index: int) -> Float32[np.ndarray, " T"]:
        """The samples of an utterance, full scale 1.

        Raises:
            JaxptmError: the shard has gone since it was opened.
        """
        path, count = self.files[self.file[index]], int(self.lengths[index])
        with disk(Path(path)):
            stored = np.fromfile(path, np.int16, count, offset=int(self.places[index]))
        if len(stored) != count:
            raise JaxptmError(f"{path}: was cut while it was in use: run `jaxptm prepare` again.")
        return stored.astype(np.float32) * self.scales[index]

    def take(self, chosen: Sequence[int] | np.ndarray) -> Recordings:
        """Some of the utterances, by number."""
        at = np.asarray(chosen, np.int64)
        parts: dict[str, Any] = {name: getattr(self, name)[at] for name in ("file", "places", "lengths", "scales")}
        parts |= {name: [getattr(self, name)[i] for i in at] for name in ("ids", "texts", "labels", "reasons")}
        return replace(self, **parts)

    def split(self, fraction: float) -> tuple[Recordings, Recordings]:
        """Two views: train, and a share that is held out, drawn the same way each time.

        Raises:
            JaxptmError: there are too few utterances for two.
        """
        if len(self) < 2:
            raise JaxptmError(f"{self.name}: has one utterance, too few for data.eval_fraction; give data.eval.")
        order = np.random.default_rng(0).permutation(len(self))
        held = min(len(self) - 1, max(1, round(fraction * len(self))))
        return self.take(np.sort(order[held:])), self.take(np.sort(order[:held]))


def _open_shard(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place in bytes, samples and scale of each utterance of a shard."""
    fields = read_json(path / "record.json")
    damage = f"{path}: has no record" if fields is None else damage_of(path, fields["files"])
    if damage is None:
        try:
            samples = np.load(path / "samples.npy", mmap_mode="r")
            ends, scales = np.load(path / "ends.npy"), np.load(path / "scales.npy")
            lengths = np.diff(ends, prepend=0)
            if len(samples) == ends[-1] == fields["samples"] and len(ends) == len(scales) and np.all(lengths >= 0):
                return samples.offset + (ends - lengths) * samples.itemsize, lengths, scales
        except (ValueError, OSError, KeyError, IndexError):
            pass
        damage = f"{path}: its arrays do not fit together"
    raise JaxptmError(f"{damage}. Remove {path} and run `jaxptm prepare` again.")
