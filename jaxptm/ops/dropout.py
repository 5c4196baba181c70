"""Dropout (Srivastava et al. 2014) whose masks cost about as much as reading them.

`jax.random.bernoulli` spends 20 rounds of Threefry on every element, which came to a tenth of a training step on a CPU
(attention weights at length 264). No mask needs that: here two words are drawn for each row; one is hashed with every
place along the last axis, the other with every place before it, and for an element the two hashes are mixed in five
operations and compared with the rate. All of it is elementwise, so XLA fuses the mask into what reads it and divides it
over devices without a word between them. The backward pass makes the mask again: that is cheaper than keeping it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Key, UInt32

from jaxptm.ops.hashed_rng import lowbias32
from jaxptm.types import Array


def dropout(x: Float[Array, "B ..."], key: Key[Array, ""], rate: float) -> Float[Array, "B ..."]:
    """x / (1 - rate) where `kept`, else 0: the same on average. Its first derivative is taken in reverse mode alone."""
    if rate == 0:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    return _dropped(x, words_of_rows(key, len(x)), rate)


def _masked(x: Float[Array, "B ..."], words: UInt32[Array, "2 B"], rate: float) -> Float[Array, "B ..."]:
    stays = kept_at(*words_of_places(words, x.shape[1:]), rate)
    scale = 1 / (1 - rate)  # in float32: in bfloat16 0.9 is 0.898
    return jnp.where(stays, x.astype(jnp.float32) * scale, 0).astype(x.dtype)


_dropped = jax.custom_vjp(_masked, nondiff_argnums=(2,))


def _dropped_forward(x: Array, words: Array, rate: float) -> tuple[Array, Array]:
    return _masked(x, words, rate), words


def _dropped_backward(rate: float, words: Array, slope: Array) -> tuple[Array, None]:
    # XLA would find that it has this mask already, and keep it.
    return _masked(slope, jax.lax.optimization_barrier(words), rate), None


_dropped.defvjp(_dropped_forward, _dropped_backward)


def kept(key: Key[Array, ""], rate: float, shape: tuple[int, ...]) -> Bool[Array, "B ..."]:
    """True with probability 1 - `rate`, which is met within 2**-32, for each element.

    Args:
        rate: share that is dropped, above 0 and below 1.
        shape: rows first; places within a row are counted modulo 2**32.
    """
    rows, *rest = shape
    return kept_at(*words_of_places(words_of_rows(key, rows), rest), rate)


def words_of_rows(key: Key[Array, ""], rows: int) -> UInt32[Array, "2 {rows}"]:
    """All that is random about the masks of a batch of rows."""
    # The remainder by the largest prime of 32 bits changes nothing to speak of, but XLA fuses no division of integers
    # into what reads each quotient many times. So the words are finished first, and what follows is one program for
    # all layers, which XLA compiles once, and not another for the constants of each layer's key.
    return jax.random.bits(key, (2, rows), jnp.uint32) % jnp.uint32(0xFFFFFFFB)


def words_of_places(words: UInt32[Array, "2 B"], shape: Sequence[int]) -> tuple[Array, Array]:
    """A random word for each place before the last axis, [B, ..., 1], and one for each along it, [B, 1, ..., K].

    Args:
        shape: of a row, such as heads, queries and keys.
    """
    before, along = list(shape[:-1]), list(shape[-1:])
    first, second = words.reshape(2, -1, *[1] * len(shape))
    place = jnp.arange(math.prod(before), dtype=jnp.uint32).reshape(1, *before, *[1] * len(along))
    place_along = jnp.arange(math.prod(along), dtype=jnp.uint32).reshape(1, *[1] * len(before), *along)
    return lowbias32(place ^ first), lowbias32(place_along ^ second)


def kept_at(before: UInt32[Array, ...], along: UInt32[Array, ...], rate: float) -> Bool[Array, ...]:
    """Whether dropout keeps the element of these two words.

    One multiplication alone would leave the decisions of two places that differ in their highest bits dependent.
    """
    mixed = (before ^ along) * jnp.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x846CA68B)
    return mixed < jnp.uint32(min(math.ceil((1 - rate) * 2**32), 2**32 - 1))
