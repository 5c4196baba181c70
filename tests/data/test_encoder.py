from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from corpora import ODD, english
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from jaxptm.data.encoder import Encoder
from jaxptm.data.sources import DOCUMENT_END
from jaxptm.data.tokenizer import BPE_SPECIAL, load_tokenizer, train_wordpiece

SENTENCES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\0"), max_size=40)
SPACED = st.text(st.sampled_from(list("ab'’s1é漢, \t\u00a0\u2003\x1c\x85\u2028\u200b\u180e ")), max_size=20)
LINES = [line for document in english(200) for line in document]


class Encoders:
    """A tokenizer, the encoder that looks words up in a table so small that it starts afresh, and the one without."""

    def __init__(self, backend: Tokenizer):
        self.plain = Tokenizer.from_str(backend.to_str())
        self.plain.encode_special_tokens = True
        self.by_word = Encoder(backend, DOCUMENT_END)
        self.by_word.TABLE_LIMIT = 20
        assert self.by_word._words is not None
        self.by_sentence = Encoder(backend, DOCUMENT_END)
        self.by_sentence._words = None

    def ids(self, text: str) -> list[int]:
        return self.plain.encode(text, add_special_tokens=False).ids


def byte_level(lines: list[str], vocab_size: int, use_regex: bool = True) -> Tokenizer:
    """A vocabulary that knows runs of spaces, from the trainer itself rather than from `train_bpe`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=BPE_SPECIAL, show_progress=False)
    backend.train_from_iterator(lines, trainer)
    return backend


WORDPIECE = Encoders(train_wordpiece(LINES, 300).backend_tokenizer)
BPE = Encoders(byte_level([*LINES, *ODD, *["".join(map(chr, range(256))), "a  b   c \t\t  d    "] * 99], 800))


def block(documents: list[list[str]]) -> str:
    return "".join("\n".join(document) + DOCUMENT_END for document in documents)


def encoded(encoder: Encoder, text: str) -> list[list[list[int]]]:
    """Documents of sentences of ids, empty sentences left out."""
    ids, ends, closes = encoder(text)
    documents: list[list[list[int]]] = [[]]
    for sentence, close in zip(np.split(ids, ends[:-1]), closes, strict=True):
        if len(sentence):
            documents[-1].append(sentence.tolist())
        if close:
            documents.append([])
    assert documents.pop() == []
    return documents


def test_encoder_is_the_tokenizer_on_real_words(shared_data: Path) -> None:
    bert = load_tokenizer(shared_data / "tokenizers" / "bert-base-uncased" / "vocab.txt")
    documents = english(30, seed=1)
    want = [[bert(line, add_special_tokens=False)["input_ids"] for line in document] for document in documents]
    assert encoded(Encoder(bert.backend_tokenizer, DOCUMENT_END), block(documents)) == want


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(SENTENCES, max_size=4), min_size=1, max_size=4))
@example([ODD, ["a b"], ["b a"], ["x,y", "x", ",", "y.", "[SEP]", "“x’y—z”"]])
def test_wordpiece_sees_one_sentence_at_a_time(documents: list[list[str]]) -> None:
    want = [[ids for ids in map(WORDPIECE.ids, document) if ids] for document in documents]
    for encoder in (WORDPIECE.by_word, WORDPIECE.by_sentence):
        assert encoded(encoder, block(documents)) == want


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(SENTENCES | SPACED, max_size=4), min_size=1, max_size=4))
@example([ODD, ["a b"], ["b a"], ["x,y", "", "  'tis", "’s  a   b \t c", "</s><s>", "<mask> a"]])
def test_byte_level_bpe_sees_a_document_as_one_line(documents: list[list[str]]) -> None:
    want = [BPE.ids(" ".join(filter(None, map(str.strip, document)))) for document in documents]
    for encoder in (BPE.by_word, BPE.by_sentence):
        assert [list(chain(*document)) for document in encoded(encoder, block(documents))] == want
    sentences = [
        [BPE.ids(f" {line}" if number else line) for number, line in enumerate(filter(None, map(str.strip, document)))]
        for document in documents
    ]
    assert encoded(BPE.by_word, block(documents)) == sentences


def test_the_tokenizers_of_gpt2_and_roberta_are_looked_up(shared_data: Path) -> None:
    documents = [*english(30, seed=1), ODD]
    for name in ("gpt2", "roberta-base"):
        encoders = Encoders(load_tokenizer(shared_data / "tokenizers" / name).backend_tokenizer)
        want = [encoders.ids(" ".join(filter(None, map(str.strip, document)))) for document in documents]
        assert [list(chain(*document)) for document in encoded(encoders.by_word, block(documents))] == want


@pytest.mark.parametrize("encoders", [WORDPIECE, BPE], ids=["wordpiece", "bpe"])
def test_special_tokens_in_the_text_are_text(encoders: Encoders) -> None:
    special = {token.content: id for id, token in encoders.plain.get_added_tokens_decoder().items()}
    assert len(special) == 5
    text = " ".join(f"the {token}river" for token in special)
    for encoder in (encoders.by_word, encoders.by_sentence):
        [[ids]] = encoded(encoder, block([[text]]))
        assert not set(ids) & (set(special.values()) - {special.get("[UNK]")})


def test_encoder_leaves_the_tokenizer_as_it_was() -> None:
    backend = train_wordpiece(LINES, 300).backend_tokenizer
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    [[ids]] = encoded(Encoder(backend, DOCUMENT_END), block([["the river of stone was never lost"]]))
    assert len(ids) == 7
    assert len(backend.encode("the river of stone was never lost").ids) == 4
    assert backend.encode("[SEP]", add_special_tokens=False).ids[0] == 3


@pytest.mark.parametrize("use_regex", [True, False])
def test_a_document_may_go_on_in_the_next_block(use_regex: bool) -> None:
    backend = byte_level(LINES, 400, use_regex)
    encoder = Encoder(backend, DOCUMENT_END)
    assert (encoder._words is not None) == use_regex, "without its regular expression, words depend on each other"
    blocks = [encoder("One river.\n Two rivers.\n"), encoder("\nThree." + DOCUMENT_END)]
    ids, _, closes = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    assert ids.tolist() == [id for text in ("One river.", " Two rivers.", " Three.") for id in backend.encode(text).ids]
    assert closes.tolist() == [False, False, False, True]
    assert encoded(encoder, block([["Next."]])) == [[backend.encode("Next.").ids]]


def test_added_tokens_keep_the_encoder_from_looking_words_up() -> None:
    backend = Tokenizer.from_str(BPE.plain.to_str())
    backend.add_tokens(["river of"])
    encoder = Encoder(backend, DOCUMENT_END)
    want = backend.encode("the river of stone", add_special_tokens=False).ids
    assert encoded(encoder, block([["the river of stone"]])) == [[want]]
    assert backend.token_to_id("river of") in want
