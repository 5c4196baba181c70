"""wav2vec 2.0 (Baevski et al. 2020) and HuBERT (Hsu et al. 2021): sizes, config.json keys and the weight table."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxptm.hf.table import Operation, Row, Table, dense, norm
from jaxptm.models.family import Family
from jaxptm.nn.audio import AudioModel
from jaxptm.nn.audio_config import AudioConfig

CONV = Operation(lambda theirs: [theirs.T], lambda ours: ours[0].T)
"""torch.nn.Conv1d keeps (out, in, taps), our kernels are (taps, in, out)."""
TAPS = Operation(lambda theirs: [theirs.reshape(-1)], lambda ours: ours[0].reshape(1, 1, -1))
"""One number a tap."""
MASKED = "masked_spec_embed"
"""Stands in for masked frames."""
ONE_ROW = Operation(lambda theirs: [theirs[None]], lambda ours: ours[0][0])
"""A vector that is a table of one entry here."""


class Wav2Vec2Config(AudioConfig):
    """Sizes of a wav2vec 2.0; the defaults are those of transformers for wav2vec 2.0 base."""


class HubertConfig(AudioConfig):
    """Sizes of a HuBERT, which quantises nothing."""

    own_fields: ClassVar[tuple[str, ...]] = (
        *AudioConfig.own_fields,
        "feat_quantizer_dropout",
        "num_codevector_groups",
        "num_codevectors_per_group",
        "codevector_dim",
        "proj_codevector_dim",
    )


LARGE: dict[str, Any] = {
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "activation_dropout": 0.0,
}
BASE: dict[str, Any] = {"activation_dropout": 0.0, "feat_proj_dropout": 0.1, "layerdrop": 0.05}
LAYER_NORMS: dict[str, Any] = {"norm": "pre", "feat_extract_norm": "layer", "conv_bias": True}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0}

PRESETS = {
    # Baevski et al. 2020, section 4.2, with dropouts and heads as in fairseq, examples/wav2vec/config/pretraining.
    "wav2vec2-tiny": Wav2Vec2Config(
        **{**BASE, "feat_quantizer_dropout": 0.1},
        conv_dim=(128,) * 7,
        num_hidden_layers=4,
        hidden_size=256,
        num_attention_heads=4,
        intermediate_size=1024,
        codevector_dim=128,
        proj_codevector_dim=128,
    ),
    "wav2vec2-base": Wav2Vec2Config(**BASE, feat_quantizer_dropout=0.1),
    "wav2vec2-large": Wav2Vec2Config(
        **LARGE,
        layerdrop=0.2,
        feat_proj_dropout=0.1,
        feat_quantizer_dropout=0.1,
        codevector_dim=768,
        proj_codevector_dim=768,
    ),
    "wav2vec2-large-lv60": Wav2Vec2Config(
        **LARGE, **LAYER_NORMS, **NO_DROPOUT, codevector_dim=768, proj_codevector_dim=768
    ),
}
HUBERT_PRESETS = {
    # Hsu et al. 2021, table 1.
    "hubert-base": HubertConfig(**BASE),
    "hubert-large": HubertConfig(**LARGE, **{**LAYER_NORMS, "conv_bias": True}, **NO_DROPOUT),
}

ARCHITECTURES = {
    None: "Wav2Vec2Model",
    "ctc": "Wav2Vec2ForCTC",
    "sequence-classification": "Wav2Vec2ForSequenceClassification",
    "contrastive": "Wav2Vec2ForPreTraining",
}
HUBERT_ARCHITECTURES = {
    None: "HubertModel",
    "ctc": "HubertForCTC",
    "sequence-classification": "HubertForSequenceClassification",
}


def _codebooks(groups: int) -> Operation:
    """They keep the entries of all codebooks in one table (1, all entries, width)."""
    return Operation(
        lambda theirs: [theirs.reshape(groups, -1, theirs.shape[-1])],
        lambda ours: ours[0].reshape(1, -1, ours[0].shape[-1]),
    )


def _encoder(config: AudioConfig, prefix: str) -> list[Row]:
    """All below the heads (transformers, modeling_wav2vec2.py)."""
    rows: list[Row] = []
    if config.masks:
        rows += [Row("mask_embedding/embedding", f"{prefix}{MASKED}", ONE_ROW)]
    for i in range(len(config.conv_dim)):
        ours, theirs = f"embeddings/feature_encoder/conv_{i}", f"{prefix}feature_extractor.conv_layers.{i}"
        rows += [Row(f"{ours}/conv/kernel", f"{theirs}.conv.weight", CONV)]
        if config.conv_bias:
            rows += [Row(f"{ours}/conv/bias", f"{theirs}.conv.bias")]
        if config.feat_extract_norm == "layer" or i == 0:
            rows += norm(f"{ours}/norm", f"{theirs}.layer_norm")
    positions = f"{prefix}encoder.pos_conv_embed.conv"
    rows += [
        *norm("embeddings/feature_norm", f"{prefix}feature_projection.layer_norm"),
        *dense("embeddings/feature_projection", f"{prefix}feature_projection.projection"),
        Row("embeddings/positions/kernel", f"{positions}.parametrizations.weight.original1", CONV),
        Row("embeddings/positions/scale", f"{positions}.parametrizations.weight.original0", TAPS),
        Row("embeddings/positions/bias", f"{positions}.bias"),
        *norm("embeddings/norm" if config.norm == "post" else "encoder/norm", f"{prefix}encoder.layer_norm"),
    ]
    for i in range(config.num_hidden_layers):
        ours, theirs = f"encoder/layer_{i}", f"{prefix}encoder.layers.{i}"
        rows += [
            *dense(f"{ours}/attention/query", f"{theirs}.attention.q_proj"),
            *dense(f"{ours}/attention/key", f"{theirs}.attention.k_proj"),
            *dense(f"{ours}/attention/value", f"{theirs}.attention.v_proj"),
            *dense(f"{ours}/attention/output", f"{theirs}.attention.out_proj"),
            *norm(f"{ours}/attention_norm", f"{theirs}.layer_norm"),
            *dense(f"{ours}/mlp/up", f"{theirs}.feed_forward.intermediate_dense"),
            *dense(f"{ours}/mlp/down", f"{theirs}.feed_forward.output_dense"),
            *norm(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm"),
        ]
    return rows


def _head(config: AudioConfig, task: str | None) -> list[Row]:
    match task:
        case "ctc":
            return dense("ctc_head/dense", "lm_head")
        case "sequence-classification":
            shares = [Row("classifier/scale", "layer_weights")] if config.use_weighted_layer_sum else []
            return [*shares, *dense("classifier/project", "projector"), *dense("classifier/dense", "classifier")]
        case "contrastive":
            ours, codebooks = "contrastive_head", _codebooks(config.num_codevector_groups)
            return [
                Row(f"{ours}/quantizer/embedding", "quantizer.codevectors", codebooks),
                *dense(f"{ours}/quantizer/logits", "quantizer.weight_proj"),
                *dense(f"{ours}/hidden", "project_hid"),
                *dense(f"{ours}/quantized", "project_q"),
            ]
    return []


def _table(config: AudioConfig, task: str | None, prefix: str) -> Table:
    # transformers creates it for training, and leaves it in the file where the masks are switched off afterwards.
    spare = () if config.masks else (f"{prefix}{MASKED}",)
    return Table([*_encoder(config, prefix), *_head(config, task)], spare=spare)


def table(config: AudioConfig, task: str | None) -> Table:
    """The weights of a wav2vec 2.0 with the head of `task`."""
    return _table(config, task, "wav2vec2.")


def hubert_table(config: AudioConfig, task: str | None) -> Table:
    """The weights of a HuBERT with the head of `task`."""
    return _table(config, task, "hubert.")


KEYS: dict[str, Any] = {
    "bare": ("feature_extractor.", "feature_projection.", "encoder.", MASKED),
    "renamed": {
        "norm": "do_stable_layer_norm",
        "hidden_dropout_prob": "hidden_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
    "values": {"norm": {"post": False, "pre": True}},
    "legacy": {
        # torch's weight norm before it was a parametrization.
        "pos_conv_embed.conv.weight_g": "pos_conv_embed.conv.parametrizations.weight.original0",
        "pos_conv_embed.conv.weight_v": "pos_conv_embed.conv.parametrizations.weight.original1",
    },
    "module": AudioModel,
}
FAMILY = Family(
    model_type="wav2vec2",
    config=Wav2Vec2Config,
    presets=PRESETS,
    architectures=ARCHITECTURES,
    table=table,
    prefix="wav2vec2.",
    fixed={"add_adapter": False, "adapter_attn_dim": None},
    **KEYS,
)
HUBERT_FAMILY = Family(
    model_type="hubert",
    config=HubertConfig,
    presets=HUBERT_PRESETS,
    architectures=HUBERT_ARCHITECTURES,
    table=hubert_table,
    prefix="hubert.",
    fixed={"feat_proj_layer_norm": True, "conv_pos_batch_norm": False},
    **KEYS,
)
