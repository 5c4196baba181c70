"""The oracle's speech models: small ones of transformers with noise on every parameter, and audio for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from jaxptm.models.params import flatten
from jaxptm.pretrained import Model

HEADS = {None: "Model", "ctc": "ForCTC", "sequence-classification": "ForSequenceClassification"}
CLASSES = {
    "wav2vec2": {task: f"Wav2Vec2{name}" for task, name in {**HEADS, "contrastive": "ForPreTraining"}.items()},
    "hubert": {task: f"Hubert{name}" for task, name in HEADS.items()},
}
SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 20, 12],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 24,
}
QUANTIZER = {
    "num_codevectors_per_group": 7,
    "num_codevector_groups": 3,
    "codevector_dim": 24,
    "proj_codevector_dim": 18,
}
STYLES: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
}
DROPOUTS = "hidden_dropout attention_dropout activation_dropout feat_proj_dropout final_dropout layerdrop".split()
NO_DROPOUT: dict[str, Any] = dict.fromkeys(DROPOUTS, 0.0)
SAMPLES = 603
"""An odd number: the last samples make no whole frame in any of the convolutions."""
LENGTHS = (603, 350, 41)
"""Of the rows of a padded batch; the last one has one frame, and not all of the samples of a second one."""


def model(
    task: str | None = None, family: str = "wav2vec2", *, seed: int = 0, noise: float = 0.1, **config: Any
) -> Any:
    """A torch model in evaluation mode; `config` are keys of its config.json."""
    kind = getattr(transformers, CLASSES[family][task])
    sizes = SIZES | (QUANTIZER if family == "wav2vec2" else {}) | config
    torch.manual_seed(seed)
    model = kind(kind.config_class(**sizes, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def saved(directory: Path, task: str | None = None, family: str = "wav2vec2", **config: Any) -> Any:
    """The same, saved in `directory`."""
    made = model(task, family, **config)
    made.save_pretrained(directory)
    return made


def inputs(*, padded: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Three rows of noise; padded ones have something other than zeros behind their end."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(len(LENGTHS), SAMPLES)).astype(np.float32)
    if not padded:
        return {"input_values": values}
    mask = (np.arange(SAMPLES)[None] < np.array(LENGTHS)[:, None]).astype(np.int64)
    return {"input_values": np.where(mask == 1, values, np.float32(0.1)), "attention_mask": mask}


def reopened(directory: Path, task: str | None, family: str = "wav2vec2") -> Any:
    """The torch model of a directory that jaxptm wrote; it fits without a word."""
    model, report = getattr(transformers, CLASSES[family][task]).from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return model


def assert_gradients_agree(model: Model, theirs: Any, gradient: Any) -> None:
    """Within 1e-3 of the largest entry of each tensor's gradient."""
    gradients = flatten(gradient)
    for row in model.family.table(model.config, model.task).rows:
        grad = theirs.get_parameter(row.theirs).grad
        if grad is None:
            assert not any(np.asarray(gradients[path]).any() for path in row.paths), row.theirs
            continue
        for path, part in zip(row.paths, row.operation.load(grad.numpy()), strict=True):
            # A key's bias shifts all scores of a query alike: its gradient is zero, but for its kernel's rounding.
            whole = row.theirs.replace("k_proj.bias", "k_proj.weight")
            scale = float(theirs.get_parameter(whole).grad.abs().max())
            assert scale > 0, path
            assert np.abs(gradients[path] - part).max() <= 1e-3 * scale, path
