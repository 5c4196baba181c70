"""ELECTRA (Clark et al. 2020): the discriminator, and the generator that it is trained against."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from jaxptm.config import Positive, Share, validate
from jaxptm.hf.table import Table, dense
from jaxptm.models.family import Family
from jaxptm.models.rows import bert_embeddings, bert_layers, labels, mlm_head
from jaxptm.nn.text_config import TextConfig
from jaxptm.types import JaxptmError

Multiple = Annotated[float, Field(gt=0, le=1)]


class ElectraConfig(TextConfig):
    """Sizes of an ELECTRA discriminator, and of its generator as shares of them; the defaults are ELECTRA-small."""

    norm: Literal["post"] = "post"
    pooler: Literal[False] = False
    hidden_size: Positive = 256
    num_attention_heads: Positive = 4
    intermediate_size: Positive = 1024
    embedding_size: Positive = 128
    summary_last_dropout: Share = 0.1
    """Dropout under the classifier of multiple-choice."""
    generator_size: Multiple = 0.25
    """Width of the generator, its feed-forward layers and its number of heads, as a share of the discriminator's."""
    generator_layers: Multiple = 1.0
    """Depth of the generator as a share of the discriminator's."""

    embedding_projection: ClassVar[Literal["never", "between widths", "always"]] = "between widths"
    pooler_activation: ClassVar[str] = "gelu"
    pooler_dropout: ClassVar[bool] = True
    mlm_activation: ClassVar[str | None] = "gelu"

    def head_dropout(self, task: str) -> float:
        """Dropout under the classifier of `task`."""
        return self.summary_last_dropout if task == "multiple-choice" else super().head_dropout(task)

    def generator(self) -> ElectraConfig:
        """The generator's sizes (google-research/electra, run_pretraining.py `get_generator_config`).

        Its embeddings are the discriminator's, so their width stays, and so does that of a head (64 in the reference).

        Raises:
            JaxptmError: the heads do not divide the width.
        """
        width = round(self.hidden_size * self.generator_size)
        sizes: dict[str, Any] = {
            "hidden_size": width,
            "num_hidden_layers": round(self.num_hidden_layers * self.generator_layers),
            "num_attention_heads": max(1, width // (self.hidden_size // self.num_attention_heads)),
            "intermediate_size": round(self.intermediate_size * self.generator_size),
            "embedding_size": self.embedding_width,
            "generator_size": 1.0,
            "generator_layers": 1.0,
        }
        if width % sizes["num_attention_heads"]:
            raise JaxptmError(
                f"model.generator_size: {self.generator_size} of the width {self.hidden_size} is {width}, which "
                f"{sizes['num_attention_heads']} heads do not divide; choose another share, such as 0.25."
            )
        return validate(ElectraConfig, {**self.model_dump(), **sizes}, "model.generator_size")


def _size(layers: int, width: int, embedding: int, generator: float) -> ElectraConfig:
    return ElectraConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        embedding_size=embedding,
        generator_size=generator,
    )


PRESETS = {
    # Clark et al. 2020, table 6. The released small model (ELECTRA-Small++) has a generator of its own size.
    "electra-tiny": _size(4, 128, 64, 0.5),
    "electra-small": _size(12, 256, 128, 1 / 4),
    "electra-small++": _size(12, 256, 128, 1.0),
    "electra-base": _size(12, 768, 768, 1 / 3),
    "electra-large": _size(24, 1024, 1024, 1 / 4),
}

ARCHITECTURES = {
    None: "ElectraModel",
    "masked-lm": "ElectraForMaskedLM",
    "replaced-token": "ElectraForPreTraining",
    "sequence-classification": "ElectraForSequenceClassification",
    "token-classification": "ElectraForTokenClassification",
    "multiple-choice": "ElectraForMultipleChoice",
    "question-answering": "ElectraForQuestionAnswering",
}


def table(config: ElectraConfig, task: str | None) -> Table:
    """The weights of an ELECTRA with the head of `task` (transformers, modeling_electra.py)."""
    rows = [*bert_embeddings(config, "electra."), *bert_layers(config, "electra.")]
    if config.embedding_width != config.hidden_size:
        rows += dense("embeddings_project", "electra.embeddings_project")
    ignored = (r"embeddings\.position_ids$",)
    match task:
        case "masked-lm":
            head = mlm_head(
                config,
                dense_name="generator_predictions.dense",
                norm_name="generator_predictions.LayerNorm",
                decoder="generator_lm_head",
                bias="generator_lm_head.bias",
                words="electra.embeddings.word_embeddings.weight",
            )
            return Table(rows + head.rows, head.tied, head.dead, ignored)
        case "replaced-token":
            rows += dense("replaced_token_head/dense", "discriminator_predictions.dense")
            rows += dense("replaced_token_head/output", "discriminator_predictions.dense_prediction")
        case "sequence-classification":
            rows += [*dense("pooler/dense", "classifier.dense"), *labels(task, "classifier.out_proj")]
        case "multiple-choice":
            rows += [*dense("pooler/dense", "sequence_summary.summary"), *labels(task)]
        case _:
            rows += labels(task)
    return Table(rows, ignored=ignored)


FAMILY = Family(
    model_type="electra",
    config=ElectraConfig,
    presets=PRESETS,
    architectures=ARCHITECTURES,
    table=table,
    prefix="electra.",
    bare=("embeddings.", "embeddings_project.", "encoder."),
    fixed={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "summary_type": "first",
        "summary_use_proj": True,
        "summary_activation": "gelu",
    },
)
