"""The record that every objective is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Int

from jaxptm.nn.core import Execution
from jaxptm.nn.model import PretrainedModule
from jaxptm.types import Array, Batch, Means, Params


@runtime_checkable
class Loss(Protocol):
    """The losses and scores of some rows of a batch."""

    def __call__(
        self, params: Params, batch: Batch, keys: Array, *, train: bool, step: int | Int[Array, ""] = 0
    ) -> tuple[Means, Means]:
        """Returns (terms, scores).

        The loss is the weighted sum of the terms' means over the whole batch. Terms stay apart because each has a
        weight of its own (predictions, rows, tokens), which microbatches and devices add up before they divide.

        Args:
            keys: [B], one PRNG key a row: whatever a row draws does not depend on the rows beside it.
            train: dropout on.
            step: updates done so far, for what changes with them.
        """


def _whole(params: Params) -> dict[str, Params]:
    return {"model": params}


def _only(parts: Mapping[str, Params]) -> Params:
    return parts["model"]


def _nothing(values: Mapping[str, float]) -> dict[str, float]:
    return {}


def _no_alarm(values: Mapping[str, float]) -> str | None:
    return None


@dataclass(frozen=True)
class Objective:
    """What is learned, and by which models.

    Attributes:
        modules: what is trained, by the directory of the run that it is exported to; the first is the one that users
            are after.
        init: key -> fresh parameters, of all modules.
        loss: see `Loss`.
        flops: (rows, length) -> floating point operations of the matrix products of one forward pass.
        coefficients: of the terms in the sum that is the loss, where they are not 1.
        split: parameters -> those of each module. What modules share is in each of them.
        join: the way back.
        summary: further figures of an evaluation, from the values of its terms and scores.
        alarm: the values of terms and scores in training -> what is going wrong, if anything; not asked in the first
            tenth of a run, when nothing has been learned yet.
        predict: (parameters, batch) -> what the model says of each row; None where the terms and scores tell all.
    """

    modules: Mapping[str, PretrainedModule]
    init: Callable[[Array], Params]
    loss: Loss
    flops: Callable[[int, int], float]
    coefficients: Mapping[str, float] = field(default_factory=dict)
    split: Callable[[Params], dict[str, Params]] = _whole
    join: Callable[[Mapping[str, Params]], Params] = _only
    summary: Callable[[Mapping[str, float]], dict[str, float]] = _nothing
    alarm: Callable[[Mapping[str, float]], str | None] = _no_alarm
    predict: Callable[[Params, Batch], dict[str, Array]] | None = None

    @property
    def module(self) -> PretrainedModule:
        """The model that users are after."""
        return next(iter(self.modules.values()))

    @property
    def execution(self) -> Execution:
        """How all of them compute."""
        return self.module.execution

    def total(self, terms: Means) -> Array:
        """The loss: the weighted sum of the terms' means."""
        values = (self.coefficients.get(name, 1.0) * term.value for name, term in terms.items())
        return sum(values, jnp.zeros(()))
