"""Shards of decoded audio: exact, restartable, whole or absent, and never silent about what is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from recorded import damaged, tone, write_audio
from side_by_side import at_once

from jaxptm.config import RATE, AudioData
from jaxptm.data import prepare_audio as recording
from jaxptm.data.audio import decode
from jaxptm.data.prepare_audio import prepare_audio, to_int16
from jaxptm.data.recordings import AudioManifest, Recordings
from jaxptm.errors import JaxptmError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD", 4)


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """Ten files of 16-bit noise at 16 kHz, whose lengths and texts tell which they are."""
    root = tmp_path / "audio"
    random = np.random.default_rng(0)
    lines = []
    for i in range(10):
        write_audio(root / f"{i}.flac", random.integers(-(2**15), 2**15, 1000 + i).astype(np.int16))
        lines.append(f"{i}.flac\tnumber {i}\n")
    (root / "all.tsv").write_text("".join(lines))
    return root


def shard_bytes(directory: Path) -> dict[str, bytes]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@settings(deadline=None)
@given(
    arrays.arrays(np.float32, st.integers(1, 100), elements=st.floats(-float(2**126), 2**126, width=32)),
    st.sampled_from([1.0, 1e-3, 1e-20]),
)
def test_floats_keep_96_decibels_below_their_peak(samples: np.ndarray, factor: float) -> None:
    samples = (samples * np.float32(factor)).astype(np.float32)
    integers, scale = to_int16(samples)
    back = integers.astype(np.float32) * np.float32(scale)
    peak = np.abs(samples).max()
    assert integers.dtype == np.int16
    assert np.abs(back - samples).max() <= peak * 10 ** (-96 / 20) * 1.01 + 1e-38


@given(arrays.arrays(np.int16, st.integers(1, 100)))
def test_sixteen_bits_are_exact(integers: np.ndarray) -> None:
    found, scale = to_int16(integers / np.float32(32768))
    assert scale == 1 / 32768
    np.testing.assert_array_equal(found, integers)


def test_what_is_read_is_what_was_recorded(audio: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_audio(other / "yes" / "loud.wav", 3 * tone(0.1), subtype="FLOAT")
    write_audio(other / "no" / "quiet.wav", 1e-4 * tone(0.1, 44_100), 44_100, subtype="FLOAT")
    data = AudioData(train=str(audio / "all.tsv"), eval=str(other))
    manifest = prepare_audio(data, tmp_path / "prepared", workers=1)
    assert manifest == AudioManifest.load(tmp_path / "prepared")
    train, held_out = (Recordings.open(tmp_path / "prepared", split) for split in ("train", "eval"))
    assert train.texts == [f"number {i}" for i in range(10)] and len(train.files) == 3
    assert train.lengths.tolist() == [1000 + i for i in range(10)]
    assert train.seconds == manifest.splits["train"].samples / RATE == sum(range(1000, 1010)) / RATE
    assert manifest.summary("train") == "10 utterances, 0.00 hours"
    for i in range(10):
        np.testing.assert_array_equal(train.samples(i), decode(audio / f"{i}.flac"))
    assert list(zip(held_out.ids, held_out.labels, strict=True)) == [("quiet", "no"), ("loud", "yes")]
    for i, path in enumerate([other / "no" / "quiet.wav", other / "yes" / "loud.wav"]):
        expected = decode(path)
        np.testing.assert_allclose(held_out.samples(i), expected, atol=float(np.abs(expected).max()) / 60_000)
    part = train.take([7, 2])
    assert part.texts == ["number 7", "number 2"] and part.lengths.tolist() == [1007, 1002]
    np.testing.assert_array_equal(part.samples(1), train.samples(2))
    lines = [json.loads(line) for line in (tmp_path / "prepared" / "train.jsonl").read_text().splitlines()]
    assert lines[3] == {"id": "3", "path": str(audio / "3.flac"), "seconds": 0.0627, "text": "number 3"}


def test_a_held_out_share(audio: Path, tmp_path: Path) -> None:
    prepare_audio(AudioData(train=str(audio)), tmp_path / "prepared", workers=1)
    whole = Recordings.open(tmp_path / "prepared")
    train, held_out = whole.split(0.3)
    assert len(held_out) == 3 and sorted([*train.ids, *held_out.ids]) == sorted(whole.ids)
    assert whole.split(0.3)[1].ids == held_out.ids
    assert [len(part) for part in whole.split(0.01)] == [9, 1] and [len(part) for part in whole.split(0.99)] == [1, 9]
    with pytest.raises(JaxptmError, match=r"data\.train: has one utterance, too few for data\.eval_fraction"):
        whole.take([0]).split(0.5)


def test_finished_shards_are_kept(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, directory = AudioData(train=str(audio)), tmp_path / "prepared"
    prepare_audio(data, directory, workers=1)
    before = shard_bytes(directory)
    done: list[list[str]] = []
    write = recording._write_shard
    monkeypatch.setattr(
        recording, "_write_shard", lambda task: done.append([item.id for item in task.utterances]) or write(task)
    )
    prepare_audio(data, directory, workers=1)
    prepare_audio(data.model_copy(update={"max_seconds": 3.0, "vocabulary": "characters"}), directory, workers=1)
    assert done == [] and shard_bytes(directory) == before
    names = json.loads(before["manifest.json"])["splits"]["train"]["shards"]
    (directory / "manifest.json").unlink()
    (directory / "shards" / names[0]).rename(directory / "shards" / f"{names[0]}.tmp")
    (directory / "shards" / names[2] / "samples.npy").write_bytes(b"cut")
    shares: list[tuple[float, str]] = []
    prepare_audio(data, directory, workers=1, progress=lambda share, line: shares.append((share, line)))
    assert done == [["0", "1", "2", "3"], ["8", "9"]] and shard_bytes(directory) == before
    assert shares[0] == (0.4, "4 of 10 utterances were done before") and [share for share, _ in shares[1:]] == [0.8, 1]
    # A file that changes, one that comes, and one that goes but has been decoded.
    done.clear()
    write_audio(audio / "5.flac", tone(0.2))
    write_audio(audio / "91.flac", tone(0.3))
    prepare_audio(data, directory, workers=1)
    assert done == [["4", "5", "6", "7"], ["8", "9", "91"]]
    assert Recordings.open(directory).lengths[[5, 10]].tolist() == [3200, 4800]


def test_shards_outlive_their_files(audio: Path, tmp_path: Path) -> None:
    data, directory = AudioData(train=str(audio / "all.tsv")), tmp_path / "prepared"
    manifest = prepare_audio(data, directory, workers=1)
    before = shard_bytes(directory)
    for file in audio.glob("*.flac"):
        file.unlink()
    assert prepare_audio(data, directory, workers=1) == manifest and shard_bytes(directory) == before
    shutil.rmtree(audio)
    assert prepare_audio(data, directory, workers=1) == manifest
    with pytest.raises(JaxptmError, match=r"all\.tsv: matches no file"):
        prepare_audio(data, tmp_path / "elsewhere", workers=1)


def test_worker_processes_and_hosts_write_the_same(audio: Path, tmp_path: Path) -> None:
    data = AudioData(train=str(audio))
    prepare_audio(data, tmp_path / "one", workers=1)
    prepare_audio(data, tmp_path / "two", workers=2)
    assert prepare_audio(data, tmp_path / "hosts", host=1, hosts=2, workers=1) is None
    assert prepare_audio(data, tmp_path / "hosts", host=0, hosts=2, workers=1) is not None
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two") == shard_bytes(tmp_path / "hosts")


def test_two_processes_do_not_write_the_same_shards(audio: Path, tmp_path: Path) -> None:
    data = AudioData(train=str(audio))
    ours, theirs = at_once(lambda progress: prepare_audio(data, tmp_path / "shared", workers=1, progress=progress))
    assert ours == theirs == prepare_audio(data, tmp_path / "alone", workers=1)
    assert shard_bytes(tmp_path / "shared") == shard_bytes(tmp_path / "alone")


def test_a_killed_process_loses_nothing(audio: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; from jaxptm.config import AudioData; import jaxptm.data.prepare_audio as r; r.SHARD = 4\n"
        "write = r._write_shard; r._write_shard = lambda task: (time.sleep(0.5), write(task))[1]\n"
        f"r.prepare_audio(AudioData(train={str(audio)!r}), sys.argv[1], workers=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "killed")])
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("shards/*/record.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    for name in ("killed", "whole"):
        prepare_audio(AudioData(train=str(audio)), tmp_path / name, workers=1)
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole")


def test_bad_files_are_counted_or_refused(audio: Path, tmp_path: Path) -> None:
    reasons = damaged(audio / "bad")
    manifest = audio / "all.tsv"
    manifest.write_text(f"{manifest.read_text()}absent.wav\tnobody\n" + "".join(f"bad/{n}\tx\n" for n in reasons))
    prepared = prepare_audio(AudioData(train=str(manifest)), tmp_path / "prepared", workers=1)
    assert (
        prepared is not None and prepared.summary("train") == f"10 utterances, 0.00 hours, {len(reasons) + 1} unusable"
    )
    found = Recordings.open(tmp_path / "prepared")
    assert found.reasons == [None] * 10 + ["not there", *reasons.values()]
    assert not found.lengths[10:].any()
    refusing = AudioData(train=str(manifest), unusable="error")
    for directory in ("prepared", "fresh"):  # decoded before, and now
        with pytest.raises(JaxptmError, match=r"absent\.wav is not there: remove it, or set data\.unusable: skip"):
            prepare_audio(refusing, tmp_path / directory, workers=1)
    with pytest.raises(
        JaxptmError, match=r"data\.train: none of its 10 utterance\(s\) can be used; .*bad/claims\.wav is with a he"
    ):
        prepare_audio(AudioData(train=str(audio / "bad")), tmp_path / "none", workers=1)


def test_held_out_speech_is_not_trained_on(audio: Path, tmp_path: Path) -> None:
    with pytest.raises(JaxptmError, match=r"3\.flac: is both in data\.train and in data\.eval"):
        prepare_audio(AudioData(train=str(audio), eval=str(audio / "3.flac")), tmp_path, workers=1)


def test_damage_is_named(audio: Path, tmp_path: Path) -> None:
    directory = tmp_path / "prepared"
    with pytest.raises(JaxptmError, match=r"holds no prepared audio \(no manifest.json\): run `jaxptm prepare`"):
        Recordings.open(directory)
    prepare_audio(AudioData(train=str(audio)), directory, workers=1)
    with pytest.raises(JaxptmError, match=r"holds no 'eval' speech, only: train"):
        Recordings.open(directory, "eval")
    whole = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    samples = directory / "shards" / AudioManifest.load(directory).splits["train"].shards[1] / "samples.npy"
    ends, record = samples.with_name("ends.npy"), samples.with_name("record.json")
    manifest = directory / "manifest.json"
    for path, content, message in [
        (samples, b"cut", rf"{samples}: has 3 bytes, not \d+\. Remove {samples.parent} and run"),
        (samples, None, rf"{samples}: is missing"),
        (ends, bytes(len(whole[ends])), rf"{samples.parent}: its arrays do not fit together"),
        (record, b"{", rf"{samples.parent}: has no record"),
        (directory / "train.jsonl", b"{}\n", r"train\.jsonl: does not go with its shards"),
        (directory / "train.jsonl", b"{", r"train\.jsonl: is missing or damaged"),
        (manifest, b"{", r"manifest\.json: is damaged"),
        (manifest, whole[manifest].replace(b'"format": 1', b'"format": 9'), "format 9"),
    ]:  # fmt: skip
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(JaxptmError, match=message):
            Recordings.open(directory)
        path.write_bytes(whole[path])
    found = Recordings.open(directory)
    assert len(found) == 10
    samples.write_bytes(whole[samples][:-2])
    with pytest.raises(JaxptmError, match=r"samples\.npy: was cut while it was in use"):
        found.samples(7)
    samples.unlink()
    with pytest.raises(JaxptmError, match=r"samples\.npy: No such file"):
        found.samples(7)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux shows them")
def test_many_shards_hold_no_files_open(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SHARD", 1)
    prepare_audio(AudioData(train=str(audio)), tmp_path / "prepared", workers=1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    found = Recordings.open(tmp_path / "prepared")
    assert [len(found.samples(i)) for i in range(10)] == found.lengths.tolist()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_odd_characters_survive(audio: Path, tmp_path: Path) -> None:
    text = "a\u2028b\u0085c “d” é\x1c"
    (audio / "one.jsonl").write_text(json.dumps({"path": "0.flac", "text": text}))
    prepare_audio(AudioData(train=str(audio / "one.jsonl")), tmp_path / "prepared", workers=1)
    assert Recordings.open(tmp_path / "prepared").texts == [text]


def test_real_speech(shared_data: Path, tmp_path: Path) -> None:
    libri = shared_data / "speech" / "LibriSpeech" / "test-clean"
    prepare_audio(AudioData(train=str(libri)), tmp_path, workers=1)
    found = Recordings.open(tmp_path)
    assert 0.5 < found.seconds / 60 < 60 and all(found.texts) and set(found.scales) == {np.float32(1 / 32768)}
    path = next(libri.rglob(f"{found.ids[-1]}.flac"))
    np.testing.assert_array_equal(found.samples(len(found) - 1), decode(path))
