"""Normalisation and its derivatives against float64, over features and over time."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxptm.ops.norm import normalise

EPSILON = 1e-5
ROWS, TIMES, FEATURES = 3, 11, 7


def inputs(mean: float = 0.0) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What is normalised, scale, bias, and the gradient of the result."""
    rng = np.random.default_rng(1)
    x = rng.normal(mean, 2, (ROWS, TIMES, FEATURES))
    return tuple(
        jnp.asarray(array, jnp.float32)
        for array in (x, rng.normal(1, 0.3, FEATURES), rng.normal(size=FEATURES), rng.normal(size=x.shape))
    )


def shares_of(lengths: list[int]) -> jax.Array:
    counted = np.arange(TIMES) < np.array(lengths)[:, None]
    return jnp.asarray(counted / counted.sum(1, keepdims=True), jnp.float32)[..., None]


WAYS = {"features": (-1, None), "time": (1, None), "time of uneven rows": (1, shares_of([11, 4, 7]))}


def in_float64(x: Any, scale: Any, bias: Any, axis: int, shares: Any) -> Any:
    """The definition, without a word on how to derive it."""
    weights = jnp.ones(x.shape) / x.shape[axis] if shares is None else jnp.broadcast_to(shares, x.shape)
    mean = (weights * x).sum(axis, keepdims=True)
    variance = (weights * (x - mean) ** 2).sum(axis, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + EPSILON) * scale[None, None] + bias[None, None]


@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_agree_with_float64(way: str, mean: float) -> None:
    axis, shares = WAYS[way]
    *arguments, slope = inputs(mean)
    out, back = jax.vjp(lambda *xs: normalise(*xs, EPSILON, jnp.float32, axis, shares), *arguments)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array), jnp.float64) for array in arguments]
        expected, their_back = jax.vjp(partial(in_float64, axis=axis, shares=shares), *wide)
        gradients = their_back(jnp.asarray(np.asarray(slope), jnp.float64))
    atol = 2e-6 * max(1, mean)  # the input itself is rounded by that
    np.testing.assert_allclose(out, expected, atol=atol)
    for ours, theirs in zip(back(slope), gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol * 10)


@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives_and_forward_mode_agree_with_float64(way: str) -> None:
    axis, shares = WAYS[way]
    x, scale, bias, direction = inputs()

    def bent(norm: Any, x: Any) -> Any:
        return jnp.sin(norm(x)).sum()

    ours = partial(bent, lambda x: normalise(x, scale, bias, EPSILON, jnp.float32, axis, shares))
    forward = jax.jvp(ours, (x,), (direction,))[1]
    twice = jax.jvp(jax.grad(ours), (x,), (direction,))[1]
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array), jnp.float64) for array in (x, scale, bias, direction)]
        theirs = partial(bent, lambda x: in_float64(x, wide[1], wide[2], axis, shares))
        np.testing.assert_allclose(forward, jax.jvp(theirs, (wide[0],), (wide[3],))[1], atol=1e-4)
        np.testing.assert_allclose(twice, jax.jvp(jax.grad(theirs), (wide[0],), (wide[3],))[1], atol=1e-4)


def test_half_precision_loses_but_its_own_rounding() -> None:
    x, scale, bias, slope = inputs()
    half = x.astype(jnp.bfloat16)
    out, back = jax.vjp(lambda x: normalise(x, scale, bias, EPSILON, jnp.bfloat16), half)
    expected, their_back = jax.vjp(lambda x: in_float64(x, scale, bias, -1, None), half.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16 and back(slope.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)
    (gradient,) = their_back(slope.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(back(slope.astype(jnp.bfloat16))[0].astype(jnp.float32), gradient, rtol=2**-8, atol=1e-6)


def test_the_backward_pass_keeps_the_input_and_two_numbers_a_row() -> None:
    x, scale, bias, _ = inputs()
    _, back = jax.vjp(lambda x: normalise(x, scale, bias, EPSILON, jnp.float32), x.astype(jnp.bfloat16))
    kept = sorted((leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(back) if leaf.size > FEATURES)
    assert kept == [("bfloat16", x.shape), *2 * [("float32", (ROWS, TIMES, 1))]]
