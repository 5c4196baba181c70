"""A corpus on disk: text in, memory-mapped shards of token ids out.

A prepared directory holds

    tokenizer/                 what the text was tokenised with, as transformers saves it
    shards/<split>-<key>/      one for each source: tokens.npy, sentence_ends.npy, document_ends.npy, record.json
    manifest.json              written last: the shards of each split in order, and their counts

`tokens` are the ids of the whole source, with the separator token after each document. `sentence_ends` are offsets into
`tokens` (a document's last sentence includes the separator), `document_ends` are offsets into `sentence_ends`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from jaxptm.data.shards import damage_of
from jaxptm.errors import JaxptmError

FORMAT = 1
"""Version of the layout and of the way text is cut; another version is prepared anew."""

Indices = Int[np.ndarray, "*shape"]


@dataclass(frozen=True)
class Shard:
    """One source's tokens, as its record.json tells."""

    name: str
    source: str
    stamp: list[int | str]
    text_field: str
    tokenizer: str
    documents: int
    sentences: int
    tokens: int
    bytes: int
    """Of UTF-8 text."""
    max_token: int
    files: dict[str, int]
    """Sizes in bytes."""
    digest: str = ""
    """Of the tokens and the borders between them; shards of jaxptm before 2026-11-28 have none."""
    format: int = FORMAT


@dataclass(frozen=True)
class Manifest:
    """What a prepared directory holds."""

    request: dict[str, Any]
    """The settings and the sources' stamps that it was prepared from."""
    tokenizer: str
    """`tokenizer_hash` of its tokenizer."""
    vocab_size: int
    separator: int
    """Id of the token after each document."""
    splits: dict[str, list[Shard]]
    format: int = FORMAT

    def total(self, count: str, split: str = "train") -> int:
        """Sum over shards of `documents`, `sentences`, `tokens` (separators included) or `bytes`."""
        return sum(getattr(shard, count) for shard in self.splits[split])

    def summary(self, split: str) -> str:
        """What the split holds, for people."""
        counts = ("documents", "sentences", "tokens", "bytes")
        return ", ".join(f"{self.total(count, split):,} {count}" for count in counts)

    def damage(self, directory: str | Path) -> str | None:
        """The first shard file that is missing or has another size than when it was written."""
        shards = (shard for shards in self.splits.values() for shard in shards)
        return next(
            filter(None, (damage_of(Path(directory) / "shards" / shard.name, shard.files) for shard in shards)), None
        )

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Raises JaxptmError where there is none, or one of another format."""
        path = Path(directory) / "manifest.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields["format"] != FORMAT:
                raise JaxptmError(
                    f"{path}: has format {fields['format']}, this jaxptm reads {FORMAT}: prepare it again."
                )
            shards = {split: [Shard(**shard) for shard in rows] for split, rows in fields.pop("splits").items()}
            return cls(**fields, splits=shards)
        except FileNotFoundError as error:
            raise JaxptmError(
                f"{directory}: holds no prepared corpus (no manifest.json): run `jaxptm prepare`."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JaxptmError(f"{path}: is damaged: remove it and run `jaxptm prepare` again.") from error


@dataclass(frozen=True)
class Corpus:
    """One split's shards (memory-mapped) seen as one stream of tokens, or a part of its documents.

    The stream's boundaries are held in memory: 8 bytes a sentence and a document.
    """

    shards: tuple[np.ndarray, ...]
    """Token ids (uint16 or uint32) of each shard."""
    shard_ends: tuple[int, ...]
    """Stream position where each shard ends."""
    sentence_ends: Int[np.ndarray, " sentences"]
    """Stream position after each sentence; a document's last sentence includes the separator."""
    document_ends: Int[np.ndarray, " documents"]
    """Number of the sentence after each document."""
    ranges: Int[np.ndarray, "R 2"]
    """First and last + 1 document of each contiguous range of this view; no range crosses a shard."""
    vocab_size: int
    separator: int

    @classmethod
    def open(cls, directory: str | Path, split: str = "train") -> Corpus:
        """Opens a prepared split.

        Raises:
            JaxptmError: nothing is prepared there, it has no such split, or a shard is damaged or holds ids beyond the
                vocabulary (which a model would turn into NaN).
        """
        manifest = Manifest.load(directory)
        if split not in manifest.splits:
            raise JaxptmError(f"{directory}: holds no {split!r} text, only: {', '.join(manifest.splits)}.")
        shards, sentence_ends, document_ends, ranges = [], [], [], []
        tokens = sentences = documents = 0
        for shard in manifest.splits[split]:
            if shard.documents == 0:
                continue
            arrays = _open_shard(Path(directory) / "shards" / shard.name, shard, manifest)
            shards.append(arrays[0])
            sentence_ends.append(arrays[1] + tokens)
            document_ends.append(arrays[2] + sentences)
            ranges.append((documents, documents + shard.documents))
            tokens, sentences, documents = tokens + shard.tokens, sentences + shard.sentences, ranges[-1][1]
        return cls(
            tuple(shards),
            tuple(np.cumsum([len(shard) for shard in shards]).tolist()),
            np.concatenate(sentence_ends),
            np.concatenate(document_ends),
            np.array(ranges, np.int64),
            manifest.vocab_size,
            manifest.separator,
        )

    @property
    def documents(self) -> Int[np.ndarray, " documents"]:
        """Numbers of this view's documents.

        Raises:
            JaxptmError: there are none.
        """
        if len(self.ranges) == 0:
            raise JaxptmError("there is no text in this part of the corpus (data.eval_fraction: 0 holds nothing out).")
        return np.concatenate([np.arange(first, last) for first, last in self.ranges])

    @property
    def token_count(self) -> int:
        """Tokens in this view, separators included."""
        first, last = (self.document_start(documents) for documents in self.ranges.T)
        return int(np.sum(self.sentence_start(last) - self.sentence_start(first)))

    def sentence_start(self, sentences: Indices) -> Indices:
        """Stream position where the sentences start."""
        return np.where(sentences > 0, self.sentence_ends[sentences - 1], 0)

    def document_start(self, documents: Indices) -> Indices:
        """Number of the documents' first sentence."""
        return np.where(documents > 0, self.document_ends[documents - 1], 0)

    def tokens(self, start: int, end: int) -> UInt[np.ndarray, " tokens"]:
        """Ids of the stream from `start` up to `end`, within one shard; a view of the file."""
        shard = bisect_right(self.shard_ends, start)
        offset = self.shard_ends[shard - 1] if shard else 0
        return self.shards[shard][start - offset : end - offset]

    def split(self, eval_fraction: float) -> tuple[Corpus, Corpus]:
        """Parts the documents in two views: train, and eval with the last `eval_fraction` of each shard.

        Shards too small for a document of their own are counted together. Where `eval_fraction` is not 0, at least two
        documents are held out, since a random next sentence needs another document to come from.

        Raises:
            JaxptmError: fewer than two documents are left for training.
        """
        if eval_fraction == 0:
            return self, replace(self, ranges=np.zeros((0, 2), np.int64))
        sizes = self.ranges[:, 1] - self.ranges[:, 0]
        held = np.diff(np.floor(np.cumsum(sizes) * eval_fraction + 1e-9).astype(np.int64), prepend=0)
        while held.sum() < min(2, sizes.sum()):
            held[np.argmax(sizes - held)] += 1
        held = np.minimum(held, sizes)
        if sizes.sum() - held.sum() < 2:
            raise JaxptmError(
                f"the corpus has {sizes.sum()} document(s), too few to hold {held.sum()} out: documents are parted by "
                "blank lines; give more text, or data.eval_files, or data.eval_fraction: 0."
            )
        border = self.ranges[:, 1] - held
        train = np.stack([self.ranges[:, 0], border], axis=1)
        heldout = np.stack([border, self.ranges[:, 1]], axis=1)
        return tuple(replace(self, ranges=part[part[:, 0] < part[:, 1]]) for part in (train, heldout))  # type: ignore[return-value]


