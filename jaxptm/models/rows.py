"""Rows of weight tables that several families share: BERT's names under another prefix."""

from __future__ import annotations

from jaxptm.hf.table import Row, Table, dense, norm
from jaxptm.nn.text_config import TextConfig


def bert_embeddings(config: TextConfig, prefix: str) -> list[Row]:
    """Token, position and type tables, and their norm, of `<prefix>embeddings`."""
    theirs = f"{prefix}embeddings"
    types = [Row("embeddings/token_type/embedding", f"{theirs}.token_type_embeddings.weight")]
    return [
        Row("embeddings/token/embedding", f"{theirs}.word_embeddings.weight"),
        Row("embeddings/position/embedding", f"{theirs}.position_embeddings.weight"),
        *(types if config.type_vocab_size else []),
        *norm("embeddings/norm", f"{theirs}.LayerNorm"),
    ]


def bert_layers(config: TextConfig, prefix: str) -> list[Row]:
    """All layers of `<prefix>encoder` (transformers, modeling_bert.py)."""
    rows = []
    for i in range(config.num_hidden_layers):
        ours, theirs = f"encoder/layer_{i}", f"{prefix}encoder.layer.{i}"
        rows += [
            *dense(f"{ours}/attention/query", f"{theirs}.attention.self.query"),
            *dense(f"{ours}/attention/key", f"{theirs}.attention.self.key"),
            *dense(f"{ours}/attention/value", f"{theirs}.attention.self.value"),
            *dense(f"{ours}/attention/output", f"{theirs}.attention.output.dense"),
            *norm(f"{ours}/attention_norm", f"{theirs}.attention.output.LayerNorm"),
            *dense(f"{ours}/mlp/up", f"{theirs}.intermediate.dense"),
            *dense(f"{ours}/mlp/down", f"{theirs}.output.dense"),
            *norm(f"{ours}/mlp_norm", f"{theirs}.output.LayerNorm"),
        ]
    return rows


def labels(task: str | None, classifier: str = "classifier") -> list[Row]:
    """The last layer of the heads that are trained for a task."""
    match task:
        case "sequence-classification" | "token-classification" | "multiple-choice":
            return dense("classifier/dense", classifier)
        case "question-answering":
            return dense("qa_head/dense", "qa_outputs")
    return []


def mlm_head(config: TextConfig, *, dense_name: str, norm_name: str, decoder: str, bias: str, words: str) -> Table:
    """A masked-LM head.

    Args:
        decoder: their linear layer over the vocabulary; `bias` is its bias, under this or a name of its own.
        words: their name of the table of token embeddings.
    """
    rows = [*dense("mlm_head/dense", dense_name), *norm("mlm_head/norm", norm_name)]
    own = bias != f"{decoder}.bias"
    if config.tie_word_embeddings:
        tied = {f"{decoder}.weight": words} | ({f"{decoder}.bias": bias} if own else {})
        return Table([*rows, Row("mlm_head/bias", bias)], tied)
    rows += [Row("mlm_head/embedding", f"{decoder}.weight"), Row("mlm_head/bias", f"{decoder}.bias")]
    # transformers 5 creates it beside the decoder's own bias and never reads it.
    return Table(rows, dead={bias: f"{decoder}.bias"} if own else {})
