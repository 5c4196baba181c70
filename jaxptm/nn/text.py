"""Text models: token, type and position tables under the transformer, and one head by task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from pydantic import Field, model_validator

from jaxptm.config import Positive, Share
from jaxptm.nn.core import Cache, Dropout, Execution, Transformer, dense, encoder_products, layer_norm, visible_keys
from jaxptm.nn.heads import CausalLmHead, Classifier, MlmHead, Pooler, ReplacedTokenHead
from jaxptm.nn.model import ModelConfig, PretrainedModule
from jaxptm.types import Array, JaxptmError

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
PRETRAINING_TASKS = ("masked-lm", "pretraining", "replaced-token", "causal-lm")
"""Heads that learn from text alone."""
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
            JaxptmError: an input without a name here, of another shape, or with an id outside its table.
        """
        if "input_ids" not in arrays:
            raise JaxptmError("give the model `input_ids`, an integer array of shape [batch, length].")
        ids = arrays["input_ids"]
        axes = "[batch, choices, length]" if task == "multiple-choice" else "[batch, length]"
        if ids.ndim != axes.count(",") + 1:
            raise JaxptmError(f"`input_ids` has shape {list(ids.shape)}, expected {axes}.")
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


class TextEmbeddings(nn.Module):
    """norm(token + position + type), with dropout. `table` is what a language-model head ties to.

    A model without token types has no table of them, and GPT-2 no norm.
    """

    config: TextConfig
    execution: Execution

    def setup(self) -> None:
        def embed(entries: int) -> nn.Embed:
            return nn.Embed(
                entries,
                self.config.embedding_width,
                # In float32 whatever the type of the computation: the gradient of a table is a sum over all tokens, and
                # half of it is lost when thousands of terms of one entry are added in bfloat16.
                dtype=jnp.float32,
                param_dtype=self.execution.param_dtype,
                embedding_init=self.config.initializer(),
            )

        self.token = embed(self.config.vocab_size)
        self.position = embed(self.config.max_position_embeddings)
        if self.config.type_vocab_size:
            self.token_type = embed(self.config.type_vocab_size)
        if self.config.embedding_norm:
            self.norm = layer_norm(self.config, self.execution, None)
        rate = self.config.embedding_dropout_prob
        self.dropout = Dropout(self.config.hidden_dropout_prob if rate is None else rate)

    @property
    def table(self) -> Float[Array, "V E"]:
        return self.token.embedding

    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        token_type_ids: Int[Array, "B L"],
        position_ids: Int[Array, "#B L"],
        *,
        train: bool,
    ) -> Float[Array, "B L E"]:
        x = self.token(input_ids)
        if self.config.type_vocab_size:
            x += _chosen(self.token_type.embedding.astype(x.dtype), token_type_ids)
        x += self.position(position_ids)
        x = self.norm(x) if self.config.embedding_norm else x.astype(self.execution.dtype)
        return self.dropout(x, train=train)


def _chosen(table: Float[Array, "T E"], ids: Int[Array, "B L"]) -> Float[Array, "B L E"]:
    """`table[ids]`, NaN where there is no such entry.

    Of few entries: what thousands of tokens add to the gradient of one is then a sum, and no scattered additions.
    """
    chosen: Array = jnp.full((1, 1, 1), jnp.nan, table.dtype)
    for entry, row in enumerate(table):
        chosen = jnp.where((ids == entry)[..., None], row[None, None], chosen)
    return chosen


