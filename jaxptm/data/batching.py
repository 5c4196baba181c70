"""Batches of rows by step, read ahead by Grain: the data position of a run is its step, so that resuming is a seek."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int

THREADS = 2
AHEAD = 8
"""Batches that are read ahead."""


@runtime_checkable
class Rows(Protocol):
    """Rows by index, without end: what a run reads."""

    def __len__(self) -> int:
        """Rows of an epoch."""

    def rows(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The rows of these indices, all of one step, as a batch."""

    def token_share(self) -> float:
        """Share of the positions of an epoch that hold tokens, not padding."""


class _Steps:
    """Step -> batch, for Grain: it knows no epoch and keeps no place."""

    def __init__(self, source: Rows, batch_size: int, start_step: int, steps: int, rows: np.ndarray):
        self._source = source
        self._batch_size = batch_size
        self._start_step = start_step
        self._steps = steps
        self._rows = rows

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        start = (self._start_step + int(step)) * self._batch_size
        return self._source.rows((start + self._rows).tolist())


def batches(
    source: Rows, batch_size: int, start_step: int, steps: int, rows: Int[np.ndarray, " R"] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps `start_step` up to `start_step + steps`; rows of earlier steps are never touched.

    The batch of step s is rows s * batch_size and following of `source`.

    Args:
        rows: which rows of each batch to read, for a host that needs no others (`jaxptm.parallel.host_rows`).
    """
    rows = np.arange(batch_size) if rows is None else rows
    dataset = grain.MapDataset.source(_Steps(source, batch_size, start_step, steps, rows))
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    return iter(dataset.to_iter_dataset(options))


def one_pass(
    source: Rows, batch_size: int, limit: int | None = None, rows: Int[np.ndarray, " R"] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Each row of epoch 0 once, in at most `limit` batches; the last one is filled up with rows of zeros.

    Args:
        rows: which rows of each batch to read, in ascending order; equally many batches come whatever they are.
    """
    rows = np.arange(batch_size) if rows is None else rows
    steps = -(-len(source) // batch_size)
    steps = steps if limit is None else min(steps, limit)
    for step, batch in enumerate(batches(source, batch_size, 0, steps, rows)):
        left = int(np.searchsorted(rows, len(source) - step * batch_size))
        full = left == len(rows)
        yield batch if full else pad_rows({name: values[:left] for name, values in batch.items()}, len(rows))


def pad_rows(batch: Mapping[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """Fills a batch up to `rows` rows of zeros, whose attention mask counts them out."""
    return {
        name: np.concatenate([values, np.zeros((rows - len(values), *values.shape[1:]), values.dtype)])
        for name, values in batch.items()
    }
