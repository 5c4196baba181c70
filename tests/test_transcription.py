"""Transcripts from CTC against a search of all paths: greedy, beams with and without a language model, alignments."""

from __future__ import annotations

import importlib.util
import math
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxptm.transcription import KenLm, Span, WordScoring, align, beam_search, best_path
from jaxptm.types import JaxptmError

BLANK, SPACE = 0, 3
SPELL = ["", "a", "b", " "]


def frames(seed: int, count: int, symbols: int = 4) -> np.ndarray:
    logits = 2 * np.random.default_rng(seed).normal(size=(count, symbols))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(symbol for symbol, _ in groupby(path) if symbol != BLANK)


def all_paths(log_probs: np.ndarray) -> dict[tuple[int, ...], list[tuple[float, tuple[int, ...]]]]:
    """Transcript -> (log probability, path) of each of its alignments."""
    found: dict[tuple[int, ...], list[tuple[float, tuple[int, ...]]]] = {}
    for path in product(range(log_probs.shape[1]), repeat=len(log_probs)):
        likely = sum(float(row[symbol]) for row, symbol in zip(log_probs, path, strict=True))
        found.setdefault(collapsed(path), []).append((likely, path))
    return found


def total(paths: list[tuple[float, tuple[int, ...]]]) -> float:
    return float(np.logaddexp.reduce([likely for likely, _ in paths]))


class Bigrams:
    """A language model whose state is the word before; log probabilities by what the words are, made up."""

    def start(self) -> str:
        return "<s>"

    def word(self, state: str, word: str) -> tuple[float, str]:
        return -0.1 * len(word) - (2.0 if word == state else 0.3) - (3.0 if "bb" in word else 0.0), word

    def end(self, state: str) -> float:
        return -1.5 if state == "a" else -0.2

    def whole(self, text: str) -> float:
        words = text.split()
        likely = [self.word(before, word)[0] for before, word in zip(["<s>", *words], words, strict=False)]
        return sum(likely) + self.end(words[-1] if words else "<s>")


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_a_wide_beam_is_the_search_of_all_paths(seed: int, count: int) -> None:
    log_probs = frames(seed, count)
    wanted = {symbols: total(paths) for symbols, paths in all_paths(log_probs).items()}
    found = beam_search(log_probs, BLANK, width=10**6, token_min_logp=-math.inf)
    assert {each.symbols for each in found} == set(wanted)
    for each in found:
        assert each.score == pytest.approx(wanted[each.symbols])
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    assert np.logaddexp.reduce([each.score for each in found]) == pytest.approx(0, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0, 2), st.floats(-1, 2))
def test_a_language_model_counts_whole_words(seed: int, count: int, weight: float, bonus: float) -> None:
    log_probs, model = frames(seed, count), Bigrams()
    words = WordScoring(model, SPELL, SPACE, weight, bonus)
    wanted = {}
    for symbols, paths in all_paths(log_probs).items():
        text = "".join(SPELL[symbol] for symbol in symbols)
        wanted[symbols] = total(paths) + weight * model.whole(text) + bonus * len(text.split())
    found = beam_search(log_probs, BLANK, width=10**6, token_min_logp=-math.inf, words=words)
    for each in found:
        assert each.score == pytest.approx(wanted[each.symbols])
    assert found[0].score == pytest.approx(max(wanted.values()))


def test_a_narrow_beam_finds_nearly_as_much() -> None:
    gaps = []
    for seed in range(6):
        log_probs = frames(seed, 40)
        wide, narrow = (beam_search(log_probs, BLANK, width=width)[0].score for width in (200, 30))
        assert narrow <= wide + 1e-9
        gaps.append(wide - narrow)
    assert np.mean(gaps) < 1.0


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(-3, 0))
def test_symbols_that_are_too_unlikely_are_in_no_transcript(seed: int, count: int, least: float) -> None:
    """What is found is what all paths give that keep to symbols of at least so much, or to the frame's likeliest."""
    log_probs = frames(seed, count)
    kept = np.where(log_probs >= np.minimum(least, log_probs.max(axis=1, keepdims=True)), log_probs, -math.inf)
    wanted = {symbols: total(paths) for symbols, paths in all_paths(kept).items() if total(paths) > -math.inf}
    found = {each.symbols: each.score for each in beam_search(log_probs, BLANK, width=10**6, token_min_logp=least)}
    assert found == pytest.approx(wanted)


