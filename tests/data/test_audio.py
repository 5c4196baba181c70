"""Audio in: against soundfile, an analytic sine and transformers' feature extractor; and all that is no audio."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from recorded import damaged, encoded, tone, write_audio
from transformers import AutoFeatureExtractor, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from jaxptm.config import RATE
from jaxptm.data.audio import BadAudio, Preprocessor, decode, normalized, resample
from jaxptm.errors import JaxptmError


@pytest.mark.parametrize("suffix", ["wav", "flac", "aiff", "au", "caf"])
def test_lossless_audio_comes_exactly(tmp_path: Path, suffix: str) -> None:
    integers = np.random.default_rng(0).integers(-(2**15), 2**15, 5000).astype(np.int16)
    integers[:2] = -(2**15), 2**15 - 1
    path = write_audio(tmp_path / f"a.{suffix}", integers)
    for source in (path, str(path), path.read_bytes()):
        samples = decode(source)
        assert samples.dtype == np.float32
        np.testing.assert_array_equal(samples, integers / np.float32(32768))


@pytest.mark.parametrize(
    ("suffix", "options"), [("ogg", {}), ("mp3", {}), ("opus", {"format": "OGG", "subtype": "OPUS"})]
)
def test_lossy_audio_is_what_soundfile_reads(tmp_path: Path, suffix: str, options: dict[str, str]) -> None:
    path = write_audio(tmp_path / f"a.{suffix}", tone(1.0), **options)
    samples = decode(path)
    expected, rate = soundfile.read(path, dtype="float32")
    assert rate == RATE and len(samples) == len(expected) == RATE
    np.testing.assert_allclose(samples, expected, atol=2**-22)  # mpg123 rounds by the place of its buffer
    assert np.abs(samples - tone(1.0))[2000:-2000].max() < 0.05


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_mixed_evenly(tmp_path: Path, channels: int) -> None:
    parts = np.stack([tone(0.3, hertz=200 * (i + 1)) for i in range(channels)], axis=1)
    path = write_audio(tmp_path / "a.wav", parts, subtype="FLOAT")
    np.testing.assert_allclose(decode(path), parts.mean(axis=1, dtype=np.float64), atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 11_025, 12_345, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_a_sine(rate: int) -> None:
    """Against the sine itself at 16 kHz; the ends, where the filter reaches beyond the signal, are left out."""
    resampled = resample(tone(1.0, rate, 1000.0), rate)
    assert abs(len(resampled) - RATE) <= 1
    middle = slice(1000, RATE - 1000)
    np.testing.assert_allclose(resampled[middle], tone(1.0, RATE, 1000.0)[middle], atol=2**-15)


def test_resampling_lets_nothing_fold_back() -> None:
    """A tone of 10 kHz is above what 16 kHz can hold, and would come back as one of 6 kHz."""
    assert np.abs(resample(tone(1.0, 48_000, 10_000.0), 48_000))[1000:-1000].max() < 2**-15


def test_stereo_and_odd_rates_together(tmp_path: Path) -> None:
    both = np.stack([tone(1.0, 44_100, 300.0)] * 2, axis=1)
    samples = decode(write_audio(tmp_path / "a.flac", both, 44_100))
    np.testing.assert_allclose(samples[1000:-1000], tone(1.0, RATE, 300.0)[1000:-1000], atol=2**-13)


def test_what_is_no_audio_says_why(tmp_path: Path) -> None:
    for name, reason in damaged(tmp_path).items():
        with pytest.raises(BadAudio, match=rf"^{reason}$"):
            decode(tmp_path / name)
    with pytest.raises(BadAudio, match="not there"):
        decode(tmp_path / "absent.wav")
    with pytest.raises(BadAudio, match="a directory"):
        decode(tmp_path)


def test_a_stream_that_could_not_know_its_length_is_read() -> None:
    content = bytearray(encoded(tone(0.5), "WAV"))
    content[40:44] = b"\xff" * 4
    assert len(decode(bytes(content))) == RATE // 2


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["WAV", "FLAC", "OGG", "MP3"]), st.integers(0, 3000))
def test_any_bytes_are_audio_or_refused(noise: bytes, kind: str, at: int) -> None:
    content = bytearray(encoded(tone(0.1), kind))
    content[at : at + len(noise)] = noise
    try:
        samples = decode(bytes(content))
    except BadAudio:
        return
    assert len(samples) and np.isfinite(samples).all()


@settings(deadline=None)
@given(arrays.arrays(np.float32, st.integers(1, 400), elements=st.floats(-1, 1, width=32)))
def test_normalized_is_what_transformers_does(samples: np.ndarray) -> None:
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    np.testing.assert_array_equal(normalized(samples), extractor(samples, sampling_rate=RATE)["input_values"][0])


@pytest.mark.parametrize("do_normalize", [True, False])
@pytest.mark.parametrize("return_attention_mask", [True, False])
def test_padded_rows_are_those_of_transformers(tmp_path: Path, do_normalize: bool, return_attention_mask: bool) -> None:
    extractor = Wav2Vec2FeatureExtractor(do_normalize=do_normalize, return_attention_mask=return_attention_mask)
    extractor.save_pretrained(tmp_path)
    preprocessor = Preprocessor.load(tmp_path)
    assert preprocessor == Preprocessor(do_normalize, return_attention_mask)
    random = np.random.default_rng(0)
    audio = [(0.1 * random.normal(size=length) + 0.2).astype(np.float32) for length in (400, 1234, 3, 1000)]
    expected = extractor(audio, sampling_rate=RATE, padding=True, return_tensors="np")
    found = preprocessor(audio)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == values.dtype
    (tmp_path / "ours").mkdir()
    preprocessor.save(tmp_path / "ours")
    assert Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "ours").to_dict() == extractor.to_dict()


def test_processors_of_transformers_are_read(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3}))
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    Wav2Vec2Processor(extractor, Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert Preprocessor.load(tmp_path) == Preprocessor(False, True)
    Preprocessor(True, False).save(tmp_path)  # of both files they and we read one
    both = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert Preprocessor.load(tmp_path) == Preprocessor(both.do_normalize, both.return_attention_mask)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"processor_class": "Wav2Vec2Processor"}))  # of transformers 4
    assert Preprocessor.load(tmp_path) == Preprocessor(True, False)
    path.write_text(json.dumps({"feature_extractor": {"sampling_rate": 8000}}))
    with pytest.raises(JaxptmError, match=r"/processor_config.json: asks for 1 value\(s\) at 8000 Hz"):
        Preprocessor.load(tmp_path)
    path.write_text(json.dumps({"feature_extractor": "mine"}))
    with pytest.raises(JaxptmError, match=r"/processor_config.json: `feature_extractor` is no JSON object"):
        Preprocessor.load(tmp_path)


def test_preprocessors_that_hear_otherwise_are_refused(tmp_path: Path) -> None:
    assert Preprocessor.load(tmp_path) == Preprocessor() and Preprocessor.find(tmp_path) is None
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"sampling_rate": 8000}))
    with pytest.raises(JaxptmError, match=r"preprocessor_config.json: asks for 1 value\(s\) at 8000 Hz"):
        Preprocessor.load(tmp_path)
    for content in ("[", "[]"):
        path.write_text(content)
        with pytest.raises(JaxptmError, match=r"/preprocessor_config.json: is no JSON object"):
            Preprocessor.load(tmp_path)


def test_real_recordings(shared_data: Path) -> None:
    """44.1 kHz stereo, and LibriSpeech, whose integers come as they are."""
    president = decode(shared_data / "speech" / "misc" / "jfk.flac")
    assert len(president) == 11 * RATE and 0.1 < np.abs(president).max() <= 1
    path = next((shared_data / "speech" / "LibriSpeech").rglob("*.flac"))
    integers, rate = soundfile.read(path, dtype="int16")
    assert rate == RATE
    np.testing.assert_array_equal(decode(path), integers / np.float32(32768))
