"""DistilBERT (Sanh et al. 2019): half of BERT's layers, without token types and pooler."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from jaxptm.config import Positive, Share
from jaxptm.hf.table import Table, dense, norm
from jaxptm.models.family import Family
from jaxptm.models.rows import bert_embeddings, labels, mlm_head
from jaxptm.nn.text_config import TextConfig


class DistilBertConfig(TextConfig):
    """Sizes of a DistilBERT; the defaults are distilbert-base-uncased."""

    norm: Literal["post"] = "post"
    pooler: Literal[False] = False
    type_vocab_size: Literal[0] = 0
    num_hidden_layers: Positive = 6
    # Its config.json has no key for another epsilon, and transformers computes with this one.
    layer_norm_eps: Annotated[float, Field(ge=1e-12, le=1e-12)] = 1e-12
    classifier_dropout: Share = 0.2
    qa_dropout: Share = 0.1

    pooler_activation: ClassVar[str] = "relu"

    def head_dropout(self, task: str) -> float:
        """Dropout under the classifier of `task`."""
        match task:
            case "question-answering":
                return self.qa_dropout
            case "token-classification":
                return self.hidden_dropout_prob
        return self.classifier_dropout


PRESETS = {"distilbert-base": DistilBertConfig()}

ARCHITECTURES = {
    None: "DistilBertModel",
    "masked-lm": "DistilBertForMaskedLM",
    "sequence-classification": "DistilBertForSequenceClassification",
    "token-classification": "DistilBertForTokenClassification",
    "multiple-choice": "DistilBertForMultipleChoice",
    "question-answering": "DistilBertForQuestionAnswering",
}


def table(config: DistilBertConfig, task: str | None) -> Table:
    """The weights of a DistilBERT with the head of `task` (transformers, modeling_distilbert.py)."""
    rows = [*bert_embeddings(config, "distilbert."), *labels(task)]
    for i in range(config.num_hidden_layers):
        ours, theirs = f"encoder/layer_{i}", f"distilbert.transformer.layer.{i}"
        rows += [
            *dense(f"{ours}/attention/query", f"{theirs}.attention.q_lin"),
            *dense(f"{ours}/attention/key", f"{theirs}.attention.k_lin"),
            *dense(f"{ours}/attention/value", f"{theirs}.attention.v_lin"),
            *dense(f"{ours}/attention/output", f"{theirs}.attention.out_lin"),
            *norm(f"{ours}/attention_norm", f"{theirs}.sa_layer_norm"),
            *dense(f"{ours}/mlp/up", f"{theirs}.ffn.lin1"),
            *dense(f"{ours}/mlp/down", f"{theirs}.ffn.lin2"),
            *norm(f"{ours}/mlp_norm", f"{theirs}.output_layer_norm"),
        ]
    if task in ("sequence-classification", "multiple-choice"):
        rows += dense("pooler/dense", "pre_classifier")
    if task != "masked-lm":
        return Table(rows)
    head = mlm_head(
        config,
        dense_name="vocab_transform",
        norm_name="vocab_layer_norm",
        decoder="vocab_projector",
        bias="vocab_projector.bias",
        words="distilbert.embeddings.word_embeddings.weight",
    )
    return Table(rows + head.rows, head.tied, head.dead)


FAMILY = Family(
    model_type="distilbert",
    config=DistilBertConfig,
    presets=PRESETS,
    architectures=ARCHITECTURES,
    table=table,
    prefix="distilbert.",
    bare=("embeddings.", "transformer."),
    fixed={"layer_norm_eps": 1e-12},
    renamed={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
    },
)
