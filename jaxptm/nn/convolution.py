"""Convolutions over time, in the form that is fastest where they run."""

from __future__ import annotations

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
