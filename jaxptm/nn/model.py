"""What models of text and of speech have in common: a config that knows its inputs, a module with one of many heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import flax.linen as nn
import numpy as np
from pydantic import Field

from jaxptm.config import Positive
from jaxptm.nn.core import Execution, TransformerConfig
from jaxptm.types import Array

BODY = ("embeddings", "embeddings_project", "encoder")
"""Top-level modules of a model that belong to no head."""
KEPT = (*BODY, "pooler", "mask_embedding")
"""What a new head still stands on."""


class ModelConfig(TransformerConfig):
    """A transformer over inputs of some kind."""

    vocab_size: Positive
    pad_token_id: Annotated[int, Field(ge=0)] | None
    num_labels: Positive = 2

    own_fields: ClassVar[tuple[str, ...]] = ("norm", "num_labels")
    """Fields that config.json has under no name, or in another form."""
    optional_keys: ClassVar[tuple[str, ...]] = ("activation_dropout", "layerdrop")
    """Fields that transformers has no key for: config.json lacks them where they are null or 0."""

    input_names: ClassVar[tuple[str, ...]] = ()
    """What a batch holds for the model; the first one tells the shape of its rows."""

    def checked_inputs(self, task: str | None, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs of a call, of the types that the module takes.

        Raises:
            JaxptmError: an input that the model of `task` does not have, of another shape, or of values that it cannot
                take.
        """
        raise NotImplementedError


class PretrainedModule(nn.Module):
    """A transformer with the head of `task` (None: without one). Outputs are named as in transformers."""

    config: ModelConfig
    task: str | None = None
    execution: Execution = Execution()

    def example(self) -> Array:
        """The smallest first argument of a call, which parameters are initialised with."""
        raise NotImplementedError

    def flops(self, rows: int, length: int, targets: int = 0) -> float:
        """Floating point operations of the matrix products of one forward pass.

        Args:
            length: of a row, padding included, in what the model reads: tokens or samples.
            targets: positions a row that a head for some of them runs on.
        """
        raise NotImplementedError
