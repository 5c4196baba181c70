"""What sits on top of an encoder. A head is handed what it ties."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from jaxptm.nn.core import ACTIVATIONS, Execution, TransformerConfig, dense, layer_norm
from jaxptm.types import Array


class Pooler(nn.Module):
    """activation(W h_[CLS] + b): one vector a row (BERT, Devlin et al. 2019, section 3)."""

    config: TransformerConfig
    execution: Execution
    activation: str
    dropout: float = 0.0

    @nn.compact
    def __call__(self, hidden: Float[Array, "B L D"], *, train: bool) -> Float[Array, "B D"]:
        first = nn.Dropout(self.dropout, deterministic=not train)(hidden[:, 0])
        x = dense(self.config, self.execution, self.config.hidden_size, "dense")(first)
        return ACTIVATIONS[self.activation](x)


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
        return jnp.einsum("...d,vd->...v", x, table.astype(self.execution.dtype), preferred_element_type=jnp.float32)


class MlmHead(LmHead):
    """norm(activation(W h + b)) against the table, and a bias."""

    activation: str = "gelu"

    @nn.compact
    def __call__(self, hidden: Float[Array, "*R D"], table: Float[Array, "V E"] | None) -> Float[Array, "*R V"]:
        x = dense(self.config, self.execution, self.width, "dense")(hidden)
        x = layer_norm(self.config, self.execution, "norm")(ACTIVATIONS[self.activation](x))
        bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,), self.execution.param_dtype)
        logits = self.logits(x, table)
        return logits + jnp.broadcast_to(bias.astype(jnp.float32), logits.shape)


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
        return dense(self.config, self.execution, 1, "output")(x)[..., 0].astype(jnp.float32)


class Classifier(nn.Module):
    """Dropout and one linear layer; returns float32 logits."""

    config: TransformerConfig
    execution: Execution
    labels: int
    dropout: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, hidden: Float[Array, "*R D"], *, train: bool) -> Float[Array, "*R K"]:
        x = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return dense(self.config, self.execution, self.labels, "dense", use_bias=self.use_bias)(x).astype(jnp.float32)
