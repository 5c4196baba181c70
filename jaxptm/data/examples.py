"""Labelled examples of different length, and batches of them that have few shapes.

XLA compiles a step once for each shape of its input. Rows are therefore padded not to the longest of their batch but to
one of a few lengths, chosen so that least is padded, and a batch is made of rows that go to the same length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxptm.config import IGNORED

SHAPES = 6
"""Lengths that the examples of a data set are padded to, at most."""
WORTH = 0.03
"""Share of all positions that a further length must save; compiling a step for it takes as long as dozens of steps."""
LENGTH_STEP = 8
"""Every such length is a multiple of this."""


@dataclass(frozen=True)
class Examples:
    """Encoded examples, in the order of their file.

    Attributes:
        tokens: name -> int32, the tokens of all rows one after the other: `input_ids`, `token_type_ids` where the
            tokenizer makes them, and `labels` where tokens are labelled.
        ends: [N * max(choices, 1)] where each row ends.
        targets: name -> [N, ...], one value an example: `labels`, or `start_positions` and `end_positions`.
        choices: rows of an example of multiple choice; 0 where an example is one row.
        cut: rows whose text was longer, and of which the tokenizer left the rest out.
    """

    tokens: Mapping[str, Int[np.ndarray, " T"]]
    ends: Int[np.ndarray, " R"]
    targets: Mapping[str, np.ndarray]
    choices: int = 0
    cut: int = 0

    @classmethod
    def of(
        cls, encoded: Mapping[str, Any], targets: Mapping[str, np.ndarray] | None = None, choices: int = 0
    ) -> Examples:
        """From what a tokenizer returns, or as lists of token ids by name; of other names none is kept."""
        names = [name for name in ("input_ids", "token_type_ids", "labels") if name in encoded]
        rows = encoded["input_ids"]
        ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        count = int(ends[-1]) if len(ends) else 0
        tokens = {name: np.fromiter(chain.from_iterable(encoded[name]), np.int32, count) for name in names}
        # Pure Python tokenizers have no encodings, and do not tell what they leave out.
        cut = sum(bool(row.overflowing) for row in getattr(encoded, "encodings", None) or ())
        return cls(tokens, ends, dict(targets or {}), choices, cut)

    def __len__(self) -> int:
        return len(self.ends) // max(self.choices, 1)

    @property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of each example; of its longest choice."""
        lengths = np.diff(self.ends, prepend=0)
        return lengths.reshape(-1, self.choices).max(axis=1, initial=0) if self.choices else lengths

    def batch(self, indices: Sequence[int] | np.ndarray, length: int, pad: int) -> dict[str, np.ndarray]:
        """Some examples as a batch: tokens [B, L], or [B, C, L] with choices, and targets [B, ...].

        Args:
            indices: [B]; where one is below 0, the row is nothing but padding.
            length: L.
            pad: the id in `input_ids` behind the last token; other names have 0 there, and `labels` -100.
        """
        each = max(self.choices, 1)
        shape = (len(indices), self.choices, length) if self.choices else (len(indices), length)
        fills = {"input_ids": pad, "labels": IGNORED}
        batch = {name: np.full(shape, fills.get(name, 0), np.int32) for name in self.tokens}
        batch["attention_mask"] = np.zeros(shape, np.int32)
        for at, index in enumerate(indices):
            for choice in range(each) if index >= 0 else ():
                row = int(index) * each + choice
                start, end = (int(self.ends[row - 1]) if row else 0), int(self.ends[row])
                place = (at, choice) if self.choices else (at,)
                for name, values in self.tokens.items():
                    batch[name][place][: end - start] = values[start:end]
                batch["attention_mask"][place][: end - start] = 1
        there = np.asarray(indices) >= 0
        for name, values in self.targets.items():
            batch[name] = np.zeros((len(indices), *values.shape[1:]), values.dtype)
            batch[name][there] = values[np.asarray(indices)[there]]
        return batch


class Plan(NamedTuple):
    """An epoch: which examples make each of its S batches (-1: a row of padding), and the length of their rows."""

    examples: list[Int[np.ndarray, " _"]]
    lengths: Int[np.ndarray, " S"]


