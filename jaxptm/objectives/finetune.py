"""Fine-tuning: labels of rows, of tokens, of choices, and answers as spans. The losses are those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxptm.config import IGNORED
from jaxptm.models.params import initialise
from jaxptm.nn.model import PretrainedModule
from jaxptm.nn.text import TextModel
from jaxptm.objectives.objective import Objective
from jaxptm.ops.hashed_rng import hashed
from jaxptm.ops.losses import (
    accuracy,
    audio_seconds,
    binary_cross_entropy,
    cross_entropy,
    squared_error,
    token_share,
)
from jaxptm.types import Array, Batch, Mean, Means, Params

Arrays = Mapping[str, Array]
Judge = Callable[[Arrays, Arrays, Float[Array, " B"]], tuple[Means, Means]]
"""(outputs of the model, batch, 1 for a row and 0 for padding) -> (terms, scores)."""


def sequence_classification(
    module: PretrainedModule, problem_type: str, class_weights: Sequence[float] | None = None
) -> Objective:
    """A label, several labels or numbers for each row.

    Batches hold `labels`: [B] ids, [B, K] of 0 and 1, or numbers [B] or [B, K]. Terms: `cross_entropy` in nats (mean
    over rows, weighted by label; for several labels over rows and labels), or `squared_error`.
    """
    weights = None if class_weights is None else jnp.asarray(class_weights, jnp.float32)

    def one_label(out: Arrays, batch: Arrays, rows: Array) -> tuple[Means, Means]:
        logits, labels = out["logits"], batch["labels"]
        weighted = rows if weights is None else rows * weights[labels]
        return {"cross_entropy": cross_entropy(logits, labels, weighted)}, {"accuracy": accuracy(logits, labels, rows)}

    def several_labels(out: Arrays, batch: Arrays, rows: Array) -> tuple[Means, Means]:
        logits, labels = out["logits"], batch["labels"].astype(bool)
        cells = jnp.broadcast_to(rows[:, None], logits.shape)
        mean = binary_cross_entropy(logits, labels, cells)
        if weights is not None:  # of a label where it holds, and not in what the sum is divided by, as in PyTorch
            weighted = jnp.where(labels, weights[None, :], 1.0) * cells
            mean = binary_cross_entropy(logits, labels, weighted)._replace(weight=mean.weight)
        right = jnp.all((logits > 0) == labels, axis=1)
        return {"cross_entropy": mean}, {"accuracy": Mean.of(right, rows)}

    def numbers(out: Arrays, batch: Arrays, rows: Array) -> tuple[Means, Means]:
        logits = out["logits"]
        labels = batch["labels"].reshape(logits.shape)
        return {"squared_error": squared_error(logits, labels, jnp.broadcast_to(rows[:, None], logits.shape))}, {}

    judges: dict[str, Judge] = {
        "single_label_classification": one_label,
        "multi_label_classification": several_labels,
        "regression": numbers,
    }
    return _fine_tuning(module, judges[problem_type])


def token_classification(module: TextModel, class_weights: Sequence[float] | None = None) -> Objective:
    """A label for each token that asks for one (Devlin et al. 2019, section 5.3).

    Batches hold `labels` [B, L], -100 for tokens that are not asked. Term: `cross_entropy`, the mean over the others,
    weighted by label, in nats.
    """
    weights = None if class_weights is None else jnp.asarray(class_weights, jnp.float32)

    def judge(out: Arrays, batch: Arrays, rows: Array) -> tuple[Means, Means]:
        logits, labels = out["logits"], batch["labels"]
        asked = (labels != IGNORED).astype(jnp.float32)
        weighted = asked if weights is None else asked * weights[jnp.where(labels == IGNORED, 0, labels)]
        return {"cross_entropy": cross_entropy(logits, labels, weighted)}, {"accuracy": accuracy(logits, labels, asked)}

    return _fine_tuning(module, judge)


def multiple_choice(module: TextModel) -> Objective:
    """Which of C choices is right. Batches hold ids [B, C, L] and `labels` [B]. Term: `cross_entropy`, in nats."""

    def judge(out: Arrays, batch: Arrays, rows: Array) -> tuple[Means, Means]:
        logits, labels = out["logits"], batch["labels"]
        return {"cross_entropy": cross_entropy(logits, labels, rows)}, {"accuracy": accuracy(logits, labels, rows)}

    return _fine_tuning(module, judge)


def question_answering(module: TextModel) -> Objective:
    """Where the answer starts and ends (Devlin et al. 2019, section 4.2); at the first token where there is none.

    Batches hold `start_positions` and `end_positions` [B]. Terms: `start_loss` and `end_loss`, in nats, each a softmax
    over all positions of the padded row, as in the reference; the loss is the mean of the two. The embedding of
    padding, which so would learn, does not, as in PyTorch (`padding_idx`).
    """
    pad = None if module.config.causal else module.config.pad_token_id

    def fix_padding(params: Params) -> Params:
        if pad is None:
            return params
        embeddings = params["embeddings"]
        table = embeddings["token"]["embedding"]
        fixed = table.at[pad].set(jax.lax.stop_gradient(table[pad]))
        return {**params, "embeddings": {**embeddings, "token": {"embedding": fixed}}}

    def judge(out: Arrays, batch: Arrays, rows: Array) -> tuple[Means, Means]:
        terms, right = {}, rows.astype(bool)
        for name in ("start", "end"):
            logits, positions = out[f"{name}_logits"], batch[f"{name}_positions"]
            terms[f"{name}_loss"] = cross_entropy(logits, positions, rows)
            right &= jnp.argmax(logits, axis=-1) == positions
        return terms, {"span_accuracy": Mean.of(right, rows)}

    objective = _fine_tuning(module, judge, {"start_loss": 0.5, "end_loss": 0.5})

    def loss(
        params: Params, batch: Batch, keys: Array, *, train: bool, step: int | Int[Array, ""] = 0
    ) -> tuple[Means, Means]:
        return objective.loss(fix_padding(params), batch, keys, train=train)

    return replace(objective, loss=loss)


def _fine_tuning(module: PretrainedModule, judge: Judge, coefficients: Mapping[str, float] | None = None) -> Objective:
    name, count = ("token_share", token_share) if isinstance(module, TextModel) else ("audio_seconds", audio_seconds)

    def apply(params: Params, batch: Batch, **options: Any) -> dict[str, Array]:
        inputs = {name: batch[name] for name in module.config.input_names if name in batch}
        return module.apply({"params": params}, **inputs, **options)

    def loss(
        params: Params, batch: Batch, keys: Array, *, train: bool, step: int | Int[Array, ""] = 0
    ) -> tuple[Means, Means]:
        arrays = {name: jnp.asarray(rows) for name, rows in batch.items()}
        out = apply(params, arrays, train=train, rngs={"dropout": hashed(keys[0])})
        real = arrays["attention_mask"].astype(bool)
        terms, scores = judge(out, arrays, real.any(axis=tuple(range(1, real.ndim))).astype(jnp.float32))
        return terms, scores | {name: count(real.reshape(-1, real.shape[-1]))}

    return Objective(
        modules={"model": module},
        init=lambda key: initialise(module, key),
        loss=loss,
        flops=module.flops,
        coefficients=coefficients or {},
        predict=apply,
    )
