"""Hashed keys against what independent draws would give, in all that a model does with a key."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxptm.models import PRESETS
from jaxptm.nn.core import Execution
from jaxptm.ops.hashed_rng import hashed, lowbias32

SURE = 1e-6
"""Probability below which a statistic of independent draws never falls in a test with fixed keys."""


def data(keys: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(keys))


def bits(words: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8))


def likely(ones: int, size: int) -> bool:
    return float(stats.binomtest(ones, size).pvalue) > SURE


def test_the_hash_is_the_published_one() -> None:
    """Computed with Python's integers."""
    for x in (0, 1, 0xDEADBEEF, 2**32 - 1):
        expected = x
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            expected = (expected ^ (expected >> shift)) * factor % 2**32
        expected ^= expected >> 16
        assert int(lowbias32(jnp.uint32(x))) == expected


def test_a_stream_repeats_nothing() -> None:
    key = hashed(jax.random.key(0))
    assert len(np.unique(jax.random.bits(key, (1 << 20,), jnp.uint32))) == 1 << 20
    halves = data(jax.random.split(key, 1 << 16)).T
    assert all(len(np.unique(half)) == 1 << 16 for half in halves)
    assert (halves[0] != halves[1]).all()


def test_folded_and_split_keys_are_independent() -> None:
    """Of keys a step apart: names of places (flax folds in their hashes), numbers of layers, rows."""
    for seed in range(4):
        key = hashed(jax.random.key(seed))
        for children in (
            jax.random.split(key, 512),
            jax.vmap(lambda name, key=key: jax.random.fold_in(key, name))(jnp.arange(512, dtype=jnp.uint32) << 23),
            jax.vmap(lambda seed: hashed(jax.random.key(seed)))(jnp.arange(512)),
        ):
            words = np.asarray(jax.vmap(lambda key: jax.random.bits(key, (64,), jnp.uint32))(children))
            assert likely(bits(words).sum(), 32 * words.size)
            for lag in (1, 2, 8, 64, 256):  # between children, and along their streams
                assert likely(bits(words[lag:] ^ words[:-lag]).sum(), 32 * words[lag:].size)
            assert likely(bits(words[:, 1:] ^ words[:, :-1]).sum(), 32 * words[:, 1:].size)
            counts = np.unpackbits(words[..., None].view(np.uint8), axis=-1).sum(axis=(0, 1))  # of each bit
            assert min(stats.binomtest(int(count), words.size).pvalue for count in counts) > SURE


@pytest.mark.parametrize("bit", range(0, 64, 7))
def test_one_bit_of_a_key_changes_half_of_what_is_drawn(bit: int) -> None:
    impl = jax.random.key_impl(hashed(jax.random.key(0)))
    flip = np.array([1 << bit if bit < 32 else 0, 1 << (bit - 32) if bit >= 32 else 0], np.uint32)
    keys = data(jax.random.split(hashed(jax.random.key(1)), 256))
    for drawn in (
        lambda key: jax.random.bits(key, (16,), jnp.uint32),
        lambda key: jax.random.key_data(jax.random.fold_in(key, 5)),
    ):
        first, second = (
            np.asarray(jax.vmap(lambda key: drawn(jax.random.wrap_key_data(key, impl=impl)))(one))  # noqa: B023
            for one in (keys, keys ^ flip)
        )
        assert likely(bits(first ^ second).sum(), 32 * first.size)


def test_what_jax_makes_of_bits() -> None:
    key = hashed(jax.random.key(2))
    uniform = np.asarray(jax.random.uniform(key, (1 << 16,)))
    assert stats.kstest(uniform, "uniform").pvalue > SURE
    assert stats.kstest(np.asarray(jax.random.normal(key, (1 << 16,))), "norm").pvalue > SURE
    for width in (8, 16):
        short = np.asarray(jax.random.bits(key, (1 << 16,), jnp.dtype(f"uint{width}")))
        assert short.dtype.itemsize * 8 == width and likely(bits(short).sum(), width * short.size)
    assert data(jax.random.key(3, impl=jax.random.key_impl(key))).shape == (2,)


def test_a_key_may_be_of_any_kind() -> None:
    for kind in ("threefry2x32", "rbg"):
        first, second = (data(hashed(jax.random.key(seed, impl=kind))) for seed in (0, 1))
        assert first.shape == (2,) and (first != second).all() and first[0] != first[1]


def test_words_of_64_bits_are_refused() -> None:
    with jax.enable_x64(True), pytest.raises(ValueError, match="words of at most 32 bits, not of 64"):
        jax.random.bits(hashed(jax.random.key(0)), (1,), jnp.uint64)


def test_flax_makes_its_keys_of_it() -> None:
    class Draw(nn.Module):
        @nn.compact
        def __call__(self, carry: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            return carry, jax.random.bits(self.make_rng("dropout"), (4,), jnp.uint32)

    class Layers(nn.Module):
        @nn.compact
        def __call__(self) -> tuple[jax.Array, jax.Array]:
            scan = nn.scan(Draw, split_rngs={"dropout": True}, length=3)
            scanned = scan(name="scanned")(jnp.zeros(()), None)[1]
            return scanned, jnp.stack([nn.remat(Draw)(name=f"layer_{i}")(jnp.zeros(()), None)[1] for i in range(3)])

    drawn = jax.jit(lambda key: Layers().apply({}, rngs={"dropout": hashed(key)}))(jax.random.key(4))
    assert len(np.unique(np.concatenate(drawn))) == 24


def test_dropout_leaves_no_loops_to_compile() -> None:
    """Threefry's rounds are a loop on CPUs, two for each place that drops something."""
    family, config = PRESETS["bert-tiny"]
    config = config.model_copy(update={"num_hidden_layers": 3})
    module = family.module(config, None, Execution())
    variables = jax.eval_shape(module.init, jax.random.key(0), module.example())

    def loops(*kind: object) -> int:
        def run(variables: object, key: jax.Array) -> object:
            key = hashed(key) if kind else key
            ids = jnp.ones((2, 8), jnp.int32)
            return module.apply(variables, ids, jnp.ones_like(ids), train=True, rngs={"dropout": key})

        return jax.jit(run).lower(variables, jax.random.key(0)).compile().as_text().count(" while(")

    assert loops() >= 2 * 3 * 3
    assert loops("hashed") <= 1  # where the hashed key is drawn
