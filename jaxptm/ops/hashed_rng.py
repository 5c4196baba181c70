"""Random keys whose operations cost XLA little to compile.

Every place that drops something folds its name into a key and draws a few words from it. By Threefry, jax's default,
that is two loops of twenty rounds a place, and three quarters of all that XLA compiled for a BERT-base's forward pass.
By the hash here it is some twenty integer operations that fuse with what reads them, the same on every device.

It decides what dropout drops, not more: a hash of 32 bits is no match for Threefry where a stream has to stand a test
suite.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl
from jaxtyping import Key, UInt32

from jaxptm.types import Array

OTHER = 0x9E3779B9
"""Sets the second word of a key apart from the first: 2**32 over the golden ratio."""


def lowbias32(x: UInt32[Array, ...]) -> UInt32[Array, ...]:
    """A permutation of 32 bits (C. Wellons, hash-prospector).

    Any one bit of x flips half of the bits of the result, on average.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def hashed(key: Key[Array, ""]) -> Key[Array, ""]:
    """A key of this kind, drawn from one of any kind."""
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl=_HASHED)


def _words(key: UInt32[Array, " 2"], counters: UInt32[Array, ...] | int) -> UInt32[Array, ...]:
    """A word for each counter: none twice, as long as no counter is."""
    return lowbias32(lowbias32(counters ^ key[0]) + key[1])


def _fold_in(key: UInt32[Array, " 2"], counters: UInt32[Array, ...] | int) -> UInt32[Array, "... 2"]:
    return jnp.stack([_words(key, counters), _words(key[::-1] ^ jnp.uint32(OTHER), counters)], axis=-1)


def _seed(seed: Array) -> UInt32[Array, " 2"]:
    return _fold_in(jnp.zeros(2, jnp.uint32), seed.astype(jnp.uint32))


def _counters(shape: tuple[int, ...]) -> UInt32[Array, ...]:
    return jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)


def _split(key: UInt32[Array, " 2"], shape: tuple[int, ...]) -> UInt32[Array, "... 2"]:
    return _fold_in(key, _counters(shape))


def _random_bits(key: UInt32[Array, " 2"], width: int, shape: tuple[int, ...]) -> Array:
    if width > 32:
        raise ValueError(f"a hashed key gives words of at most 32 bits, not of {width}")
    return (_words(key, _counters(shape)) >> (32 - width)).astype(jnp.dtype(f"uint{width}"))


_HASHED = define_prng_impl(
    key_shape=(2,), seed=_seed, split=_split, random_bits=_random_bits, fold_in=_fold_in, name="lowbias32", tag="hash"
)
