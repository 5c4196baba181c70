"""What all modules are made of: dense layers, norms and dropout. Sums over rows are float32 whatever is computed in."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from jaxptm.ops.dropout import dropout
from jaxptm.ops.norm import normalise
from jaxptm.types import Array


def over_rows(x: Float[Array, "*R I"], kernel: Float[Array, "I O"]) -> Float[Array, "*R O"]:
    """x times the kernel, with all leading axes as one.

    The product is the same. But the gradient of the kernel then sums over one axis, for which XLA on CPUs has a form
    that neither transposes its operands nor computes them again: a quarter less time for a feed-forward layer.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def spread(vector: Float[Array, " D"], x: Float[Array, "*R D"]) -> Float[Array, "*R D"]:
    """The vector in every row, in the type of `x`.

    Its gradient is summed over the rows in float32. In bfloat16 the sum of some thousands loses up to half of itself.
    """
    return jnp.broadcast_to(vector.astype(jnp.float32), x.shape).astype(x.dtype)


class Dense(nn.Module):
    """x W + b."""

    features: int
    kernel_init: nn.initializers.Initializer
    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*R I"]) -> Float[Array, "*R O"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        y = over_rows(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return y
        return y + spread(self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype), y)


class Norm(nn.Module):
    """Over the last axis, or another (see `ops.norm`)."""

    epsilon: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis: int = -1

    @nn.compact
    def __call__(self, x: Float[Array, "*R D"], shares: Float[Array, ...] | None = None) -> Float[Array, "*R D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        return normalise(x, scale, bias, self.epsilon, self.dtype, self.axis, shares)


class Dropout(nn.Module):
    """In training, drops a share `rate` of the elements by the rng `dropout` (see `ops.dropout`)."""

    rate: float

    def __call__(self, x: Float[Array, "B ..."], *, train: bool) -> Float[Array, "B ..."]:
        return dropout(x, self.make_rng("dropout"), self.rate) if train and self.rate else x
