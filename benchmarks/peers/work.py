"""The steps that are compared, and their batches: numpy alone, for every environment to import."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

MASK, FIRST_WORD, VOCABULARY = 103, 1000, 30522
SHARE = 0.15
"""Of the tokens that are masked."""
LEARNING_RATE, WEIGHT_DECAY, CLIP, EPSILON = 1e-4, 0.01, 1.0, 1e-8
"""AdamW, with the gradient's global norm clipped."""
CHARACTERS = 32
IGNORED = -100
# wav2vec 2.0, as in fairseq's configs of the base model but for layers left out at random, which one side computes and
# the other does not: pre-training drops less than CTC does.
DROPOUTS = {
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.1,
    "feat_quantizer_dropout": 0.1,
    "final_dropout": 0.1,
    "layerdrop": 0.0,
}
SIZES = {
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
"""By preset, under Hugging Face's names; of other presets those of its default configurations."""
MASKS = {"mask_time_prob": 0.65, "mask_time_length": 10, "mask_feature_prob": 0.5, "mask_feature_length": 64}
"""Of ctc, under Hugging Face's names; contrastive has the first two."""


class Work(NamedTuple):
    """A training step: dropout on, float32 parameters.

    Each side computes as its users have it: transformers' classes run their language-model heads on all tokens,
    jaxptm and KerasHub on the masked ones.

    Attributes:
        objective: as in jaxptm's configs.
        preset: of jaxptm.
        rows: of a batch.
        length: of a row, in tokens or in samples of audio.
    """

    objective: str
    preset: str
    rows: int
    length: int


WORK = {
    "bert-base-128": Work("masked-lm", "bert-base", 8, 128),
    "bert-base-512": Work("masked-lm", "bert-base", 2, 512),
    "bert-large-128": Work("masked-lm", "bert-large", 4, 128),
    "bert-large-512": Work("masked-lm", "bert-large", 1, 512),
    "electra-small-128": Work("replaced-token", "electra-small", 16, 128),
    "gpt2-small-1024": Work("causal-lm", "gpt2-small", 1, 1024),
    "wav2vec2-base-contrastive": Work("contrastive", "wav2vec2-base", 2, 80_000),
    "wav2vec2-base-ctc": Work("ctc", "wav2vec2-base", 2, 80_000),
}


def named(name: str) -> Work:
    """The work of that name, with as many rows as ROWS in the environment says."""
    work = WORK[name]
    return work._replace(rows=int(os.environ.get("ROWS", work.rows)))


def batch(work: Work) -> dict[str, np.ndarray]:
    """Full rows of random tokens or noise.

    Of masked-lm and replaced-token also `positions` [B, P], ascending; `labels` are [B, L] with IGNORED where nothing
    is to be predicted, or the characters [B, 40] of ctc.
    """
    rng = np.random.default_rng(0)
    rows, length = work.rows, work.length
    if work.objective in ("contrastive", "ctc"):
        audio = rng.normal(size=(rows, length)).astype(np.float32)
        labels = rng.integers(5, CHARACTERS, (rows, 40)).astype(np.int32)
        return {"input_values": audio, "attention_mask": np.ones((rows, length), np.int32), "labels": labels}
    ids = rng.integers(FIRST_WORD, VOCABULARY, (rows, length)).astype(np.int32)
    ones = np.ones((rows, length), np.int32)
    if work.objective == "causal-lm":
        return {"input_ids": ids, "attention_mask": ones, "labels": ids}
    masked = round(SHARE * length)
    positions = np.sort(rng.permuted(np.tile(np.arange(length), (rows, 1)), axis=1)[:, :masked]).astype(np.int32)
    labels = np.full((rows, length), IGNORED, np.int32)
    np.put_along_axis(labels, positions, np.take_along_axis(ids, positions, 1), 1)
    inputs = ids.copy()
    np.put_along_axis(inputs, positions, MASK, 1)
    return {"input_ids": inputs, "original_ids": ids, "attention_mask": ones, "positions": positions, "labels": labels}
