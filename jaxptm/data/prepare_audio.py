"""Audio of any kind in, shards of 16 kHz samples out, as `jaxptm.data.recordings` describes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int16

from jaxptm.config import RATE, AudioData
from jaxptm.data.audio import BadAudio, decode
from jaxptm.data.recordings import FORMAT, AudioManifest, AudioSplit
from jaxptm.data.shards import (
    NpyFile,
    Progress,
    alone,
    check_share,
    content_digest,
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
        digest: of the samples; shards of jaxptm before 2026-11-28 have none.
    """

    name: str
    recordings: list[list[Any]]
    unusable: dict[str, str]
    samples: int
    files: dict[str, int]
    digest: str = ""
    format: int = FORMAT


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
    check_share(host, hosts, workers)
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
    report = progress or (lambda share, message: None)
    with disk(directory), alone(directory, host, report):
        home.mkdir(exist_ok=True)
        _decode_all(tasks[host::hosts], workers, report, data)
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
        shard = AudioShard(task.path.name, task.stamps, unusable, ends[-1], file_sizes(fresh), content_digest(fresh))
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
    content = [[shard.samples, shard.unusable, shard.digest] for _, shard in part]
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
