"""Losses against torch in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxptm.ops.losses import accuracy, cross_entropy
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
