"""BERT (Devlin et al. 2019): sizes, config.json keys and the weight table."""

from __future__ import annotations

from typing import Literal

from jaxptm.hf.table import Table, dense
from jaxptm.models.family import Family
from jaxptm.models.rows import bert_embeddings, bert_layers, labels, mlm_head
from jaxptm.nn.text_config import POOLED_TASKS, TextConfig


class BertConfig(TextConfig):
    """Sizes of a BERT; the defaults are BERT-base, uncased."""

    norm: Literal["post"] = "post"


def _size(layers: int, width: int) -> BertConfig:
    return BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width
    )


PRESETS = {
    # Base and large: Devlin et al. 2019, section 3. The others: Turc et al. 2019, table 1.
    "bert-tiny": _size(2, 128),
    "bert-mini": _size(4, 256),
    "bert-small": _size(4, 512),
    "bert-medium": _size(8, 512),
    "bert-base": _size(12, 768),
    "bert-large": _size(24, 1024),
}

ARCHITECTURES = {
    None: "BertModel",
    "masked-lm": "BertForMaskedLM",
    "pretraining": "BertForPreTraining",
    "next-sentence": "BertForNextSentencePrediction",
    "sequence-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "multiple-choice": "BertForMultipleChoice",
    "question-answering": "BertForQuestionAnswering",
}


def table(config: BertConfig, task: str | None) -> Table:
    """The weights of a BERT with the head of `task`, in Hugging Face's names (transformers, modeling_bert.py)."""
    rows = [*bert_embeddings(config, "bert."), *bert_layers(config, "bert."), *labels(task)]
    if task in POOLED_TASKS or (task is None and config.pooler):
        rows += dense("pooler/dense", "bert.pooler.dense")
    if task in ("pretraining", "next-sentence"):
        rows += dense("nsp_head/dense", "cls.seq_relationship")
    ignored = (r"embeddings\.position_ids$",)
    if task not in ("masked-lm", "pretraining"):
        return Table(rows, ignored=ignored)
    head = mlm_head(
        config,
        dense_name="cls.predictions.transform.dense",
        norm_name="cls.predictions.transform.LayerNorm",
        decoder="cls.predictions.decoder",
        bias="cls.predictions.bias",
        words="bert.embeddings.word_embeddings.weight",
    )
    return Table(rows + head.rows, head.tied, head.dead, ignored)


FAMILY = Family(
    model_type="bert",
    config=BertConfig,
    presets=PRESETS,
    architectures=ARCHITECTURES,
    table=table,
    prefix="bert.",
    bare=("embeddings.", "encoder.", "pooler."),
    fixed={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
)