class Buckets(ABC):
    """Batches of examples of similar length, each example once an epoch; a subclass says what they hold.

    An epoch deals its examples out in random order to buckets by their length. A bucket that is full is a batch; what
    is left in one at the end goes on to the bucket of the next length, so that the last batch alone may not be full.
    The batches come in random order. Slot `i` stands for slot `i % B` of batch `i // B`, counted through all epochs; it
    is a row, or several where batches of short rows have more of them.
    """

    def __init__(
        self,
        sizes: Int[np.ndarray, " N"],
        lengths: Sequence[int],
        batch_size: int,
        seed: int | None = None,
        rows_per_slot: Sequence[int] | None = None,
    ):
        """Plans nothing yet.

        Args:
            sizes: of the examples.
            lengths: what rows are padded to, ascending; the last one holds the largest example.
            batch_size: slots of a batch, B.
            seed: of the order of examples and batches; None keeps that of the file within each length.
            rows_per_slot: for each length; default one.
        """
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self._sizes = sizes
        self._rows = [batch_size * each for each in rows_per_slot or [1] * len(self.lengths)]
        self._bucket = np.searchsorted(self.lengths, sizes)
        self._lock = Lock()
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._steps = left = 0
        for count, rows in zip(np.bincount(self._bucket, minlength=len(self.lengths)), self._rows, strict=True):
            full, left = divmod(int(count) + left, rows)
            self._steps += full
        self._steps += left > 0

    def __len__(self) -> int:
        """Slots of an epoch: its examples and the padding of the last batch."""
        return self._steps * self.batch_size

    def rows(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The rows of some slots of one batch."""
        step = indices[0] // self.batch_size
        epoch, at = divmod(step, self._steps)
        plan = self.plan(epoch)
        slots = plan.examples[at].reshape(self.batch_size, -1)
        chosen = slots[np.asarray(indices) - step * self.batch_size].reshape(-1)
        return self._batch(chosen, int(plan.lengths[at]), epoch)

    @abstractmethod
    def _batch(self, chosen: np.ndarray, length: int, epoch: int) -> dict[str, np.ndarray]:
        """The examples of these numbers (-1: nothing but padding) as rows of this length."""

    def token_share(self) -> float:
        """Share of the positions of an epoch's real rows that hold tokens."""
        padded = np.array(self.lengths)[self._bucket].sum() if len(self._sizes) else 1
        return float(self._sizes.sum() / padded)

    def plan(self, epoch: int) -> Plan:
        """The batches of an epoch; the two newest are kept, for threads that read ahead."""
        with self._lock:
            if epoch not in self._plans:
                self._plans[epoch] = self._made(epoch)
                while len(self._plans) > 2:
                    self._plans.popitem(last=False)
            return self._plans[epoch]

    def _made(self, epoch: int) -> Plan:
        random = None if self.seed is None else np.random.default_rng([self.seed, epoch])
        count = len(self._sizes)
        order = np.arange(count) if random is None else random.permutation(count)
        batches: list[np.ndarray] = []
        lengths: list[int] = []
        left = np.zeros(0, np.int64)
        for bucket, (length, size) in enumerate(zip(self.lengths, self._rows, strict=True)):
            waiting = np.concatenate([left, order[self._bucket[order] == bucket]])
            full = len(waiting) // size * size
            batches += np.split(waiting[:full], full // size) if full else []
            lengths += [length] * (full // size)
            left = waiting[full:]
        if len(left):
            batches.append(np.concatenate([left, np.full(self._rows[-1] - len(left), -1)]))
            lengths.append(self.lengths[-1])
        shuffled = np.arange(len(batches)) if random is None else random.permutation(len(batches))
        return Plan([batches[at] for at in shuffled], np.array(lengths, np.int64)[shuffled])


class LengthBuckets(Buckets):
    """Batches of encoded examples."""

    def __init__(self, examples: Examples, batch_size: int, pad: int, seed: int | None = None):
        """Plans nothing yet.

        Args:
            pad: the id that fills rows up.
            seed: of the order of examples and batches; None keeps that of the file within each length.
        """
        super().__init__(examples.lengths, bucket_lengths(examples.lengths), batch_size, seed)
        self.examples = examples
        self.pad = pad

    def _batch(self, chosen: np.ndarray, length: int, epoch: int) -> dict[str, np.ndarray]:
        return self.examples.batch(chosen, length, self.pad)


def bucket_lengths(lengths: Int[np.ndarray, " N"], shapes: int = SHAPES, step: int = LENGTH_STEP) -> list[int]:
    """At most `shapes` multiples of `step` to pad rows of these lengths to, such that least is padded in all.

    Rows go to the smallest that holds them. There are as many as save `WORTH` of the positions each. By dynamic
    programming over the multiples that occur.
    """
    ceilings, counts = np.unique(-(-np.maximum(lengths, 1) // step) * step, return_counts=True)
    if not len(ceilings):
        return [step]
    total = np.concatenate([[0], np.cumsum(counts)])
    # best[j]: positions that the rows of the j shortest ceilings take, padded to the lengths chosen so far.
    best = np.where(total == 0, 0.0, np.inf)
    chosen: list[list[int]] = []
    for _ in range(min(shapes, len(ceilings))):
        costs = best[:, None] + ceilings[None, :] * (total[None, 1:] - total[:, None])  # [first, last] -> one length
        costs[np.tril_indices(len(total), -1, len(ceilings))] = np.inf
        if costs[:, -1].min() > (1 - WORTH) * best[-1]:
            break
        chosen.append([0, *costs.argmin(axis=0).tolist()])
        best = np.concatenate([[0.0], costs.min(axis=0)])
    picked, end = [], len(ceilings)
    for cuts in reversed(chosen):
        if end:
            picked.append(int(ceilings[end - 1]))
            end = cuts[end]
    return picked[::-1]
