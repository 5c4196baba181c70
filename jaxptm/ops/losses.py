"""Losses and scores as undivided means, computed in float32 whatever the type of the logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int

from jaxptm.config import RATE
from jaxptm.types import Array, Mean

PART = 512
"""Fewest tokens of which `linear_cross_entropy` takes the logits at once: with fewer, products do not fill a device."""
PARTS = 4
"""Most parts that it cuts a batch into: each one adds to the gradient of the whole table, which is read and written."""


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


def linear_cross_entropy(
    x: Float[Array, "B L E"], table: Float[Array, "V E"], labels: Int[Array, "B L"], weights: Float[Array, "B L"]
) -> tuple[Mean, Mean]:
    """`cross_entropy` and `accuracy` of the logits `x table^T`, of which never more than a part is in memory.

    The gradients of `x` and `table` are computed with the loss, part by part of the rows' length, while the logits are
    there; the backward pass only scales them (as Hsu et al. 2024, "Liger Kernel", do by the row). Products
    are of the type of `x`, what they add up to is float32. Forward-mode derivatives are not defined.
    """
    inside = (labels >= 0) & (labels < len(table))
    total, right = _linear_sums(x, table, jnp.where(inside, labels, 0), jnp.where(inside, weights, 0))
    weight = weights.sum(dtype=jnp.float32)
    return Mean(jnp.where(jnp.any(~inside & (weights != 0)), jnp.nan, total), weight), Mean(right, weight)


def parts_of_logits(tokens: int) -> int:
    """How many parts `linear_cross_entropy` cuts a batch of so many tokens into."""
    return max(1, min(PARTS, tokens // PART))


@jax.custom_vjp
def _linear_sums(
    x: Float[Array, "B L E"], table: Float[Array, "V E"], labels: Int[Array, "B L"], weights: Float[Array, "B L"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums of the negative log likelihood of the labels, and of where they have the largest logit."""
    return _in_parts(x, table, labels, weights, gradients=False)[0]


def _linear_sums_backward(gradients: Any, changes: Any) -> tuple[Array, Array, None, None]:
    (of_x, of_table), (change, _) = gradients, changes
    return of_x * change.astype(of_x.dtype), of_table * change.astype(of_table.dtype), None, None


def _in_parts(
    x: Float[Array, "B L E"],
    table: Float[Array, "V E"],
    labels: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    *,
    gradients: bool,
) -> tuple[tuple[Array, Array], tuple[Array, Array] | None]:
    """The sums, and the gradients of the first one."""
    rows, length = labels.shape
    parts = parts_of_logits(labels.size)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    entries = table.astype(x.dtype)

    def cut(array: Array) -> Array:
        """[B, L, ...] -> [parts, B, L / parts, ...]: of the length, since the rows may lie on many devices."""
        array = jnp.pad(array, [(0, 0), (0, -length % parts)] + [(0, 0)] * (array.ndim - 2))
        return jnp.swapaxes(array.reshape(rows, parts, -1, *array.shape[2:]), 0, 1)

    def add(sums: Any, part: Any) -> tuple[Any, Array | None]:
        (total, right, of_table), (x, labels, weights) = sums, part
        logits = product("ble,ve->blv", x, entries)
        largest = logits.max(axis=-1, keepdims=True)
        label = jnp.take_along_axis(logits, labels[..., None], axis=-1)
        exponentials = jnp.exp(logits - largest)
        partition = exponentials.sum(axis=-1, keepdims=True)
        total += (weights * (jnp.log(partition) - (label - largest))[..., 0]).sum()
        right += (weights * (label >= largest)[..., 0]).sum()
        if not gradients:
            return (total, right, None), None
        # softmax - one-hot
        slope = exponentials / partition - jax.nn.one_hot(labels, len(table))
        slope = (slope * weights[..., None]).astype(x.dtype)
        of_table += product("blv,ble->ve", slope, x)
        return (total, right, of_table), jnp.einsum("blv,ve->ble", slope, entries)

    zero = jnp.zeros(())
    start = (zero, zero, jnp.zeros(table.shape) if gradients else None)
    (total, right, of_table), of_x = jax.lax.scan(add, start, tuple(map(cut, (x, labels, weights))))
    if of_table is None or of_x is None:
        return (total, right), None
    of_x = jnp.swapaxes(of_x, 0, 1).reshape(rows, -1, x.shape[-1])[:, :length]
    return (total, right), (of_x, of_table.astype(table.dtype))


_linear_sums.defvjp(partial(_in_parts, gradients=True), _linear_sums_backward)


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
