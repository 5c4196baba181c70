"""Words that are wrong: as they are spelled, and as the likeliest of the words that occur.

    python experiments/spoken_digits/errors.py MODEL MANIFEST...

MODEL is `model/` of a run, MANIFEST one of those that manifests.py wrote.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jiwer

import jaxptm


class OneWord:
    """A language model of texts of one word, each of `words` as likely as the others."""

    def __init__(self, words: Collection[str]) -> None:
        self._words = words

    def start(self) -> int:
        return 0

    def word(self, state: int, word: str) -> tuple[float, int]:
        allowed = state == 0 and word in self._words
        return (-math.log(len(self._words)) if allowed else -1e6), state + 1

    def end(self, state: int) -> float:
        return 0.0 if state == 1 else -1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("manifests", nargs="+", type=Path)
    arguments = parser.parse_args()
    recognise = jaxptm.pipeline("automatic-speech-recognition", arguments.model)
    for manifest in arguments.manifests:
        paths, words = zip(*(line.split("\t") for line in manifest.read_text().splitlines()), strict=True)

        def wrong(paths: tuple[str, ...] = paths, words: tuple[str, ...] = words, **options: Any) -> float:
            said = [each["text"] for each in recognise(list(paths), **options)]
            return jiwer.wer(list(words), said)

        known = set(words)
        among = wrong(language_model=OneWord(known), language_model_weight=1.0, beam_width=100)
        print(f"{manifest}: of {len(words)} words {wrong():.1%} wrong as spelled, {among:.1%} among {len(known)} words")


if __name__ == "__main__":
    main()
