"""Text models: token, type and position tables under the transformer, and one head by task."""

from __future__ import annotations

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Int
from pydantic import Field

from jaxptm.config import Positive, Share
from jaxptm.nn.core import Execution, Transformer, TransformerConfig, layer_norm, visible_keys
from jaxptm.nn.heads import Classifier, MlmHead, Pooler
from jaxptm.types import Array

TASKS = (
    "masked-lm",
    "pretraining",
    "next-sentence",
    "sequence-classification",
    "token-classification",
    "multiple-choice",
    "question-answering",
)
POOLED_TASKS = ("pretraining", "next-sentence", "sequence-classification", "multiple-choice")


class TextConfig(TransformerConfig):
    """A transformer over token ids."""

    vocab_size: Positive = 30522
    max_position_embeddings: Positive = 512
    type_vocab_size: Positive = 2
    pad_token_id: Annotated[int, Field(ge=0)] | None = 0
    tie_word_embeddings: bool = True
    classifier_dropout: Share | None = None
    """Dropout under a classification head; `hidden_dropout_prob` where it is null."""
    num_labels: Positive = 2
    pooler: bool = True
    """Whether the bare encoder has a pooler; heads that need one have it regardless."""


class TextEmbeddings(nn.Module):
    """norm(token + position + type), with dropout. `table` is what a language-model head ties to."""

    config: TextConfig
    execution: Execution

    def setup(self) -> None:
        def embed(entries: int) -> nn.Embed:
            return nn.Embed(
                entries,
                self.config.hidden_size,
                # In float32 whatever the type of the computation: the gradient of a table is a sum over all tokens, and
                # half of it is lost when thousands of terms of one entry are added in bfloat16.
                dtype=jnp.float32,
                param_dtype=self.execution.param_dtype,
                embedding_init=nn.initializers.truncated_normal(self.config.initializer_range),
            )

        self.token = embed(self.config.vocab_size)
        self.position = embed(self.config.max_position_embeddings)
        self.token_type = embed(self.config.type_vocab_size)
        self.norm = layer_norm(self.config, self.execution, None)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    @property
    def table(self) -> Float[Array, "V D"]:
        return self.token.embedding

    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        token_type_ids: Int[Array, "B L"],
        position_ids: Int[Array, "#B L"],
        *,
        train: bool,
    ) -> Float[Array, "B L D"]:
        x = self.token(input_ids) + self.token_type(token_type_ids) + self.position(position_ids)
        return self.dropout(self.norm(x), deterministic=not train)


class TextModel(nn.Module):
    """An encoder with the head of `task` (None: the bare encoder).

    Outputs are named as in transformers. All logits are float32.
    """

    config: TextConfig
    task: str | None = None
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "*C L"],
        attention_mask: Int[Array, "*C L"] | None = None,
        token_type_ids: Int[Array, "*C L"] | None = None,
        position_ids: Int[Array, "*C L"] | None = None,
        segment_ids: Int[Array, "*C L"] | None = None,
        mlm_positions: Int[Array, "B P"] | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
    ) -> dict[str, Array | tuple[Array, ...]]:
        """Runs the model.

        Args:
            input_ids: [B, L] token ids; [B, C, L] for multiple-choice, as are the other ids.
            attention_mask: 1 for tokens, 0 for padding; default all ones.
            token_type_ids: default zeros.
            position_ids: default 0, 1, ...
            segment_ids: tokens attend only to equal ids (packed documents).
            mlm_positions: where the language-model head runs; its logits are then [B, P, V] instead of [B, L, V].
            train: dropout on; needs the rng `dropout`.
            output_hidden_states: adds `hidden_states`, one [B, L, D] before each layer and one after the last.
        """
        rows = input_ids.shape[:-1]
        input_ids = input_ids.reshape(-1, input_ids.shape[-1])
        attention_mask, token_type_ids, position_ids, segment_ids = (
            None if ids is None else ids.reshape(input_ids.shape)
            for ids in (attention_mask, token_type_ids, position_ids, segment_ids)
        )
        embeddings = TextEmbeddings(self.config, self.execution, name="embeddings")
        x = embeddings(
            input_ids,
            jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
            jnp.arange(input_ids.shape[1])[None] if position_ids is None else position_ids,
            train=train,
        )
        hidden, states = Transformer(self.config, self.execution, name="encoder")(
            x, visible_keys(attention_mask, segment_ids), train=train, output_hidden_states=output_hidden_states
        )

        def pool() -> Array:
            return Pooler(self.config, self.execution, name="pooler")(hidden)

        def classify(x: Array, labels: int) -> Array:
            rate = self.config.classifier_dropout
            rate = self.config.hidden_dropout_prob if rate is None else rate
            return Classifier(self.config, self.execution, labels, rate, name="classifier")(x, train=train)

        def predict_tokens() -> Array:
            at = hidden if mlm_positions is None else jnp.take_along_axis(hidden, mlm_positions[..., None], axis=1)
            table = embeddings.table if self.config.tie_word_embeddings else None
            return MlmHead(self.config, self.execution, self.config.vocab_size, name="mlm_head")(at, table)

        def is_next() -> Array:
            return Classifier(self.config, self.execution, 2, 0.0, name="nsp_head")(pool(), train=train)

        match self.task:
            case None:
                out = {"last_hidden_state": hidden}
                if self.config.pooler:
                    out["pooler_output"] = pool()
            case "masked-lm":
                out = {"logits": predict_tokens()}
            case "pretraining":
                out = {"prediction_logits": predict_tokens(), "seq_relationship_logits": is_next()}
            case "next-sentence":
                out = {"logits": is_next()}
            case "sequence-classification":
                out = {"logits": classify(pool(), self.config.num_labels)}
            case "token-classification":
                out = {"logits": classify(hidden, self.config.num_labels)}
            case "multiple-choice":
                out = {"logits": classify(pool(), 1).reshape(rows)}
            case "question-answering":
                span = Classifier(self.config, self.execution, 2, 0.0, name="qa_head")(hidden, train=train)
                out = {"start_logits": span[..., 0], "end_logits": span[..., 1]}
            case _:
                raise ValueError(f"task {self.task!r} is not one of {', '.join(TASKS)}")
        if output_hidden_states:
            out["hidden_states"] = states
        return out


def forward_flops(config: TextConfig, task: str | None, rows: int, length: int, predictions: int) -> float:
    """Floating point operations of the matrix products of one forward pass, two a multiply-add.

    The usual count for model FLOP utilisation: padding counts, and norms, activations and lookups do not.

    Args:
        predictions: tokens a row that a language-model head runs on.
    """
    width, inner = config.hidden_size, config.intermediate_size
    token = config.num_hidden_layers * (4 * width**2 + 2 * width * inner + 2 * length * width)
    head = 0
    if task in ("masked-lm", "pretraining"):
        head += predictions * (width**2 + width * config.vocab_size)
    if task in POOLED_TASKS:
        head += width**2
    return 2.0 * rows * (length * token + head)
