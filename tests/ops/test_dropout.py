"""Dropout against what independent draws of one probability would give."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from jaxptm.ops.dropout import dropout, kept
from jaxptm.ops.hashed_rng import hashed

RATES = [1 / 3, 0.1, 0.5]
SURE = 1e-6
"""Probability below which a statistic of independent draws never falls in a test with fixed keys."""


def mask(seed: int, rate: float, *shape: int) -> np.ndarray:
    return np.asarray(kept(hashed(jax.random.key(seed)), rate, shape))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shape", [(64, 12, 37, 37), (512, 2048), (4096, 3, 7), (1, 1 << 19), (1 << 19,)])
def test_share_over_all_elements(rate: float, shape: tuple[int, ...]) -> None:
    found = mask(0, rate, *shape)
    assert found.shape == shape and found.dtype == bool
    assert stats.binomtest(int(found.sum()), found.size, 1 - rate).pvalue > SURE


@pytest.mark.parametrize("rate", RATES)
def test_sums_spread_as_those_of_independent_draws(rate: float) -> None:
    # [rows, 256, 64]: of elements that follow each other, of those at one position in all rows, of whole rows.
    found = mask(1, rate, 512, 256, 64)
    for axes in ((2,), (1,), (0,), (1, 2)):
        sums = found.sum(axis=axes)
        count = found.size / sums.size
        expected = count * (1 - rate)
        spread = float(((sums - expected) ** 2).sum() / (expected * rate))
        tail = stats.chi2(sums.size)
        assert min(tail.cdf(spread), tail.sf(spread)) > SURE, axes


def test_sums_over_keys_of_one_position_spread_as_those_of_independent_draws() -> None:
    keys = jax.random.split(jax.random.key(2), 2048)
    found = np.asarray(jax.jit(jax.vmap(lambda key: kept(hashed(key), 0.1, (3, 200))))(keys))
    sums = found.sum(axis=0)
    spread = float(((sums - 2048 * 0.9) ** 2).sum() / (2048 * 0.9 * 0.1))
    tail = stats.chi2(sums.size)
    assert min(tail.cdf(spread), tail.sf(spread)) > SURE


def agreement(first: Any, second: Any) -> float:
    """Two-sided probability that independent masks agree as often as these do, or as seldom."""
    rate = 0.5
    return float(stats.binomtest(int((first == second).sum()), first.size, rate).pvalue)


def test_elements_rows_keys_and_layers_are_independent_of_each_other() -> None:
    found = mask(3, 0.5, 16, 1 << 15)
    for lag in (1, 2, 3, 7, 8, 64, 100, 128, 1 << 10, 1 << 12, 1 << 14):
        assert agreement(found[:, lag:], found[:, :-lag]) > SURE, lag
    for flip in (1 << bit for bit in range(15)):  # the positions that differ in one bit
        assert agreement(found[:, np.arange(1 << 15) ^ flip], found) > SURE, flip
    for other in range(1, 16):
        assert agreement(found[0], found[other]) > SURE
    for seed in range(4, 24):
        assert agreement(found, mask(seed, 0.5, 16, 1 << 15)) > SURE


def test_the_corners_of_rectangles_are_independent() -> None:
    # Of two places before the last axis and two along it, three decisions must not tell the fourth.
    found = mask(5, 0.5, 64, 128, 128)
    for before, along in ((1, 1), (1, 64), (37, 5), (64, 64), (127, 127)):
        edges = found[:, before:] ^ found[:, :-before]
        corners = edges[:, :, along:] ^ edges[:, :, :-along]
        assert agreement(corners, np.zeros_like(corners)) > SURE, (before, along)


@pytest.mark.parametrize("rate", [0.25, 0.1])  # 1 - 0.1 is no number of bfloat16
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_kept_is_scaled_and_the_gradient_with_it(dtype: Any, rate: float) -> None:
    x = jax.random.normal(jax.random.key(7), (4, 5, 6), dtype)
    key = jax.random.key(8)
    found = np.asarray(kept(key, rate, x.shape))
    assert 0 < found.sum() < found.size
    out, back = jax.vjp(lambda x: dropout(x, key, rate), x)
    assert out.dtype == dtype
    within = {"rtol": float(jnp.finfo(dtype).eps / 2 + jnp.finfo(jnp.float32).eps)}  # rounded once
    np.testing.assert_allclose(np.asarray(out, float), np.where(found, np.asarray(x, float) / (1 - rate), 0), **within)
    np.testing.assert_allclose(
        np.asarray(back(jnp.ones_like(x))[0], float), np.where(found, 1 / (1 - rate), 0), **within
    )


def test_the_backward_pass_makes_the_mask_again_and_has_a_derivative() -> None:
    x, key = jax.random.normal(jax.random.key(9), (3, 4, 5)), jax.random.key(10)
    _, back = jax.vjp(lambda x: dropout(x, key, 0.25), x)
    assert all(leaf.size <= 2 * len(x) for leaf in jax.tree.leaves(back))  # two words a row
    scale = np.where(kept(key, 0.25, x.shape), 1 / 0.75, 0)
    twice = jax.jvp(jax.grad(lambda x: jnp.sin(dropout(x, key, 0.25)).sum()), (x,), (jnp.ones_like(x),))[1]
    np.testing.assert_allclose(twice, -np.sin(scale * x) * scale**2, atol=1e-5)


def test_no_rate_keeps_everything_and_the_full_rate_nothing() -> None:
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(dropout(x, jax.random.key(0), 0.0), x)
    np.testing.assert_array_equal(dropout(x, jax.random.key(0), 1.0), jnp.zeros((2, 3)))


def test_masks_do_not_depend_on_how_devices_divide_them() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Auto, AxisType.Auto))
    layout = NamedSharding(mesh, PartitionSpec("data", "tensor"))
    draw = jax.jit(lambda key: kept(key, 0.3, (4, 6, 8, 8)), out_shardings=layout)
    divided = draw.lower(hashed(jax.random.key(9))).compile()
    assert not any(word in divided.as_text() for word in ("all-gather", "all-reduce", "collective-permute"))
    np.testing.assert_array_equal(draw(hashed(jax.random.key(9))), mask(9, 0.3, 4, 6, 8, 8))


def test_a_rate_next_to_nothing_keeps_everything() -> None:
    x = jnp.ones((4, 8))
    np.testing.assert_array_equal(dropout(x, jax.random.key(0), 1e-12), x)
