"""Convolutions over time, in the form that is fastest where they run."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxptm.types import Array


def grouped_convolution(
    x: Float[Array, "B F D"], kernel: Float[Array, "taps Dg D"], groups: int, *, one_by_one: bool | None = None
) -> Float[Array, "B F D"]:
    """Each group of channels convolved over time with its own kernel, as many frames out as in.

    Args:
        one_by_one: a convolution for each group, and not one for all; default on CPUs, where XLA takes fifteen times as
            long for the backward pass of the latter. GPUs are faster with it (benchmarks/README.md).
    """
    taps = len(kernel)
    if one_by_one is None:
        one_by_one = jax.default_backend() == "cpu"
    parts = groups if one_by_one else 1
    convolved = [
        jax.lax.conv_general_dilated(
            part,
            weights,
            window_strides=(1,),
            padding=[(taps // 2, (taps - 1) // 2)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups // parts,
        )
        for part, weights in zip(jnp.split(x, parts, axis=-1), jnp.split(kernel, parts, axis=-1), strict=True)
    ]
    return jnp.concatenate(convolved, axis=-1)


def strided_convolution(
    x: Float[Array, "B L E"], kernel: Float[Array, "taps E E2"], stride: int, *, products: bool | None = None
) -> Float[Array, "B F E2"]:
    """x convolved over time without padding, a frame every `stride` places.

    Args:
        products: the gradients are matrix products, and not convolutions; default on CPUs, where XLA takes a quarter
            longer for the latter, while it is the fastest forwards. Derivatives are then taken in reverse mode alone.
    """
    if products is None:
        products = jax.default_backend() == "cpu"
    return (_convolved_for_products if products else _convolved)(x, kernel, stride)


def _convolved(x: Array, kernel: Array, stride: int) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))


def _as_products(x: Array, kernel: Array, stride: int) -> Array:
    """The same, `stride` taps at a time: a frame's share of x is then a row of x as it lies in memory."""
    taps, _, features = kernel.shape
    frames = (x.shape[1] - taps) // stride + 1
    out = jnp.zeros((len(x) * frames, features), x.dtype)
    for first in range(0, taps, stride):
        some = kernel[first : first + stride]
        if len(some) == stride:
            seen = x[:, first : first + frames * stride]
        else:  # fewer taps than a stride: what lies between them is left out
            end = first + (frames - 1) * stride + 1
            seen = jnp.stack([x[:, tap : end + tap - first : stride] for tap in range(first, taps)], axis=2)
        out += seen.reshape(len(out), -1) @ some.reshape(-1, features)
    return out.reshape(len(x), frames, features)


def _slopes(stride: int, kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    return jax.vjp(partial(_as_products, stride=stride), *kept)[1](slope)


_convolved_for_products = jax.custom_vjp(_convolved, nondiff_argnums=(2,))
_convolved_for_products.defvjp(lambda x, kernel, stride: (_convolved(x, kernel, stride), (x, kernel)), _slopes)
