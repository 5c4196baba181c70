"""Activation functions by the names that they have in config.json."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxptm.types import Array


def gelu(x: Array) -> Array:
    """x times the probability of a normal variable below it (Hendrycks and Gimpel 2016)."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


def _in_float32(activation: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: activation(x.astype(jnp.float32)).astype(x.dtype)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "gelu_fast": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "linear": lambda x: x,
}
ACTIVATIONS = {name: jax.checkpoint(_in_float32(activation)) for name, activation in _ACTIVATIONS.items()}
"""By Hugging Face's `hidden_act`. All compute in float32, and keep their input for the gradient: to compute the rest
again costs less."""
