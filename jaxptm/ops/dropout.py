"""Dropout (Srivastava et al. 2014) whose masks cost about as much as reading them.

`jax.random.bernoulli` spends 20 rounds of Threefry on every element, which came to a tenth of a training step on a CPU
(attention weights at length 264). No mask needs that: here Threefry draws two words for each row, and within the row
an integer hash of the position, keyed by them, is compared with the rate. Every operation is elementwise, so XLA fuses
the mask into what reads it, forwards and backwards, and divides it over devices without a word between them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Key, UInt32

from jaxptm.types import Array


def dropout(x: Float[Array, "B ..."], key: Key[Array, ""], rate: float) -> Float[Array, "B ..."]:
    """x / (1 - rate) where `kept`, else 0: the same on average."""
    if rate == 0:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    return jnp.where(kept(key, rate, x.shape), x / (1 - rate), jnp.zeros((), x.dtype))


def kept(key: Key[Array, ""], rate: float, shape: tuple[int, ...]) -> Bool[Array, "B ..."]:
    """True with probability 1 - `rate`, which is met within 2**-32, for each element.

    Args:
        rate: share that is dropped, above 0 and below 1.
        shape: rows first; positions within a row are counted modulo 2**32.
    """
    rows, *rest = shape
    first, second = words_of_rows(key, rows).reshape(2, rows, *[1] * len(rest))
    position = jnp.zeros([1] * len(shape), jnp.uint32)
    for axis, size in enumerate(rest, 1):
        position = position * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, (1, *rest), axis)
    return kept_at(position, first, second, rate)


def words_of_rows(key: Key[Array, ""], rows: int) -> UInt32[Array, "2 {rows}"]:
    """All that is random about the masks of a batch of rows."""
    return jax.random.bits(key, (2, rows), jnp.uint32)


def kept_at(
    position: UInt32[Array, ...], first: UInt32[Array, ...], second: UInt32[Array, ...], rate: float
) -> Bool[Array, ...]:
    """Whether dropout keeps what stands at a position of the row that has these two words.

    The hash is `lowbias32` (C. Wellons, hash-prospector): two multiplications between three xor-shifts, which flip
    half of all bits when any one bit of the input flips. The first word of a row is mixed into the positions, the
    second in between, so that the masks of two rows are no permutations of each other.
    """
    mixed = position ^ first
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x7FEB352D) ^ second
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x846CA68B)
    mixed = mixed ^ (mixed >> 16)
    return mixed < jnp.uint32(math.ceil((1 - rate) * 2**32))
