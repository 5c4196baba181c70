"""Losses against torch in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxptm.ops import losses
from jaxptm.ops.losses import accuracy, cross_entropy, linear_cross_entropy
from jaxptm.types import Mean

VOCAB = 37


@pytest.fixture
def items():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (4, 9, VOCAB)).astype(np.float32)
    labels = rng.integers(0, VOCAB, (4, 9)).astype(np.int32)
    weights = rng.choice([0, 1, 0.5], (4, 9)).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weights)


def torch_mean(logits, labels, weights):
    """Weighted mean cross entropy and its gradient, in float64."""
    x = torch.tensor(np.asarray(logits, np.float64), requires_grad=True)
    values = torch.nn.functional.cross_entropy(
        x.flatten(0, -2), torch.tensor(np.asarray(labels, np.int64)).flatten(), reduction="none"
    )
    w = torch.tensor(np.asarray(weights, np.float64)).flatten()
    loss = (values * w).sum() / w.sum()
    loss.backward()
    return loss.item(), x.grad.numpy()


def mean_and_grad(logits, labels, weights):
    return jax.value_and_grad(lambda x: cross_entropy(x, labels, weights).value)(logits)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_cross_entropy_agrees_with_torch(items, scale):
    logits, labels, weights = items
    value, grad = mean_and_grad(logits * scale, labels, weights)
    expected, expected_grad = torch_mean(logits * scale, labels, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-7)


def test_bfloat16_logits_lose_nothing_but_their_own_rounding(items):
    logits, labels, weights = items
    logits = logits.astype(jnp.bfloat16)
    loss = cross_entropy(logits, labels, weights)
    assert loss.total.dtype == loss.weight.dtype == jnp.float32
    value, grad = mean_and_grad(logits, labels, weights)
    expected, expected_grad = torch_mean(logits.astype(jnp.float32), labels, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(grad.astype(jnp.float32), expected_grad, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("outside", [-100, -1, VOCAB, 10**6])
def test_labels_outside_the_vocabulary(items, outside):
    logits, labels, weights = items
    strange = jnp.where(weights == 0, outside, labels)
    value, grad = mean_and_grad(logits, strange, weights)
    expected, expected_grad = mean_and_grad(logits, labels, weights)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(grad, expected_grad)
    np.testing.assert_array_equal(accuracy(logits, strange, weights).value, accuracy(logits, labels, weights).value)
    assert np.isnan(cross_entropy(logits, jnp.full_like(labels, outside), weights).value)


def test_nothing_counted_is_zero_and_finite(items):
    logits, labels, weights = items
    value, grad = mean_and_grad(logits, labels, jnp.zeros_like(weights))
    assert value == 0
    assert not grad.any()
    assert accuracy(logits, labels, jnp.zeros_like(weights)).value == 0


def test_accuracy(items):
    logits, labels, weights = items
    labels = labels.at[0].set(jnp.argmax(logits[0], -1))
    hits = np.argmax(logits, -1) == np.asarray(labels)
    result = accuracy(logits, labels, weights)
    assert hits[0].all()
    assert not hits[1:].all()
    assert result.total == (hits * weights).sum()
    assert result.weight == weights.sum()


def test_parts_add_up_to_the_whole(items):
    logits, labels, weights = items
    weights = weights.at[1].set(0.0).at[2, 1:].set(0.0)  # so that a mean of means would be wrong
    for loss, rtol in ((accuracy, 0), (cross_entropy, 1e-6)):
        parts = [loss(logits[i], labels[i], weights[i]) for i in range(4)]
        summed = Mean(sum(part.total for part in parts), sum(part.weight for part in parts))
        whole = loss(logits, labels, weights)
        assert summed.weight == whole.weight
        np.testing.assert_allclose(summed.value, whole.value, rtol=rtol)
    assert abs(np.mean([part.value for part in parts]) - whole.value) > 0.01


@pytest.fixture
def hidden():
    rng = np.random.default_rng(1)
    x, table = rng.normal(0, 1, (4, 9, 8)), rng.normal(0, 1, (VOCAB, 8))
    return jnp.asarray(x, jnp.float32), jnp.asarray(table, jnp.float32)


@pytest.mark.parametrize(
    "part", [512, 18, 12, 9]
)  # 1, 2, 3 and 4 parts of nine tokens a row: two of them do not divide
@pytest.mark.parametrize("coefficient", [1.0, 0.3])
def test_linear_cross_entropy_agrees_with_torch(items, hidden, monkeypatch, part, coefficient):
    monkeypatch.setattr(losses, "PART", part)
    assert losses.parts_of_logits(36) == {512: 1, 18: 2, 12: 3, 9: 4}[part]
    (_, labels, weights), (x, table) = items, hidden

    def loss(x, table):
        value, score = linear_cross_entropy(x, table, labels, weights)
        return coefficient * value.value, score

    (value, score), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, table)
    ours = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    theirs = torch.tensor(np.asarray(table, np.float64), requires_grad=True)
    logits = ours @ theirs.T
    values = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(np.asarray(labels)).long().flatten(), reduction="none"
    )
    w = torch.tensor(np.asarray(weights, np.float64)).flatten()
    expected = coefficient * (values * w).sum() / w.sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(grads[0], ours.grad, atol=1e-6)
    np.testing.assert_allclose(grads[1], theirs.grad, atol=1e-6)
    right = (logits.argmax(-1).numpy() == np.asarray(labels)) * np.asarray(weights)
    assert right.any() and score.total == right.sum() and score.weight == weights.sum()
    alone, _ = linear_cross_entropy(x, table, labels, weights)  # without gradients
    np.testing.assert_allclose(coefficient * alone.value, value, rtol=1e-6)


@pytest.mark.parametrize("outside", [-100, VOCAB, 10**6])
def test_linear_cross_entropy_of_labels_outside_the_vocabulary(items, hidden, outside):
    _, labels, weights = items
    strange = jnp.where(weights == 0, outside, labels)
    for value, expected in zip(
        linear_cross_entropy(*hidden, strange, weights), linear_cross_entropy(*hidden, labels, weights), strict=True
    ):
        assert value.value == expected.value
    assert np.isnan(linear_cross_entropy(*hidden, jnp.full_like(labels, outside), weights)[0].value)
    assert linear_cross_entropy(*hidden, labels, jnp.zeros_like(weights))[0].value == 0


def test_linear_cross_entropy_in_bfloat16_adds_in_float32(hidden, monkeypatch):
    """A thousand alike gradients of one entry: what bfloat16 adds up stops at 256 of them."""
    monkeypatch.setattr(losses, "PART", 256)
    x, table = jnp.ones((1, 1024, 8), jnp.bfloat16), jnp.zeros((VOCAB, 8))
    labels, weights = jnp.zeros((1, 1024), jnp.int32), jnp.ones((1, 1024))
    of_x, of_table = jax.grad(lambda *both: linear_cross_entropy(*both, labels, weights)[0].total, (0, 1))(x, table)
    assert of_x.dtype == jnp.bfloat16 and of_table.dtype == jnp.float32
    np.testing.assert_allclose(of_table[0], 1024 * (1 / VOCAB - 1), rtol=2**-7)
    np.testing.assert_allclose(of_table[1:], 1024 / VOCAB, rtol=2**-7)


def test_no_more_logits_than_a_part_are_in_memory(monkeypatch):
    x, table = jnp.zeros((2, 64, 4)), jnp.zeros((50_000, 4))
    labels, weights = jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64))

    def memory(part):
        monkeypatch.setattr(losses, "PART", part)
        gradient = jax.grad(lambda *both: linear_cross_entropy(*both, labels, weights)[0].value, (0, 1))
        return jax.jit(gradient).lower(x, table).compile().memory_analysis().temp_size_in_bytes

    assert memory(512) > 4 * 128 * 50_000
    assert memory(32) < 0.3 * memory(512)


def test_linear_cross_entropy_over_devices(items, hidden):
    """Rows on four devices: nothing but sums travels."""
    _, labels, weights = items
    mesh = jax.make_mesh((4,), ("rows",), devices=jax.devices()[:4])
    rows, all_ = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("rows",), ()))
    gradient = jax.grad(lambda *both: linear_cross_entropy(*both)[0].value, (0, 1))
    spread = jax.jit(gradient, in_shardings=(rows, all_, rows, rows), out_shardings=(rows, all_))
    for found, expected in zip(spread(*hidden, labels, weights), gradient(*hidden, labels, weights), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-7)
    program = spread.lower(*hidden, labels, weights).compile().as_text()
    assert "all-reduce" in program and "all-gather" not in program and "all-to-all" not in program
