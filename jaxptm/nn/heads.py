"""What sits on top of an encoder. A head is handed what it ties."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from jaxptm.nn.core import ACTIVATIONS, Execution, TransformerConfig, dense, layer_norm
from jaxptm.types import Array


class Pooler(nn.Module):
    """tanh(W h_[CLS] + b): one vector a row (BERT, Devlin et al. 2019, section 3)."""

    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        return jnp.tanh(dense(self.config, self.execution, self.config.hidden_size, "dense")(hidden[:, 0]))


class MlmHead(nn.Module):
    """norm(activation(W h + b)) against the token embeddings `table`, or an own decoder where there is none.

    Returns float32 logits.
    """

    config: TransformerConfig
    execution: Execution
    vocab_size: int

    @nn.compact
    def __call__(self, hidden: Float[Array, "*R D"], table: Float[Array, "V D"] | None) -> Float[Array, "*R V"]:
        x = dense(self.config, self.execution, self.config.hidden_size, "dense")(hidden)
        x = layer_norm(self.config, self.execution, "norm")(ACTIVATIONS[self.config.hidden_act](x))
        bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,), self.execution.param_dtype)
        if table is None:
            init = nn.initializers.truncated_normal(self.config.initializer_range)
            table = self.param(
                "embedding", init, (self.vocab_size, self.config.hidden_size), self.execution.param_dtype
            )
        logits = jnp.einsum("...d,vd->...v", x, table.astype(self.execution.dtype), preferred_element_type=jnp.float32)
        return logits + jnp.broadcast_to(bias.astype(jnp.float32), logits.shape)


class Classifier(nn.Module):
    """Dropout and one linear layer; returns float32 logits."""

    config: TransformerConfig
    execution: Execution
    labels: int
    dropout: float

    @nn.compact
    def __call__(self, hidden: Float[Array, "*R D"], *, train: bool) -> Float[Array, "*R K"]:
        x = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return dense(self.config, self.execution, self.labels, "dense")(x).astype(jnp.float32)
