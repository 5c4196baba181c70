"""The Gumbel quantiser against transformers', and its laws."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2GumbelVectorQuantizer

from jaxptm.nn.core import Execution
from jaxptm.nn.quantizer import GumbelQuantizer, Quantized, perplexity

ROWS, FRAMES, WIDTH, GROUPS, ENTRIES, CODE = 3, 17, 12, 2, 9, 10
MODULE = GumbelQuantizer(GROUPS, ENTRIES, CODE, Execution())


@pytest.fixture(scope="module")
def torch_quantizer() -> tuple[Any, dict[str, Any]]:
    """Theirs with random weights, and the same weights here."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        conv_dim=[WIDTH],
        conv_kernel=[2],
        conv_stride=[1],
        num_codevector_groups=GROUPS,
        num_codevectors_per_group=ENTRIES,
        codevector_dim=CODE,
    )
    theirs = Wav2Vec2GumbelVectorQuantizer(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
    arrays = {name: parameter.detach().numpy() for name, parameter in theirs.named_parameters()}
    params = {
        "embedding": jnp.asarray(arrays["codevectors"].reshape(GROUPS, ENTRIES, CODE // GROUPS)),
        "logits": {
            "kernel": jnp.asarray(arrays["weight_proj.weight"].T),
            "bias": jnp.asarray(arrays["weight_proj.bias"]),
        },
    }
    return theirs, params


def features(seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(ROWS, FRAMES, WIDTH)), jnp.float32)


def masked(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((ROWS, FRAMES)) < 0.5


def quantize(params: dict[str, Any], x: Any, weights: Any, **options: Any) -> Quantized:
    options = {"temperature": 2.0, "noise": None, "train": False, **options}
    return MODULE.apply({"params": params}, x, jnp.asarray(weights, jnp.float32), **options)


@pytest.mark.parametrize("counted", ["all", "masked"])
def test_evaluation_agrees_with_transformers(torch_quantizer: Any, counted: str) -> None:
    theirs, params = torch_quantizer
    mask = masked()
    with torch.no_grad():
        vectors, whole = theirs.eval()(
            torch.tensor(np.asarray(features())), torch.tensor(mask) if counted == "masked" else None
        )
    found = quantize(params, features(), mask if counted == "masked" else np.ones_like(mask))
    np.testing.assert_allclose(found.vectors, vectors, atol=5e-5)
    assert perplexity(found.usage.value).sum() == pytest.approx(whole.item(), abs=5e-5)


@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_training_agrees_with_transformers(
    torch_quantizer: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same noise fed to torch's own `gumbel_softmax`, which draws exponentials and takes their -log."""
    theirs, params = torch_quantizer
    noise = np.random.default_rng(1).gumbel(size=(ROWS, FRAMES, GROUPS, ENTRIES)).astype(np.float32)
    exponentials = torch.tensor(np.exp(-noise)).reshape(-1, ENTRIES)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(exponentials))
    theirs.train().temperature = temperature
    theirs.zero_grad()
    x = torch.tensor(np.asarray(features()), requires_grad=True)
    vectors, whole = theirs(x, torch.tensor(masked()))
    (vectors.sin().sum() + whole).backward()

    def loss(params: Any, x: Any) -> Any:
        found = quantize(params, x, masked(), train=True, noise=jnp.asarray(noise), temperature=temperature)
        return jnp.sin(found.vectors).sum() + perplexity(found.probabilities.value).sum(), found

    (_, found), (gradient, below) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, features())
    np.testing.assert_allclose(found.vectors, vectors.detach(), atol=5e-5)
    assert perplexity(found.probabilities.value).sum() == pytest.approx(whole.item(), abs=5e-5)
    pairs = [
        (below, x.grad),
        (gradient["embedding"].reshape(1, -1, CODE // GROUPS), theirs.codevectors.grad),
        (gradient["logits"]["kernel"].T, theirs.weight_proj.weight.grad),
        (gradient["logits"]["bias"], theirs.weight_proj.bias.grad),
    ]
    for ours, expected in pairs:
        np.testing.assert_allclose(ours, expected, atol=1e-3 * float(expected.abs().max()))


def test_each_vector_is_made_of_the_entries_of_its_codes(torch_quantizer: Any) -> None:
    _, params = torch_quantizer
    for options in ({}, {"train": True, "rngs": {"gumbel": jax.random.key(0)}}):
        rngs = options.pop("rngs", None)
        found = MODULE.apply(
            {"params": params}, features(), jnp.ones((ROWS, FRAMES)), temperature=2.0, noise=None,
            train=options.get("train", False), rngs=rngs,
        )  # fmt: skip
        assert found.codes.shape == (ROWS, FRAMES, GROUPS)
        chosen = np.asarray(params["embedding"])[np.arange(GROUPS), np.asarray(found.codes)]
        np.testing.assert_allclose(found.vectors, chosen.reshape(ROWS, FRAMES, CODE), atol=1e-5)


def test_codes_are_drawn_by_their_probabilities_and_by_the_key() -> None:
    """P(argmax(logits + Gumbel) = n) = softmax(logits)_n, whatever the temperature (Maddison et al. 2014)."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(GROUPS, ENTRIES)).astype(np.float32)
    params = {
        "embedding": jnp.zeros((GROUPS, ENTRIES, CODE // GROUPS)),
        "logits": {"kernel": jnp.zeros((1, GROUPS * ENTRIES)), "bias": jnp.asarray(logits.reshape(-1))},
    }
    frames = 20_000

    def draw(seed: int) -> np.ndarray:
        options = {"temperature": 0.1, "noise": None, "train": True, "rngs": {"gumbel": jax.random.key(seed)}}
        out = MODULE.apply({"params": params}, jnp.zeros((1, frames, 1)), jnp.ones((1, frames)), **options)
        return np.asarray(out.codes)[0]

    codes = draw(0)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = np.stack([np.bincount(codes[:, group], minlength=ENTRIES) for group in range(GROUPS)]) / frames
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / frames)).all()
    np.testing.assert_array_equal(codes, draw(0))
    assert (codes != draw(1)).any()
    # The codebooks draw apart.
    assert abs(np.corrcoef(codes.T)[0, 1]) < 5 / frames**0.5


def test_means_of_parts_add_up(torch_quantizer: Any) -> None:
    _, params = torch_quantizer
    weights = masked().astype(np.float32)
    whole = quantize(params, features(), weights)
    parts = [quantize(params, features()[i : i + 1], weights[i : i + 1]) for i in range(ROWS)]
    for name in ("usage", "probabilities"):
        total = sum(np.asarray(getattr(part, name).total) for part in parts)
        np.testing.assert_allclose(getattr(whole, name).total, total, atol=1e-5)
        np.testing.assert_allclose(getattr(whole, name).value.sum(axis=1), 1, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(used=st.integers(1, 12), entries=st.integers(12, 20))
def test_perplexity_counts_the_entries_in_use(used: int, entries: int) -> None:
    uniform = jnp.where(jnp.arange(entries) < used, 1 / used, 0.0)[None]
    np.testing.assert_allclose(perplexity(uniform), [used], rtol=1e-5)
    assert np.isfinite(jax.grad(lambda p: perplexity(p).sum())(uniform)).all()
