"""Vocabularies of characters, which CTC writes with: given by a checkpoint or made from transcripts."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxptm.errors import JaxptmError

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
"""Of a vocabulary made here, with the ids of wav2vec2-base-960h; `<pad>` is CTC's blank."""
DELIMITER = "|"
"""Stands for the space."""
PHONEMES = "Wav2Vec2PhonemeCTCTokenizer"
"""The class of tokenizers whose symbols are phonemes, written with spaces between them."""


@dataclass(frozen=True)
class Characters:
    """A vocabulary of characters and the rules that bring a transcript to it.

    A transcript is normalised so: Unicode NFC; the characters of `ignore` are taken out; runs of white space become one
    space, none at the ends; letters go to upper case where the vocabulary has upper case alone, and to lower case
    where it has lower case alone.

    Transcripts are encoded by single characters. Symbols of several, such as "CH", are never the target of training; a
    model that says one has it spelled all the same.

    Attributes:
        ids: character -> id, special tokens left out; " " is the delimiter.
        blank: id of CTC's blank, the padding token.
        ignore: characters that are taken out of transcripts.
        tokenizer: of transformers (Wav2Vec2CTCTokenizer), with the same vocabulary.
    """

    ids: dict[str, int]
    blank: int
    ignore: str
    tokenizer: Any

    @classmethod
    def load(cls, name: str | Path, ignore: str = "") -> Characters:
        """From a `vocab.json`, or a directory or hub name that holds one with its tokenizer_config.json.

        Raises:
            JaxptmError: there is none, or it is not one of characters.
        """
        from transformers import Wav2Vec2CTCTokenizer
        from transformers.models.auto.tokenization_auto import get_tokenizer_config

        path = Path(name).expanduser()
        try:
            if path.is_file():
                return cls._of(Wav2Vec2CTCTokenizer(str(path)), ignore)
            source = str(path if path.is_dir() else name)
            tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(source)
            if get_tokenizer_config(source).get("tokenizer_class") == PHONEMES:
                raise ValueError(f"its `tokenizer_class: {PHONEMES}` writes phonemes, which are not supported")
            return cls._of(tokenizer, ignore)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise JaxptmError(
                f"data.vocabulary: {name} holds no vocabulary of characters (a vocab.json of token -> id): {reason}"
            ) from error

    @classmethod
    def of_texts(cls, texts: Iterable[str], ignore: str = "") -> Characters:
        """All characters of `texts` in upper case, sorted, behind the special tokens.

        Raises:
            JaxptmError: the texts hold no character, or one that stands for the space.
        """
        upper = cls({"A": 0}, 0, ignore, None)
        found = sorted({character for text in texts for character in upper.normal(text)} - {" "})
        if not found:
            raise JaxptmError(
                "data.vocabulary: characters needs transcripts, and data.train has none: name a manifest with them, or "
                "leave data.vocabulary out."
            )
        if DELIMITER in found:
            raise JaxptmError(f"a transcript of data.train holds {DELIMITER!r}, which stands for the space: remove it.")
        vocabulary = {token: i for i, token in enumerate([*SPECIAL, DELIMITER, *found])}
        with TemporaryDirectory() as directory:  # transformers takes a vocabulary from a file alone
            path = Path(directory) / "vocab.json"
            path.write_text(json.dumps(vocabulary), encoding="utf-8")
            return cls.load(path, ignore)

    @classmethod
    def _of(cls, tokenizer: Any, ignore: str) -> Characters:
        special = {*tokenizer.all_special_tokens, tokenizer.word_delimiter_token}
        vocabulary = tokenizer.get_vocab()
        ids = {token: i for token, i in vocabulary.items() if token not in special and len(token) == 1}
        if not ids or tokenizer.pad_token_id is None:
            raise ValueError("it has no characters, or no padding token for CTC's blank")
        if tokenizer.word_delimiter_token in vocabulary:
            ids[" "] = vocabulary[tokenizer.word_delimiter_token]
        return cls(ids, tokenizer.pad_token_id, ignore, tokenizer)

    def __len__(self) -> int:
        return len(self.tokenizer)

    @cached_property
    def spelling(self) -> dict[int, str]:
        """What each symbol spells: itself, the delimiter a space; special tokens are not among them."""
        special = self.tokenizer.all_special_tokens
        spelled = {i: token for token, i in self.tokenizer.get_vocab().items() if token not in special}
        return spelled | {i: character for character, i in self.ids.items()}

    @property
    def outputs(self) -> int:
        """How many a model needs; transformers adds special tokens and the delimiter behind them where they lack."""
        return 1 + max(self.blank, *(i for i, spelled in self.spelling.items() if spelled != " "))

    def decoded(self, text: str) -> str:
        """What is spelled as the tokenizer writes it: in lower case where it has `do_lower_case`."""
        return text.lower() if self.tokenizer.do_lower_case else text

    def save(self, directory: str | Path) -> None:
        """Writes a directory that transformers' Wav2Vec2CTCTokenizer opens."""
        self.tokenizer.save_pretrained(directory)

    def normal(self, text: str) -> str:
        """The text by the rules of the class."""
        text = unicodedata.normalize("NFC", text)
        if self.ignore:
            text = text.translate({ord(character): None for character in self.ignore})
        # Of a few letters, such as ΰ, the other case is several characters that compose again.
        return " ".join(unicodedata.normalize("NFC", self._case(text)).split())

    @cached_property
    def _case(self) -> Callable[[str], str]:
        # By what changes: º is a lower-case letter that has no upper case.
        upper = any(character.lower() != character for character in self.ids)
        lower = any(character.upper() != character for character in self.ids)
        return str if upper == lower else str.upper if upper else str.lower

    def outside(self, text: str) -> list[str]:
        """The characters of a transcript that the vocabulary lacks, each once."""
        return sorted(set(self.normal(text)) - self.ids.keys())

    def encode(self, text: str) -> Int32[np.ndarray, " U"]:
        """The ids of a transcript that has no character `outside`."""
        return np.array([self.ids[character] for character in self.normal(text)], np.int32)
