"""The one transformer of jaxptm: post-norm (BERT, RoBERTa, ELECTRA, wav2vec 2.0 base) and pre-norm (GPT-2, large).

Vaswani et al. 2017, section 3, with the norm placement as a choice. Families differ in their stems and heads, not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator

from jaxptm.config import Config, Positive, Share
from jaxptm.nn.activations import ACTIVATIONS
from jaxptm.nn.primitives import Dense, Dropout, Norm
from jaxptm.ops.attention import attention
from jaxptm.types import Array, Params


class TransformerConfig(Config):
    """Sizes of a transformer; fields are named as in Hugging Face's `config.json`.

    What a family fixes, as opposed to a size, is a class variable.
    """

    hidden_size: Positive = 768
    num_hidden_layers: Positive = 12
    num_attention_heads: Positive = 12
    intermediate_size: Positive = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: Share = 0.1
    attention_probs_dropout_prob: Share = 0.1
    activation_dropout: Share = 0.0
    """Dropout inside of the feed-forward layers, behind their activation."""
    layerdrop: Share = 0.0
    """How often training leaves a layer out, for all rows at once (Fan et al. 2019)."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-12
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    norm: Literal["post", "pre"] = "post"
    """`post`: norm(x + f(x)). `pre`: x + f(norm(x)), with one more norm after the last layer."""
    causal: ClassVar[bool] = False
    """A token attends to those before it; a row is classified by its last token."""
    shared_layer: ClassVar[bool] = False
    """One layer's parameters serve all layers (ALBERT)."""
    normed_states: ClassVar[bool] = True
    """The last hidden state on request is the normed one of a `pre` model, too, and not what its last layer gave."""

    def initializer(self, *, residual: bool = False) -> nn.initializers.Initializer:
        """How kernels and tables begin: BERT's normal, cut off at two sigma.

        Args:
            residual: of a projection whose output is added to the residual stream.
        """
        return nn.initializers.truncated_normal(self.initializer_range)

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
        dtype: of activations and matrix products; norms, softmax, logits and sums over rows are float32 regardless.
        param_dtype: of the stored parameters.
        remat: recompute in the backward pass all of a layer, or with "dots" all but its products with weights.
        scan: compile one layer and scan it over stacked parameters (see `stack_layers`).
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool | Literal["dots"] = False
    scan: bool = False


class Cache(NamedTuple):
    """Keys and values of one layer that later tokens attend to, in arrays of a fixed length K."""

    key: Float[Array, "B K H W"]
    value: Float[Array, "B K H W"]
    start: Int[Array, ""]
    """How many are there; the next ones are written from here on."""


def visible_keys(
    mask: Int[Array, "B K"] | Bool[Array, "B K"] | None,
    segment_ids: Int[Array, "B K"] | None = None,
    causal: Bool[Array, "Q K"] | None = None,
) -> Bool[Array, "#B 1 #Q K"] | None:
    """Which keys a query may see: the unpadded ones, of its own segment, that do not come after it.

    Args:
        mask: 1 for a token, 0 for padding.
        segment_ids: equal for tokens that may attend to each other.
        causal: which key stands at or before each query.
    """
    parts = []
    if mask is not None:
        parts.append(mask.astype(bool)[:, None, None, :])
    if segment_ids is not None:
        parts.append(segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    if causal is not None:
        parts.append(causal[None, None])
    return reduce(jnp.logical_and, parts) if parts else None


class Layer(nn.Module):
    """What the two kinds of layer share: their parts, by name.

    Given `positions`, a layer attends to all of `x` and computes its output there alone; the mask is then of those
    queries. Given a cache, it also returns it filled up.
    """

    config: TransformerConfig
    execution: Execution
    train: bool

    def dense(self, features: int, name: str) -> Dense:
        return dense(self.config, self.execution, features, name)

    def norm(self, name: str) -> Norm:
        return layer_norm(self.config, self.execution, name)

    def dropout(self, x: Array) -> Array:
        return Dropout(self.config.hidden_dropout_prob)(x, train=self.train)

    def attention(
        self,
        x: Float[Array, "B L D"],
        mask: Bool[Array, "#B 1 #Q K"] | None,
        cache: Cache | None,
        positions: Int[Array, "B Q"] | None,
    ) -> tuple[Float[Array, "B Q D"], Cache | None]:
        return Attention(self.config, self.execution, self.train, name="attention")(x, mask, cache, positions)

    def mlp(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return Mlp(self.config, self.execution, self.train, name="mlp")(x)


class PostNormLayer(Layer):
    """x = norm(x + attention(x));  x = norm(x + mlp(x))"""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        mask: Bool[Array, "#B 1 #Q K"] | None,
        cache: Cache | None = None,
        positions: Int[Array, "B Q"] | None = None,
    ) -> tuple[Float[Array, "B Q D"], Cache | None]:
        attended, cache = self.attention(x, mask, cache, positions)
        x = self.norm("attention_norm")(at_positions(x, positions) + self.dropout(attended))
        return self.norm("mlp_norm")(x + self.dropout(self.mlp(x))), cache


class PreNormLayer(Layer):
    """x = x + attention(norm(x));  x = x + mlp(norm(x))"""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        mask: Bool[Array, "#B 1 #Q K"] | None,
        cache: Cache | None = None,
        positions: Int[Array, "B Q"] | None = None,
    ) -> tuple[Float[Array, "B Q D"], Cache | None]:
        attended, cache = self.attention(self.norm("attention_norm")(x), mask, cache, positions)
        x = at_positions(x, positions) + self.dropout(attended)
        return x + self.dropout(self.mlp(self.norm("mlp_norm")(x))), cache


