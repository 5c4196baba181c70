"""Sizes of a text model, what a family fixes of it, and the inputs that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from jaxptm.config import Positive, Share
from jaxptm.nn.model import ModelConfig
from jaxptm.types import JaxptmError

TASKS = (
    "masked-lm",
    "pretraining",
    "next-sentence",
    "replaced-token",
    "causal-lm",
    "sequence-classification",
    "token-classification",
    "multiple-choice",
    "question-answering",
)
POOLED_TASKS = ("pretraining", "next-sentence", "sequence-classification", "multiple-choice")


class TextConfig(ModelConfig):
    """A transformer over token ids."""

    vocab_size: Positive = 30522
    max_position_embeddings: Positive = 512
    type_vocab_size: Annotated[int, Field(ge=0)] = 2
    embedding_size: Positive | None = None
    """Width of the embeddings, where it is not `hidden_size`: a projection lies between."""
    embedding_dropout_prob: Share | None = None
    """Dropout behind the embeddings; `hidden_dropout_prob` where it is null."""
    pad_token_id: Annotated[int, Field(ge=0)] | None = 0
    tie_word_embeddings: bool = True
    classifier_dropout: Share | None = None
    """Dropout under a classification head; `hidden_dropout_prob` where it is null."""
    pooler: bool = True
    """Whether the bare encoder has a pooler; heads that need one have it regardless."""

    input_names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")
    own_fields: ClassVar[tuple[str, ...]] = (*ModelConfig.own_fields, "pooler")
    optional_keys: ClassVar[tuple[str, ...]] = (
        *ModelConfig.optional_keys,
        "embedding_size",
        "embedding_dropout_prob",
        "type_vocab_size",
    )
    embedding_norm: ClassVar[bool] = True
    embedding_projection: ClassVar[Literal["never", "between widths", "always"]] = "never"
    """Whether the embeddings are projected to `hidden_size`; `never`: they have this width."""
    counts_tokens: ClassVar[bool] = False
    """Positions count the tokens that are not padding, from `pad_token_id + 1` on (RoBERTa)."""
    pooler_activation: ClassVar[str] = "tanh"
    pooler_dropout: ClassVar[bool] = False
    """Dropout below the pooler, too, when it serves sequence-classification."""
    mlm_activation: ClassVar[str | None] = None
    """Of the masked-LM head, where it is not `hidden_act`."""
    sentence_order: ClassVar[bool] = False
    """`pretraining` asks whether two segments stand in their order (ALBERT), and not whether B follows A."""

    @model_validator(mode="after")
    def _check_widths(self) -> TextConfig:
        if self.embedding_projection == "never" and self.embedding_width != self.hidden_size:
            raise ValueError(
                f"`embedding_size` {self.embedding_size} is not `hidden_size` {self.hidden_size}, "
                "and this family has no projection between the two"
            )
        return self

    @property
    def embedding_width(self) -> int:
        return self.embedding_size or self.hidden_size

    @property
    def projects_embeddings(self) -> bool:
        return self.embedding_projection == "always" or self.embedding_width != self.hidden_size

    @property
    def pair_logits(self) -> str:
        """Name of the output of `pretraining` that judges a pair of segments."""
        return "sop_logits" if self.sentence_order else "seq_relationship_logits"

    @property
    def max_length(self) -> int:
        """Tokens that a row may have."""
        return self.max_position_embeddings - self.first_position

    @property
    def first_position(self) -> int:
        return (self.pad_token_id or 0) + 1 if self.counts_tokens else 0

    def head_dropout(self, task: str) -> float:
        """Dropout under the classifier of `task`."""
        if task in ("pretraining", "next-sentence", "question-answering"):
            return 0.0
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    def checked_inputs(self, task: str | None, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs of a call, as int32.

        Args:
            arrays: integers of one shape [B, L] (multiple-choice: [B, C, L]): `input_ids`, and if wanted
                `attention_mask`, `token_type_ids`, `position_ids`, `segment_ids`; and `mlm_positions` [B, P].

        Raises:
            JaxptmError: an input without a name here, of another shape, empty, or with an id outside its table.
        """
        if "input_ids" not in arrays:
            raise JaxptmError("give the model `input_ids`, an integer array of shape [batch, length].")
        ids = arrays["input_ids"]
        axes = "[batch, choices, length]" if task == "multiple-choice" else "[batch, length]"
        if ids.ndim != axes.count(",") + 1:
            raise JaxptmError(f"`input_ids` has shape {list(ids.shape)}, expected {axes}.")
        if not ids.size:
            raise JaxptmError(f"`input_ids` has shape {list(ids.shape)}: give at least one row of at least one token.")
        # XLA clamps or wraps an index outside a table without a word, so look before.
        limits = {
            "input_ids": self.vocab_size,
            "token_type_ids": self.type_vocab_size,
            "position_ids": self.max_position_embeddings,
            "attention_mask": 2,
            "segment_ids": np.iinfo(np.int32).max,
            "mlm_positions": ids.shape[-1],
        }
        for name, array in arrays.items():
            if name not in limits:
                raise JaxptmError(f"the model has no input `{name}`, only {', '.join(limits)}.")
            fits = array.shape[:-1] == ids.shape[:-1] if name == "mlm_positions" else array.shape == ids.shape
            if not fits:
                raise JaxptmError(f"`{name}` has shape {list(array.shape)}, `input_ids` {list(ids.shape)}.")
            if array.dtype.kind not in "iub":
                raise JaxptmError(f"`{name}` holds {array.dtype}, expected integers.")
            if name == "token_type_ids" and not limits[name]:
                if array.any():
                    raise JaxptmError(
                        f"`{name}` goes from {array.min()} to {array.max()}; the model tells no types apart: leave "
                        "them out."
                    )
                continue
            if array.size and not 0 <= array.min() <= array.max() < limits[name]:
                raise JaxptmError(
                    f"`{name}` goes from {array.min()} to {array.max()}; the model takes 0 to {limits[name] - 1}."
                )
        if "position_ids" not in arrays and ids.shape[-1] > self.max_length:
            raise JaxptmError(
                f"the input is {ids.shape[-1]} tokens long, the model takes {self.max_length}; "
                "truncate it (tokenizer(..., truncation=True))."
            )
        return {name: array.astype(np.int32) for name, array in arrays.items()}
