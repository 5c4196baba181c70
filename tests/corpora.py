"""Small corpora for tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jaxptm.data.corpus import Corpus
from jaxptm.data.tokenizer import SpecialTokens

SPECIAL = SpecialTokens(pad=0, cls=2, sep=3)
FIRST = 10
"""Token at position p of `numbered_corpus` is FIRST + p, unless it is a separator."""


def numbered_corpus(shards: list[list[list[int]]]) -> Corpus:
    """A corpus whose tokens tell their position; `shards` holds the sentence lengths of each document of each shard.

    The separator after a document is not counted in its last sentence's length.
    """
    arrays, ends, sentence_ends, document_ends, ranges = [], [], [], [], []
    position = sentences = documents = 0
    for shard in shards:
        start = position
        tokens: list[int] = []
        for document in shard:
            for number, length in enumerate(document):
                tokens += range(FIRST + position, FIRST + position + length)
                position += length
                if number == len(document) - 1:
                    tokens.append(SPECIAL.sep)
                    position += 1
                sentence_ends.append(position)
            sentences += len(document)
            document_ends.append(sentences)
        ranges.append((documents, documents + len(shard)))
        documents += len(shard)
        arrays.append(np.array(tokens, np.uint32))
        assert position - start == len(tokens)
        ends.append(position)
    return Corpus(
        shards=tuple(arrays),
        shard_ends=tuple(ends),
        sentence_ends=np.array(sentence_ends),
        document_ends=np.array(document_ends),
        ranges=np.array(ranges),
        vocab_size=FIRST + position,
        separator=SPECIAL.sep,
    )


def random_corpus(seed: int = 0, shards: int = 3, documents: int = 40, sentences: int = 30, tokens: int = 25) -> Corpus:
    """Documents of 1 to `sentences` sentences of 1 to `tokens` tokens."""
    random = np.random.default_rng(seed)
    return numbered_corpus(
        [
            [random.integers(1, tokens + 1, random.integers(1, sentences + 1)).tolist() for _ in range(documents)]
            for _ in range(shards)
        ]
    )


def only_documents(corpus: Corpus, first: int, last: int) -> Corpus:
    """A view of a contiguous range of documents of one shard."""
    return replace(corpus, ranges=np.array([[first, last]]))


WORDS = (
    "the a river mountain light winter summer stone bird house road paper glass story king letter garden tree of in on "
    "under was is became made found kept lost carried wrote opened closed quickly slowly never always often two three "
    "small great"
).split()


def english(documents: int, seed: int = 0, sentences: int = 8) -> list[list[str]]:
    """Documents of lines; a line holds one sentence or a few."""
    random = np.random.default_rng(seed)

    def sentence() -> str:
        words = random.choice(WORDS, random.integers(3, 12)).tolist()
        return " ".join([words[0].capitalize(), *words[1:]]) + str(random.choice([".", "!", "?"]))

    return [
        [" ".join(sentence() for _ in range(random.integers(1, 4))) for _ in range(random.integers(1, sentences))]
        for _ in range(documents)
    ]


ODD = [
    "Café naïve ÀÉÎ Straße Ἀθῆναι İstanbul ǅ ﬁ",
    "漢字と仮名 mixed 中文,字",
    "“Quotes” — dashes… don't U.S.A. $3.50 50% #tag @me a_b",
    "emoji 😀👩\u200d👩\u200d👧 and \u200b zero\u00adwidth \ufeff bom",
    "tabs\tand\r nbsp\u00a0and\u2003em \x1c\x85\u2028 controls\x01\x7f\ufffd",
    "combining e\u0301 \u0301x a\u0301\u0327b",
    "x" * 150 + " ok",
    "",
    "   ",
]
"""Lines that tokenizers have been wrong about."""