class Attention(Layer):
    """softmax(q kT / sqrt(d)) v for each head, and the output projection."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        mask: Bool[Array, "#B 1 #Q K"] | None,
        cache: Cache | None = None,
        positions: Int[Array, "B Q"] | None = None,
    ) -> tuple[Float[Array, "B Q D"], Cache | None]:
        heads = self.config.num_attention_heads
        width = self.config.hidden_size // heads
        rows = x.reshape(-1, x.shape[-1])  # once: the products keep it for their gradients
        asking = rows if positions is None else at_positions(x, positions).reshape(-1, x.shape[-1])
        query, key, value = (
            self.dense(self.config.hidden_size, name)(of).reshape(len(x), -1, heads, width)
            for name, of in (("query", asking), ("key", rows), ("value", rows))
        )
        if cache is not None:
            key, value = (
                jax.lax.dynamic_update_slice_in_dim(held, new, cache.start, axis=1)
                for held, new in ((cache.key, key), (cache.value, value))
            )
            cache = Cache(key, value, cache.start + x.shape[1])
        rate = self.config.attention_probs_dropout_prob
        rng = self.make_rng("dropout") if self.train and rate else None
        causal = self.config.causal and cache is None and positions is None
        mixed = attention(query, key, value, mask, rng, rate, causal=causal).reshape(len(x), -1, x.shape[-1])
        return dense(self.config, self.execution, self.config.hidden_size, "output", residual=True)(mixed), cache


class Mlp(Layer):
    """down(activation(up(x)))"""

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        up = self.dense(self.config.intermediate_size, "up")
        down = dense(self.config, self.execution, self.config.hidden_size, "down", residual=True)
        inner = ACTIVATIONS[self.config.hidden_act](up(x))
        return down(Dropout(self.config.activation_dropout)(inner, train=self.train))


class Transformer(nn.Module):
    """A stack of layers.

    Parameters live under `layer_0`, `layer_1`, ... or, with `execution.scan`, stacked under `layers`; where all layers
    share them, under `shared_layer` in any case.
    """

    config: TransformerConfig
    execution: Execution

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        mask: Bool[Array, "#B 1 #Q K"] | None,
        caches: tuple[Cache, ...] | None = None,
        positions: Int[Array, "B P"] | None = None,
        *,
        train: bool,
        output_hidden_states: bool,
    ) -> tuple[Float[Array, "B P D"], tuple[Float[Array, "B Q D"], ...], tuple[Cache, ...] | None]:
        """Returns the last hidden state; on request the input of every layer and the last output; the caches.

        Args:
            mask: which keys each query sees; the keys are those of `x` or, with caches, all that a cache has room for.
            caches: one a layer, in the order of the layers; layers are then not scanned.
            positions: where the last hidden state is wanted; default everywhere. The last layer computes no other,
                unless all hidden states are asked for, or one compiled layer serves as every layer.
        """
        kind: Any = PostNormLayer if self.config.norm == "post" else PreNormLayer
        if self.execution.remat:
            policy = (
                jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.execution.remat == "dots" else None
            )
            kind = nn.remat(kind, prevent_cse=not self.execution.scan, policy=policy)
        states = [x]
        fewer = positions is not None and positions.shape[1] < x.shape[1]
        of_last = positions if fewer and not output_hidden_states and not self.execution.scan else None

        def through(
            layer: Any, x: Array, cache: Cache | None = None, positions: Array | None = None
        ) -> tuple[Array, Any]:
            out, cache = layer(x, of_queries(mask, positions), cache, positions)
            if train and self.config.layerdrop:
                # What is dropped is computed all the same: devices and a scan run one program.
                stays = jax.random.bernoulli(layer.make_rng("dropout"), 1 - self.config.layerdrop)
                out = jnp.where(stays, out, at_positions(x, positions))
            return out, cache

        shared = kind(self.config, self.execution, train, name="shared_layer") if self.config.shared_layer else None
        if self.execution.scan:
            if caches is not None:
                raise ValueError("a scanned module takes no caches; use one with scan=False and unstacked parameters")
            layers = shared or kind(self.config, self.execution, train, name="layers")

            def body(layer: nn.Module, x: Array, _: None) -> tuple[Array, Array | None]:
                x, _ = through(layer, x)
                return x, x if output_hidden_states else None

            scan = nn.scan(
                body,
                variable_axes={} if shared else {"params": 0},
                variable_broadcast="params" if shared else False,
                split_rngs={"params": not shared, "dropout": True},
                length=self.config.num_hidden_layers,
            )
            x, stacked = scan(layers, x, None)
            if output_hidden_states:
                states += [*stacked[:-1], x]  # so that nobody keeps the stack who wants the last state alone
        else:
            filled = []
            for index in range(self.config.num_hidden_layers):
                layer = shared or kind(self.config, self.execution, train, name=f"layer_{index}")
                last = index == self.config.num_hidden_layers - 1
                x, cache = through(layer, x, None if caches is None else caches[index], of_last if last else None)
                states.append(x)
                filled.append(cache)
            caches = None if caches is None else tuple(filled)
        if self.config.norm == "pre":
            x = layer_norm(self.config, self.execution, "norm")(x)
            if self.config.normed_states:
                states[-1] = x
        if of_last is None:
            x = at_positions(x, positions)
        return x, tuple(states) if output_hidden_states else (), caches


def at_positions(x: Float[Array, "B L D"], positions: Int[Array, "B P"] | None) -> Float[Array, "B P D"]:
    """The rows of `x` at these positions; all of them where there are none."""
    return x if positions is None else jnp.take_along_axis(x, positions[..., None], axis=1)


def of_queries(
    mask: Bool[Array, "#B 1 #Q K"] | None, positions: Int[Array, "B P"] | None
) -> Bool[Array, "#B 1 #P K"] | None:
    """What the queries at these positions see; one that is not told apart by queries stays."""
    if mask is None or positions is None or mask.shape[2] == 1:
        return mask
    return jnp.take_along_axis(mask, positions[:, None, :, None], axis=2)


def encoder_products(config: TransformerConfig, length: int, queries: int) -> float:
    """Multiply-adds of the matrix products of all layers for one row.

    Args:
        queries: positions of the row that the last layer computes its output for.
    """
    width = config.hidden_size
    key_or_value, of_query = width**2, 2 * width**2 + 2 * width * config.intermediate_size + 2 * length * width
    outputs = (config.num_hidden_layers - 1) * length + queries
    return config.num_hidden_layers * length * 2 * key_or_value + outputs * of_query


def dense(
    config: TransformerConfig,
    execution: Execution,
    features: int,
    name: str,
    *,
    residual: bool = False,
    use_bias: bool = True,
) -> Dense:
    init = config.initializer(residual=residual)
    return Dense(features, init, use_bias, execution.dtype, execution.param_dtype, name=name)


def logits(
    config: TransformerConfig, execution: Execution, features: int, name: str, *, use_bias: bool = True
) -> Dense:
    """A dense layer in float32, whatever the rest of the model computes in."""
    return dense(config, replace(execution, dtype=jnp.float32), features, name, use_bias=use_bias)


def linear(execution: Execution, features: int, name: str) -> Dense:
    """A dense layer outside of the transformer that begins as those of torch do, uniform in 1 / sqrt(inputs)."""
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return Dense(features, init, dtype=execution.dtype, param_dtype=execution.param_dtype, name=name)


def layer_norm(config: TransformerConfig, execution: Execution, name: str | None) -> Norm:
    return Norm(config.layer_norm_eps, execution.dtype, execution.param_dtype, name=name)


def stack_layers(params: Params) -> Params:
    """`layer_0`, `layer_1`, ... of an encoder's parameters -> one `layers` with a leading axis, for `scan`."""
    rest = {key: value for key, value in params.items() if not key.startswith("layer_")}
    layers = [params[f"layer_{index}"] for index in range(len(params) - len(rest))]
    if not layers:  # shared by all
        return params
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`."""
    rest = {key: value for key, value in params.items() if key != "layers"}
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = {f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)}
    return {**rest, **layers}
