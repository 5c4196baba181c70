"""Text models: token, type and position tables under the transformer, and one head by task."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxptm.nn.core import Cache, Execution, Transformer, dense, encoder_products, layer_norm, visible_keys
from jaxptm.nn.heads import CausalLmHead, Classifier, MlmHead, Pooler, ReplacedTokenHead
from jaxptm.nn.model import PretrainedModule
from jaxptm.nn.primitives import Dropout
from jaxptm.nn.text_config import POOLED_TASKS, TASKS, TextConfig
from jaxptm.types import Array, Params


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
        hidden, states, caches = Transformer(config, execution, name="encoder")(
            x,
            visible_keys(attention_mask, segment_ids, causal),
            caches,
            head_positions(config, self.task, input_ids, attention_mask, mlm_positions),
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


def output_table(config: TextConfig, params: Params) -> Float[Array, "V E"]:
    """What hidden states are multiplied with to become the logits of `CausalLmHead`."""
    of = params["embeddings"]["token"] if config.tie_word_embeddings else params["causal_lm_head"]
    return jnp.asarray(of["embedding"])


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


def head_positions(
    config: TextConfig,
    task: str | None,
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B K"] | None,
    mlm_positions: Int[Array, "B P"] | None,
) -> Int[Array, "B Q"] | None:
    """Where the head of `task` looks at the last hidden state, what classifies a row first; None: everywhere."""
    first = jnp.zeros((len(input_ids), 1), jnp.int32)
    match task:
        case "masked-lm" | "causal-lm":
            return mlm_positions
        case "pretraining":
            return None if mlm_positions is None else jnp.concatenate([first, mlm_positions], axis=1)
        case "next-sentence" | "sequence-classification" | "multiple-choice":
            return last_tokens(config, input_ids, attention_mask)[:, None] if config.causal else first
        case _:
            return None


def queries_of_last_layer(task: str | None, length: int, predictions: int) -> int:
    """How many tokens of a row the last layer computes its output for: those of `head_positions`."""
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
