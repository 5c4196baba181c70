"""Losses and scores as undivided means, computed in float32 whatever the type of the logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int

from jaxptm.config import RATE
from jaxptm.types import Array, Mean


def token_share(real: Bool[Array, "B L"]) -> Mean:
    """Share of the positions that are no padding, among the rows that hold anything; its total counts the tokens."""
    return Mean.of(real, jnp.broadcast_to(real.any(axis=1, keepdims=True), real.shape))


def audio_seconds(real: Bool[Array, "B T"] | Int[Array, "B T"]) -> Mean:
    """Share of the samples that are no padding; its total counts the seconds of audio."""
    there = jnp.broadcast_to(real.any(axis=1, keepdims=True), real.shape)
    return Mean(real.sum(dtype=jnp.float32) / RATE, there.sum(dtype=jnp.float32) / RATE)


def cross_entropy(
    logits: Float[Array, "*batch V"], labels: Int[Array, "*batch"], weights: Float[Array, "*batch"]
) -> Mean:
    """Softmax cross entropy in nats.

    A label outside [0, V) counts nothing where its weight is 0, and makes the loss NaN elsewhere: a vocabulary that
    does not fit must not train in silence.
    """
    inside = (labels >= 0) & (labels < logits.shape[-1])
    values = _negative_log_likelihood(logits.astype(jnp.float32), jnp.where(inside, labels, 0))
    return Mean.of(jnp.where(inside | (weights == 0), values, jnp.nan), weights)


@jax.custom_jvp
def _negative_log_likelihood(logits: Float[Array, "*batch V"], labels: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """-log softmax(logits) of the labels."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    label = jnp.take_along_axis(shifted, labels[..., None], axis=-1)[..., 0]
    return jnp.log(jnp.exp(shifted).sum(axis=-1)) - label


@_negative_log_likelihood.defjvp
def _negative_log_likelihood_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    """The gradient is softmax - one-hot in one expression; autodiff would scatter the ones into an array of zeros."""
    (logits, labels), (change, _) = primals, tangents
    slope = jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1])
    return _negative_log_likelihood(logits, labels), (slope * change).sum(axis=-1)


def binary_cross_entropy(
    logits: Float[Array, "*batch"], labels: Bool[Array, "*batch"], weights: Float[Array, "*batch"]
) -> Mean:
    """Sigmoid cross entropy in nats, where a logit above 0 says yes."""
    return Mean.of(optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), labels), weights)


def squared_error(
    predictions: Float[Array, "*batch"], targets: Float[Array, "*batch"], weights: Float[Array, "*batch"]
) -> Mean:
    """Squared difference."""
    return Mean.of(jnp.square(predictions.astype(jnp.float32) - targets.astype(jnp.float32)), weights)


def accuracy(logits: Float[Array, "*batch V"], labels: Int[Array, "*batch"], weights: Float[Array, "*batch"]) -> Mean:
    """Share of the items whose label has the largest logit; a tie counts.

    By the maximum, which XLA vectorises on CPU, and not by the argmax, which it does not.
    """
    inside = (labels >= 0) & (labels < logits.shape[-1])
    label = jnp.take_along_axis(logits, jnp.where(inside, labels, 0)[..., None], axis=-1)[..., 0]
    return Mean.of(inside & (label >= logits.max(axis=-1)), weights)
