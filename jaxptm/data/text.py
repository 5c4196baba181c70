"""Rows of text for pre-training, as pure functions of (seed, index): BERT's pairs, RoBERTa's sentences, GPT-2's stream.

A source plans an epoch once, in numpy over the whole corpus, as boundaries in the token stream; row `index` is then
copied out of the memory-mapped shards. No copy of the corpus is written, and any row is reached directly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int

from jaxptm.data.corpus import Corpus
from jaxptm.data.tokenizer import SpecialTokens
from jaxptm.errors import JaxptmError

STRETCH = 1024
"""Sentences of a document that one lane of the pair plan walks: keeps the plan parallel where documents are huge."""

Plan = TypeVar("Plan", "PairPlan", "PackedPlan")


class PairPlan(NamedTuple):
    """Stream positions of the segments A and B of each row, truncated to fit, and which B are random or before A."""

    a_start: Int[np.ndarray, " N"]
    a_end: Int[np.ndarray, " N"]
    b_start: Int[np.ndarray, " N"]
    b_end: Int[np.ndarray, " N"]
    random_next: Bool[np.ndarray, " N"]


class PackedPlan(NamedTuple):
    """Stream positions of each row's tokens."""

    start: Int[np.ndarray, " N"]
    end: Int[np.ndarray, " N"]


class TextSource(ABC, Generic[Plan]):
    """Rows of a corpus without end: row `index` belongs to epoch `index // len(source)`.

    Each epoch visits its rows in an order of its own.
    """

    def __init__(self, corpus: Corpus, pad: int, sequence_length: int, seed: int):
        self.corpus = corpus
        self._documents = corpus.documents
        self.pad = pad
        self.sequence_length = sequence_length
        self.seed = seed
        self._lock = Lock()
        self._epochs: OrderedDict[int, tuple[Plan, np.ndarray]] = OrderedDict()
        self._length = len(self._epoch(0)[1])

    @abstractmethod
    def plan(self, epoch: int) -> Plan:
        """Boundaries of all rows of an epoch, in the order of the walk through the corpus."""

    @abstractmethod
    def _fill(self, plan: Plan, row: int, into: dict[str, np.ndarray], at: int) -> None:
        """Writes row `row` of the plan to row `at` of the zeroed batch `into`."""

    @abstractmethod
    def _empty(self, rows: int) -> dict[str, np.ndarray]:
        """A batch of padding."""

    @abstractmethod
    def _used(self, plan: Plan) -> Int[np.ndarray, " N"]:
        """Tokens of each row, special ones included."""

    def __len__(self) -> int:
        """Rows of epoch 0; those of another epoch, a fraction of a percent off, are cut or wrapped to this."""
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row: the fields of `rows` without their first axis."""
        return {name: values[0] for name, values in self.rows([index]).items()}

    def rows(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The rows of these indices (any not below 0) as a batch: int32 arrays [B, L], or [B] for labels."""
        batch = self._empty(len(indices))
        for at, index in enumerate(indices):
            epoch, position = divmod(index, self._length)
            plan, order = self._epoch(epoch)
            self._fill(plan, int(order[position % len(order)]), batch, at)
        return batch

    def token_share(self) -> float:
        """Share of the positions of epoch 0 that hold tokens, not padding."""
        return float(np.mean(self._used(self._epoch(0)[0]))) / self.sequence_length

    def _epoch(self, epoch: int) -> tuple[Plan, np.ndarray]:
        """Plan and order of an epoch; the two newest are kept, for threads that read ahead."""
        with self._lock:
            if epoch not in self._epochs:
                plan = self.plan(epoch)
                order = self._random(epoch, 0).permutation(len(plan[0]))
                self._epochs[epoch] = plan, order
                while len(self._epochs) > 2:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, stream])


