"""Recordings on disk: audio of any kind in, shards of 16 kHz samples out.

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

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int16

from jaxptm.config import RATE, AudioData
from jaxptm.data.audio import BadAudio, decode
from jaxptm.data.shards import (
    NpyFile,
    Progress,
    cores,
    damage_of,
    disk,
    file_sizes,
    fresh_shard,
    read_json,
    work_all,
    write_json,
)
from jaxptm.data.utterances import Utterance, find_utterances
from jaxptm.errors import JaxptmError

FORMAT = 1
"""Version of the layout and of the way audio is decoded; another version is prepared anew."""
SHARD = 100
"""Utterances of a shard."""
SHARDS_PER_WORKER = 8
"""That make another process worth its start: of LibriSpeech they take three seconds."""


@dataclass(frozen=True)
class AudioShard:
    """Some utterances' samples, as their record.json tells.

    Attributes:
        recordings: key and stamp of each utterance.
        unusable: utterance (a number, in JSON a string) -> what is wrong with it; it has no samples.
        samples: at 16 kHz.
        files: sizes in bytes.
    """

    name: str
    recordings: list[list[Any]]
    unusable: dict[str, str]
    samples: int
    files: dict[str, int]
    format: int = FORMAT


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


def prepare_audio(
    data: AudioData,
    directory: str | Path,
    host: int = 0,
    hosts: int = 1,
    workers: int | None = None,
    progress: Progress | None = None,
) -> AudioManifest | None:
    """Decodes the audio of `data` into `directory`; what is there already and up to date is not done again.

    Host `host` of `hosts` does every `hosts`-th shard, with `workers` processes (default: as many as there are cores
    and work for them). Shards of files that are gone since are kept.

    Returns the manifest, or None where other hosts' shards are still missing: the last host to finish writes it.

    Raises:
        JaxptmError: bad or missing input, a full disk, nothing usable in a split, or, with `data.unusable: error`,
            anything unusable. Finished shards stay.
    """
    directory = Path(directory)
    request = data.model_dump(include={"train", "eval", "text_column", "label_column"})
    done = AudioManifest.load(directory) if (directory / "manifest.json").exists() else None
    try:
        utterances = _utterances(data)
    except JaxptmError:
        if done is not None and request.items() <= done.request.items():
            return done  # prepared elsewhere: the shards do without their sources
        raise
    stamped = {split: [[item.key, item.stamp] for item in items] for split, items in utterances.items()}
    home = directory / "shards"
    tasks = [
        _Task(str(home), split, tuple(items[at : at + SHARD]), stamped[split][at : at + SHARD])
        for split, items in utterances.items()
        for at in range(0, len(items), SHARD)
    ]
    with disk(directory):
        home.mkdir(parents=True, exist_ok=True)
        _decode_all(tasks[host::hosts], workers, progress or (lambda share, message: None), data)
        shards = [_finished(task) for task in tasks]
        if not all(shards):
            return None
        splits = {}
        for split in utterances:
            part = [(task, shard) for task, shard in zip(tasks, shards, strict=True) if shard and task.split == split]
            splits[split] = _write_split(directory, split, part, data)
        manifest = AudioManifest(request, splits)
        write_json(directory / "manifest.json", asdict(manifest))
        return manifest


@dataclass(frozen=True)
class _Task:
    """Utterances that make a shard; `stamps` are from before any of them is read."""

    home: str
    split: str
    utterances: tuple[Utterance, ...]
    stamps: list[list[Any]]

    @property
    def path(self) -> Path:
        keys = "\n".join(key for key, _ in self.stamps)
        return Path(self.home) / f"{self.split}-{hashlib.sha256(keys.encode()).hexdigest()[:16]}"


def _utterances(data: AudioData) -> dict[str, list[Utterance]]:
    found = {"train": find_utterances(data.train, data)}
    if data.eval is not None:
        found["eval"] = find_utterances(data.eval, data)
        train = {item.key for item in found["train"]}
        shared = next((item.key for item in found["eval"] if item.key in train), None)
        if shared is not None:
            raise JaxptmError(f"{shared}: is both in data.train and in data.eval: held-out speech is not trained on.")
    return found


def _decode_all(tasks: list[_Task], workers: int | None, report: Progress, data: AudioData) -> None:
    todo = [task for task in tasks if _finished(task) is None]
    total = max(1, sum(len(task.utterances) for task in tasks))
    done = total - sum(len(task.utterances) for task in todo)
    if len(tasks) > len(todo):
        report(done / total, f"{done} of {total} utterances were done before")

    def finish(task: _Task, shard: AudioShard) -> None:
        nonlocal done
        done += len(task.utterances)
        last = f"{shard.samples / RATE:,.0f} s in the last {len(task.utterances)}"
        unusable = f", {len(shard.unusable)} of them unusable" if shard.unusable else ""
        report(done / total, f"{done:,} of {total:,} utterances ({last}{unusable})")
        if data.unusable == "error":
            _refuse(task, shard)

    if workers is None:
        workers = min(cores(), -(-len(todo) // SHARDS_PER_WORKER))
    work_all(_start, todo, [len(task.utterances) for task in todo], finish, workers)


def _refuse(task: _Task, shard: AudioShard) -> None:
    for at, reason in shard.unusable.items():
        raise JaxptmError(f"{task.stamps[int(at)][0]} is {reason}: remove it, or set data.unusable: skip.")


def _finished(task: _Task) -> AudioShard | None:
    """The record of the shard, if it is complete and would come out the same."""
    try:
        shard = AudioShard(**read_json(task.path / "record.json"))
    except TypeError:
        return None
    same = shard.format == FORMAT and len(shard.recordings) == len(task.stamps)
    # A recording that is gone, and has no stamp, stays what it was.
    for (key, stamp), (key_before, stamp_before) in zip(task.stamps, shard.recordings, strict=False):
        same = same and key == key_before and stamp in ([], stamp_before)
    return shard if same and not damage_of(task.path, shard.files) else None


def _start() -> Callable[[_Task], AudioShard]:
    return _write_shard


def _write_shard(task: _Task) -> AudioShard:
    unusable = {}
    ends, scales = [], []
    with fresh_shard(task.path) as fresh:
        with NpyFile(fresh / "samples.npy", "int16") as file:
            for at, utterance in enumerate(task.utterances):
                try:
                    samples, scale = to_int16(decode(utterance.source()))
                    file.write(samples)
                except BadAudio as error:
                    unusable[str(at)], scale = str(error), 1.0
                ends.append(file.length)
                scales.append(scale)
        np.save(fresh / "ends.npy", np.array(ends, np.int64))
        np.save(fresh / "scales.npy", np.array(scales, np.float32))
        shard = AudioShard(task.path.name, task.stamps, unusable, ends[-1], file_sizes(fresh))
        write_json(fresh / "record.json", asdict(shard))
    return shard


def _write_split(directory: Path, split: str, part: Sequence[tuple[_Task, AudioShard]], data: AudioData) -> AudioSplit:
    lines, unusable = [], 0
    for task, shard in part:
        if data.unusable == "error":
            _refuse(task, shard)
        ends = np.load(task.path / "ends.npy")
        for at, (item, samples) in enumerate(zip(task.utterances, np.diff(ends, prepend=0), strict=True)):
            line: dict[str, Any] = {"id": item.id, "path": item.key, "seconds": round(int(samples) / RATE, 4)}
            line |= {name: value for name in ("text", "label") if (value := getattr(item, name)) is not None}
            if str(at) in shard.unusable:
                line["unusable"] = shard.unusable[str(at)]
                unusable += 1
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    if unusable == len(lines):
        first, reason = part[0][0].stamps[0][0], part[0][1].unusable["0"]
        raise JaxptmError(f"data.{split}: none of its {unusable} utterance(s) can be used; {first} is {reason}.")
    fresh = directory / f"{split}.jsonl.tmp"
    fresh.write_text("".join(lines), encoding="utf-8")
    fresh.replace(directory / f"{split}.jsonl")
    content = [[shard.samples, shard.unusable] for _, shard in part]
    said = [[item.id, item.text, item.label] for task, _ in part for item in task.utterances]
    digest = hashlib.sha256(json.dumps([content, said]).encode()).hexdigest()[:12]
    return AudioSplit(
        [shard.name for _, shard in part], len(lines), unusable, sum(shard.samples for _, shard in part), digest
    )


def to_int16(samples: Float32[np.ndarray, " T"]) -> tuple[Int16[np.ndarray, " T"], float]:
    """Integers and their scale: exact where 16 bits hold the samples, or else scaled to their peak."""
    peak = float(np.abs(samples).max())
    if peak <= 1:
        integers = samples * np.float32(32768)
        if integers.max() <= 32767 and np.array_equal(integers, np.rint(integers)):
            return integers.astype(np.int16), 1 / 32768
    scale = np.float32(peak / 32767)
    if scale == 0:  # smaller than float32 tells apart
        return np.zeros(len(samples), np.int16), 1 / 32768
    return np.rint(samples / scale).clip(-32767, 32767).astype(np.int16), float(scale)


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
    def fingerprint(self) -> str:
        """Names the utterances by what is known of them."""
        known = [list(zip(self.ids, self.texts, self.labels, strict=True)), self.lengths.tolist()]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]

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
