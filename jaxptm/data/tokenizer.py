"""Tokenizers: opened from files or the hub, trained from text, and named by a hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxptm.errors import JaxptmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BPE_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
"""RoBERTa's, the first four with RoBERTa's ids."""
END_OF_TEXT = "<|endoftext|>"
"""GPT-2's only special token."""
WORD_BORDER = re.compile(r"(?<=.)(?= \S)", re.DOTALL)
"""Places where byte-level BPE starts a new piece whatever is around them: before a space that leads a word."""
SENTENCEPIECE = ("sentencepiece.bpe.model", "spiece.model")
"""What XLM-R and ALBERT were released with."""
ALPHABET_LIMIT = 1000
"""Characters a trained vocabulary spells words with; rarer ones become [UNK], as in BERT's multilingual recipe."""


class SpecialTokens(NamedTuple):
    """Ids of the tokens that frame a row."""

    pad: int
    cls: int
    sep: int


def load_tokenizer(name: str | Path, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """Opens a tokenizer.

    Args:
        name: a directory (or a file in it) that transformers saved, a `tokenizer.json`, a bare WordPiece `vocab.txt`
            or a directory with nothing else, a directory with the `vocab.json` and `merges.txt` of GPT-2 or RoBERTa, or
            a name on the Hugging Face hub.
        lowercase: for a bare `vocab.txt`, whether text is lowercased and loses its accents (BERT "uncased").

    Raises:
        JaxptmError: nothing of that name opens, or what opens has no fast (Rust) backend.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".txt":
        return _wordpiece(_read_vocab(path), lowercase)
    if path.is_file() and path.suffix == ".json":
        return _from_json(path)
    if path.is_dir() and not (path / "tokenizer_config.json").exists():
        if (path / "tokenizer.json").exists():
            return _from_json(path / "tokenizer.json")
        if (path / "vocab.txt").exists():
            return _wordpiece(_read_vocab(path / "vocab.txt"), lowercase)
        if (path / "vocab.json").exists() and (path / "merges.txt").exists():
            return _byte_bpe(path)
        _refuse_sentencepiece(path)
        raise JaxptmError(
            f"{path}: no tokenizer here: expected tokenizer.json, or vocab.txt, or vocab.json with merges.txt, or "
            "tokenizer_config.json that names the tokenizer_class of the other files."
        )
    if path.is_file():
        raise JaxptmError(f"{path}: is no tokenizer file (.json or .txt).")
    if not path.exists() and (path.is_absolute() or path.suffix in {".txt", ".json"} or str(name).count("/") > 1):
        raise JaxptmError(f"{path}: no such tokenizer file or directory.")

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except Exception as error:  # transformers, huggingface_hub and tokenizers each raise their own kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if path.is_dir():
            _refuse_sentencepiece(path)
            raise JaxptmError(f"{path}: the tokenizer does not open: {reason}") from error
        raise JaxptmError(
            f"tokenizer {str(name)!r}: no such directory, and the Hugging Face hub does not give it (no network, or no "
            f"such repository): {reason}"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise JaxptmError(f"tokenizer {str(name)!r} has no fast version (tokenizer.json), which jaxptm needs.")
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes one up of nothing
        _refuse_sentencepiece(path)
        raise JaxptmError(
            f"tokenizer {str(name)!r} has special tokens alone: the file with its vocabulary is missing; put the "
            "tokenizer.json from where tokenizer_config.json came from beside it."
        )
    return tokenizer


def train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """Learns a WordPiece vocabulary from `texts` and returns BERT's tokenizer with it.

    Ids 0 to 4 are [PAD] [UNK] [CLS] [SEP] [MASK], then come single characters, then pieces as they were learnt.
    The same text gives the same vocabulary. A small corpus may give fewer entries than asked: see `len(tokenizer)`.

    Raises:
        JaxptmError: the texts hold no word, or `vocab_size` has no room for the alphabet.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    words: Counter[str] = Counter()
    for text in texts:
        words.update(text.split())
    # BERT's normalisation and splitting see one word at a time, so each distinct word passes through them once.
    normalize = normalizers.BertNormalizer(lowercase=lowercase).normalize_str
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    pieces: Counter[str] = Counter()
    for word, count in words.items():
        for piece, _ in split(normalize(word)):
            pieces[piece] += count
    if not pieces:
        raise JaxptmError("cannot train a tokenizer: the text holds no words.")
    characters: Counter[str] = Counter()
    for piece, count in pieces.items():
        for character in piece:
            characters[character] += count
    alphabet = sorted(sorted(characters, key=lambda c: (-characters[c], c))[:ALPHABET_LIMIT])
    # The trainer numbers "##x" in the order of a randomly seeded hash map; as "special tokens" they have fixed ids.
    fixed = [*SPECIAL, *alphabet, *(f"##{character}" for character in alphabet)]
    if vocab_size < len(fixed):
        raise JaxptmError(
            f"data.vocab_size {vocab_size} is too small: the alphabet of the corpus alone takes {len(fixed)} entries."
        )
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=fixed,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(_repeated(pieces), trainer=trainer)
    return _wordpiece(backend.get_vocab(), lowercase)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE vocabulary (Radford et al. 2019, section 2.2) and returns RoBERTa's tokenizer with it.

    Ids 0 to 4 are <s> <pad> </s> <unk> <mask>, then come the 256 bytes, then pieces as they were learnt. Nothing is
    folded: every text comes back from its ids. The same text gives the same vocabulary.

    Raises:
        JaxptmError: the texts hold no word, or `vocab_size` has no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    least = len(BPE_SPECIAL) + 256
    if vocab_size < least:
        raise JaxptmError(f"data.vocab_size {vocab_size} is too small: special tokens and bytes alone take {least}.")
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    words: Counter[str] = Counter()
    for text in texts:
        for line in filter(None, map(str.strip, text.split("\n"))):
            words.update(WORD_BORDER.split(f" {line}"))  # as `Encoder` has it: with a space between sentences
    pieces: Counter[str] = Counter()
    for word, count in words.items():
        for piece, _ in split(word):
            pieces[piece] += count
    if not pieces:
        raise JaxptmError("cannot train a tokenizer: the text holds no words.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # the pieces spell bytes, none of them as white space
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=BPE_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_repeated(pieces), trainer=trainer)
    model = json.loads(backend.to_str())["model"]
    return _roberta(model["vocab"], [tuple(merge) for merge in model["merges"]])


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hex) of everything that decides token ids; padding and truncation settings are left out."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    fields.pop("padding", None)
    fields.pop("truncation", None)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> SpecialTokens:
    """The ids that frame a row.

    Raises:
        JaxptmError: the tokenizer lacks one of them.
    """
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in SpecialTokens._fields}
    missing = [name for name, token in ids.items() if token is None]
    if missing:
        raise JaxptmError(f"the tokenizer has no {', '.join(missing)} token, which rows of text are framed with.")
    return SpecialTokens(**ids)