class TextModel(PretrainedModule):
    """An encoder or decoder with the head of `task`. All logits are float32."""

    config: TextConfig

    def example(self) -> Int[Array, "*C L"]:
        """Eight tokens of one row."""
        return jnp.zeros((1, 2, 8) if self.task == "multiple-choice" else (1, 8), jnp.int32)

    def flops(self, rows: int, length: int, targets: int = 0) -> float:
        """See `forward_flops`."""
        return forward_flops(self.config, self.task, rows, length, targets, scan=self.execution.scan)

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "*C L"],
        attention_mask: Int[Array, "*C K"] | None = None,
        token_type_ids: Int[Array, "*C L"] | None = None,
        position_ids: Int[Array, "*C L"] | None = None,
        segment_ids: Int[Array, "*C L"] | None = None,
        mlm_positions: Int[Array, "B P"] | None = None,
        caches: tuple[Cache, ...] | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
    ) -> dict[str, Any]:
        """Runs the model.

        Args:
            input_ids: [B, L] token ids; [B, C, L] for multiple-choice, as are the other ids.
            attention_mask: 1 for tokens, 0 for padding; default all ones. With caches [B, K], over all their entries.
            token_type_ids: default zeros.
            position_ids: default 0, 1, ..., or as the family counts (`TextConfig.counts_tokens`).
            segment_ids: tokens attend only to equal ids (packed documents).
            mlm_positions: where the language-model head runs; its logits are then [B, P, V] instead of [B, L, V].
            caches: of the tokens before these (see `empty_caches`); the output `caches` holds these as well.
            train: dropout on; needs the rng `dropout`.
            output_hidden_states: adds `hidden_states`, one [B, L, D] before each layer and one after the last.

        Where no more is wanted than the head needs, the last layer runs on the tokens that the head looks at: those of
        `mlm_positions`, or the one that a row is classified by. It attends to all tokens as ever.
        """
        config, execution = self.config, self.execution
        rows = input_ids.shape[:-1]
        input_ids = input_ids.reshape(-1, input_ids.shape[-1])
        attention_mask, token_type_ids, position_ids, segment_ids = (
            None if ids is None else ids.reshape(-1, ids.shape[-1])
            for ids in (attention_mask, token_type_ids, position_ids, segment_ids)
        )
        embeddings = TextEmbeddings(config, execution, name="embeddings")
        x = embeddings(
            input_ids,
            jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
            default_positions(config, input_ids) if position_ids is None else position_ids,
            train=train,
        )
        if config.projects_embeddings:
            x = dense(config, execution, config.hidden_size, "embeddings_project")(x)
        causal = None
        if config.causal:
            start, keys = (0, x.shape[1]) if caches is None else (caches[0].start, caches[0].key.shape[1])
            causal = jnp.arange(keys)[None, :] <= (start + jnp.arange(x.shape[1]))[:, None]
        first = jnp.zeros((len(input_ids), 1), jnp.int32)
        match self.task:
            case "masked-lm" | "causal-lm":
                positions = mlm_positions
            case "pretraining":
                positions = None if mlm_positions is None else jnp.concatenate([first, mlm_positions], axis=1)
            case "next-sentence" | "sequence-classification" | "multiple-choice":
                positions = last_tokens(config, input_ids, attention_mask)[:, None] if config.causal else first
            case _:
                positions = None
        hidden, states, caches = Transformer(config, execution, name="encoder")(
            x,
            visible_keys(attention_mask, segment_ids, causal),
            caches,
            positions,
            train=train,
            output_hidden_states=output_hidden_states,
        )

        def pool() -> Array:
            if config.causal:
                return hidden[:, 0]
            drops = config.pooler_dropout and self.task == "sequence-classification"
            below = config.head_dropout(str(self.task)) if drops else 0.0
            return Pooler(config, execution, config.pooler_activation, below, name="pooler")(hidden, train=train)

        def classify(x: Array, labels: int, name: str = "classifier") -> Array:
            # GPT-2 classifies rows, and nothing else, without a bias.
            bias = not (config.causal and self.task == "sequence-classification")
            rate = config.head_dropout(str(self.task))
            return Classifier(config, execution, labels, rate, bias, name=name)(x, train=train)

        def predict_tokens(hidden: Array, kind: type[MlmHead] | type[CausalLmHead], **options: Any) -> Array:
            table = embeddings.table if config.tie_word_embeddings else None
            sizes = (config.vocab_size, config.embedding_width)
            return kind(config, execution, *sizes, **options)(hidden, table)

        def predict_masked(hidden: Array) -> Array:
            activation = config.mlm_activation or config.hidden_act
            return predict_tokens(hidden, MlmHead, activation=activation, name="mlm_head")

        def is_next() -> Array:
            return classify(pool(), 2, "nsp_head")

        match self.task:
            case None:
                out = {"last_hidden_state": hidden}
                if config.pooler:
                    out["pooler_output"] = pool()
            case "masked-lm":
                out = {"logits": predict_masked(hidden)}
            case "pretraining":
                predicted = hidden if mlm_positions is None else hidden[:, 1:]
                out = {"prediction_logits": predict_masked(predicted), config.pair_logits: is_next()}
            case "next-sentence":
                out = {"logits": is_next()}
            case "replaced-token":
                out = {"logits": ReplacedTokenHead(config, execution, name="replaced_token_head")(hidden)}
            case "causal-lm":
                out = {"logits": predict_tokens(hidden, CausalLmHead, name="causal_lm_head")}
            case "sequence-classification":
                out = {"logits": classify(pool(), config.num_labels)}
            case "token-classification":
                out = {"logits": classify(hidden, config.num_labels)}
            case "multiple-choice":
                out = {"logits": classify(pool(), 1).reshape(rows)}
            case "question-answering":
                span = classify(hidden, 2, "qa_head")
                out = {"start_logits": span[..., 0], "end_logits": span[..., 1]}
            case _:
                raise ValueError(f"task {self.task!r} is not one of {', '.join(TASKS)}")
        if output_hidden_states:
            out["hidden_states"] = states
        if caches is not None:
            out["caches"] = caches
        return out


