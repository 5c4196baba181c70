"""Vocabularies of characters, against transformers' Wav2Vec2CTCTokenizer."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2PhonemeCTCTokenizer

from jaxptm.data.characters import Characters
from jaxptm.errors import JaxptmError

BASE = {token: i for i, token in enumerate([*"<pad> <s> </s> <unk> |".split(), *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"])}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vocabulary of wav2vec2-base-960h."""
    path = tmp_path_factory.mktemp("base") / "vocab.json"
    path.write_text(json.dumps(BASE))
    return path


def test_it_is_the_published_one(base: Path, shared_data: Path) -> None:
    assert json.loads((shared_data / "tokenizers" / "wav2vec2-base-960h" / "vocab.json").read_text()) == BASE
    named = Characters.load(shared_data / "tokenizers" / "wav2vec2-base-960h")
    assert (named.ids, named.blank) == (Characters.load(base).ids, 0)


@settings(deadline=None)
@given(st.text(st.sampled_from("ABEZabez' \t\n'"), max_size=30))
def test_ids_are_those_of_transformers(base: Path, text: str) -> None:
    characters = Characters.load(base)
    normal = characters.normal(text)
    assert normal == " ".join(text.upper().split()) and not characters.outside(text)
    assert characters.encode(text).tolist() == Wav2Vec2CTCTokenizer(str(base))(normal).input_ids
    assert characters.normal(normal) == normal


def test_what_is_outside_is_named(base: Path) -> None:
    characters = Characters.load(base)
    assert characters.outside("Don't: 3 née, |x|, née") == [",", "3", ":", "|", "É"]
    ignoring = Characters.load(base, ignore=",:3|é")
    assert ignoring.normal("Don't: 3 née, |x| ") == "DON'T NE X"
    assert ignoring.outside("Don't: 3 née, |x| ") == []


@pytest.mark.parametrize(("letters", "expected"), [("ab", "abba"), ("AB", "ABBA"), ("aAbB", "aBBa"), ("123", "aBBa")])
def test_case_is_that_of_the_vocabulary(tmp_path: Path, letters: str, expected: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({token: i for i, token in enumerate(["<pad>", "<unk>", "|", *letters])}))
    assert Characters.load(path).normal("aBBa") == expected


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|"), max_size=20), max_size=5))
def test_made_vocabularies_write_what_they_are_made_of(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    if not any(text.split() for text in texts):
        with pytest.raises(JaxptmError, match=r"characters needs transcripts, and data\.train has none"):
            Characters.of_texts(texts)
        return
    made = Characters.of_texts(texts)
    directory = tmp_path_factory.mktemp("made")
    made.save(directory)
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(directory)
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[token] for token in ("<pad>", "<s>", "</s>", "<unk>", "|")] == list(range(5))
    rest = [token for token, i in sorted(vocabulary.items(), key=lambda item: item[1]) if i > 4]
    assert rest == sorted(set(rest)) and len(made) == len(vocabulary)
    again = Characters.load(directory)
    assert (again.ids, again.blank, again.ignore) == (made.ids, made.blank, "")
    for text in texts:
        assert not made.outside(text)
        wanted = " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).upper()).split())
        written = tokenizer.convert_ids_to_tokens(again.encode(text).tolist())
        assert "".join(written).replace("|", " ") == again.normal(text)
        assert again.normal(text) == wanted


def test_symbols_of_several_characters_are_spelled_and_not_encoded(tmp_path: Path) -> None:
    path = tmp_path / "vocab.json"
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"ACHa", "CH", "Σ"])}
    path.write_text(json.dumps(vocabulary))
    for lower in (False, True):
        characters = Characters.load(path)
        characters.tokenizer.do_lower_case = lower
        said = list(range(4, 11))
        assert "".join(characters.spelling.get(i, "?") for i in range(11)) == "???? ACHaCHΣ"
        spelled = "".join(characters.spelling[i] for i in said).strip()
        assert characters.decoded(spelled) == characters.tokenizer.decode(said)
        assert characters.encode("ACHaΣ").tolist() == [5, 6, 7, 8, 10]


def test_what_a_model_must_tell_apart(tmp_path: Path) -> None:
    path = tmp_path / "vocab.json"
    for tokens, outputs in ((["<pad>", "<unk>", "|", "A"], 4), (["<pad>", "A"], 2), (["|", "A", "<unk>", "<pad>"], 4)):
        path.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        characters = Characters.load(path)
        assert characters.outputs == outputs < len(characters)  # <s> and </s> at the least are put behind


def test_bad_vocabularies(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"<pad>": 0, "word": 1}')
    with pytest.raises(JaxptmError, match=r"data.vocabulary: .* holds no vocabulary of characters .*: it has no char"):
        Characters.load(tmp_path / "vocab.json")
    (tmp_path / "list.json").write_text("[1, 2")
    with pytest.raises(JaxptmError, match=r"list.json holds no vocabulary of characters"):
        Characters.load(tmp_path / "list.json")
    with pytest.raises(JaxptmError, match=r"no-such-name holds no vocabulary of characters"):
        Characters.load("no-such-name")
    (tmp_path / "phonemes.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "a": 2, "tʃ": 3}))
    tokenizer = Wav2Vec2PhonemeCTCTokenizer(str(tmp_path / "phonemes.json"), do_phonemize=False)
    tokenizer.save_pretrained(tmp_path / "phonemes")
    with pytest.raises(JaxptmError, match=r"`tokenizer_class: Wav2Vec2PhonemeCTCTokenizer` writes phonemes"):
        Characters.load(tmp_path / "phonemes")
    with pytest.raises(JaxptmError, match=r"a transcript of data.train holds '\|', which stands for the space"):
        Characters.of_texts(["a|b"])
