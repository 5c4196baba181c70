"""Audio of any kind that libsndfile reads, as models hear it: 16 kHz, mono, float32."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxptm.config import RATE
from jaxptm.errors import JaxptmError

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64", ".rf64", ".sph")
"""What a folder is searched for."""
BLOCK = 2**20
"""Frames that are decoded at once: a header that lies must not make anyone ask for its terabytes."""
UNTOLD = 0x7FFF0000
"""Bytes that a WAV header claims where a stream's writer could not know: this or more (sox, ffmpeg)."""

_LIE = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)


class BadAudio(Exception):
    """What an utterance is that cannot be used (`damaged or cut off`): a reason that many may share."""


def decode(source: str | Path | bytes) -> Float32[np.ndarray, " T"]:
    """Reads a file, or the bytes of one, mixes its channels evenly, and resamples it to `RATE`.

    Returns:
        Samples where full scale is 1. 16-bit audio at 16 kHz comes as its integers / 32768, exactly.

    Raises:
        BadAudio: it is no audio, is damaged, has no samples or some that are no finite number, or its header promises
            more or fewer of them than there are.
        OSError: the file cannot be read, which says nothing about what it holds.
    """
    import soundfile

    if not isinstance(source, bytes):
        try:
            source = Path(source).read_bytes()
        except FileNotFoundError:
            raise BadAudio("not there") from None
        except IsADirectoryError:
            raise BadAudio("a directory") from None
    if not source:
        raise BadAudio("an empty file")
    try:
        with soundfile.SoundFile(io.BytesIO(source)) as file:
            rate, promised, header = file.samplerate, file.frames, file.extra_info
            if promised > 2**62:
                raise BadAudio("without a header that tells its length")
            blocks = []
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32))
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        unknown = "unrecognised" in str(error) or "not recognised" in str(error)
        reason = "no audio that libsndfile knows" if unknown else "damaged or cut off"
        raise BadAudio(reason) from error
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    lie = _LIE.search(header)
    if len(samples) != promised or (lie is not None and int(lie[1]) < UNTOLD):
        raise BadAudio("with a header that promises another length")
    samples = resample(samples, rate)
    if not len(samples):
        raise BadAudio("without samples")
    if not np.isfinite(samples).all():
        raise BadAudio("with samples that are NaN or infinite")
    return samples


def resample(samples: Float32[np.ndarray, " S"], rate: int) -> Float32[np.ndarray, " T"]:
    """From `rate` samples a second to `RATE`, by soxr at its high quality (errors below those of 16-bit samples)."""
    if rate == RATE or not len(samples):
        return samples
    import soxr

    return soxr.resample(samples, rate, RATE)


def normalized(samples: Float32[np.ndarray, " T"]) -> Float32[np.ndarray, " T"]:
    """Zero mean and unit variance (`zero_mean_unit_var_norm` of transformers' Wav2Vec2FeatureExtractor)."""
    return (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)


@dataclass(frozen=True)
class Preprocessor:
    """What a checkpoint does to audio before it hears it.

    Attributes:
        do_normalize: each utterance to zero mean and unit variance.
        return_attention_mask: whether the model is told which samples are padding. Models that normalise over time
            (group norm) are not; theirs is silence.
    """

    do_normalize: bool = True
    return_attention_mask: bool = False

    @classmethod
    def load(cls, directory: str | Path) -> Preprocessor:
        """What a checkpoint says; where it says nothing, transformers' defaults hold.

        Raises:
            JaxptmError: see `find`.
        """
        return cls.find(directory) or cls()

    @classmethod
    def find(cls, directory: str | Path) -> Preprocessor | None:
        """What a checkpoint says, or None where it says nothing.

        It stands in processor_config.json under `feature_extractor`, where the processors of transformers 5 keep it, or
        else in preprocessor_config.json (transformers, feature_extraction_utils.py, `get_feature_extractor_dict`).

        Raises:
            JaxptmError: the file is damaged, or asks for another rate than 16 kHz or for more than one channel.
        """
        path = Path(directory) / "processor_config.json"
        fields = _fields(path).get("feature_extractor") if path.exists() else None
        if fields is None:
            path = Path(directory) / "preprocessor_config.json"
            if not path.exists():
                return None
            fields = _fields(path)
        if not isinstance(fields, dict):
            raise JaxptmError(f"{path}: `feature_extractor` is no JSON object.")
        rate, features = fields.get("sampling_rate", RATE), fields.get("feature_size", 1)
        if (rate, features, fields.get("padding_value", 0.0)) != (RATE, 1, 0.0):
            raise JaxptmError(
                f"{path}: asks for {features} value(s) at {rate} Hz; jaxptm hears one channel at {RATE} Hz, padded "
                "with zeros."
            )
        return cls(bool(fields.get("do_normalize", True)), bool(fields.get("return_attention_mask", False)))

    def save(self, directory: str | Path) -> None:
        """Writes the file that transformers reads."""
        fields = {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "sampling_rate": RATE,
            "padding_side": "right",
            "padding_value": 0.0,
            "do_normalize": self.do_normalize,
            "return_attention_mask": self.return_attention_mask,
        }
        path = Path(directory) / "preprocessor_config.json"
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    def __call__(self, audio: Sequence[Float32[np.ndarray, " _"]]) -> dict[str, np.ndarray]:
        """`input_values` [B, T] and, where the model is told, `attention_mask` [B, T], as transformers pads a batch.

        There, a model that is not told of padding has it normalised along with the utterance; to keep the rows of a
        batch what they are alone, give them one by one.
        """
        lengths = [len(samples) for samples in audio]
        values = np.zeros((len(audio), max(lengths)), np.float32)
        mask = np.zeros(values.shape, np.int32)
        for row, samples in enumerate(audio):
            values[row, : len(samples)] = samples
            mask[row, : len(samples)] = 1
        if self.do_normalize:
            for row, length in enumerate(lengths):
                heard = values[row, : length if self.return_attention_mask else None]
                heard[:] = normalized(heard)
        return {"input_values": values} | ({"attention_mask": mask} if self.return_attention_mask else {})


def _fields(path: Path) -> dict[str, Any]:
    """The JSON object of a file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JaxptmError(f"{path}: is no JSON object: {error}.") from error
    if not isinstance(fields, dict):
        raise JaxptmError(f"{path}: is no JSON object.")
    return fields
