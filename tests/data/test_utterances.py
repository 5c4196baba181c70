"""Where utterances come from, and what each kind of source says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from recorded import encoded, tone, write_audio

from jaxptm.config import AudioData
from jaxptm.data import utterances
from jaxptm.data.audio import BadAudio, decode
from jaxptm.data.utterances import Utterance, find_utterances
from jaxptm.errors import JaxptmError


def find(patterns: str | Path | list[str], **options: str) -> list[Utterance]:
    patterns = patterns if isinstance(patterns, list) else str(patterns)
    return find_utterances(patterns, AudioData(train=patterns, **options))


def said(found: list[Utterance]) -> list[tuple[str, str | None, str | None]]:
    return [(item.id, item.text, item.label) for item in found]


@pytest.fixture
def short(tmp_path: Path) -> bytes:
    return encoded(tone(0.05), "FLAC")


def put(root: Path, content: bytes, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def test_librispeech(tmp_path: Path, short: bytes) -> None:
    put(tmp_path, short, "dev/2/20/2-20-0001.flac", "dev/2/20/2-20-0000.flac", "dev/1/10/1-10-0000.flac")
    (tmp_path / "dev" / "2" / "20" / "2-20.trans.txt").write_text("2-20-0000 HELLO THERE\n2-20-0001 IT'S LATE\n")
    (tmp_path / "dev" / "1" / "10" / "1-10.trans.txt").write_text("1-10-0000 YES\n1-10-0001 NOT HERE\n")
    expected = [("1-10-0000", "YES", None), ("2-20-0000", "HELLO THERE", None), ("2-20-0001", "IT'S LATE", None)]
    assert said(find(tmp_path)) == said(find(tmp_path / "dev")) == expected
    assert said(find(f"{tmp_path}/dev/*")) == expected
    (tmp_path / "dev" / "1" / "10" / "1-10.trans.txt").write_text("1-10-0000 YES\nNOTEXT\n")
    with pytest.raises(JaxptmError, match=r"1-10\.trans\.txt:2: expected `id TRANSCRIPT`, not 'NOTEXT'"):
        find(tmp_path)


def test_ljspeech(tmp_path: Path, short: bytes) -> None:
    put(tmp_path, short, "wavs/LJ-1.flac", "wavs/LJ-2.flac")
    (tmp_path / "metadata.csv").write_text('LJ-1|Dr. X, "5"|Doctor X, "five"\nLJ-2|Two|Two\nLJ-3|Gone\n')
    found = find(tmp_path)
    assert said(found) == [("LJ-1", 'Doctor X, "five"', None), ("LJ-2", "Two", None), ("LJ-3", "Gone", None)]
    assert found[2].stamp == []
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(JaxptmError, match=r"metadata\.csv:1: expected `id\|text\|normalised text`, not 1 field"):
        find(tmp_path)


def test_folders(tmp_path: Path, short: bytes) -> None:
    put(tmp_path, short, "b/yes/1.WAV", "b/no/1.ogg", "b/no/notes.md", "top.mp3", "spoken.flac")
    (tmp_path / "spoken.txt").write_text("What was said\n")
    expected = [("spoken", "What was said", None), ("top", None, None), ("1", None, "no"), ("1", None, "yes")]
    assert said(find(tmp_path)) == expected
    assert said(find([f"{tmp_path}/top.mp3", f"{tmp_path}/b/*/*.*[gV]"])) == [
        ("top", None, None), ("1", None, None), ("1", None, None),
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(JaxptmError, match=r"empty: holds no utterance"):
        find(tmp_path / "empty")


def test_manifests(tmp_path: Path, short: bytes) -> None:
    put(tmp_path, short, "a.wav", "sub/b.wav")
    (tmp_path / "plain.tsv").write_text(f"a.wav\tone\n\n{tmp_path}/sub/b.wav\ttwo words\r\n")
    assert said(find(tmp_path / "plain.tsv")) == [("a", "one", None), ("b", "two words", None)]
    assert all(Path(item.path).exists() for item in find(tmp_path / "plain.tsv"))
    (tmp_path / "bare.txt").write_text("a.wav\nsub/b.wav\n")
    assert said(find(tmp_path / "bare.txt")) == [("a", None, None), ("b", None, None)]
    (tmp_path / "headed.tsv").write_text("file\tseconds\ttext\tspeaker\na.wav\t1\tone\tann\n")
    assert said(find(tmp_path / "headed.tsv", label_column="speaker")) == [("a", "one", "ann")]
    records = [{"audio": "a.wav", "text": "one", "label": 3}, {"path": "sub/b.wav", "other": [1]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert said(find(tmp_path / "rows.jsonl")) == [("a", "one", "3"), ("b", None, None)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.tsv", "", r"m\.tsv: holds no utterance"),
        ("m.jsonl", "\n \n", r"m\.jsonl: holds no utterance"),
        ("m.tsv", "path\ttext\n", r"m\.tsv: holds no utterance"),
        ("m.tsv", "a.wav\tone\nb.wav\n", r"m\.tsv:2: has 1 field\(s\), expected 2 with tabs between: path, text"),
        ("m.tsv", "a.wav\tone\n\ttwo\n", r"m\.tsv:2: names no file; expected a field called path or audio or file"),
        ("m.tsv", "a.wav\tone\na.wav\ttwo\n", r"a\.wav comes twice, as 'one' and as 'two': keep one"),
        ("m.jsonl", '{"path": "a.wav"}\n{"path"', r"m\.jsonl:2: is not JSON"),
        ("m.jsonl", "[1]", r"m\.jsonl:1: is no JSON object with named fields"),
        ("m.jsonl", '{"audio": {"bytes": 1}}', r"m\.jsonl:1: names no file"),
        ("m.jsonl", '{"path": "a.wav", "text": 3}', r"m\.jsonl:1: 'text' holds 3, expected text"),
        ("m.tsv", b"\xff\xfe", r"m\.tsv:1: is not UTF-8 text"),
        ("m.csv", "a,b", r"m\.csv: is neither audio .* nor a manifest"),
    ],
)
def test_bad_manifests(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(JaxptmError, match=message):
        find(tmp_path / name)


def test_one_recording_comes_once(tmp_path: Path, short: bytes) -> None:
    put(tmp_path, short, "a.wav", "b.wav")
    assert said(find([f"{tmp_path}/b.wav", str(tmp_path), f"{tmp_path}/*.wav"])) == [
        ("b", None, None),
        ("a", None, None),
    ]
    for pattern in (f"{tmp_path}/c.wav", f"{tmp_path}/*.flac"):
        with pytest.raises(JaxptmError, match="matches no file"):
            find(pattern)


def test_datasets_hand_out_their_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = write_audio(tmp_path / "kept.wav", tone(0.2))
    sounds = [{"bytes": encoded(tone(0.1), "WAV"), "path": "a.wav"}, {"bytes": None, "path": str(kept)}]
    rows = datasets.Dataset.from_dict({"sound": sounds, "sentence": ["One", None], "label": [1, 0]})
    rows = rows.cast_column("sound", datasets.Audio()).cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    opened: list[Any] = []

    def load(path: str, config: str | None, split: str) -> Any:
        opened.append((path, config, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    utterances._audio_column.cache_clear()
    found = find("me/speech:clean:test", text_column="sentence")
    assert said(found) == [("me/speech:clean:test[0]", "One", "yes"), ("me/speech:clean:test[1]", None, "no")]
    assert set(opened) == {("me/speech", "clean", "test")}
    np.testing.assert_array_equal(decode(found[0].source()), decode(encoded(tone(0.1), "WAV")))
    np.testing.assert_array_equal(decode(found[1].source()), decode(kept))
    assert found[0].stamp and found[0].stamp == found[1].stamp
    utterances._audio_column.cache_clear()
    monkeypatch.setattr(utterances, "load_dataset", lambda name: rows.remove_columns("sound"))
    with pytest.raises(JaxptmError, match=r"me/speech: has no column of audio, only: sentence, label"):
        find("me/speech")
    monkeypatch.setattr(utterances, "_audio_column", lambda name: ("sound", [{"sound": {"bytes": None, "path": None}}]))
    with pytest.raises(BadAudio, match="a row of a dataset without audio"):
        Utterance("x", "me/speech", row=0).source()


def test_real_sources(shared_data: Path) -> None:
    speech = shared_data / "speech"
    assert len(find(speech / "LJSpeech-1.1-subset")) == 77
    libri = find([str(speech / "LibriSpeech" / part) for part in ("test-clean", "dev-clean", "test-other")])
    assert all(item.text and item.text.isupper() for item in libri)
    assert sum(item.text is None for item in find(speech / "LibriSpeech" / "train-clean-100-unlabelled")) > 80
    assert {Path(item.path).suffix for item in find(speech / "misc" / "transcripts.tsv")} == {".wav", ".flac"}
