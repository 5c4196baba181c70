"""Normalisation that keeps for the backward pass its input and two numbers for what is normalised together.

Over features it is layer normalisation (Ba et al. 2016), over time a group normalisation (Wu and He 2018) with a group
for each channel.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from jaxptm.types import Array


def normalise(
    x: Float[Array, "*R D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    epsilon: float,
    dtype: Any,
    axis: int = -1,
    shares: Float[Array, ...] | None = None,
) -> Float[Array, "*R D"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, computed in float32 and returned as `dtype`.

    Args:
        axis: that mean and variance are over.
        shares: of the elements along the axis in both, which add up to 1; default the same for all. Constants.
    """
    scale, bias = (jnp.expand_dims(of_features, range(x.ndim - 1)) for of_features in (scale, bias))

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("mean", "spread"))
    def normalised(x: Array, scale: Array, bias: Array) -> Array:
        return (_standardised(x.astype(jnp.float32), shares, axis, epsilon) * scale + bias).astype(dtype)

    return normalised(x, scale, bias)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _standardised(x: Array, shares: Array | None, axis: int, epsilon: float) -> Array:
    mean, spread = _moments(x, shares, axis, epsilon)
    return (x - mean) * spread


@_standardised.defjvp
def _standardised_jvp(axis: int, epsilon: float, primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> Any:
    """Without the sum of x - mean, which is zero, and for which autodiff would read everything once more."""
    (x, shares), (dx, _) = primals, tangents
    mean, spread = _moments(x, shares, axis, epsilon)
    y = (x - mean) * spread
    return y, spread * (dx - _mean(dx, shares, axis) - y * _mean(y * dx, shares, axis))


def _moments(x: Array, shares: Array | None, axis: int, epsilon: float) -> tuple[Array, Array]:
    mean = checkpoint_name(_mean(x, shares, axis), "mean")
    # In two passes: the mean of squares less the square of the mean loses digits where the mean is large.
    variance = _mean(jnp.square(x - mean), shares, axis)
    return mean, checkpoint_name(jax.lax.rsqrt(variance + epsilon), "spread")


def _mean(x: Array, shares: Array | None, axis: int) -> Array:
    return x.mean(axis, keepdims=True) if shares is None else (x * shares).sum(axis, keepdims=True)
