"""What is said in recordings, against the pipelines of transformers on perturbed models of both styles."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import speech
import torch
import transformers
from pipeline_pairs import assert_close

import jaxptm
from jaxptm.pipelines.asking import ask, read_inputs
from jaxptm.speech import score_transcripts
from jaxptm.types import JaxptmError

VOCABULARY = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEF")
FIELD = 30
"""Samples that a frame sees; frames are 20 samples apart."""


def opened(
    directory: Path,
    style: str,
    task: str = "ctc",
    vocabulary: Sequence[str] = VOCABULARY,
    never: Sequence[int] = (),
    **tokenizer: Any,
) -> tuple[Any, Any]:
    """Our pipeline and theirs over one model, which has 11 symbols and says some of them `never`."""
    theirs = speech.saved(directory, task, noise=0.3, **speech.STYLES[style])
    large = style == "large"
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=large)
    extractor.save_pretrained(directory)
    kind = "automatic-speech-recognition" if task == "ctc" else "audio-classification"
    if task == "ctc":
        with torch.no_grad():  # or one symbol is the likeliest in nearly all frames
            logits = torch.cat([theirs(torch.tensor(samples)[None]).logits[0] for samples in recordings(10)])
            theirs.lm_head.weight.div_(logits.std(0)[:, None])
            theirs.lm_head.bias.sub_(logits.mean(0)).div_(logits.std(0))
            theirs.lm_head.bias[list(never)] = -100
        theirs.save_pretrained(directory)
        path = directory / "vocab.json"
        path.write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        transformers.Wav2Vec2CTCTokenizer(str(path), **tokenizer).save_pretrained(directory)
    return jaxptm.pipeline(kind, directory), transformers.pipeline(kind, str(directory), device="cpu")


def recordings(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=int(n)).astype(np.float32) for n in rng.integers(60, 4000, count)]


@pytest.mark.parametrize("style", speech.STYLES)
def test_transcripts_and_times_are_those_of_transformers(style: str, tmp_path: Path) -> None:
    ours, theirs = opened(tmp_path, style)
    audio = recordings(60)
    found = ours(audio)
    assert found == [theirs(samples.copy()) for samples in audio]
    assert len({answer["text"] for answer in found}) > 30 and any(" " in answer["text"] for answer in found)
    for times in ("word", "char"):
        for mine, samples in zip(ours(audio[:20], return_timestamps=times), audio, strict=False):
            other = theirs(samples.copy(), return_timestamps=times)
            assert mine["text"] == other["text"]
            # Of characters, transformers also tells the spaces.
            wanted = [chunk for chunk in other["chunks"] if chunk["text"].strip()]
            got = [chunk for chunk in mine["chunks"] if chunk["text"].strip()]
            assert [chunk["text"] for chunk in got] == [chunk["text"] for chunk in wanted]
            for one, two in zip(got, wanted, strict=True):
                assert one["timestamp"] == pytest.approx(two["timestamp"])


def test_long_recordings_are_heard_in_windows(tmp_path: Path) -> None:
    ours, theirs = opened(tmp_path, "base")
    (audio,) = [np.random.default_rng(5).normal(size=9000).astype(np.float32)]
    for options in ({"chunk_length_s": 0.12}, {"chunk_length_s": 0.1, "stride_length_s": (0.02, 0.01)}):
        for length in (FIELD, FIELD + 1, 1600, 1601, 1600 + FIELD, 9000):
            samples = audio[:length]
            assert ours(samples, **options)["text"] == theirs(samples.copy(), **options)["text"], (options, length)
    for length in range(FIELD, 400):  # theirs fails at ends that make no frame
        windows = [window for window, _, _ in ours._windows(audio[:length], 0.01, 0)]
        assert min(map(len, windows)) >= FIELD
        np.testing.assert_array_equal(np.concatenate(windows), audio[:length])


@pytest.mark.parametrize(
    ("vocabulary", "never", "tokenizer"),
    [
        (VOCABULARY[:-1], [3], {}),  # theirs takes a symbol without a name and <unk> beside it for one
        (("<pad>", "<unk>", "|", *"ABCDEFGH"), [1], {}),
        ((*VOCABULARY[:-1], "CH"), [1, 2, 3], {"do_lower_case": True}),
    ],
    ids=["fewer", "special_tokens_put_behind", "several_characters_in_lower_case"],
)
def test_vocabularies_are_written_and_scored_alike(
    tmp_path: Path, vocabulary: Sequence[str], never: list[int], tokenizer: dict[str, Any]
) -> None:
    ours, theirs = opened(tmp_path, "base", vocabulary=vocabulary, never=never, **tokenizer)
    audio = recordings(30)
    texts = [theirs(samples.copy())["text"] for samples in audio]
    assert [answer["text"] for answer in ours(audio)] == texts
    assert any(("<unk>" if len(vocabulary) < 11 else ours.characters.decoded(vocabulary[-1])) in text for text in texts)
    for answer, text in zip(ours(audio, return_timestamps="char"), texts, strict=True):
        assert "".join(chunk["text"] for chunk in answer["chunks"]).strip() == text
    paths = [logits.argmax(-1) for logits in ours._logits(audio, 8)]
    right = [re.sub("<[^>]*>", "", text) for text in texts]  # special tokens spell nothing
    assert score_transcripts({"path": paths}, characters=ours.characters, texts=right) == {"wer": 0, "cer": 0}


def test_a_vocabulary_that_the_model_cannot_write_is_refused(tmp_path: Path) -> None:
    message = r"vocab\.json: has 12 entries, and .* tells 11 apart; put there the one it was trained with"
    for vocabulary in ((*VOCABULARY, "G"), (*VOCABULARY[1:], "G", "<pad>")):
        with pytest.raises(JaxptmError, match=message):
            opened(tmp_path, "base", vocabulary=vocabulary)


def test_the_class_of_a_recording(tmp_path: Path) -> None:
    ours, theirs = opened(tmp_path, "large", "sequence-classification")
    audio = recordings(30)
    assert_close(ours(audio), [theirs(samples.copy()) for samples in audio])
    assert_close(ours(audio[0], top_k=1), theirs(audio[0].copy(), top_k=1))


def test_files_bytes_and_other_rates(tmp_path: Path) -> None:
    ours, _ = opened(tmp_path, "base")
    samples = (0.1 * np.sin(np.arange(3000) / 9)).astype(np.float32)
    path = tmp_path / "a.wav"
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    wanted = ours(samples)
    assert ours(path) == ours(str(path)) == ours(path.read_bytes()) == wanted
    assert ours({"array": samples, "sampling_rate": 16000}) == wanted
    assert isinstance(ours({"raw": samples[::2].copy(), "sampling_rate": 8000})["text"], str)
    (answer,) = ask(
        "automatic-speech-recognition", tmp_path, read_inputs("automatic-speech-recognition", [str(path)]), {}
    )
    assert answer.output == wanted and answer.lines[0].endswith(wanted["text"])


def test_a_beam_finds_what_is_likelier_over_all_alignments(tmp_path: Path) -> None:
    ours, _ = opened(tmp_path, "base")
    audio = recordings(4)
    for narrow, wide in zip(ours(audio), ours(audio, beam_width=20, return_timestamps="word"), strict=True):
        assert isinstance(wide["text"], str) and wide["chunks"] is not None and narrow["text"] is not None
        assert " ".join(chunk["text"] for chunk in wide["chunks"]) == wide["text"]


class OneOf:
    """A language model of texts of one word."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def start(self) -> int:
        return 0

    def word(self, state: int, word: str) -> tuple[float, int]:
        return (0.0 if state == 0 and word in self.words else -1e6), state + 1

    def end(self, state: int) -> float:
        return 0.0 if state == 1 else -1e6


