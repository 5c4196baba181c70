"""The product quantiser of wav2vec 2.0: a frame chooses one entry of each of several codebooks.

Baevski et al. 2020, section 2 ("Quantization module"); fairseq, modules/gumbel_vector_quantizer.py.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxptm.nn.core import Execution
from jaxptm.nn.primitives import Dense
from jaxptm.types import Array, Mean


class Quantized(NamedTuple):
    """What a quantiser makes of frames."""

    vectors: Float[Array, "B P W"]
    """The chosen entries of all codebooks, one after the other."""
    codes: Int[Array, "B P G"]
    """Which entries were chosen."""
    usage: Mean
    """How often each entry is the likeliest: `value` [G, N] sums to 1 over the entries."""
    probabilities: Mean
    """The same of the entries' probabilities, which have a gradient."""


class GumbelQuantizer(nn.Module):
    """codebook[argmax(W h + b)]; training adds Gumbel noise, and has the gradient of a softmax (Jang et al. 2017).

    Computes in float32.

    Attributes:
        groups: codebooks.
        entries: of each codebook.
        width: of the vectors, all codebooks together.
    """

    groups: int
    entries: int
    width: int
    execution: Execution

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "B P E"],
        weights: Float[Array, "B P"],
        *,
        temperature: float | Float[Array, ""],
        noise: Float[Array, "B P G N"] | None,
        train: bool,
    ) -> Quantized:
        """Quantises frames.

        Args:
            weights: how much each frame counts for the usage and the probabilities.
            temperature: of the softmax whose gradient is taken.
            noise: standard Gumbel; drawn from the rng `gumbel` in training where it is not given.
            train: choose with noise, and let gradients through.
        """
        logits = Dense(
            self.groups * self.entries,
            nn.initializers.normal(1.0),
            param_dtype=self.execution.param_dtype,
            name="logits",
        )(features)
        logits = logits.reshape(*features.shape[:2], self.groups, self.entries)
        shape = (self.groups, self.entries, self.width // self.groups)
        codebooks = self.param("embedding", nn.initializers.uniform(1.0), shape, self.execution.param_dtype)

        likeliest = nn.one_hot(jnp.argmax(logits, axis=-1), self.entries)
        chosen = likeliest
        if train:
            if noise is None:
                noise = jax.random.gumbel(self.make_rng("gumbel"), logits.shape)
            soft = nn.softmax((logits + noise) / temperature)
            hard = nn.one_hot(jnp.argmax(soft, axis=-1), self.entries)
            chosen = soft + jax.lax.stop_gradient(hard - soft)
        vectors = jnp.einsum("bpgn,gnw->bpgw", chosen, codebooks.astype(jnp.float32))
        return Quantized(
            vectors.reshape(*features.shape[:2], self.width),
            jnp.argmax(chosen, axis=-1),
            _mean(likeliest, weights),
            _mean(nn.softmax(logits), weights),
        )


def perplexity(probabilities: Float[Array, "G N"]) -> Float[Array, " G"]:
    """exp(entropy) of each codebook: how many entries are in use, from 1 to N."""
    logs = jnp.log(jnp.maximum(probabilities, jnp.finfo(jnp.float32).tiny))
    return jnp.exp(-jnp.sum(probabilities * logs, axis=-1))


def _mean(values: Float[Array, "B P G N"], weights: Float[Array, "B P"]) -> Mean:
    return Mean(jnp.einsum("bpgn,bp->gn", values, weights), jnp.sum(weights))
