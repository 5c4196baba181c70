"""What is said in recordings, against the pipelines of transformers on perturbed models of both styles."""

from __future__ import annotations

import json
import re
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
from jaxptm.types import JaxptmError

VOCABULARY = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEF"])}


def opened(directory: Path, style: str, task: str = "ctc") -> tuple[Any, Any]:
    """Our pipeline and theirs over one model, whose frames are 20 samples apart."""
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
        theirs.save_pretrained(directory)
        (directory / "vocab.json").write_text(json.dumps(VOCABULARY))
        transformers.Wav2Vec2CTCTokenizer(str(directory / "vocab.json")).save_pretrained(directory)
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
        assert ours(audio, **options)["text"] == theirs(audio.copy(), **options)["text"], options


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
        (np.zeros(900, np.float32), {"language_model": "none.arpa"}, "none.arpa: there is no such file|pip install"),
    ],
)
def test_what_cannot_be_heard(tmp_path: Path, given: Any, options: dict[str, Any], message: str) -> None:
    ours, _ = opened(tmp_path, "base")
    with pytest.raises(JaxptmError, match=message):
        ours(given, **options)
