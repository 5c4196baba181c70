"""GPT-2 (Radford et al. 2019): a causal decoder of pre-norm layers."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import flax.linen as nn
from pydantic import model_validator

from jaxptm.config import Positive
from jaxptm.hf.table import TRANSPOSE, Row, Table, norm, split
from jaxptm.models.family import Family
from jaxptm.models.rows import labels
from jaxptm.nn.text_config import TextConfig


class Gpt2Config(TextConfig):
    """Sizes of a GPT-2; the defaults are GPT-2 small."""

    norm: Literal["pre"] = "pre"
    pooler: Literal[False] = False
    type_vocab_size: Literal[0] = 0
    vocab_size: Positive = 50257
    max_position_embeddings: Positive = 1024
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = None

    causal: ClassVar[bool] = True
    embedding_norm: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _inner_width(cls, fields: dict[str, Any]) -> dict[str, Any]:
        # config.json says null for four times the width.
        if fields.get("intermediate_size") is None:
            fields = {**fields, "intermediate_size": 4 * fields.get("hidden_size", 768)}
        return fields

    def initializer(self, *, residual: bool = False) -> nn.initializers.Initializer:
        """A plain normal; what is added to the residual stream shrinks with its length (section 2.3)."""
        shrinking = (2 * self.num_hidden_layers) ** 0.5 if residual else 1.0
        return nn.initializers.normal(self.initializer_range / shrinking)

    def head_dropout(self, task: str) -> float:
        """Dropout under the classifier of `task`: of token-classification alone, 0.1 where the config is silent."""
        if task != "token-classification":
            return 0.0
        return 0.1 if self.classifier_dropout is None else self.classifier_dropout


def _size(layers: int, width: int, positions: int = 1024) -> Gpt2Config:
    return Gpt2Config(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=positions,
    )


PRESETS = {
    # Radford et al. 2019, table 2, with the heads of OpenAI's hparams.json; below small, the sizes of Turc et al. 2019.
    "gpt2-tiny": _size(2, 128, 512),
    "gpt2-mini": _size(4, 256, 512),
    "gpt2-small": _size(12, 768),
    "gpt2-medium": _size(24, 1024),
    "gpt2-large": _size(36, 1280),
    "gpt2-xl": _size(48, 1600),
}

ARCHITECTURES = {
    None: "GPT2Model",
    "causal-lm": "GPT2LMHeadModel",
    "sequence-classification": "GPT2ForSequenceClassification",
    "token-classification": "GPT2ForTokenClassification",
    "question-answering": "GPT2ForQuestionAnswering",
}


def _conv1d(ours: str, theirs: str) -> list[Row]:
    """A linear layer whose kernel they keep as (in, out), as we do."""
    return [Row(f"{ours}/kernel", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def table(config: Gpt2Config, task: str | None) -> Table:
    """The weights of a GPT-2 with the head of `task` (transformers, modeling_gpt2.py)."""
    rows = [
        Row("embeddings/token/embedding", "transformer.wte.weight"),
        Row("embeddings/position/embedding", "transformer.wpe.weight"),
        *norm("encoder/norm", "transformer.ln_f"),
    ]
    for i in range(config.num_hidden_layers):
        ours, theirs = f"encoder/layer_{i}", f"transformer.h.{i}"
        qkv = [f"{ours}/attention/{name}" for name in ("query", "key", "value")]
        rows += [
            *norm(f"{ours}/attention_norm", f"{theirs}.ln_1"),
            Row(tuple(f"{name}/kernel" for name in qkv), f"{theirs}.attn.c_attn.weight", split(3)),
            Row(tuple(f"{name}/bias" for name in qkv), f"{theirs}.attn.c_attn.bias", split(3)),
            *_conv1d(f"{ours}/attention/output", f"{theirs}.attn.c_proj"),
            *norm(f"{ours}/mlp_norm", f"{theirs}.ln_2"),
            *_conv1d(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc"),
            *_conv1d(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj"),
        ]
    tied = {}
    match task:
        case "causal-lm" if config.tie_word_embeddings:
            tied["lm_head.weight"] = "transformer.wte.weight"
        case "causal-lm":
            rows += [Row("causal_lm_head/embedding", "lm_head.weight")]
        case "sequence-classification":
            rows += [Row("classifier/dense/kernel", "score.weight", TRANSPOSE)]
        case _:
            rows += labels(task)
    return Table(rows, tied, ignored=(r"h\.\d+\.attn\.(masked_)?bias$",))


FAMILY = Family(
    model_type="gpt2",
    config=Gpt2Config,
    presets=PRESETS,
    architectures=ARCHITECTURES,
    table=table,
    prefix="transformer.",
    bare=("wte.", "wpe.", "h.", "ln_f."),
    renamed={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "hidden_dropout_prob": "resid_pdrop",
        "embedding_dropout_prob": "embd_pdrop",
        "attention_probs_dropout_prob": "attn_pdrop",
        "layer_norm_eps": "layer_norm_epsilon",
    },
    fixed={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
)
