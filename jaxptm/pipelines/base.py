"""What all pipelines share: what they take, and rows of different length through a model in batches of few shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np

from jaxptm.data.examples import Examples
from jaxptm.data.tokenizer import filler
from jaxptm.pretrained import Model
from jaxptm.types import JaxptmError

T = TypeVar("T")
LENGTH_STEP = 32
"""Inputs are padded to a multiple of this, so that XLA compiles a few shapes and not one for each length."""


class Pipeline(ABC):
    """A function of inputs, one or several, to results of the form that transformers gives them."""

    task: ClassVar[str | None]
    """The head of the model (see `jaxptm.from_pretrained`)."""
    fields: ClassVar[tuple[str, ...]] = ("text",)
    """Names of the texts of an input."""
    needed: ClassVar[int] = 1
    """How many of them an input has at least; one that has a single text may be the text itself."""
    reads_files: ClassVar[bool] = False
    """Whether an input is itself a file, and no text."""
    bare: ClassVar[bool] = False
    """Whether the result for a list of one input is that input's own and no list."""

    __call__: Callable[..., Any]
    """(inputs, options by name) -> results."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @abstractmethod
    def lines(self, given: Any, result: Any) -> Iterator[str]:
        """One input and its result for people to read."""


def window(model: Model) -> int:
    """Tokens that the model and its tokenizer take."""
    return min(model.max_length, int(model.tokenizer.model_max_length))


def check_batch_size(batch_size: int) -> None:
    """Raises JaxptmError for a batch without rows."""
    if batch_size < 1:
        raise JaxptmError(f"batch_size is {batch_size}, expected at least 1.")


def check_lengths(model: Model, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
    """Raises JaxptmError for the first text whose row of tokens is longer than the model."""
    for text, ids in zip(texts, rows, strict=True):
        if len(ids) > model.max_length:
            raise JaxptmError(
                f"a text has {len(ids)} tokens, the model takes {model.max_length}; pass truncation=True, or shorten "
                f"it: {text[:60]!r}..."
            )


def run_rows(
    model: Model,
    encoded: Mapping[str, Sequence[Sequence[int]]],
    take: Callable[[Mapping[str, np.ndarray], int], T],
    batch_size: int,
) -> list[T]:
    """What is taken of the outputs of the model for each row, in the order of the rows.

    Rows of similar length run together. A batch has `batch_size` rows or, at the end, the next power of two, and a
    multiple of `LENGTH_STEP` tokens.

    Args:
        encoded: token ids by name, as a tokenizer returns them without padding.
        take: what to keep of the outputs for one row, by name, and its length; an output for each token is longer than
            that by the padding.

    Raises:
        JaxptmError: a row is empty or longer than the model.
    """
    check_batch_size(batch_size)
    examples, limit = Examples.of(encoded), model.max_length
    lengths = examples.lengths
    if len(lengths) and lengths.max() > limit:
        raise JaxptmError(f"input {int(lengths.argmax())} has {lengths.max()} tokens, the model takes {limit}.")
    if len(lengths) and not lengths.min():
        raise JaxptmError(f"input {int(lengths.argmin())} is empty: it has no tokens to answer for; leave it out.")
    order = np.argsort(lengths, kind="stable")
    results: dict[int, T] = {}
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        rows = min(batch_size, 1 << (len(chosen) - 1).bit_length())
        length = min(limit, -(-int(lengths[chosen[-1]]) // LENGTH_STEP) * LENGTH_STEP)
        # A row of nothing but padding has nothing to attend to; a copy of the first one costs the same.
        filled = np.concatenate([chosen, np.full(rows - len(chosen), chosen[0])])
        batch: dict[str, Any] = examples.batch(filled, length, filler(model.tokenizer))
        outputs = jax.device_get(dict(model(**batch)))
        for at, place in enumerate(chosen.tolist()):
            results[place] = take({name: values[at] for name, values in outputs.items()}, int(lengths[place]))
    return [results[place] for place in range(len(order))]