class SentencePairs(TextSource[PairPlan]):
    """BERT's rows, [CLS] A [SEP] B [SEP] (Devlin et al. 2019, section 3.1, and its create_pretraining_data.py).

    Sentences of a document are gathered up to a target length. A is a random number of them from the front; B is the
    rest or, half the time and where there is no rest, text from a random place of another document, in which case the
    rest is put back and the walk goes on after A. A pair that is too long loses tokens of its longer segment, each at
    the front or the back by chance. With `swapped`, B is always the rest, and half the time the two change places (the
    sentence order of Lan et al. 2020, section 3.1; where there is no rest, B is random text, as in the reference
    albert/create_pretraining_data.py). The target is drawn for each pair (the reference draws it for each document):
    `sequence_length - 3`, or with `short_probability` a uniform length from 2 up to that.

    Fields: `input_ids`, `token_type_ids`, `attention_mask` [B, L], and `next_sentence_label` [B], 0 where B follows A
    and 1 where it is random or the two are swapped (as in transformers).

    Raises:
        JaxptmError: there is only one document.
    """

    def __init__(
        self,
        corpus: Corpus,
        special: SpecialTokens,
        sequence_length: int,
        seed: int,
        short_probability: float = 0.1,
        swapped: bool = False,
    ):
        self.special = special
        self.short_probability = short_probability
        self.swapped = swapped
        if len(corpus.documents) == 1:
            raise JaxptmError(
                "sentence pairs need two documents at least, and this part of the corpus has one: a random next "
                "sentence comes from another document. Part documents by blank lines, or use data.format: packed."
            )
        super().__init__(corpus, special.pad, sequence_length, seed)

    def plan(self, epoch: int) -> PairPlan:
        """See `TextSource.plan`. All documents are walked in lockstep: a round makes the next pair of each of them."""
        random = self._random(epoch, 1)
        corpus, documents = self.corpus, self._documents
        most = self.sequence_length - 3
        document, position, lane_end = self._lanes()
        rounds = []
        while len(position):
            count = len(position)
            target = np.where(
                random.random(count) < self.short_probability, random.integers(2, most, count, endpoint=True), most
            )
            a_start = corpus.sentence_start(position)
            end = np.minimum(self._reach(a_start + target), lane_end)
            taken = end - position
            a_sentences = np.where(taken > 1, random.integers(1, np.maximum(taken, 2)), 1)
            alone = taken == 1
            random_next = alone if self.swapped else (random.random(count) < 0.5) | alone
            a_end = self._text_end(documents[document], position + a_sentences)
            # Another document, uniformly: skip over the own one.
            other = random.integers(0, len(documents) - 1, count)
            other = documents[other + (other >= document)]
            first, last = corpus.document_start(other), corpus.document_ends[other]
            from_sentence = random.integers(first, last)
            b_start = np.where(
                random_next, corpus.sentence_start(from_sentence), corpus.sentence_start(position + a_sentences)
            )
            wanted = b_start + np.maximum(target - (a_end - a_start), 1)
            b_end = np.where(
                random_next,
                self._text_end(other, np.minimum(self._reach(wanted), last)),
                self._text_end(documents[document], end),
            )
            rounds.append(PairPlan(a_start, a_end, b_start, b_end, random_next))
            position = np.where(random_next, position + a_sentences, end)
            going = position < lane_end
            document, position, lane_end = document[going], position[going], lane_end[going]
        plan = _truncate(PairPlan(*(np.concatenate(parts) for parts in zip(*rounds, strict=True))), most, random)
        return _swap(plan, ~plan.random_next & (random.random(len(plan.a_start)) < 0.5)) if self.swapped else plan

    def _lanes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each document cut to stretches of sentences: index in `_documents`, first sentence, last sentence + 1."""
        first, last = self.corpus.document_start(self._documents), self.corpus.document_ends[self._documents]
        stretches = -(-(last - first) // STRETCH)
        document = np.repeat(np.arange(len(first)), stretches)
        number = np.arange(len(document)) - np.repeat(np.cumsum(stretches) - stretches, stretches)
        start = first[document] + number * STRETCH
        return document, start, np.minimum(start + STRETCH, last[document])

    def _reach(self, position: np.ndarray) -> np.ndarray:
        """Number of the sentence after the first one that ends at or beyond the stream position."""
        return np.searchsorted(self.corpus.sentence_ends, position) + 1

    def _text_end(self, document: np.ndarray, sentence: np.ndarray) -> np.ndarray:
        """Stream position where the text before `sentence` ends: the document's separator is no part of it."""
        return self.corpus.sentence_ends[sentence - 1] - (sentence == self.corpus.document_ends[document])

    def _empty(self, rows: int) -> dict[str, np.ndarray]:
        shape = (rows, self.sequence_length)
        return {
            "input_ids": np.full(shape, self.pad, np.int32),
            "token_type_ids": np.zeros(shape, np.int32),
            "attention_mask": np.zeros(shape, np.int32),
            "next_sentence_label": np.zeros(rows, np.int32),
        }

    def _fill(self, plan: PairPlan, row: int, into: dict[str, np.ndarray], at: int) -> None:
        a = self.corpus.tokens(int(plan.a_start[row]), int(plan.a_end[row]))
        b = self.corpus.tokens(int(plan.b_start[row]), int(plan.b_end[row]))
        middle, end = len(a) + 2, len(a) + len(b) + 3
        ids = into["input_ids"][at]
        ids[0] = self.special.cls
        ids[1 : middle - 1] = a
        ids[middle - 1] = self.special.sep
        ids[middle : end - 1] = b
        ids[end - 1] = self.special.sep
        into["token_type_ids"][at, middle:end] = 1
        into["attention_mask"][at, :end] = 1
        into["next_sentence_label"][at] = plan.random_next[row]

    def _used(self, plan: PairPlan) -> np.ndarray:
        return plan.a_end - plan.a_start + plan.b_end - plan.b_start + 3