def test_an_own_language_model_leaves_its_words_alone(tmp_path: Path) -> None:
    ours, _ = opened(tmp_path, "base")
    audio = [samples[:100] for samples in recordings(40) if len(samples) > 100][:12]  # few frames, so few transcripts
    words = OneOf("A", "B", "C")
    answers = ours(audio, language_model=words, beam_width=500)
    found = {re.sub("<[^>]*>", "", answer["text"]).strip() for answer in answers}  # what is no character spells nothing
    assert len(found) > 1 and found <= {*words.words}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("none.wav", {}, "none.wav: is not there"),
        (b"no audio at all", {}, "the audio: is no audio that libsndfile knows"),
        (np.zeros(10, np.float32), {}, "the audio has 10 samples, the model needs"),
        (np.zeros((2, 900), np.float32), {}, "give a float array"),
        (np.full(900, np.nan, np.float32), {}, "NaN or infinite"),
        (np.zeros(900, np.float32), {"chunk_length_s": 0.01, "stride_length_s": 0.02}, "leaves nothing between"),
        (
            np.zeros(900, np.float32),
            {"chunk_length_s": 0.001},
            "chunk_length_s 0.001 is 20 samples, the model needs 30",
        ),
        (np.zeros(900, np.float32), {"batch_size": 0}, "batch_size is 0, expected at least 1"),
        (np.zeros(900, np.float32), {"batch_size": -1}, "batch_size is -1, expected at least 1"),
        (np.zeros(900, np.float32), {"language_model": "none.arpa"}, "none.arpa: there is no such file|pip install"),
    ],
)
def test_what_cannot_be_heard(tmp_path: Path, given: Any, options: dict[str, Any], message: str) -> None:
    ours, _ = opened(tmp_path, "base")
    with pytest.raises(JaxptmError, match=message):
        ours(given, **options)
