from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpora import WORDS, english
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from jaxptm.data.sources import DOCUMENT_END
from jaxptm.data.tokenizer import Encoder, load_tokenizer, special_tokens, tokenizer_hash, train_wordpiece
from jaxptm.errors import JaxptmError

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
SENTENCES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\0"), max_size=40)


@pytest.fixture(scope="module")
def trained():
    return train_wordpiece((line for document in english(200) for line in document), 300)


@pytest.fixture(scope="module")
def bert(shared_data: Path):
    return load_tokenizer(shared_data / "tokenizers" / "bert-base-uncased" / "vocab.txt")


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


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_bare_vocabulary_tokenises_like_bert(shared_data: Path, tmp_path: Path, lowercase: bool) -> None:
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    vocabulary = shared_data / "tokenizers" / "bert-base-uncased" / "vocab.txt"
    (tmp_path / "vocab.txt").write_bytes(vocabulary.read_bytes())
    reference = BertTokenizerLegacy(str(vocabulary), do_lower_case=lowercase)
    for place in (vocabulary, tmp_path):
        tokenizer = load_tokenizer(place, lowercase=lowercase)
        for text in ODD:
            assert tokenizer(text)["input_ids"] == reference(text)["input_ids"], text
        pair = tokenizer("one", "two words")
        assert pair["input_ids"] == reference("one", "two words")["input_ids"]
        assert pair["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    assert special_tokens(tokenizer) == (0, 101, 102)


def test_a_trained_tokenizer_survives_saving(trained, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained.save_pretrained(tmp_path)
    assert trained.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(trained) <= 300
    for opened in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert tokenizer_hash(opened) == tokenizer_hash(trained)
        assert opened.mask_token_id == 4
        for text in [*ODD, "The river of stone."]:
            assert opened(text)["input_ids"] == trained(text)["input_ids"]
    assert (
        trained.decode(trained("The river of stone.")["input_ids"], skip_special_tokens=True) == "the river of stone."
    )
    assert set(WORDS) <= set(trained.get_vocab()), "every word of the corpus is frequent enough for a token of its own"


def test_training_is_a_function_of_the_text() -> None:
    texts = [line for document in english(60, seed=3) for line in document]
    first, again = train_wordpiece(texts, 150), train_wordpiece(reversed(texts), 150)
    assert first.get_vocab() == again.get_vocab()
    assert tokenizer_hash(first) == tokenizer_hash(again)
    assert tokenizer_hash(first) != tokenizer_hash(train_wordpiece(texts, 151))
    assert tokenizer_hash(first) != tokenizer_hash(train_wordpiece(texts, 150, lowercase=False))


def test_case_is_kept_when_asked() -> None:
    texts = ["Ärger macht Ärger"] * 20
    assert "ärger" not in train_wordpiece(texts, 100, lowercase=False).get_vocab()
    assert "Ärger" in train_wordpiece(texts, 100, lowercase=False).get_vocab()
    assert "arger" in train_wordpiece(texts, 100).get_vocab()


def test_the_hash_ignores_padding_and_truncation(trained) -> None:
    before = tokenizer_hash(trained)
    trained(["a", "the river of stone"], padding=True, truncation=True, max_length=3)
    assert trained.backend_tokenizer.truncation is not None
    assert tokenizer_hash(trained) == before


def test_encoder_is_the_tokenizer_on_real_words(bert) -> None:
    documents = english(30, seed=1)
    want = [[bert(line, add_special_tokens=False)["input_ids"] for line in document] for document in documents]
    assert encoded(Encoder(bert.backend_tokenizer, DOCUMENT_END), block(documents)) == want


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(SENTENCES, max_size=4), min_size=1, max_size=4))
@example([ODD, ["a b"], ["b a"], ["x,y", "x", ",", "y.", "[SEP]", "“x’y—z”"]])
def test_encoder_is_the_tokenizer_on_any_text(documents: list[list[str]]) -> None:
    tokenizer = ENCODED_BY[0]
    want = [
        [ids for ids in (tokenizer.encode(line, add_special_tokens=False).ids for line in document) if ids]
        for document in documents
    ]
    for encoder in ENCODED_BY[1:]:
        assert encoded(encoder, block(documents)) == want


ENCODED_BY: list = []


@pytest.fixture(scope="module", autouse=True)
def _encoders(trained) -> None:
    """The same tokenizer, word by word with a table that fills up and starts afresh, and sentence by sentence."""
    by_word = Encoder(trained.backend_tokenizer, DOCUMENT_END)
    by_word.TABLE_LIMIT = 20
    by_sentence = Encoder(trained.backend_tokenizer, DOCUMENT_END)
    assert by_word._by_word
    by_sentence._by_word = False
    plain = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    plain.encode_special_tokens = True
    ENCODED_BY[:] = plain, by_word, by_sentence


def test_special_tokens_in_the_text_are_text(trained) -> None:
    for encoder in ENCODED_BY[1:]:
        [[ids]] = encoded(encoder, block([["the [SEP] [MASK] [PAD]river"]]))
        assert not set(ids) & {0, 2, 3, 4}
    assert trained("[SEP]", add_special_tokens=False)["input_ids"] == [3], "the caller's tokenizer is left as it was"


def test_encoder_undoes_the_truncation_of_a_saved_tokenizer(trained) -> None:
    backend = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    [[ids]] = encoded(Encoder(backend, DOCUMENT_END), block([["the river of stone was never lost"]]))
    assert len(ids) == 7


def test_byte_level_tokenizers_see_a_space_before_all_but_the_first_sentence() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lines = [line for document in english(50) for line in document]
    backend.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    encoder = Encoder(backend, DOCUMENT_END)
    half = "One river.\n Two rivers.\n"  # the document goes on in the next block
    blocks = [encoder(half), encoder("\nThree." + DOCUMENT_END)]
    ids, _, closes = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    assert ids.tolist() == backend.encode("One river. Two rivers. Three.").ids
    assert closes.tolist() == [False, False, False, True]
    assert encoded(encoder, block([["Next."]])) == [[backend.encode("Next.").ids]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/vocab.txt", "/nowhere/vocab.txt: no such tokenizer file or directory"),
        ("nobody/no-such-tokenizer", "'nobody/no-such-tokenizer': no such directory.*hub does not give it.*no network"),
    ],
)
def test_what_does_not_exist_is_named(name: str, message: str) -> None:
    with pytest.raises(JaxptmError, match=message):
        load_tokenizer(name)


def test_files_that_are_no_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(JaxptmError, match=r"no tokenizer here: expected tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nword\n")
    with pytest.raises(JaxptmError, match=r"vocab.txt: is no WordPiece vocabulary.*\[CLS\], \[SEP\], \[MASK\] missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(JaxptmError, match="not UTF-8"):
        load_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(JaxptmError, match=r"is no tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.bin").write_text("{}")
    with pytest.raises(JaxptmError, match="is no tokenizer file"):
        load_tokenizer(tmp_path / "tokenizer.bin")


def test_training_needs_words_and_room() -> None:
    with pytest.raises(JaxptmError, match=r"the text holds no words"):
        train_wordpiece(["", " \n"], 100)
    with pytest.raises(JaxptmError, match=r"vocab_size 6 is too small: the alphabet of the corpus alone takes 11"):
        train_wordpiece(["abc"], 6)


def test_a_missing_special_token_is_named() -> None:
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(JaxptmError, match="no cls, sep token"):
        special_tokens(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>"))