def filler(tokenizer: PreTrainedTokenizerFast) -> int:
    """An id for places that the attention mask hides: padding or, where there is none (GPT-2), the end of text.

    Raises:
        JaxptmError: the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise JaxptmError(
        "the tokenizer has neither a padding token nor an end of text, which short rows are filled up with; set "
        "`pad_token` in its tokenizer_config.json."
    )


def _wordpiece(vocab: dict[str, int], lowercase: bool) -> PreTrainedTokenizerFast:
    from transformers import BertTokenizerFast

    return BertTokenizerFast(vocab=vocab, do_lower_case=lowercase)


def _roberta(vocab: dict[str, int], merges: list[tuple[str, ...]]) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken
    from transformers import RobertaTokenizer

    # The space in front of a mask belongs to the token that it hides.
    return RobertaTokenizer(vocab=vocab, merges=merges, mask_token=AddedToken("<mask>", lstrip=True, special=True))


def _refuse_sentencepiece(path: Path) -> None:
    for name in SENTENCEPIECE:
        if (path / name).exists() and not (path / "tokenizer.json").exists():
            raise JaxptmError(
                f"{path / name}: a SentencePiece model does not open by itself; put the tokenizer.json beside it that "
                "its repository on the Hugging Face hub also holds."
            )


def _byte_bpe(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a bare `vocab.json` and `merges.txt`: RoBERTa's where its special tokens are in there."""
    from transformers import GPT2Tokenizer

    file = path / "vocab.json"
    try:
        vocab = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(vocab, dict) or not all(isinstance(index, int) for index in vocab.values()):
            raise ValueError("tokens and their ids expected")
        file = path / "merges.txt"
        lines = file.read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        bad = next((merge for merge in merges if len(merge) != 2), None)
        if bad is not None:
            raise ValueError(f"{' '.join(bad)!r} is no pair of pieces")
        if all(token in vocab for token in BPE_SPECIAL):
            return _roberta(vocab, merges)
        if END_OF_TEXT in vocab:
            return GPT2Tokenizer(vocab=vocab, merges=merges)
    except Exception as error:  # tokenizers raises bare Exception
        reason = str(error).splitlines()[0]
        raise JaxptmError(f"{file}: belongs to no byte-level BPE: {reason}; fetch both files anew.") from error
    raise JaxptmError(
        f"{path / 'vocab.json'}: has neither RoBERTa's special tokens ({' '.join(BPE_SPECIAL)}) nor GPT-2's "
        f"{END_OF_TEXT}; save the tokenizer with transformers (tokenizer.json and tokenizer_config.json)."
    )


def _from_json(path: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise JaxptmError(f"{path}: is no tokenizer.json: {str(error).splitlines()[0]}") from error
    # A lone tokenizer.json does not say which token plays which part: go by the names of BERT, RoBERTa and GPT-2.
    vocab = tokenizer.get_vocab()
    names = {"pad": ["[PAD]", "<pad>"], "unk": ["[UNK]", "<unk>"], "mask": ["[MASK]", "<mask>"]}
    names |= {"cls": ["[CLS]", "<s>"], "sep": ["[SEP]", "</s>"]}
    names |= {"bos": ["<s>", END_OF_TEXT], "eos": ["</s>", END_OF_TEXT]}
    for part, spellings in names.items():
        for spelling in spellings:
            if getattr(tokenizer, f"{part}_token") is None and spelling in vocab:
                setattr(tokenizer, f"{part}_token", spelling)
    return tokenizer


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise JaxptmError(f"{path}: the vocabulary is not UTF-8 text (byte {error.start}).") from error
    if lines[-1] == "":
        lines.pop()
    vocab = {token: index for index, token in enumerate(lines)}
    missing = [token for token in SPECIAL if token not in vocab]
    if missing:
        raise JaxptmError(f"{path}: is no WordPiece vocabulary (a token a line): {', '.join(missing)} missing.")
    return vocab


def _repeated(pieces: Counter[str]) -> Iterable[str]:
    """Each piece as often as it was counted, in strings of at most about a megabyte."""
    for piece, count in sorted(pieces.items()):
        step = max(1, 2**20 // (len(piece) + 1))
        for start in range(0, count, step):
            yield f"{piece} " * min(step, count - start)
