"""What tests share: small models of transformers with noise on every parameter, and small batches."""

from __future__ import annotations

import jax
import numpy as np
import torch
import transformers

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def key_data(seed: int) -> np.ndarray:
    """What compiled steps take of a key."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def perturbed(architecture: str, seed: int = 0, noise: float = 0.1, **config: object) -> transformers.PreTrainedModel:
    """A BERT of transformers in evaluation mode; the noise tells norms and biases apart, which start at 1 and 0."""
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(transformers.BertConfig(**{**SMALL, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model


def pair_batch(rng: np.random.Generator, rows: int, length: int, vocab_size: int = 97) -> dict[str, np.ndarray]:
    """Rows [CLS] A [SEP] B [SEP] of different lengths with ids 0 [PAD], 2 [CLS], 3 [SEP]; text is 5 and up."""
    batch = {name: np.zeros((rows, length), np.int32) for name in ("input_ids", "token_type_ids", "attention_mask")}
    for row in range(rows):
        end = int(rng.integers(8, length + 1))
        middle = int(rng.integers(3, end - 3))
        batch["input_ids"][row, :end] = rng.integers(5, vocab_size, end)
        batch["input_ids"][row, [0, middle, end - 1]] = 2, 3, 3
        batch["token_type_ids"][row, middle + 1 : end] = 1
        batch["attention_mask"][row, :end] = 1
    batch["next_sentence_label"] = rng.integers(0, 2, rows).astype(np.int32)
    return batch
