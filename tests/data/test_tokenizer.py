from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from corpora import ODD, WORDS, english
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxptm.data.tokenizer import (
    BPE_SPECIAL,
    END_OF_TEXT,
    filler,
    load_tokenizer,
    special_tokens,
    tokenizer_hash,
    train_bpe,
    train_wordpiece,
)
from jaxptm.errors import JaxptmError

LINES = [line for document in english(200) for line in document]
BPE = train_bpe([*LINES, *ODD], 500)


@pytest.fixture(scope="module")
def trained():
    return train_wordpiece(LINES, 300)


@pytest.fixture
def bpe():
    return BPE


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
    with pytest.raises(JaxptmError, match="neither a padding token nor an end of text"):
        filler(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))


def model_of(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def test_bpe_merges_the_most_frequent_pair_each_time() -> None:
    """Learns anew in plain Python, as Sennrich et al. (2016), algorithm 1, with ties as the trainer took them."""
    text = "\n".join([*LINES[:60], *["runs   of     space,  \t\t  and   'tis"] * 30])
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    counts = Counter(piece for line in text.split("\n") for piece, _ in split(f" {line}"))
    words = [[list(piece), count] for piece, count in counts.items()]
    tokenizer = train_bpe([text], 400)
    model = model_of(tokenizer)
    assert len(model["merges"]) == 400 - 256 - 5
    for number, merge in enumerate(model["merges"]):
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, count in words:
            for pair in pairwise(symbols):
                pairs[pair] += count
        assert pairs[tuple(merge)] == max(pairs.values()) > 1
        assert model["vocab"]["".join(merge)] == 5 + 256 + number
        for word in words:
            word[0] = merged(word[0], merge)
    for piece, (symbols, _) in zip(counts, words, strict=True):
        assert tokenizer.tokenize(decoders.ByteLevel().decode([piece])) == symbols


def merged(symbols: list[str], merge: list[str]) -> list[str]:
    out: list[str] = []
    while symbols:
        width = 2 if symbols[:2] == merge else 1
        out.append("".join(symbols[:width]))
        symbols = symbols[width:]
    return out


def test_bpe_training_is_a_function_of_the_text() -> None:
    first = train_bpe(LINES, 400)
    assert tokenizer_hash(first) == tokenizer_hash(train_bpe(["\n".join(reversed(LINES))], 400))
    assert tokenizer_hash(first) != tokenizer_hash(train_bpe(LINES, 401))
    program = (
        "from corpora import english; from jaxptm.data.tokenizer import *; "
        "print(tokenizer_hash(train_bpe((line for document in english(200) for line in document), 400)))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[1])}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == tokenizer_hash(first)


def test_a_trained_bpe_survives_saving(bpe, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert bpe.convert_ids_to_tokens(range(5)) == BPE_SPECIAL == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.save_pretrained(tmp_path)
    for opened in (bpe, AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert tokenizer_hash(opened) == tokenizer_hash(bpe)
        assert special_tokens(opened) == (1, 0, 2)
        assert (opened.bos_token_id, opened.eos_token_id, opened.unk_token_id, opened.mask_token_id) == (0, 2, 3, 4)
        assert filler(opened) == 1
        for text in [*ODD, "The river of stone."]:
            assert opened(text)["input_ids"] == bpe(text)["input_ids"]
        a, b = (opened(text, add_special_tokens=False)["input_ids"] for text in ("The river", "of stone"))
        assert opened("The river", "of stone")["input_ids"] == [0, *a, 2, 2, *b, 2]
        assert opened("The <mask>", add_special_tokens=False)["input_ids"] == [
            *opened("The", add_special_tokens=False)["input_ids"],
            4,
        ], "the mask takes the space before it along"


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(ODD))
def test_bpe_gives_every_text_back(text: str) -> None:
    plain = Tokenizer.from_str(BPE.backend_tokenizer.to_str())
    plain.encode_special_tokens = True  # "<s>" in the text is text, as it is to `Encoder`
    ids = plain.encode(text, add_special_tokens=False).ids
    assert min(ids, default=5) >= 5, "no special token, the unknown one least of all"
    assert BPE.decode(ids) == text


def bare(directory: Path, tokenizer, rename: dict[str, str]) -> Path:
    """The `vocab.json` and `merges.txt` of a tokenizer, with some tokens under other names."""
    model = model_of(tokenizer)
    vocab = {rename.get(token, token): index for token, index in model["vocab"].items()}
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "".join(f"{' '.join(merge)}\n" for merge in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    return directory


def test_a_bare_byte_level_vocabulary_is_that_of_roberta_or_gpt2(bpe, tmp_path: Path) -> None:
    roberta = load_tokenizer(bare(tmp_path, bpe, {}))
    assert tokenizer_hash(roberta) == tokenizer_hash(bpe)
    assert roberta.special_tokens_map == bpe.special_tokens_map
    gpt2 = load_tokenizer(bare(tmp_path, bpe, {"<s>": END_OF_TEXT}))
    assert (gpt2.bos_token_id, gpt2.eos_token_id, gpt2.unk_token_id) == (0, 0, 0)
    assert gpt2.pad_token_id is gpt2.sep_token_id is gpt2.mask_token_id is None
    assert filler(gpt2) == 0
    for text in ODD:
        assert gpt2(text)["input_ids"] == bpe(text, add_special_tokens=False)["input_ids"]
    with pytest.raises(JaxptmError, match=r"vocab.json: has neither RoBERTa's special tokens .* nor GPT-2's"):
        load_tokenizer(bare(tmp_path, bpe, {"<s>": "[CLS]"}))


@pytest.mark.parametrize("name", ["roberta-base", "gpt2"])
def test_the_published_byte_level_vocabularies_open_bare(shared_data: Path, tmp_path: Path, name: str) -> None:
    from transformers import GPT2Tokenizer, RobertaTokenizer

    directory = shared_data / "tokenizers" / name
    tokenizer = load_tokenizer(directory)
    # In the published tokenizer.json the mask takes the space before it along; the class leaves that to its caller.
    mask = {"mask_token": AddedToken("<mask>", lstrip=True, special=True)}
    reference = (
        RobertaTokenizer.from_pretrained(directory, **mask)
        if name == "roberta-base"
        else GPT2Tokenizer.from_pretrained(directory)
    )
    for text in [*ODD, "Hello world", "The <mask> is 42.", "</s><s>", END_OF_TEXT]:
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"], text
    assert tokenizer.special_tokens_map == reference.special_tokens_map
    if name == "roberta-base":
        assert tokenizer("Hello world<mask>")["input_ids"] == [0, 31414, 232, 50264, 2]
        assert special_tokens(tokenizer) == (1, 0, 2)
    else:
        assert tokenizer(f"Hello world{END_OF_TEXT}")["input_ids"] == [15496, 995, 50256]
        assert tokenizer.pad_token_id is None
        with pytest.raises(JaxptmError, match="no pad, cls, sep token"):
            special_tokens(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tokenizer)
    (tmp_path / "tokenizer_config.json").unlink()
    alone = load_tokenizer(tmp_path)
    assert tokenizer_hash(alone) == tokenizer_hash(tokenizer)
    for part in ("bos", "eos", "pad", "mask", "cls", "sep"):
        assert getattr(alone, f"{part}_token_id") == getattr(tokenizer, f"{part}_token_id")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", b'{"<s>": 0', r"vocab.json: belongs to no byte-level BPE: Expecting .*; fetch both files anew"),
        ("vocab.json", b"[1, 2]", r"vocab.json: .*: tokens and their ids expected"),
        ("vocab.json", b'{"<s>": "0"}', r"vocab.json: .*: tokens and their ids expected"),
        ("merges.txt", b"#version: 0.2\nt h e\n", r"merges.txt: .*: 't h e' is no pair of pieces"),
        ("merges.txt", b"t zebra\n", r"merges.txt: .*zebra.* out of vocabulary"),
        ("merges.txt", b"\xff", r"merges.txt: .*can't decode byte 0xff"),
    ],
)
def test_a_damaged_byte_level_vocabulary_is_named(bpe, tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (bare(tmp_path, bpe, {}) / file).write_bytes(content)
    with pytest.raises(JaxptmError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "spiece.model"])
@pytest.mark.parametrize("config", [None, {"tokenizer_class": "XLMRobertaTokenizer"}], ids=["bare", "config"])
def test_a_sentencepiece_model_needs_its_tokenizer_json(
    bpe, tmp_path: Path, name: str, config: dict[str, str] | None
) -> None:
    (tmp_path / name).write_bytes(b"\x0a\x0e")
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(JaxptmError, match=rf"{name}: a SentencePiece model does not open.* put the tokenizer.json"):
        load_tokenizer(tmp_path)
    bpe.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert load_tokenizer(tmp_path).get_vocab() == bpe.get_vocab()


@pytest.mark.parametrize("name", ["BertTokenizer", "RobertaTokenizer", "GPT2Tokenizer"])
def test_a_configuration_without_its_vocabulary_is_no_tokenizer(tmp_path: Path, name: str) -> None:
    """transformers makes up a tokenizer of the special tokens, to which every word is unknown."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(JaxptmError, match=r"special tokens alone: the file with its vocabulary is missing; put the"):
        load_tokenizer(tmp_path)


def test_bpe_training_needs_words_and_room() -> None:
    with pytest.raises(JaxptmError, match="the text holds no words"):
        train_bpe(["", " \n"], 300)
    with pytest.raises(JaxptmError, match=r"vocab_size 260 is too small: special tokens and bytes alone take 261"):
        train_bpe(["abc"], 260)
    assert len(train_bpe(["abc"], 261)) == 261