def default_positions(config: TextConfig, input_ids: Int[Array, "B L"]) -> Int[Array, "#B L"]:
    """0, 1, ...; or from `first_position` on at tokens, and the position before at padding (fairseq, utils.py)."""
    if not config.counts_tokens:
        return jnp.arange(input_ids.shape[1])[None]
    tokens = input_ids != config.pad_token_id
    return jnp.cumsum(tokens, axis=1) * tokens + config.first_position - 1


def last_tokens(
    config: TextConfig, input_ids: Int[Array, "B L"], attention_mask: Int[Array, "B L"] | None
) -> Int[Array, " B"]:
    """Where the last token of each row stands; without a mask, padding is what `pad_token_id` says."""
    if attention_mask is None:
        attention_mask = input_ids != (-1 if config.pad_token_id is None else config.pad_token_id)
    return jnp.max(jnp.arange(input_ids.shape[1])[None] * attention_mask, axis=1)


def empty_caches(config: TextConfig, execution: Execution, rows: int, length: int) -> tuple[Cache, ...]:
    """Caches with room for `length` tokens a row, one a layer."""
    shape = (rows, length, config.num_attention_heads, config.hidden_size // config.num_attention_heads)
    empty = jnp.zeros(shape, execution.dtype)
    return (Cache(empty, empty, jnp.zeros((), jnp.int32)),) * config.num_hidden_layers


def queries_of_last_layer(task: str | None, length: int, predictions: int) -> int:
    """Tokens a row that the last layer computes its output for, which are those that the head of `task` looks at."""
    match task:
        case "masked-lm" | "causal-lm":
            return min(predictions, length)
        case "pretraining":
            return min(1 + predictions, length)
        case "next-sentence" | "sequence-classification" | "multiple-choice":
            return 1
        case _:
            return length


def forward_flops(
    config: TextConfig, task: str | None, rows: int, length: int, predictions: int, *, scan: bool = False
) -> float:
    """Floating point operations of the matrix products of one forward pass, two a multiply-add.

    What is computed, and no more: padding counts, and norms, activations and lookups do not. Causal attention counts in
    full. The last layer counts at the tokens that the head looks at, unless layers are scanned.

    Args:
        predictions: tokens a row that a language-model head runs on.
    """
    width, embedded = config.hidden_size, config.embedding_width
    queries = length if scan else queries_of_last_layer(task, length, predictions)
    row = encoder_products(config, length, queries)
    if config.projects_embeddings:
        row += length * embedded * width
    if task == "replaced-token":
        row += length * (width**2 + width)
    head = 0
    if task in ("masked-lm", "pretraining"):
        head += predictions * (width * embedded + embedded * config.vocab_size)
    if task == "causal-lm":
        head += predictions * embedded * config.vocab_size
    if task in POOLED_TASKS and not config.causal:
        head += width**2
    return 2.0 * rows * (row + head)
