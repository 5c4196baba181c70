"""ALBERT (Lan et al. 2020): one layer that is used again and again, on embeddings of a smaller width."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxptm.config import Positive, Share
from jaxptm.hf.table import TRANSPOSE, Row, Table, dense, norm
from jaxptm.models.family import Family
from jaxptm.models.rows import bert_embeddings, labels, mlm_head
from jaxptm.nn.text_config import POOLED_TASKS, TextConfig


class AlbertConfig(TextConfig):
    """Sizes of an ALBERT; the defaults are those of transformers."""

    norm: Literal["post"] = "post"
    vocab_size: Positive = 30000
    embedding_size: Positive = 128
    hidden_size: Positive = 4096
    num_attention_heads: Positive = 64
    intermediate_size: Positive = 16384
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: Share = 0.0
    attention_probs_dropout_prob: Share = 0.0
    classifier_dropout: Share = 0.1

    shared_layer: ClassVar[bool] = True
    embedding_projection: ClassVar[Literal["never", "between widths", "always"]] = "always"
    sentence_order: ClassVar[bool] = True

    def head_dropout(self, task: str) -> float:
        """Dropout under the classifier of `task`, sentence order among them."""
        return 0.0 if task == "question-answering" else self.classifier_dropout


def _size(layers: int, width: int, heads: int) -> AlbertConfig:
    return AlbertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width
    )


PRESETS = {
    # Lan et al. 2020, table 1; heads as in google-research/albert.
    "albert-base": _size(12, 768, 12),
    "albert-large": _size(24, 1024, 16),
    "albert-xlarge": _size(24, 2048, 16),
    "albert-xxlarge": _size(12, 4096, 64),
}

ARCHITECTURES = {
    None: "AlbertModel",
    "masked-lm": "AlbertForMaskedLM",
    "pretraining": "AlbertForPreTraining",
    "sequence-classification": "AlbertForSequenceClassification",
    "token-classification": "AlbertForTokenClassification",
    "multiple-choice": "AlbertForMultipleChoice",
    "question-answering": "AlbertForQuestionAnswering",
}


def table(config: AlbertConfig, task: str | None) -> Table:
    """The weights of an ALBERT with the head of `task` (transformers, modeling_albert.py)."""
    ours, theirs = "encoder/shared_layer", "albert.encoder.albert_layer_groups.0.albert_layers.0"
    rows = [
        *bert_embeddings(config, "albert."),
        *dense("embeddings_project", "albert.encoder.embedding_hidden_mapping_in"),
        *dense(f"{ours}/attention/query", f"{theirs}.attention.query"),
        *dense(f"{ours}/attention/key", f"{theirs}.attention.key"),
        *dense(f"{ours}/attention/value", f"{theirs}.attention.value"),
        *dense(f"{ours}/attention/output", f"{theirs}.attention.dense"),
        *norm(f"{ours}/attention_norm", f"{theirs}.attention.LayerNorm"),
        *dense(f"{ours}/mlp/up", f"{theirs}.ffn"),
        *dense(f"{ours}/mlp/down", f"{theirs}.ffn_output"),
        *norm(f"{ours}/mlp_norm", f"{theirs}.full_layer_layer_norm"),
        *labels(task),
    ]
    if task in POOLED_TASKS or (task is None and config.pooler):
        rows += [Row("pooler/dense/kernel", "albert.pooler.weight", TRANSPOSE)]
        rows += [Row("pooler/dense/bias", "albert.pooler.bias")]
    if task == "pretraining":
        rows += dense("nsp_head/dense", "sop_classifier.classifier")
    ignored = (r"embeddings\.position_ids$",)
    if task not in ("masked-lm", "pretraining"):
        return Table(rows, ignored=ignored)
    head = mlm_head(
        config,
        dense_name="predictions.dense",
        norm_name="predictions.LayerNorm",
        decoder="predictions.decoder",
        bias="predictions.bias",
        words="albert.embeddings.word_embeddings.weight",
    )
    return Table(rows + head.rows, head.tied, head.dead, ignored)


FAMILY = Family(
    model_type="albert",
    config=AlbertConfig,
    presets=PRESETS,
    architectures=ARCHITECTURES,
    table=table,
    prefix="albert.",
    bare=("embeddings.", "encoder.", "pooler."),
    renamed={"classifier_dropout": "classifier_dropout_prob"},
    fixed={"num_hidden_groups": 1, "inner_group_num": 1, "position_embedding_type": "absolute"},
)
