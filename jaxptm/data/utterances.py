"""Where utterances come from: folders of audio, LibriSpeech, LJSpeech, manifests and Hugging Face datasets."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxptm.config import AudioData
from jaxptm.data.audio import SUFFIXES, BadAudio
from jaxptm.data.sources import load_dataset
from jaxptm.data.table import filled_lines, json_objects, read_text
from jaxptm.errors import JaxptmError

PATHS = ("path", "audio", "file", "file_name")
"""What a manifest may call the column of its files."""

_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")


@dataclass(frozen=True)
class Utterance:
    """One recording, and what is known of it.

    Attributes:
        id: a short name, for messages and predictions.
        path: of the file; for a row of a dataset, its name as `name:config:split`.
        text: the transcript, as it is written there.
        label: its class, for classification.
        row: in a dataset.
    """

    id: str
    path: str
    text: str | None = None
    label: str | None = None
    row: int | None = None
    fingerprint: str | None = None
    """Of its dataset."""

    @property
    def key(self) -> str:
        """Which recording it is, whatever the working directory."""
        return os.path.abspath(self.path) if self.row is None else f"{self.path}[{self.row}]"

    @property
    def stamp(self) -> list[int | str]:
        """Changes when the recording does; empty where there is none."""
        if self.row is not None:
            return [self.fingerprint or ""]
        try:
            status = os.stat(self.path)
        except OSError:
            return []
        return [status.st_size, status.st_mtime_ns]

    def source(self) -> str | bytes:
        """What `jaxptm.data.audio.decode` reads."""
        if self.row is None:
            return self.path
        column, rows = _audio_column(self.path)
        cell = rows[self.row][column]
        content, path = cell["bytes"], cell["path"]
        if content is None and path is None:
            raise BadAudio("a row of a dataset without audio")
        return path if content is None else content


def find_utterances(patterns: str | list[str], data: AudioData) -> list[Utterance]:
    """The utterances that paths, globs and dataset names stand for, each recording once, in a stable order.

    - A directory is searched for audio files. A transcript is taken from a `*.trans.txt` beside the file (LibriSpeech:
      `id TEXT` lines), or from a `.txt` of the file's name. A directory with a `metadata.csv` is an LJSpeech
      (`id|text|normalised text` lines, `wavs/`). Otherwise the folder that a file lies in is its label.
    - A `.tsv` or `.txt` file is a manifest of `path<TAB>text` lines, or of paths alone. Where the first field of the
      first line is called path, audio, file or file_name, that line names the columns.
    - A `.jsonl` file is a manifest of objects with one of these names, a text and a label.
    - An audio file is itself; anything else is looked for as a Hugging Face dataset, `name[:config][:split]`.

    Paths in a manifest are relative to it.

    Raises:
        JaxptmError: a pattern stands for nothing, a line of a manifest is malformed, or one recording comes with two
            transcripts.
    """
    found: dict[str, Utterance] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for utterance in _find(pattern, data):
            before = found.setdefault(utterance.key, utterance)
            if (before.text, before.label) != (utterance.text, utterance.label):
                raise JaxptmError(
                    f"{pattern}: {utterance.path} comes twice, as {before.text or before.label!r} and as "
                    f"{utterance.text or utterance.label!r}: keep one."
                )
    if not found:
        raise JaxptmError(f"{patterns}: holds no utterance.")
    return list(found.values())


def _find(pattern: str, data: AudioData) -> Iterator[Utterance]:
    path = Path(pattern).expanduser()
    matches = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if not matches and (glob.has_magic(pattern) or path.suffix or not _DATASET.fullmatch(pattern)):
        raise JaxptmError(f"{pattern}: matches no file.")
    if not matches:
        yield from _of_dataset(pattern, data)
    for match in matches:
        if match.is_dir():
            yield from _of_ljspeech(match) if (match / "metadata.csv").is_file() else _of_folder(match)
        elif match.suffix == ".jsonl":
            yield from _of_jsonl(match, data)
        elif match.suffix in (".tsv", ".txt"):
            yield from _of_tsv(match, data)
        elif match.suffix.lower() in SUFFIXES:
            yield Utterance(match.stem, str(match))
        else:
            raise JaxptmError(
                f"{match}: is neither audio ({', '.join(SUFFIXES)}) nor a manifest (.tsv, .txt or .jsonl)."
            )


def _of_folder(root: Path) -> Iterator[Utterance]:
    """Audio of a directory tree in the order of its paths."""
    for directory, below, names in os.walk(root, followlinks=True):
        below.sort()
        here = Path(directory)
        present = set(names)
        transcripts: dict[str, str] = {}
        for name in sorted(names):
            if name.endswith(".trans.txt"):
                transcripts |= _librispeech_transcripts(here / name)
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in SUFFIXES:
                continue
            text, label = transcripts.get(stem), None
            if text is None and f"{stem}.txt" in present:
                text = read_text(here / f"{stem}.txt").strip()
            if text is None and here != root:
                label = here.name
            yield Utterance(stem, str(here / name), text, label)


def _librispeech_transcripts(path: Path) -> dict[str, str]:
    texts = {}
    for number, line in filled_lines(read_text(path)):
        utterance, blank, text = line.partition(" ")
        if not blank:
            raise JaxptmError(f"{path}:{number}: expected `id TRANSCRIPT`, not {line!r}.")
        texts[utterance] = text
    return texts


def _of_ljspeech(root: Path) -> Iterator[Utterance]:
    """`wavs/<id>.wav`, or of another kind of audio; the text is the normalised one, where numbers are words."""
    path = root / "metadata.csv"
    there = {file.stem: file for file in sorted((root / "wavs").glob("*")) if file.suffix.lower() in SUFFIXES}
    for number, line in filled_lines(read_text(path)):
        fields = line.split("|")
        if len(fields) not in (2, 3):
            raise JaxptmError(f"{path}:{number}: expected `id|text|normalised text`, not {len(fields)} field(s).")
        file = there.get(fields[0], root / "wavs" / f"{fields[0]}.wav")
        yield Utterance(fields[0], str(file), fields[-1])


def _of_tsv(path: Path, data: AudioData) -> Iterator[Utterance]:
    names: list[str] | None = None
    for number, line in filled_lines(read_text(path)):
        fields = line.split("\t")
        if names is None:
            headed = fields[0] in PATHS
            names = fields if headed else ["path", data.text_column][: len(fields)]
            if headed:
                continue
        if len(fields) != len(names):
            raise JaxptmError(
                f"{path}:{number}: has {len(fields)} field(s), expected {len(names)} with tabs between: "
                f"{', '.join(names)}."
            )
        yield _row(path, number, dict(zip(names, fields, strict=True)), data)


def _of_jsonl(path: Path, data: AudioData) -> Iterator[Utterance]:
    for number, record in json_objects(path, read_text(path)):
        yield _row(path, number, record, data)


def _row(manifest: Path, number: int, fields: dict[str, Any], data: AudioData) -> Utterance:
    file = next((fields[name] for name in PATHS if name in fields), None)
    if not isinstance(file, str) or not file:
        raise JaxptmError(f"{manifest}:{number}: names no file; expected a field called {' or '.join(PATHS)}.")
    text, label = fields.get(data.text_column), fields.get(data.label_column)
    if text is not None and not isinstance(text, str):
        raise JaxptmError(f"{manifest}:{number}: {data.text_column!r} holds {text!r}, expected text.")
    path = manifest.parent / Path(file).expanduser()
    return Utterance(path.stem, str(path), text, None if label is None else str(label))


def _of_dataset(name: str, data: AudioData) -> Iterator[Utterance]:
    _, rows = _audio_column(name)
    wanted = [field for field in (data.text_column, data.label_column) if field in rows.column_names]
    others = rows.select_columns(wanted) if wanted else None
    to_name = getattr(rows.features.get(data.label_column), "int2str", str)
    for at in range(len(rows)):
        fields = {} if others is None else others[at]
        text, label = fields.get(data.text_column), fields.get(data.label_column)
        if text is not None and not isinstance(text, str):
            raise JaxptmError(f"{name}: row {at}: {data.text_column!r} holds {text!r}, expected text.")
        shown = None if label is None else to_name(label)
        yield Utterance(f"{name}[{at}]", name, text, shown, at, str(rows._fingerprint))


@lru_cache(maxsize=8)
def _audio_column(name: str) -> tuple[str, Any]:
    """The column of a dataset that holds audio, and the dataset, which hands out the bytes as they are."""
    import datasets

    rows = load_dataset(name)
    column = next((key for key, feature in rows.features.items() if isinstance(feature, datasets.Audio)), None)
    if column is None:
        raise JaxptmError(f"{name}: has no column of audio, only: {', '.join(rows.column_names)}.")
    # Decoding it would take torchcodec, and with it torch and ffmpeg.
    return column, rows.cast_column(column, datasets.Audio(decode=False))