@given(st.integers(0, 10**6), st.integers(1, 9))
def test_the_best_path_is_that_of_the_likeliest_symbols(seed: int, count: int) -> None:
    log_probs = frames(seed, count)
    path = tuple(log_probs.argmax(axis=1).tolist())
    spans = best_path(log_probs, BLANK)
    assert tuple(span.symbol for span in spans) == collapsed(path)
    shown = [BLANK] * count
    for span in spans:
        assert span.start < span.end
        shown[span.start : span.end] = [span.symbol] * (span.end - span.start)
    assert tuple(shown) == path


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_an_alignment_is_the_likeliest_path_of_its_transcript(seed: int, count: int) -> None:
    log_probs = frames(seed, count, symbols=3)
    for symbols, paths in all_paths(log_probs).items():
        best = max(paths)[0]
        spans = align(log_probs, symbols, BLANK)
        path = [BLANK] * count
        for span in spans:
            path[span.start : span.end] = [span.symbol] * (span.end - span.start)
        assert collapsed(tuple(path)) == symbols
        assert sum(float(row[symbol]) for row, symbol in zip(log_probs, path, strict=True)) == pytest.approx(best)


def test_spans_of_a_written_example() -> None:
    path = [0, 1, 1, 0, 1, 2, 2, 0]
    log_probs = np.log(np.full((8, 3), 0.05) + 0.85 * np.eye(3)[path])
    wanted = [Span(1, 1, 3), Span(1, 4, 5), Span(2, 5, 7)]
    assert best_path(log_probs, BLANK) == wanted == align(log_probs, [1, 1, 2], BLANK)
    assert align(log_probs, [], BLANK) == [] == best_path(log_probs[:1], BLANK)


def test_what_cannot_be_aligned_or_searched() -> None:
    with pytest.raises(JaxptmError, match="2 frames are too few for a transcript of 2 symbols"):
        align(frames(0, 2), [1, 1], BLANK)  # needs a blank between
    with pytest.raises(JaxptmError, match="a beam of width 0"):
        beam_search(frames(0, 2), BLANK, width=0)


ARPA = """\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-1.0\t<s>\t-0.3
-1.2\t</s>
-0.7\ta\t-0.2
-0.9\tba\t-0.1
-1.5\t<unk>

\\2-grams:
-0.2\t<s> a
-0.4\ta ba
-0.3\tba </s>

\\end\\
"""


def test_an_arpa_file(tmp_path: Path) -> None:
    with pytest.raises(JaxptmError, match=r"there is no such file|pip install kenlm"):
        KenLm(tmp_path / "none.arpa")
    if importlib.util.find_spec("kenlm") is None:
        pytest.skip("kenlm is not installed")
    (tmp_path / "small.arpa").write_text(ARPA)
    model: Any = KenLm(tmp_path / "small.arpa")
    first, state = model.word(model.start(), "a")
    second, state = model.word(state, "ba")
    # Bigrams that are there; then one that is not: the back-off weight and the word alone.
    assert (first, second, model.end(state)) == pytest.approx(tuple(math.log(10) * x for x in (-0.2, -0.4, -0.3)))
    assert model.word(state, "a")[0] == pytest.approx(math.log(10) * (-0.1 - 0.7))
    (tmp_path / "broken.arpa").write_text("no model")
    with pytest.raises(JaxptmError, match=r"broken\.arpa: is no n-gram model"):
        KenLm(tmp_path / "broken.arpa")
