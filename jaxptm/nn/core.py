"""The one transformer of jaxptm: post-norm (BERT, RoBERTa, ELECTRA, wav2vec 2.0 base) and pre-norm (GPT-2, large).

Vaswani et al. 2017, section 3, with the norm placement as a choice. Families differ in their stems and heads, not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator

from jaxptm.config import Config, Positive, Share
from jaxptm.types import Array, Params

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # Keys are Hugging Face's `hidden_act` names; `gelu` is the exact one, by erf.
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "gelu_fast": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "linear": lambda x: x,
}


class TransformerConfig(Config):
    """Sizes of a transformer; fields are named as in Hugging Face's `config.json`."""

    hidden_size: Positive = 768
    num_hidden_layers: Positive = 12
    num_attention_heads: Positive = 12
    intermediate_size: Positive = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: Share = 0.1
    attention_probs_dropout_prob: Share = 0.1
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-12
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    norm: Literal["post", "pre"] = "post"
    """`post`: norm(x + f(x)). `pre`: x + f(norm(x)), with one more norm after the last layer."""

    @model_validator(mode="after")
    def _check(self) -> TransformerConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} is not a multiple of "
                f"`num_attention_heads` {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"`hidden_act` {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
        return self


@dataclass(frozen=True)
class Execution:
    """How a module computes, as opposed to what it computes.

    Attributes:
        dtype: of activations and matrix products; norms, softmax and logits are float32 regardless.
        param_dtype: of the stored parameters.
        remat: recompute in the backward pass all of a layer, or with "dots" all but its products with weights.
        scan: compile one layer and scan it over stacked parameters (see `stack_layers`).
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool | Literal["dots"] = False
    scan: bool = False


def visible_keys(
    mask: Int[Array, "B L"] | None, segment_ids: Int[Array, "B L"] | None = None
) -> Bool[Array, "B 1 Q L"] | None:
    """Which keys a query may see: the unpadded ones and, with `segment_ids`, only those of its own segment.

    Args:
        mask: 1 for a token, 0 for padding.
        segment_ids: equal for tokens that may attend to each other.
    """
    visible = None if mask is None else mask.astype(bool)[:, None, None, :]
    if segment_ids is not None:
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        visible = same if visible is None else visible & same
    return visible


class Layer(nn.Module):
    """What the two kinds of layer share: their parts, by name."""

    config: TransformerConfig
    execution: Execution
    train: bool

    def dense(self, features: int, name: str) -> nn.Dense:
        return dense(self.config, self.execution, features, name)

    def norm(self, name: str) -> nn.LayerNorm:
        return layer_norm(self.config, self.execution, name)

    def dropout(self, x: Array) -> Array:
        return nn.Dropout(self.config.hidden_dropout_prob, deterministic=not self.train)(x)

    def attention(self, x: Float[Array, "B L D"], mask: Bool[Array, "B 1 Q L"] | None) -> Float[Array, "B L D"]:
        return Attention(self.config, self.execution, self.train, name="attention")(x, mask)

    def mlp(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return Mlp(self.config, self.execution, name="mlp")(x)


class PostNormLayer(Layer):
    """x = norm(x + attention(x));  x = norm(x + mlp(x))"""

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], mask: Bool[Array, "B 1 Q L"] | None) -> Float[Array, "B L D"]:
        x = self.norm("attention_norm")(x + self.dropout(self.attention(x, mask)))
        return self.norm("mlp_norm")(x + self.dropout(self.mlp(x)))


class PreNormLayer(Layer):
    """x = x + attention(norm(x));  x = x + mlp(norm(x))"""

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], mask: Bool[Array, "B 1 Q L"] | None) -> Float[Array, "B L D"]:
        x = x + self.dropout(self.attention(self.norm("attention_norm")(x), mask))
        return x + self.dropout(self.mlp(self.norm("mlp_norm")(x)))


class Attention(Layer):
    """softmax(q kT / sqrt(d)) v for each head, and the output projection."""

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], mask: Bool[Array, "B 1 Q L"] | None) -> Float[Array, "B L D"]:
        heads = self.config.num_attention_heads
        width = self.config.hidden_size // heads
        query, key, value = (
            self.dense(self.config.hidden_size, name)(x).reshape(*x.shape[:2], heads, width)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query * width**-0.5, key, preferred_element_type=jnp.float32)
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = nn.softmax(scores).astype(self.execution.dtype)
        weights = nn.Dropout(self.config.attention_probs_dropout_prob, deterministic=not self.train)(weights)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        return self.dense(self.config.hidden_size, "output")(mixed)


class Mlp(nn.Module):
    """down(activation(up(x)))"""

    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        up = dense(self.config, self.execution, self.config.intermediate_size, "up")
        down = dense(self.config, self.execution, self.config.hidden_size, "down")
        return down(ACTIVATIONS[self.config.hidden_act](up(x)))


class Transformer(nn.Module):
    """A stack of layers; returns the last hidden state and, on request, the input of every layer and the last output.

    Parameters live under `layer_0`, `layer_1`, ... or, with `execution.scan`, stacked under `layers`.
    """

    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B 1 Q L"] | None, *, train: bool, output_hidden_states: bool
    ) -> tuple[Float[Array, "B L D"], tuple[Float[Array, "B L D"], ...]]:
        kind: Any = PostNormLayer if self.config.norm == "post" else PreNormLayer
        if self.execution.remat:
            policy = (
                jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.execution.remat == "dots" else None
            )
            kind = nn.remat(kind, prevent_cse=not self.execution.scan, policy=policy)
        states = [x]
        if self.execution.scan:
            layers = kind(self.config, self.execution, train, name="layers")

            def body(layer: nn.Module, x: Array, _: None) -> tuple[Array, Array | None]:
                x = layer(x, mask)
                return x, x if output_hidden_states else None

            scan = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.config.num_hidden_layers,
            )
            x, stacked = scan(layers, x, None)
            if output_hidden_states:
                states += list(stacked)
        else:
            for index in range(self.config.num_hidden_layers):
                x = kind(self.config, self.execution, train, name=f"layer_{index}")(x, mask)
                states.append(x)
        if self.config.norm == "pre":
            x = layer_norm(self.config, self.execution, "norm")(x)
            states[-1] = x
        return x, tuple(states) if output_hidden_states else ()


def dense(config: TransformerConfig, execution: Execution, features: int, name: str) -> nn.Dense:
    return nn.Dense(
        features,
        dtype=execution.dtype,
        param_dtype=execution.param_dtype,
        kernel_init=nn.initializers.truncated_normal(config.initializer_range),
        name=name,
    )


def layer_norm(config: TransformerConfig, execution: Execution, name: str | None) -> nn.LayerNorm:
    # The two-pass variance: the fast one loses digits where the mean is large against the spread.
    return nn.LayerNorm(
        config.layer_norm_eps,
        dtype=execution.dtype,
        param_dtype=execution.param_dtype,
        use_fast_variance=False,
        name=name,
    )


def stack_layers(params: Params) -> Params:
    """`layer_0`, `layer_1`, ... of an encoder's parameters -> one `layers` with a leading axis, for `scan`."""
    rest = {key: value for key, value in params.items() if not key.startswith("layer_")}
    layers = [params[f"layer_{index}"] for index in range(len(params) - len(rest))]
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`."""
    rest = {key: value for key, value in params.items() if key != "layers"}
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = {f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)}
    return {**rest, **layers}
