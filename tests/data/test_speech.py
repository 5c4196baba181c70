"""Which utterances serve, and the laws of their batches."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import tone, write_audio
from transformers import Wav2Vec2FeatureExtractor

from jaxptm.config import IGNORED, RATE, AudioData
from jaxptm.data.batching import Rows, batches, one_pass
from jaxptm.data.characters import Characters
from jaxptm.data.prepare_audio import prepare_audio
from jaxptm.data.recordings import Recordings
from jaxptm.data.speech import SAMPLE_STEP, SpeechBuckets, open_speech, transcripts, usable
from jaxptm.errors import JaxptmError

FILES = TemporaryDirectory()
DATA = AudioData(train="anywhere", max_seconds=2.0)


def spoken(
    lengths: list[int], texts: list[str | None] | None = None, labels: list[str | None] | None = None
) -> Recordings:
    """Utterances; sample t of utterance i is 100 * i + t % 97, in steps of 1 / 32768."""
    samples = [100 * i + np.arange(length) % 97 for i, length in enumerate(lengths)]
    with NamedTemporaryFile(dir=FILES.name, delete=False) as file:
        file.write(np.concatenate(samples).astype(np.int16).tobytes())
    none: list[str | None] = [None] * len(lengths)
    return Recordings(
        name="data.train",
        files=(file.name,),
        file=np.zeros(len(lengths), np.int64),
        places=2 * (np.cumsum(lengths) - lengths),
        lengths=np.array(lengths, np.int64),
        scales=np.full(len(lengths), 1 / 32768, np.float32),
        ids=[f"u{i}" for i in range(len(lengths))],
        texts=texts or none,
        labels=labels or none,
        reasons=none,
    )


def steps_of(source: SpeechBuckets, epoch: int = 0) -> list[dict[str, np.ndarray]]:
    size, count = source.batch_size, len(source)
    return [source.rows(range(at, at + size)) for at in range(epoch * count, (epoch + 1) * count, size)]


def heard(batch: dict[str, np.ndarray]) -> list[tuple[int, int, int]]:
    """Of each row that is no padding: the utterance, the remainder of its first sample, and its length."""
    rows = []
    for values, mask in zip(batch["input_values"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        if length:
            assert mask[:length].all() and not values[length:].any()
            numbers = np.rint(values[:length] * 32768).astype(int)
            utterance = int(numbers.min()) // 100
            rows.append((utterance, int(numbers[0]) - 100 * utterance, length))
            np.testing.assert_array_equal(numbers, 100 * utterance + (rows[-1][1] + np.arange(length)) % 97)
    return rows


LENGTHS = st.lists(st.integers(100, 12_000), min_size=1, max_size=40)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5), st.booleans(), st.sampled_from([None, 3, 4000, 9000]), st.integers(0, 2))
def test_each_utterance_once_an_epoch_and_few_shapes(
    lengths: list[int], size: int, by_samples: bool, longest: int | None, epoch: int
) -> None:
    source = SpeechBuckets(spoken(lengths), size, normalize=False, longest=longest, by_samples=by_samples, seed=3)
    assert isinstance(source, Rows) and len(source) % size == 0
    batches = steps_of(source, epoch)
    rows = [row for batch in batches for row in heard(batch)]
    assert sorted(row[0] for row in rows) == list(range(len(lengths)))
    for utterance, first, length in rows:
        cut = min(lengths[utterance], longest or lengths[utterance])
        assert length == cut and first == source.crop(utterance, epoch) % 97
        assert 0 <= source.crop(utterance, epoch) <= lengths[utterance] - cut
    shapes = {batch["input_values"].shape for batch in batches}
    widest = max(shape[1] for shape in shapes)
    assert len(shapes) <= 6 and widest <= max(min(n, longest or n) for n in lengths)
    most = -(-source.lengths[-1] // SAMPLE_STEP) * SAMPLE_STEP
    assert all(shape[0] * shape[1] <= size * most for shape in shapes)
    assert all(shape[0] == size for shape in shapes) or by_samples
    assert all(length % SAMPLE_STEP == 0 for length in source.lengths[:-1])
    assert all(low < high for low, high in pairwise(source.lengths))
    assert 0 < source.token_share() <= 1


def test_short_rows_come_in_larger_batches() -> None:
    source = SpeechBuckets(spoken([1600] * 100 + [16000] * 10), 2, normalize=False, seed=0)
    shapes = sorted(batch["input_values"].shape for batch in steps_of(source))
    assert shapes == [(2, 16000)] * 5 + [(20, 1600)] * 5
    rows = SpeechBuckets(spoken([1600] * 100 + [16000] * 10), 2, normalize=False, by_samples=False, seed=0)
    assert {batch["input_values"].shape for batch in steps_of(rows)} == {(2, 16000), (2, 1600)}


def make(seed: int | None = 1) -> SpeechBuckets:
    random = np.random.default_rng(0)
    lengths = random.integers(800, 9000, 60).tolist()
    targets = [random.integers(5, 32, length // 800).astype(np.int32) for length in lengths]
    return SpeechBuckets(spoken(lengths), 4, normalize=True, targets=targets, longest=6000, seed=seed)


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name])


def test_seeking_is_replaying_through_epochs() -> None:
    steps = 3 * len(make()) // 4
    replayed = list(batches(make(), 4, 0, steps))
    assert len(replayed) == steps
    for start in (1, steps // 2, steps - 1):
        for one, other in zip(replayed[start:], list(batches(make(), 4, start, steps - start)), strict=True):
            assert_equal(one, other)


def test_hosts_read_their_parts_of_the_same_batches() -> None:
    whole = list(batches(make(), 4, 2, 9))
    parts = [list(batches(make(), 4, 2, 9, rows)) for rows in np.split(np.arange(4), 2)]
    for step, batch in enumerate(whole):
        assert_equal(batch, {name: np.concatenate([part[step][name] for part in parts]) for name in batch})


def test_crops_are_drawn_anew_and_alike() -> None:
    one, two, other = make(), make(), make(seed=2)
    long = np.flatnonzero(one.recordings.lengths > 6000).tolist()
    drawn = np.array([[one.crop(i, epoch) for i in long] for epoch in range(50)])
    assert np.array_equal(drawn, [[two.crop(i, epoch) for i in long] for epoch in range(50)])
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], [other.crop(i, 0) for i in long])
    spare = one.recordings.lengths[long] - 6000
    shares = (drawn / np.maximum(spare, 1))[:, spare > 200]
    assert abs(shares.mean() - 0.5) < 0.05 and shares.min() < 0.05 and shares.max() > 0.95
    assert [make(seed=None).crop(i, 0) for i in long] == [0] * len(long)


def test_rows_are_normalised_as_a_whole_and_then_cropped() -> None:
    source, extractor = make(), Wav2Vec2FeatureExtractor(do_normalize=True)
    for index in (0, int(np.argmax(source.recordings.lengths))):
        batch = source._batch(np.array([index, -1]), 6000, epoch=1)
        whole = extractor(source.recordings.samples(index), sampling_rate=RATE)["input_values"][0]
        first, length = source.crop(index, 1), min(len(whole), 6000)
        np.testing.assert_array_equal(batch["input_values"][0, :length], whole[first : first + length])
        assert not batch["input_values"][0, length:].any() and not batch["input_values"][1].any()
        assert batch["attention_mask"].sum(axis=1).tolist() == [length, 0]


def test_labels_go_with_their_rows() -> None:
    lengths = [1600, 8000, 1500, 7000, 3000]
    ids = [np.arange(1, n + 1, dtype=np.int32) for n in (9, 3, 2, 5, 1)]
    source = SpeechBuckets(spoken(lengths), 2, normalize=False, targets=ids, seed=0)
    for batch in steps_of(source):
        for row, labels in zip(heard(batch), batch["labels"], strict=False):
            assert labels.dtype == np.int32 and len(labels) % 8 == 0
            assert labels[labels != IGNORED].tolist() == ids[row[0]].tolist()
    assert (source._batch(np.array([-1]), 8000, 0)["labels"] == IGNORED).all()
    classes = np.array([4, 3, 2, 1, 0], np.int32)
    for batch in steps_of(SpeechBuckets(spoken(lengths), 2, normalize=False, targets=classes, seed=0)):
        for row, label in zip(heard(batch), batch["labels"], strict=False):
            assert label == classes[row[0]]
    assert "labels" not in SpeechBuckets(spoken(lengths), 2, normalize=False).rows([0, 1])


@settings(deadline=None)
@given(LENGTHS, st.data())
def test_labels_have_as_few_shapes_as_rows(lengths: list[int], data: st.DataObject) -> None:
    ids = [np.ones(data.draw(st.integers(0, 30)), np.int32) for _ in lengths]
    source = SpeechBuckets(spoken(lengths), 2, normalize=False, targets=ids, seed=0)
    shapes = {(batch["input_values"].shape, batch["labels"].shape) for batch in steps_of(source)}
    assert len({shape for shape, _ in shapes}) == len(shapes) <= 6


def test_an_evaluation_reads_each_once_in_the_order_of_the_file_within_a_length() -> None:
    source = SpeechBuckets(spoken([800] * 7 + [8000] * 4), 2, normalize=False, by_samples=False)
    rows = [row[0] for batch in one_pass(source, 2) for row in heard(batch)]
    assert sorted(rows) == list(range(11)) and rows == sorted(rows)


def test_unusable_utterances_are_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    letters = Characters.of_texts(["AB C"])
    texts = ["AB", "A B", "ABX", "a€", None, " ", "ABC", "ABBA", "AC", "C"]
    lengths = [3200, 3200, 3200, 3200, 3200, 3200, 100, 1600, 48_000, 40_000]
    found = spoken(lengths, texts)
    with caplog.at_level(logging.WARNING, "jaxptm"):
        kept = usable(found, DATA, vocabulary=letters, frames=lambda samples: samples // 400)
    assert kept.ids == ["u0", "u1"]
    assert caplog.messages == [
        "data.train: 8 of 10 utterances are unusable: 2 with characters outside the vocabulary 'X' '€' (u2, u3); "
        "2 without a transcript (u4, u5); 2 longer than data.max_seconds: 2 (u8, u9); "
        "1 shorter than data.min_seconds: 0.1 (u6); 1 too short for the transcript (u7)."
    ]
    assert [ids.tolist() for ids in transcripts(kept, letters)] == [[5, 6], [5, 4, 6]]
    # ABBA takes four frames, and one more between the two Bs.
    just = usable(spoken([1600, 1600], ["ABBA", "ABCA"]), DATA, vocabulary=letters, frames=lambda samples: 4)
    assert just.ids == ["u1"]
    refusing = DATA.model_copy(update={"unusable": "error"})
    with pytest.raises(JaxptmError, match=r"u9\).*; mend or remove them, or set data\.unusable: skip"):
        usable(found, refusing, vocabulary=letters)
    assert usable(spoken([3200]), refusing).ids == ["u0"]
    with pytest.raises(JaxptmError, match=r"3 of 3 utterances are unusable: 3 longer than .*; nothing is left\."):
        usable(spoken([33_000] * 3), DATA)
    assert len(usable(spoken([33_000] * 3), DATA, crop=True)) == 3


def test_labels_that_are_not_to_be_learned(caplog: pytest.LogCaptureFixture) -> None:
    found = spoken([3200] * 5, labels=["yes", None, "no", "perhaps", "no"])
    with caplog.at_level(logging.WARNING, "jaxptm"):
        assert usable(found, DATA, labels=["no", "yes"]).ids == ["u0", "u2", "u4"]
    assert "1 without a label (u1); 1 with a label that is not one of those to learn (u3)" in caplog.text


def test_opening_everything(tmp_path: Path) -> None:
    for name, seconds in {"a": 0.2, "b": 0.3, "c": 5.0}.items():
        write_audio(tmp_path / "train" / "yes" / f"{name}.wav", tone(seconds))
        write_audio(tmp_path / "eval" / "no" / f"{name}.wav", tone(seconds))
    for part in ("train/yes", "eval/no"):
        (tmp_path / part / "m.tsv").write_text("a.wav\tOne\nb.wav\tno, ten\nc.wav\tnote\n")
    manifests = {split: str(tmp_path / part / "m.tsv") for split, part in (("train", "train/yes"), ("eval", "eval/no"))}
    data = AudioData(**manifests, vocabulary="characters", max_seconds=2.0, ignore_characters=",")
    prepare_audio(data, tmp_path / "prepared", workers=1)
    speech = open_speech(data, tmp_path / "prepared")
    assert speech.held_out is not None and speech.vocabulary is not None and speech.labels is None
    assert speech.train.ids == speech.held_out.ids == ["a", "b"]
    assert sorted(speech.vocabulary.ids) == [" ", "E", "N", "O", "T"]
    folders = AudioData(train=str(tmp_path / "train"), eval=str(tmp_path / "eval"), max_seconds=2.0)
    prepare_audio(folders, tmp_path / "folders", workers=1)
    with pytest.raises(
        JaxptmError, match=r"data\.eval: 3 of 3 utterances are unusable: .*2 with a label that is not one"
    ):
        open_speech(folders, tmp_path / "folders", labelled=True)
    labelled = folders.model_copy(update={"eval": None, "eval_fraction": 0.5})
    speech = open_speech(labelled, tmp_path / "folders", labelled=True, crop=True)
    assert speech.labels == ["yes"] and speech.held_out is not None
    assert sorted([*speech.train.ids, *speech.held_out.ids]) == ["a", "b", "c"]
