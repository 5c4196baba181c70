"""RoBERTa (Liu et al. 2019) and XLM-R (Conneau et al. 2020), which differ in their vocabularies alone."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import flax.linen as nn

from jaxptm.hf.table import Table, dense
from jaxptm.models.family import Family
from jaxptm.models.rows import bert_embeddings, bert_layers, labels, mlm_head
from jaxptm.nn.text_config import TextConfig


class RobertaConfig(TextConfig):
    """Sizes of a RoBERTa; the defaults are those of transformers, not of a released model (see `PRESETS`)."""

    norm: Literal["post"] = "post"
    vocab_size: int = 50265
    pad_token_id: int = 1

    counts_tokens: ClassVar[bool] = True
    pooler_dropout: ClassVar[bool] = True
    mlm_activation: ClassVar[str | None] = "gelu"

    def initializer(self, *, residual: bool = False) -> nn.initializers.Initializer:
        """A plain normal (fairseq, transformer_sentence_encoder.py `init_bert_params`)."""
        return nn.initializers.normal(self.initializer_range)

    def head_dropout(self, task: str) -> float:
        """Dropout under the classifier of `task`; multiple-choice has no rate of its own."""
        return self.hidden_dropout_prob if task == "multiple-choice" else super().head_dropout(task)


def _size(layers: int, width: int, vocab_size: int = 50265) -> RobertaConfig:
    return RobertaConfig(
        vocab_size=vocab_size,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=514,  # 512 tokens: positions begin behind the padding's, at 2
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )


PRESETS = {
    # Liu et al. 2019, table 9; the small ones have the sizes of Turc et al. 2019, table 1.
    "roberta-tiny": _size(2, 128),
    "roberta-mini": _size(4, 256),
    "roberta-small": _size(4, 512),
    "roberta-base": _size(12, 768),
    "roberta-large": _size(24, 1024),
}
XLM_PRESETS = {
    # Conneau et al. 2020, section 4.
    "xlm-roberta-base": _size(12, 768, vocab_size=250002),
    "xlm-roberta-large": _size(24, 1024, vocab_size=250002),
}

ARCHITECTURES = {
    None: "RobertaModel",
    "masked-lm": "RobertaForMaskedLM",
    "sequence-classification": "RobertaForSequenceClassification",
    "token-classification": "RobertaForTokenClassification",
    "multiple-choice": "RobertaForMultipleChoice",
    "question-answering": "RobertaForQuestionAnswering",
}


def table(config: RobertaConfig, task: str | None) -> Table:
    """The weights of a RoBERTa with the head of `task` (transformers, modeling_roberta.py)."""
    rows = [*bert_embeddings(config, "roberta."), *bert_layers(config, "roberta.")]
    ignored = (r"embeddings\.position_ids$",)
    match task:
        case "masked-lm":
            head = mlm_head(
                config,
                dense_name="lm_head.dense",
                norm_name="lm_head.layer_norm",
                decoder="lm_head.decoder",
                bias="lm_head.bias",
                words="roberta.embeddings.word_embeddings.weight",
            )
            return Table(rows + head.rows, head.tied, head.dead, ignored)
        case "sequence-classification":
            rows += [*dense("pooler/dense", "classifier.dense"), *labels(task, "classifier.out_proj")]
        case _:
            rows += labels(task)
            if task == "multiple-choice" or (task is None and config.pooler):
                rows += dense("pooler/dense", "roberta.pooler.dense")
    return Table(rows, ignored=ignored)


FAMILY = Family(
    model_type="roberta",
    config=RobertaConfig,
    presets=PRESETS,
    architectures=ARCHITECTURES,
    table=table,
    prefix="roberta.",
    bare=("embeddings.", "encoder.", "pooler."),
    fixed={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
)


class XlmRobertaConfig(RobertaConfig):
    """A RoBERTa that config.json calls `xlm-roberta`."""

    vocab_size: int = 30522  # as in transformers


XLM_FAMILY = replace(
    FAMILY,
    model_type="xlm-roberta",
    config=XlmRobertaConfig,
    presets={name: XlmRobertaConfig(**config.model_dump()) for name, config in XLM_PRESETS.items()},
    architectures={task: f"XLM{name}" for task, name in ARCHITECTURES.items()},
)
