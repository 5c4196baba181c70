"""Small audio for the tests: tones of known length, written by soundfile."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0, loud: float = 0.5) -> np.ndarray:
    """A sine, float32 [T]."""
    return (loud * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_audio(path: Path, samples: np.ndarray, rate: int = 16_000, **options: str) -> Path:
    """Writes a file of the kind that its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **options)
    return path


def encoded(samples: np.ndarray, kind: str, rate: int = 16_000) -> bytes:
    """The content of a file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


def damaged(directory: Path) -> dict[str, str]:
    """Writes files that nobody can use; their names, and the reason that is told for each."""
    directory.mkdir(parents=True, exist_ok=True)
    good = encoded(tone(0.5), "WAV")
    flac = encoded(tone(0.5), "FLAC")
    mp3 = encoded(tone(1.0), "MP3")
    holes = tone(0.5)
    holes[100] = np.nan
    endless = tone(0.5)
    endless[7] = np.inf
    write_audio(directory / "nan.wav", holes, subtype="FLOAT")
    write_audio(directory / "infinite.wav", endless, subtype="FLOAT")
    write_audio(directory / "none.wav", tone(0))
    claims = bytearray(good)
    claims[40:44] = (10**8).to_bytes(4, "little")
    huge = bytearray(flac)
    huge[21] |= 0x0F  # 2**36 - 1 samples, or 256 GiB of floats
    huge[22:26] = b"\xff" * 4
    contents = {
        "text.wav": b"this is no audio at all, whatever its name says. " * 20,
        "empty.flac": b"",
        "cut.wav": good[: len(good) // 2],
        "cut.flac": flac[: len(flac) // 2],
        "cut.mp3": mp3[: len(mp3) // 2],
        "claims.wav": bytes(claims),
        "huge.flac": bytes(huge),
    }
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return {
        "text.wav": "no audio that libsndfile knows",
        "empty.flac": "an empty file",
        "none.wav": "without samples",
        "nan.wav": "with samples that are NaN or infinite",
        "infinite.wav": "with samples that are NaN or infinite",
        "cut.wav": "with a header that promises another length",
        "claims.wav": "with a header that promises another length",
        "cut.mp3": "with a header that promises another length",
        "cut.flac": "damaged or cut off",
        "huge.flac": "damaged or cut off",
    }
