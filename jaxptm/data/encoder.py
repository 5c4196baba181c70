"""From blocks of text to token ids, as fast as a table of words is."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Int, UInt

from jaxptm.data.tokenizer import WORD_BORDER

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
"""Texts to their ids, one after the other, and how many each has."""

PUNCTUATION = ",.;:!?\"'()[]-—“”‘’"
"""The commonest marks that BERT's tokenisation makes tokens of their own."""


class Encoder:
    """Token ids of text blocks, without special tokens; what looks like a special token in the text is plain text.

    A block is a string in which a newline ends a sentence and `document_end` ends a sentence and its document; it ends
    with one of the two. BERT's tokenisation and that of GPT-2 and RoBERTa see one word at a time, so each distinct word
    is tokenised once and looked up afterwards, several times as fast as the tokenizer itself. Others see whole
    sentences. All but BERT's see a space in front of every sentence but the first of a document, as if the document
    were one line: byte-level vocabularies need it.
    """

    TABLE_LIMIT = 2**19
    """Words the table holds before it starts afresh (some 100 MB)."""

    def __init__(self, backend: Tokenizer, document_end: str):
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self._document_end = document_end
        self._document_starts = True
        self._words = {"bert": self._bert_words, "bytes": self._byte_words}.get(_tokenisation(self._backend))
        self._table = _WordTable(["\n", document_end])

    def __call__(self, block: str) -> tuple[UInt[np.ndarray, " tokens"], Int[np.ndarray, " S"], Bool[np.ndarray, " S"]]:
        """The ids, the offset in them where each sentence (empty ones too) ends, and whether a document ends there."""
        if self._words is None:
            sentences, closes = self._sentences(block)
            ids, lengths = self._encode(sentences)
            return ids, np.cumsum(lengths), np.array(closes, bool)
        if len(self._table) > self.TABLE_LIMIT:
            self._table = _WordTable(["\n", self._document_end])
        rows, first, length = self._table.look_up(self._words(block), self._encode)
        ends = np.cumsum(length)
        ids = self._table.ids[np.repeat(first - (ends - length), length) + np.arange(ends[-1])]
        marks = np.flatnonzero(rows < 2)
        return ids, ends[marks], rows[marks] == 1

    def _bert_words(self, block: str) -> list[str]:
        # Punctuation is a word of its own to BERT, so setting it apart changes no id and makes fewer distinct words.
        # Other white space and marks stay within "words", where the tokenizer itself decides what they are.
        for mark in ("\n", self._document_end, *PUNCTUATION):
            block = block.replace(mark, f" {mark} ")
        return block.split(" ")

    def _byte_words(self, block: str) -> list[str]:
        words: list[str] = []
        for sentence, closes in zip(*self._sentences(block), strict=True):
            words += WORD_BORDER.split(sentence)
            words.append(self._document_end if closes else "\n")
        return words

    def _sentences(self, block: str) -> tuple[list[str], list[bool]]:
        """The sentences as the tokenizer gets them, and whether a document ends with each."""
        sentences: list[str] = []
        closes: list[bool] = []
        for number, document in enumerate(block.split(self._document_end)):
            if number > 0:
                closes[-1] = self._document_starts = True
            for sentence in map(str.strip, document.split("\n")):
                sentences.append(f" {sentence}" if sentence and not self._document_starts else sentence)
                closes.append(False)
                self._document_starts = self._document_starts and not sentence
        return sentences[:-1], closes[:-1]  # nothing follows the last mark

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.uint32, int(lengths.sum())), lengths


class _WordTable(dict[str, int]):
    """Word -> row number; row r's token ids are `ids[first[r] : first[r] + length[r]]`. The marks have none."""

    def __init__(self, marks: list[str]):
        super().__init__((mark, row) for row, mark in enumerate(marks))
        self._new: list[str] = []
        self.ids = np.zeros(0, np.uint32)
        self._first = np.zeros(len(marks), np.int64)
        self._length = np.zeros(len(marks), np.int64)

    def __missing__(self, word: str) -> int:
        self[word] = row = len(self)
        self._new.append(word)
        return row

    def look_up(self, words: list[str], encode: Encode) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The words' rows, and those rows' `first` and `length`; words not seen before go through `encode`."""
        rows = np.fromiter(map(self.__getitem__, words), np.int64, len(words))
        if self._new:
            ids, lengths = encode(self._new)
            firsts = len(self.ids) + np.cumsum(lengths) - lengths
            self.ids = np.concatenate([self.ids, ids])
            self._first = np.concatenate([self._first, firsts])
            self._length = np.concatenate([self._length, lengths])
            self._new = []
        return rows, self._first[rows], self._length[rows]


def _tokenisation(backend: Tokenizer) -> Literal["bert", "bytes", "other"]:
    """How a text falls into words whose ids, one after the other, are those of the text."""
    fields = json.loads(backend.to_str())
    splitting = fields["pre_tokenizer"] or {}
    parts = [(fields["normalizer"] or {}).get("type"), splitting.get("type"), fields["model"]["type"]]
    # Special tokens are plain text to the encoder; another added token may reach over a border of words.
    if not all(token["special"] for token in fields["added_tokens"]):
        return "other"
    if parts == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]:
        return "bert"
    if parts == [None, "ByteLevel", "BPE"] and splitting["use_regex"] and not fields["model"]["dropout"]:
        return "bytes"
    return "other"