class RunningText(TextSource[PackedPlan]):
    """Rows that are stretches of the stream, over the ends of documents, where it has a separator. No token is lost.

    Fields [B, L]: `input_ids`, `attention_mask`, and with `separate_documents` also `segment_ids`: 1, 2, ... for the
    documents in the row, 0 for padding.
    """

    frame: int
    """Tokens that stand before a row's text, and as many behind it."""

    def __init__(self, corpus: Corpus, pad: int, sequence_length: int, seed: int, separate_documents: bool):
        self.separate_documents = separate_documents
        self._plan: PackedPlan | None = None
        super().__init__(corpus, pad, sequence_length, seed)

    def plan(self, epoch: int = 0) -> PackedPlan:
        """See `TextSource.plan`: the same for each epoch, only their orders differ."""
        if self._plan is None:
            ranges = [self._pack(first, last) for first, last in self.corpus.ranges.tolist()]
            self._plan = PackedPlan(*(np.concatenate(parts) for parts in zip(*ranges, strict=True)))
        return self._plan

    @abstractmethod
    def _pack(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of the rows of a range of documents."""

    def _empty(self, rows: int) -> dict[str, np.ndarray]:
        shape = (rows, self.sequence_length)
        batch = {"input_ids": np.full(shape, self.pad, np.int32), "attention_mask": np.zeros(shape, np.int32)}
        return batch | ({"segment_ids": np.zeros(shape, np.int32)} if self.separate_documents else {})

    def _fill(self, plan: PackedPlan, row: int, into: dict[str, np.ndarray], at: int) -> None:
        tokens = self.corpus.tokens(int(plan.start[row]), int(plan.end[row]))
        first, end = self.frame, self.frame + len(tokens)
        into["input_ids"][at, first:end] = tokens
        into["attention_mask"][at, : end + self.frame] = 1
        if self.separate_documents:
            # A separator belongs to the document it ends, and the frame to the documents that it touches.
            segments = into["segment_ids"][at]
            segments[: first + 1] = 1
            segments[first + 1 : end] = 1 + np.cumsum(tokens[:-1] == self.corpus.separator)
            segments[end : end + self.frame] = segments[end - 1]

    def _used(self, plan: PackedPlan) -> np.ndarray:
        return plan.end - plan.start + 2 * self.frame


class TokenStream(RunningText):
    """GPT-2's rows: every `sequence_length` tokens of the stream, with nothing around them (Radford et al. 2019, 2.3).

    The last row of each stretch of the corpus is filled up with padding.
    """

    frame = 0

    def __init__(self, corpus: Corpus, pad: int, sequence_length: int, seed: int, separate_documents: bool = False):
        super().__init__(corpus, pad, sequence_length, seed, separate_documents)

    def _pack(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        start, end = (
            int(self.corpus.sentence_start(self.corpus.document_start(np.array(first)))),
            int(self.corpus.sentence_ends[self.corpus.document_ends[last - 1] - 1]),
        )
        starts = np.arange(start, end, self.sequence_length)
        return starts, np.append(starts[1:], end)


class PackedSentences(RunningText):
    """RoBERTa's FULL-SENTENCES rows, [CLS] text [SEP] (Liu et al. 2019, section 4.2).

    Whole sentences follow each other up to `sequence_length - 2` tokens. A sentence longer than a row starts a row and
    goes on in the next ones.
    """

    frame = 1

    def __init__(
        self, corpus: Corpus, special: SpecialTokens, sequence_length: int, seed: int, separate_documents: bool = False
    ):
        self.special = special
        super().__init__(corpus, special.pad, sequence_length, seed, separate_documents)

    def _pack(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of the rows of a range of documents."""
        capacity = self.sequence_length - 2
        sentences = np.arange(
            int(self.corpus.document_start(np.array(first))), int(self.corpus.document_ends[last - 1])
        )
        starts, ends = self.corpus.sentence_start(sentences), self.corpus.sentence_ends[sentences]
        # Pieces that are not cut: sentences, the longer ones in parts of a row's capacity.
        parts = -(-(ends - starts) // capacity)
        number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        piece_starts = np.repeat(starts, parts) + number * capacity
        piece_ends = np.append(piece_starts[1:], ends[-1])
        # From each piece, the first that no longer fits in a row begun there; then the chain from the first piece.
        following = np.searchsorted(piece_ends, piece_starts + capacity, "right").tolist()
        rows = [0]
        while rows[-1] < len(following):
            rows.append(following[rows[-1]])
        row_starts = piece_starts[rows[:-1]]
        return row_starts, np.append(row_starts[1:], ends[-1])

    def _fill(self, plan: PackedPlan, row: int, into: dict[str, np.ndarray], at: int) -> None:
        super()._fill(plan, row, into, at)
        into["input_ids"][at, 0] = self.special.cls
        into["input_ids"][at, plan.end[row] - plan.start[row] + 1] = self.special.sep


def _swap(plan: PairPlan, rows: np.ndarray) -> PairPlan:
    """A and B change places in these rows, which is what there is to be found out."""

    def either(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        return np.where(rows, theirs, ours)

    return PairPlan(
        either(plan.a_start, plan.b_start),
        either(plan.a_end, plan.b_end),
        either(plan.b_start, plan.a_start),
        either(plan.b_end, plan.a_end),
        plan.random_next | rows,
    )


def _truncate(plan: PairPlan, most: int, random: np.random.Generator) -> PairPlan:
    """Shortens pairs to `most` tokens, as if one by one from the longer segment (or B), at front or back by chance."""
    a, b = plan.a_end - plan.a_start, plan.b_end - plan.b_start
    excess = np.maximum(a + b - most, 0)
    uneven = np.minimum(np.abs(a - b), excess)  # all of these come from the longer one, the others from B, A, B, ...
    even = excess - uneven
    cut_a = np.where(a > b, uneven, 0) + even // 2
    cut_b = excess - cut_a
    front_a, front_b = random.binomial(cut_a, 0.5), random.binomial(cut_b, 0.5)
    return plan._replace(
        a_start=plan.a_start + front_a,
        a_end=plan.a_end - (cut_a - front_a),
        b_start=plan.b_start + front_b,
        b_end=plan.b_end - (cut_b - front_b),
    )
