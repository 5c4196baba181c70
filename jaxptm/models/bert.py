"""BERT (Devlin et al. 2019): sizes, config.json keys and the weight table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from jaxptm.hf.table import Row, Table, dense, norm
from jaxptm.models.family import Family
from jaxptm.nn.text import POOLED_TASKS, TextConfig, TextModel


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
    rows = [
        Row("embeddings/token/embedding", "bert.embeddings.word_embeddings.weight"),
        Row("embeddings/position/embedding", "bert.embeddings.position_embeddings.weight"),
        Row("embeddings/token_type/embedding", "bert.embeddings.token_type_embeddings.weight"),
        *norm("embeddings/norm", "bert.embeddings.LayerNorm"),
    ]
    for i in range(config.num_hidden_layers):
        ours, theirs = f"encoder/layer_{i}", f"bert.encoder.layer.{i}"
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
    if task in POOLED_TASKS or (task is None and config.pooler):
        rows += dense("pooler/dense", "bert.pooler.dense")

    tied, dead = {}, {}
    if task in ("masked-lm", "pretraining"):
        decoder = "cls.predictions.decoder"
        rows += [
            *dense("mlm_head/dense", "cls.predictions.transform.dense"),
            *norm("mlm_head/norm", "cls.predictions.transform.LayerNorm"),
        ]
        if config.tie_word_embeddings:
            rows += [Row("mlm_head/bias", "cls.predictions.bias")]
            tied[f"{decoder}.weight"] = "bert.embeddings.word_embeddings.weight"
            tied[f"{decoder}.bias"] = "cls.predictions.bias"
        else:
            rows += [Row("mlm_head/embedding", f"{decoder}.weight"), Row("mlm_head/bias", f"{decoder}.bias")]
            # transformers 5 creates it beside the decoder's own bias and never reads it.
            dead["cls.predictions.bias"] = f"{decoder}.bias"
    if task in ("pretraining", "next-sentence"):
        rows += dense("nsp_head/dense", "cls.seq_relationship")
    if task in ("sequence-classification", "token-classification", "multiple-choice"):
        rows += dense("classifier/dense", "classifier")
    if task == "question-answering":
        rows += dense("qa_head/dense", "qa_outputs")
    return Table(rows, tied, dead, ignored=(r"embeddings\.position_ids$",))


def modern_name(name: str) -> str:
    """Spells TensorFlow-era norm names, and the names of a bare encoder, as those of a model with a head."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def from_hf(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `BertConfig` that a config.json gives.

    Raises:
        ValueError: it asks for something that is not BERT's encoder.
    """
    for key, usual in (("position_embedding_type", "absolute"), ("is_decoder", False), ("add_cross_attention", False)):
        if theirs.get(key, usual) != usual:
            raise ValueError(f"`{key}: {theirs[key]}` is not supported, only {usual!r}")
    fields = {key: theirs[key] for key in BertConfig.model_fields if key in theirs and key not in ("norm", "pooler")}
    if theirs.get("id2label"):
        fields["num_labels"] = len(theirs["id2label"])
    return fields


def to_hf(config: BertConfig) -> dict[str, Any]:
    """The keys of config.json that `config` decides."""
    theirs = config.model_dump(exclude={"norm", "pooler", "num_labels"})
    if config.num_labels != 2:
        theirs["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        theirs["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
    return theirs


FAMILY = Family(
    model_type="bert",
    config=BertConfig,
    module=TextModel,
    presets=PRESETS,
    architectures=ARCHITECTURES,
    table=table,
    prefix="bert.",
    modern_name=modern_name,
    from_hf=from_hf,
    to_hf=to_hf,
)