def _open_shard(path: Path, shard: Shard, manifest: Manifest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    damage = damage_of(path, shard.files)
    if damage is None:
        arrays = []
        for name in ("tokens", "sentence_ends", "document_ends"):
            try:
                # Plain arrays over the mapping: numpy's memmap class makes every small slice slow.
                arrays.append(np.asarray(np.load(path / f"{name}.npy", mmap_mode="r")))
            except ValueError:
                damage = f"{path / name}.npy: is no array file"
        if damage is None:
            tokens, sentence_ends, document_ends = arrays
            ordered = all(
                len(ends) == count and ends[0] > 0 and ends[-1] == last and np.all(ends[1:] > ends[:-1])
                for ends, count, last in (
                    (sentence_ends, shard.sentences, shard.tokens),
                    (document_ends, shard.documents, shard.sentences),
                )
            )
            if not ordered or len(tokens) != shard.tokens or shard.tokenizer != manifest.tokenizer:
                damage = f"{path}: its arrays do not fit together"
            elif shard.max_token >= manifest.vocab_size:
                damage = f"{path}: holds token {shard.max_token}, beyond the vocabulary of {manifest.vocab_size}"
    if damage is not None:
        raise JaxptmError(f"{damage}. Remove {path} and run `jaxptm prepare` again.")
    return tokens, sentence_ends, document_ends
