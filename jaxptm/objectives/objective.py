"""The record that every objective is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxptm.nn.text import TextModel
from jaxptm.types import Array, Batch, Means, Params


@runtime_checkable
class Loss(Protocol):
    """The losses and scores of some rows of a batch."""

    def __call__(self, params: Params, batch: Batch, keys: Array, *, train: bool) -> tuple[Means, Means]:
        """Returns (terms, scores).

        The loss is the sum of the terms' means over the whole batch. Terms stay apart because each has a weight of its
        own (predictions, rows, tokens), which microbatches and devices add up before they divide.

        Args:
            keys: [B], one PRNG key a row: whatever a row draws does not depend on the rows beside it.
            train: dropout on.
        """


@dataclass(frozen=True)
class Objective:
    """What a model learns.

    Attributes:
        module: the model that is trained and exported.
        init: key -> fresh parameters.
        loss: see `Loss`.
        flops: (rows, length) -> floating point operations of the matrix products of one forward pass.
    """

    module: TextModel
    init: Callable[[Array], Params]
    loss: Loss
    flops: Callable[[int, int], float]
