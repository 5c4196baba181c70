"""Speech: what is said in a recording, and of which class it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32
from scipy.special import log_softmax, softmax

from jaxptm.config import RATE
from jaxptm.data.audio import BadAudio, decode, resample
from jaxptm.data.characters import Characters
from jaxptm.nn.audio_config import AudioConfig
from jaxptm.pipelines.base import Pipeline, check_batch_size
from jaxptm.pretrained import Model
from jaxptm.speech import Listener, check_outputs
from jaxptm.transcription import KenLm, LanguageModel, Span, WordScoring, align, beam_search, best_path
from jaxptm.types import JaxptmError

Audio = str | os.PathLike[str] | bytes | np.ndarray | Mapping[str, Any]
"""A file, its bytes, samples at 16 kHz, or {"array" or "raw": samples, "sampling_rate"}."""
SAMPLE_STEP = RATE // 2
"""Inputs are padded to a multiple of this, so that few shapes are compiled."""


class SpeechPipeline(Pipeline):
    """What pipelines of audio share."""

    fields = ("audio",)
    reads_files = True

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        if model.source is None:
            raise JaxptmError("the model came from no directory, which would say how it hears.")
        self.listener = Listener.load(model.source, writes=self.task == "ctc")

    @property
    def config(self) -> AudioConfig:
        assert isinstance(self.model.config, AudioConfig)
        return self.model.config

    def _recordings(self, inputs: Audio | Sequence[Audio]) -> tuple[list[np.ndarray], bool]:
        """The samples of each, and whether one alone was given."""
        if isinstance(inputs, str | os.PathLike | bytes | np.ndarray | Mapping):
            return [self._samples(inputs)], True
        return [self._samples(audio) for audio in inputs], False

    def _samples(self, audio: Audio) -> Float32[np.ndarray, " T"]:
        rate = RATE
        if isinstance(audio, Mapping):
            samples = audio.get("array", audio.get("raw"))
            rate = int(audio.get("sampling_rate", RATE))
        elif isinstance(audio, np.ndarray):
            samples = audio
        else:
            try:
                samples = decode(audio if isinstance(audio, bytes) else Path(audio))
            except (BadAudio, OSError) as error:
                where = "the audio" if isinstance(audio, bytes) else str(audio)
                raise JaxptmError(f"{where}: is {error}.") from error
        if not isinstance(samples, np.ndarray) or samples.ndim != 1 or samples.dtype.kind != "f":
            raise JaxptmError("samples: give a float array [samples] of one channel.")
        samples = resample(samples.astype(np.float32), rate)
        if len(samples) < self.config.receptive_field:
            raise JaxptmError(f"the audio has {len(samples)} samples, the model needs {self.config.receptive_field}.")
        if not np.isfinite(samples).all():
            raise JaxptmError("the audio holds NaN or infinite samples.")
        return samples

    def _logits(self, rows: Sequence[np.ndarray], batch_size: int) -> list[np.ndarray]:
        """Of each recording, as it is heard alone; several at once, of similar lengths."""
        check_batch_size(batch_size)
        order = np.argsort([len(row) for row in rows], kind="stable").tolist()
        results: dict[int, np.ndarray] = {}
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            longest = -(-len(rows[chosen[-1]]) // SAMPLE_STEP) * SAMPLE_STEP
            heard = [self.listener.preprocessor([rows[at]])["input_values"][0] for at in chosen]
            heard += [heard[0]] * ((1 << (len(chosen) - 1).bit_length()) - len(chosen))
            values = np.stack([np.pad(samples, (0, longest - len(samples))) for samples in heard])
            logits = self.model(input_values=values, lengths=np.array([len(samples) for samples in heard]))["logits"]
            for at, found in zip(chosen, np.asarray(logits), strict=False):
                results[at] = found[: self.config.frames(len(rows[at]))] if self.task == "ctc" else found
        return [results[at] for at in range(len(rows))]


class SpeechRecognition(SpeechPipeline):
    """Writes what is said: `transformers.pipeline("automatic-speech-recognition")`."""

    task = "ctc"

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        check_outputs(self.characters, model, f"{model.source}/vocab.json", "put there the one it was trained with")

    @property
    def characters(self) -> Characters:
        assert self.listener.characters is not None
        return self.listener.characters

    def __call__(
        self,
        inputs: Audio | Sequence[Audio],
        *,
        return_timestamps: Literal["char", "word"] | None = None,
        chunk_length_s: float = 0,
        stride_length_s: float | Sequence[float] | None = None,
        beam_width: int = 0,
        language_model: str | os.PathLike[str] | LanguageModel | None = None,
        language_model_weight: float = 0.5,
        word_bonus: float = 1.0,
        batch_size: int = 8,
    ) -> Any:
        """The transcript of each recording.

        Args:
            inputs: a recording or several: a file, its bytes, samples [T] at 16 kHz, or {"array", "sampling_rate"}.
            return_timestamps: also say when each word or character is said.
            chunk_length_s: listen to long recordings in windows of so many seconds; 0 for the whole at once.
            stride_length_s: of a window, what is heard on its left and right and not written; default a sixth each.
            beam_width: transcripts that a prefix beam search keeps; 0 writes the likeliest symbol of each frame.
            language_model: of words as they are written, for the beam, whose width is then 50 by default: an n-gram
                model (a file, ARPA or KenLM), or an object with the methods of `jaxptm.transcription.LanguageModel`.
            language_model_weight: of its log probability.
            word_bonus: for each word, against the model's liking for few.
            batch_size: windows that run at once.

        Returns:
            {"text"}, with `return_timestamps` also "chunks", a list of {"text", "timestamp": (start, end)} in seconds;
            for several recordings a list of those.

        Raises:
            JaxptmError: a recording cannot be read or is too short, or an argument is out of range.
        """
        recordings, single = self._recordings(inputs)
        if return_timestamps not in (None, "char", "word"):
            raise JaxptmError(f"return_timestamps is {return_timestamps!r}, expected char or word.")
        write = self._writer(beam_width, language_model, language_model_weight, word_bonus)
        windows = [
            (at, *window)
            for at, samples in enumerate(recordings)
            for window in self._windows(samples, chunk_length_s, stride_length_s)
        ]
        heard = self._logits([samples for _, samples, _, _ in windows], batch_size)
        frames: list[list[np.ndarray]] = [[] for _ in recordings]
        for (at, _, first, last), logits in zip(windows, heard, strict=True):
            frames[at].append(logits[first:last])
        results = [self._said(write(np.concatenate(parts)), return_timestamps) for parts in frames]
        return results[0] if single else results

    def lines(self, given: Any, result: Any) -> Iterator[str]:
        yield f"{given}: {result['text']}"
        for chunk in result.get("chunks", ()):
            yield f"  {chunk['timestamp'][0]:8.2f} - {chunk['timestamp'][1]:.2f}  {chunk['text']}"

    def _windows(
        self, samples: np.ndarray, chunk_length_s: float, stride_length_s: float | Sequence[float] | None
    ) -> Iterator[tuple[np.ndarray, int, int]]:
        """Windows of a recording, and which of their frames count: the others are heard twice."""
        if chunk_length_s == 0:
            yield samples, 0, len(samples)
            return
        step = self.config.stride
        usual = chunk_length_s / 6
        given = usual if stride_length_s is None else stride_length_s
        sides = [given, given] if isinstance(given, int | float) else list(given)
        length, left, right = (round(seconds * RATE / step) * step for seconds in (chunk_length_s, *sides))
        advance = length - left - right
        if advance < step or min(left, right) < 0:
            raise JaxptmError(
                f"chunk_length_s {chunk_length_s:g} leaves nothing between the strides {sides}: make it longer, or "
                "stride_length_s shorter."
            )
        needed = self.config.receptive_field
        if length < needed:
            raise JaxptmError(f"chunk_length_s {chunk_length_s:g} is {length} samples, the model needs {needed}.")
        for start in range(0, len(samples), advance):
            # An end that is too short to be heard by itself belongs to the window before it.
            last = start + length >= len(samples) or start + advance + needed > len(samples)
            window = samples[start : None if last else start + length]
            before, after = (0 if start == 0 else left), (0 if last else right)
            count = round(len(window) / step)
            yield window, round(before / len(window) * count), count - round(after / len(window) * count)
            if last:
                return

    def _writer(
        self, width: int, model: str | os.PathLike[str] | LanguageModel | None, weight: float, bonus: float
    ) -> Callable[[np.ndarray], list[Span]]:
        characters = self.characters
        if width == 0 and model is None:
            return lambda logits: best_path(logits, characters.blank)
        words = None
        if model is not None:
            model = model if isinstance(model, LanguageModel) else KenLm(Path(model))
            spelled = characters.spelling
            letters = [characters.decoded(spelled.get(symbol, "")) for symbol in range(self.config.vocab_size)]
            words = WordScoring(model, letters, characters.ids[" "], weight, bonus)

        def search(logits: np.ndarray) -> list[Span]:
            log_probs = log_softmax(logits.astype(np.float64), axis=-1)
            best = beam_search(log_probs, characters.blank, width=width or 50, words=words)[0]
            return align(log_probs, best.symbols, characters.blank)

        return search

    def _said(self, spans: Sequence[Span], times: str | None) -> dict[str, Any]:
        characters, seconds = self.characters, self.config.stride / RATE
        # As transformers writes; a special token, which a trained model does not choose, by its name.
        names = {i: token for token, i in characters.tokenizer.get_vocab().items()} | characters.spelling
        unknown = characters.tokenizer.unk_token or ""
        letters = [(names.get(span.symbol, unknown), span) for span in spans]
        result: dict[str, Any] = {"text": characters.decoded("".join(letter for letter, _ in letters).strip())}
        if times is None:
            return result
        units: list[list[tuple[str, Span]]] = [[]]
        for letter, span in letters:
            if times == "char" or letter == " ":
                units.append([])
            if letter and (times == "char" or letter != " "):
                units[-1].append((letter, span))
        result["chunks"] = [
            {
                "text": characters.decoded("".join(letter for letter, _ in unit)),
                "timestamp": (unit[0][1].start * seconds, unit[-1][1].end * seconds),
            }
            for unit in units
            if unit
        ]
        return result


class AudioClassification(SpeechPipeline):
    """The class of a recording: `transformers.pipeline("audio-classification")`."""

    task = "sequence-classification"

    def __call__(self, inputs: Audio | Sequence[Audio], *, top_k: int | None = 5, batch_size: int = 8) -> Any:
        """The likeliest classes of each recording.

        Args:
            inputs: as of `SpeechRecognition`.
            top_k: how many, best first; None for all.
            batch_size: recordings that run at once.

        Returns:
            A list of {"score", "label"}; for several recordings a list of those.

        Raises:
            JaxptmError: a recording cannot be read or is too short, or an argument is out of range.
        """
        if top_k is not None and top_k < 1:
            raise JaxptmError(f"top_k is {top_k}, expected at least 1.")
        recordings, single = self._recordings(inputs)
        results = []
        for logits in self._logits(recordings, batch_size):
            scores = softmax(logits)
            order = np.argsort(-scores, kind="stable")[:top_k]
            results.append([{"score": float(scores[i]), "label": self.model.labels[i]} for i in order])
        return results[0] if single else results

    def lines(self, given: Any, result: Any) -> Iterator[str]:
        yield f"{given}: " + "   ".join(f"{answer['label']} {answer['score']:.1%}" for answer in result)
