"""What sits on top of an encoder. A head is handed what it ties."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxptm.nn.activations import ACTIVATIONS
from jaxptm.nn.core import Execution, TransformerConfig, dense, layer_norm, linear, logits
from jaxptm.nn.primitives import Dropout, spread
from jaxptm.nn.quantizer import GumbelQuantizer, perplexity
from jaxptm.types import Array


class Pooler(nn.Module):
    """activation(W h_[CLS] + b): one vector a row (BERT, Devlin et al. 2019, section 3)."""

    config: TransformerConfig
    execution: Execution
    activation: str
    dropout: float = 0.0

    @nn.compact
    def __call__(self, hidden: Float[Array, "B L D"], *, train: bool) -> Float[Array, "B D"]:
        first = Dropout(self.dropout)(hidden[:, 0], train=train)
        x = dense(self.config, self.execution, self.config.hidden_size, "dense")(first)
        return ACTIVATIONS[self.activation](x)


@jax.custom_jvp
def _products(x: Float[Array, "*R E"], table: Float[Array, "V E"]) -> Float[Array, "*R V"]:
    return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)


@_products.defjvp
def _products_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """In the type of the inputs, so that the products of the backward pass are of that type, as all others are."""
    (x, table), (dx, dtable) = primals, tangents
    change = jnp.einsum("...d,vd->...v", dx, table) + jnp.einsum("...d,vd->...v", x, dtable)
    return _products(x, table), change.astype(jnp.float32)


class LmHead(nn.Module):
    """What language-model heads share: float32 logits against the token embeddings `table` of width E.

    Where there is no table, the head has one of its own.
    """

    config: TransformerConfig
    execution: Execution
    vocab_size: int
    width: int

    def logits(self, x: Float[Array, "*R E"], table: Float[Array, "V E"] | None) -> Float[Array, "*R V"]:
        if table is None:
            shape = (self.vocab_size, self.width)
            table = self.param("embedding", self.config.initializer(), shape, self.execution.param_dtype)
        return _products(x, table.astype(self.execution.dtype))


class MlmHead(LmHead):
    """norm(activation(W h + b)) against the table, and a bias."""

    activation: str = "gelu"

    @nn.compact
    def __call__(self, hidden: Float[Array, "*R D"], table: Float[Array, "V E"] | None) -> Float[Array, "*R V"]:
        x = dense(self.config, self.execution, self.width, "dense")(hidden)
        x = layer_norm(self.config, self.execution, "norm")(ACTIVATIONS[self.activation](x))
        bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,), self.execution.param_dtype)
        products = self.logits(x, table)
        return products + spread(bias, products)


class CausalLmHead(LmHead):
    """The hidden state against the table (GPT-2)."""

    @nn.compact
    def __call__(self, hidden: Float[Array, "*R E"], table: Float[Array, "V E"] | None) -> Float[Array, "*R V"]:
        return self.logits(hidden, table)


class ReplacedTokenHead(nn.Module):
    """w activation(W h + b): a float32 logit a token, above 0 where it was replaced (ELECTRA, Clark et al. 2020, 2)."""

    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L"]:
        x = dense(self.config, self.execution, self.config.hidden_size, "dense")(hidden)
        x = ACTIVATIONS[self.config.hidden_act](x)
        return logits(self.config, self.execution, 1, "output")(x)[..., 0]


class CopyHead(nn.Module):
    """w h + b: a float32 logit a token, above 0 where it is rather to be copied than chosen anew (All-Tokens MLM)."""

    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L"]:
        return logits(self.config, self.execution, 1, "output")(hidden)[..., 0]


class Classifier(nn.Module):
    """Dropout and one linear layer; returns float32 logits."""

    config: TransformerConfig
    execution: Execution
    labels: int
    dropout: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, hidden: Float[Array, "*R D"], *, train: bool) -> Float[Array, "*R K"]:
        x = Dropout(self.dropout)(hidden, train=train)
        return logits(self.config, self.execution, self.labels, "dense", use_bias=self.use_bias)(x)


class FrameClassifier(nn.Module):
    """W mean(P h + b) + c over the frames that are no padding; returns float32 logits (Yang et al. 2021, SUPERB)."""

    config: TransformerConfig
    execution: Execution
    width: int
    labels: int

    @nn.compact
    def __call__(
        self, states: tuple[Float[Array, "B F D"], ...], real: Bool[Array, "B F"] | None
    ) -> Float[Array, "B K"]:
        """Classifies rows.

        Args:
            states: one, or all hidden states, of which a learned average is taken.
            real: which frames are no padding; default all.
        """
        (x, *others) = states
        if others:
            alike = nn.initializers.constant(1 / len(states))
            shares = nn.softmax(self.param("scale", alike, (len(states),), self.execution.param_dtype))
            x = jnp.einsum("s,sbfd->bfd", shares.astype(x.dtype), jnp.stack(states))
        x = dense(self.config, self.execution, self.width, "project")(x).astype(jnp.float32)
        counted = jnp.ones((*x.shape[:2], 1)) if real is None else real[..., None].astype(jnp.float32)
        # A row of nothing but padding has the mean 0, so that it counts nothing and breaks nothing.
        mean = jnp.sum(x * counted, axis=1) / jnp.maximum(jnp.sum(counted, axis=1), 1.0)
        return logits(self.config, self.execution, self.labels, "dense")(mean)


class ContrastiveHead(nn.Module):
    """Frames that the transformer saw masked, and the quantised ones that they are to be found among.

    Baevski et al. 2020, section 3.2. Both are float32 and of one width.

    Attributes:
        groups: codebooks.
        entries: of each codebook.
        quantized_width: of a quantised frame, all codebooks together.
        width: in which the two are compared.
    """

    execution: Execution
    groups: int
    entries: int
    quantized_width: int
    width: int

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B P D"],
        features: Float[Array, "B P E"],
        weights: Float[Array, "B P"],
        *,
        temperature: float | Float[Array, ""],
        noise: Float[Array, "B P G N"] | None,
        train: bool,
    ) -> dict[str, Any]:
        """For the arguments see `GumbelQuantizer`.

        Returns `projected_states` and `projected_quantized_states` [B, P, W], `codevector_perplexity` (of the
        probabilities in training, of the codes otherwise, summed over the codebooks), and of `Quantized` the rest as
        `codes`, `code_usage` and `code_probabilities`.
        """
        quantizer = GumbelQuantizer(self.groups, self.entries, self.quantized_width, self.execution, name="quantizer")
        quantized = quantizer(features, weights, temperature=temperature, noise=noise, train=train)
        seen = quantized.probabilities if train else quantized.usage
        project = {name: linear(self.execution, self.width, name) for name in ("hidden", "quantized")}
        return {
            "projected_states": project["hidden"](hidden).astype(jnp.float32),
            "projected_quantized_states": project["quantized"](quantized.vectors).astype(jnp.float32),
            "codevector_perplexity": jnp.sum(perplexity(seen.value)),
            "codes": quantized.codes,
            "code_usage": quantized.usage,
            "code_probabilities": quantized.probabilities,
        }
