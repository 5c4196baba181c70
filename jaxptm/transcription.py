"""Transcripts from the probabilities of CTC (Graves et al. 2006): greedy, or by a beam with a language model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from jaxptm.types import JaxptmError

NEVER = -math.inf


class Span(NamedTuple):
    """A symbol and the frames it takes: from `start` up to `end`."""

    symbol: int
    start: int
    end: int


class Transcript(NamedTuple):
    """Symbols, and how likely they are: the log probability, with what a language model adds."""

    symbols: tuple[int, ...]
    score: float


@runtime_checkable
class LanguageModel(Protocol):
    """What a beam asks of a model of words. A state stands for the words before and may be shared."""

    def start(self) -> Any:
        """The state before the first word."""

    def word(self, state: Any, word: str) -> tuple[float, Any]:
        """Log probability (natural) of a word, and the state behind it."""

    def end(self, state: Any) -> float:
        """Log probability of no further word."""


@dataclass(frozen=True)
class WordScoring:
    """How a language model counts in a beam: `weight` times its log probability, and `bonus` for each word.

    Attributes:
        spell: symbol -> characters.
        space: the symbol between words.
    """

    model: LanguageModel
    spell: Sequence[str]
    space: int
    weight: float = 0.5
    bonus: float = 1.0


def best_path(log_probs: Float[np.ndarray, "F V"], blank: int) -> list[Span]:
    """The likeliest symbol of each frame, repetitions taken together and blanks left out (Graves et al. 2006, 3.2)."""
    frames = np.asarray(log_probs).argmax(axis=-1)
    changes = np.flatnonzero(np.diff(frames, prepend=-1))
    ends = [*changes[1:].tolist(), len(frames)]
    runs = zip(frames[changes].tolist(), changes.tolist(), ends, strict=True)
    return [Span(symbol, start, end) for symbol, start, end in runs if symbol != blank]


def written(path: Int[np.ndarray, " F"], blank: int, spell: Mapping[int, str]) -> str:
    """The text of the likeliest symbol of each frame, spaces at its ends left out.

    Args:
        spell: symbol -> characters; others spell nothing.
    """
    kept = path[np.flatnonzero(np.diff(path, prepend=-1))].tolist()
    return " ".join("".join(spell.get(symbol, "") for symbol in kept if symbol != blank).split())


def beam_search(
    log_probs: Float[np.ndarray, "F V"],
    blank: int,
    *,
    width: int = 50,
    token_min_logp: float = -5.0,
    words: WordScoring | None = None,
) -> list[Transcript]:
    """The likeliest transcripts, each over all of its alignments, best first (Graves 2012; Hannun et al. 2014).

    Args:
        log_probs: natural logarithms; each frame sums to one.
        width: transcripts that are kept from frame to frame.
        token_min_logp: log probability that a symbol must have to be tried in a frame, the likeliest one aside. Most
            frames have one or two such; the default is that of pyctcdecode.
        words: a language model over the words that the symbols spell.

    Raises:
        JaxptmError: `width` is below 1.
    """
    if width < 1:
        raise JaxptmError(f"a beam of width {width}: it is at least 1.")
    told = _Told(words)
    # Of each transcript so far, log probabilities that it ends in a blank and that it does not.
    beam: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, NEVER)}
    for frame in np.asarray(log_probs, np.float64):
        tried = np.flatnonzero(frame >= min(token_min_logp, frame.max())).tolist()
        following: dict[tuple[int, ...], tuple[float, float]] = {}

        def add(symbols: tuple[int, ...], blank_ends: float, symbol_ends: float, into: Any = following) -> None:
            before = into.get(symbols, (NEVER, NEVER))
            into[symbols] = _log_sum(before[0], blank_ends), _log_sum(before[1], symbol_ends)

        for symbols, (in_blank, in_symbol) in beam.items():
            either = _log_sum(in_blank, in_symbol)
            for symbol in tried:
                likely = float(frame[symbol])
                if symbol == blank:
                    add(symbols, either + likely, NEVER)
                elif symbols and symbol == symbols[-1]:  # the same one goes on, or after a blank comes anew
                    add(symbols, NEVER, in_symbol + likely)
                    add((*symbols, symbol), NEVER, in_blank + likely)
                else:
                    add((*symbols, symbol), NEVER, either + likely)
        ranked = sorted(following, key=lambda symbols: -(_log_sum(*following[symbols]) + told.score(symbols)))
        beam = {symbols: following[symbols] for symbols in ranked[:width]}
        told.forget_all_but(beam)
    found = [Transcript(symbols, _log_sum(*ends) + told.final(symbols)) for symbols, ends in beam.items()]
    return sorted((each for each in found if each.score > NEVER), key=lambda each: -each.score)


def align(log_probs: Float[np.ndarray, "F V"], symbols: Sequence[int], blank: int) -> list[Span]:
    """The frames of each symbol in the likeliest alignment of a transcript (Viterbi over its states and blanks).

    Raises:
        JaxptmError: there are fewer frames than the transcript needs.
    """
    if not symbols:
        return []
    log_probs = np.asarray(log_probs, np.float64)
    states = np.full(2 * len(symbols) + 1, blank)
    states[1::2] = symbols
    # A blank may be left out between two symbols that differ.
    skips = np.zeros(len(states), bool)
    skips[3::2] = states[3::2] != states[1:-2:2]
    scores = np.full(len(states), NEVER)
    scores[:2] = log_probs[0, states[:2]]
    steps: list[Int[np.ndarray, " S"]] = []
    for frame in log_probs[1:]:
        ways = np.stack([scores, np.concatenate([[NEVER], scores[:-1]]), np.concatenate([[NEVER, NEVER], scores[:-2]])])
        ways[2, ~skips] = NEVER
        steps.append(ways.argmax(axis=0))
        scores = ways.max(axis=0) + frame[states]
    state = len(states) - 1 if scores[-1] > scores[-2] else len(states) - 2
    if scores[state] == NEVER:
        raise JaxptmError(f"{len(log_probs)} frames are too few for a transcript of {len(symbols)} symbols.")
    path = [state]
    for step in reversed(steps):
        path.append(path[-1] - int(step[path[-1]]))
    places = np.array(path[::-1])
    taken = [np.flatnonzero(places == 2 * at + 1) for at in range(len(symbols))]
    return [Span(symbol, int(at[0]), int(at[-1]) + 1) for symbol, at in zip(symbols, taken, strict=True)]


class KenLm:
    """An n-gram model from an ARPA or KenLM file, by the package `kenlm` (Heafield 2011)."""

    def __init__(self, path: str | Path) -> None:
        """Raises JaxptmError: the package is missing, or the file is none of these."""
        try:
            import kenlm
        except ImportError as error:
            raise JaxptmError("a language model needs the package kenlm: pip install kenlm.") from error
        if not Path(path).is_file():
            raise JaxptmError(f"{path}: there is no such file; name an n-gram model (.arpa, or KenLM's binary form).")
        try:
            self._model = kenlm.Model(str(path))
        except OSError as error:
            raise JaxptmError(f"{path}: is no n-gram model that kenlm reads ({error}).") from error
        self._state = kenlm.State

    def start(self) -> Any:
        state = self._state()
        self._model.BeginSentenceWrite(state)
        return state

    def word(self, state: Any, word: str) -> tuple[float, Any]:
        following = self._state()
        return self._model.BaseScore(state, word, following) * math.log(10), following

    def end(self, state: Any) -> float:
        return self.word(state, "</s>")[0]


class _Told:
    """What a language model says of transcripts, each built on that of the transcript one symbol shorter."""

    def __init__(self, words: WordScoring | None) -> None:
        self._words = words
        # Score so far, state, and the word that is not yet ended.
        self._known: dict[tuple[int, ...], tuple[float, Any, str]] = {}
        if words is not None:
            self._known[()] = (0.0, words.model.start(), "")

    def score(self, symbols: tuple[int, ...]) -> float:
        return self._at(symbols)[0] if self._words is not None else 0.0

    def final(self, symbols: tuple[int, ...]) -> float:
        if self._words is None:
            return 0.0
        score, state = self._ended(*self._at(symbols))
        return score + self._words.weight * self._words.model.end(state)

    def forget_all_but(self, kept: Iterable[tuple[int, ...]]) -> None:
        if self._words is not None:
            self._known = {symbols: self._known[symbols] for symbols in kept}

    def _at(self, symbols: tuple[int, ...]) -> tuple[float, Any, str]:
        assert self._words is not None
        if symbols not in self._known:
            score, state, word = self._at(symbols[:-1])
            if symbols[-1] == self._words.space:
                self._known[symbols] = (*self._ended(score, state, word), "")
            else:
                self._known[symbols] = (score, state, word + self._words.spell[symbols[-1]])
        return self._known[symbols]

    def _ended(self, score: float, state: Any, word: str) -> tuple[float, Any]:
        assert self._words is not None
        if not word:
            return score, state
        likely, state = self._words.model.word(state, word)
        return score + self._words.weight * likely + self._words.bonus, state


def _log_sum(a: float, b: float) -> float:
    high, low = (a, b) if a > b else (b, a)
    return high if low == NEVER else high + math.log1p(math.exp(low - high))
