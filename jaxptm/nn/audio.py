"""Speech models: convolutions from samples to frames under the transformer, and one head by task.

wav2vec 2.0 (Baevski et al. 2020) and HuBERT (Hsu et al. 2021), which differ in what they learn from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from jaxptm.nn.activations import ACTIVATIONS
from jaxptm.nn.audio_config import AudioConfig
from jaxptm.nn.convolution import grouped_convolution, strided_convolution
from jaxptm.nn.core import Execution, Transformer, at_positions, encoder_products, layer_norm, linear, visible_keys
from jaxptm.nn.heads import Classifier, ContrastiveHead, FrameClassifier
from jaxptm.nn.model import PretrainedModule
from jaxptm.nn.primitives import Dropout, Norm, spread
from jaxptm.types import Array

TASKS = ("ctc", "sequence-classification", "contrastive")
CONV_NORM_EPS = 1e-5
"""Of the norms between convolutions, whatever the config's epsilon is."""


class Convolution(nn.Module):
    """conv(x) + b over time, without padding."""

    taps: int
    features: int
    stride: int
    use_bias: bool
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"]) -> Float[Array, "B F E2"]:
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        dtype, shape = self.execution.param_dtype, (self.taps, x.shape[-1], self.features)
        kernel = self.param("kernel", init, shape, dtype).astype(x.dtype)
        y = strided_convolution(x, kernel, self.stride)
        if not self.use_bias:
            return y
        return y + spread(self.param("bias", nn.initializers.zeros, (self.features,), dtype), y)


class ConvLayer(nn.Module):
    """activation(norm(conv(x))), the first of which takes the samples as one channel."""

    config: AudioConfig
    execution: Execution
    index: int

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], lengths: Int[Array, " B"] | None = None) -> Float[Array, "B F E2"]:
        """`lengths`, which the group norm counts alone, are those of `x`; default all of it."""
        config, execution = self.config, self.execution
        sizes = config.conv_kernel[self.index], config.conv_dim[self.index]
        x = Convolution(*sizes, config.conv_stride[self.index], config.conv_bias, execution, name="conv")(x)
        options: dict[str, Any] = {"dtype": execution.dtype, "param_dtype": execution.param_dtype, "name": "norm"}
        if config.feat_extract_norm == "layer":
            x = Norm(CONV_NORM_EPS, **options)(x)
        elif self.index == 0:
            shares = None
            if lengths is not None:
                frames = (lengths - config.conv_kernel[0]) // config.conv_stride[0] + 1
                counted = jnp.arange(x.shape[1])[None] < frames[:, None]
                shares = (counted / jnp.maximum(frames, 1)[:, None])[..., None]
            x = Norm(CONV_NORM_EPS, axis=1, **options)(x, shares)
        return ACTIVATIONS[config.feat_extract_activation](x)


class FeatureEncoder(nn.Module):
    """From samples to frames, 20 ms apart (Baevski et al. 2020, section 2)."""

    config: AudioConfig
    execution: Execution

    @nn.compact
    def __call__(self, samples: Float[Array, "B T"], lengths: Int[Array, " B"] | None = None) -> Float[Array, "B F E"]:
        # The first layers hold most of what a backward pass needs.
        kind: Any = nn.remat(ConvLayer) if self.execution.remat else ConvLayer
        x = samples[..., None].astype(self.execution.dtype)
        for index in range(len(self.config.conv_dim)):
            x = kind(self.config, self.execution, index, name=f"conv_{index}")(x, None if index else lengths)
        return x


class ConvPositions(nn.Module):
    """activation(conv(x)): where a frame stands, told by the frames around it (Baevski et al. 2020, section 2).

    The kernel is `scale` times its direction, tap by tap (Salimans and Kingma 2016; fairseq takes the norm over the
    channels). With an even kernel a frame sees one more before it than behind.
    """

    config: AudioConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B F D"]) -> Float[Array, "B F D"]:
        width, taps, groups = (
            self.config.hidden_size,
            self.config.num_conv_pos_embeddings,
            self.config.num_conv_pos_embedding_groups,
        )
        shape, dtype = (taps, width // groups, width), self.execution.param_dtype
        direction = self.param("kernel", nn.initializers.normal(2 / (taps * width) ** 0.5), shape, dtype)
        direction = direction.astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(direction**2, axis=(1, 2)))
        scale = self.param("scale", lambda _: norm.astype(dtype))
        bias = self.param("bias", nn.initializers.zeros, (width,), dtype)
        kernel = (direction * (scale / norm)[:, None, None]).astype(self.execution.dtype)
        out = grouped_convolution(x, kernel, groups)
        return ACTIVATIONS[self.config.feat_extract_activation](out + spread(bias, out))


class Frames(NamedTuple):
    """What becomes of audio below the transformer."""

    embedded: Float[Array, "B F D"]
    """The input of the first layer."""
    convolved: Float[Array, "B F E"]
    """What the convolutions gave."""
    extracted: Float[Array, "B F E"]
    """The same, normalised: what is projected and quantised, and never masked."""


class AudioEmbeddings(nn.Module):
    """project(norm(convolutions)), masked, plus positions; with a norm where that of the layers comes behind."""

    config: AudioConfig
    execution: Execution

    @nn.compact
    def __call__(
        self,
        input_values: Float[Array, "B T"],
        lengths: Int[Array, " B"] | None,
        real: Bool[Array, "B F"] | None,
        mask_embedding: Float[Array, " D"] | None,
        mask_time_indices: Bool[Array, "B F"] | None,
        mask_feature_indices: Bool[Array, "B D"] | None,
        *,
        train: bool,
    ) -> Frames:
        config, execution = self.config, self.execution
        convolved = FeatureEncoder(config, execution, name="feature_encoder")(input_values, lengths)
        extracted = layer_norm(config, execution, "feature_norm")(convolved)
        x = linear(execution, config.hidden_size, "feature_projection")(extracted)
        x = Dropout(config.feat_proj_dropout)(x, train=train)
        if mask_time_indices is not None and mask_embedding is not None:
            x = jnp.where(mask_time_indices[..., None], spread(mask_embedding, x), x)
        if mask_feature_indices is not None:
            x = jnp.where(mask_feature_indices[:, None], 0, x)
        if real is not None:
            x = jnp.where(real[..., None], x, 0)
        x += ConvPositions(config, execution, name="positions")(x)
        if config.norm == "post":
            x = layer_norm(config, execution, "norm")(x)
        return Frames(Dropout(config.hidden_dropout_prob)(x, train=train), convolved, extracted)


class AudioModel(PretrainedModule):
    """A speech encoder with the head of `task`. Logits and what is compared are float32."""

    config: AudioConfig

    def example(self) -> Float[Array, "B T"]:
        """One frame."""
        return jnp.zeros((1, self.config.receptive_field))

    def flops(self, rows: int, length: int, targets: int = 0) -> float:
        """See `forward_flops`."""
        return forward_flops(self.config, self.task, rows, length, targets, scan=self.execution.scan)

    @nn.compact
    def __call__(
        self,
        input_values: Float[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        mask_time_indices: Bool[Array, "B F"] | None = None,
        mask_feature_indices: Bool[Array, "B D"] | None = None,
        target_positions: Int[Array, "B P"] | None = None,
        target_weights: Float[Array, "B P"] | None = None,
        gumbel_noise: Float[Array, "B P G N"] | None = None,
        temperature: float | Float[Array, ""] = 2.0,
        *,
        lengths: Int[Array, " B"] | None = None,
        train: bool = False,
        output_hidden_states: bool = False,
    ) -> dict[str, Any]:
        """Runs the model.

        Args:
            input_values: samples at 16 kHz, normalised or not as the checkpoint has learned.
            attention_mask: 1 for samples, 0 for padding on the right; default all ones. The group norm of base models
                sees padding all the same.
            mask_time_indices: frames that the mask embedding stands in for.
            mask_feature_indices: channels that are 0 in all frames.
            target_positions: frames that the contrastive head and the last layer run on; default all.
            target_weights: how much each of them counts for the use of the codebooks; default 1, or where all frames
                are targets, 1 for the masked ones.
            gumbel_noise: of the quantiser in training; default drawn from the rng `gumbel`.
            temperature: of the quantiser's softmax in training.
            lengths: samples of each row, instead of a mask: what is padded comes out as it would by itself.
            train: dropout on; needs the rng `dropout`.
            output_hidden_states: adds `hidden_states`, one [B, F, D] before each layer and one after the last, which no
                norm has seen where norms come before layers.
        """
        config, execution = self.config, self.execution
        real, samples = None, lengths
        if samples is None and attention_mask is not None:
            samples = jnp.sum(attention_mask, axis=1)
        if samples is not None:
            real = jnp.arange(config.frames(input_values.shape[1]))[None] < config.frames(samples)[:, None]
        mask_embedding = None
        if config.masks:
            mask_embedding = nn.Embed(
                1,
                config.hidden_size,
                param_dtype=execution.param_dtype,
                embedding_init=nn.initializers.uniform(1.0),
                name="mask_embedding",
            ).embedding[0]
        frames = AudioEmbeddings(config, execution, name="embeddings")(
            input_values, lengths, real, mask_embedding, mask_time_indices, mask_feature_indices, train=train
        )
        classifies_states = self.task == "sequence-classification" and config.use_weighted_layer_sum
        hidden, states, _ = Transformer(config, execution, name="encoder")(
            frames.embedded,
            visible_keys(real),
            positions=target_positions if self.task == "contrastive" else None,
            train=train,
            output_hidden_states=output_hidden_states or classifies_states,
        )

        match self.task:
            case None:
                out = {"last_hidden_state": hidden, "extract_features": frames.extracted}
            case "ctc":
                spell = Classifier(config, execution, config.vocab_size, config.final_dropout, name="ctc_head")
                out = {"logits": spell(hidden, train=train)}
            case "sequence-classification":
                labels, width = config.num_labels, config.classifier_proj_size
                classify = FrameClassifier(config, execution, width, labels, name="classifier")
                out = {"logits": classify(states if classifies_states else (hidden,), real)}
            case "contrastive":
                features = at_positions(frames.extracted, target_positions)
                if target_weights is None:
                    counted = mask_time_indices if target_positions is None else None
                    target_weights = jnp.ones(hidden.shape[:2]) if counted is None else counted.astype(jnp.float32)
                contrast = ContrastiveHead(
                    execution,
                    groups=config.num_codevector_groups,
                    entries=config.num_codevectors_per_group,
                    quantized_width=config.codevector_dim,
                    width=config.proj_codevector_dim,
                    name="contrastive_head",
                )
                out = contrast(
                    hidden,
                    Dropout(config.feat_quantizer_dropout)(features, train=train),
                    target_weights,
                    temperature=temperature,
                    noise=gumbel_noise,
                    train=train,
                )
                out["feature_penalty"] = jnp.mean(jnp.square(frames.convolved.astype(jnp.float32)), axis=-1)
            case _:
                raise ValueError(f"task {self.task!r} is not one of {', '.join(TASKS)}")
        if output_hidden_states:
            out["hidden_states"] = states
        return out


def forward_flops(
    config: AudioConfig, task: str | None, rows: int, samples: int, targets: int, *, scan: bool = False
) -> float:
    """Floating point operations of the convolutions and matrix products of a forward pass, two a multiply-add.

    Counted as `jaxptm.nn.text.forward_flops` counts; the codebooks' usage is left out.

    Args:
        samples: of a row, padding included.
        targets: frames a row that the contrastive head runs on.
    """
    width, frames, below, convolved = config.hidden_size, samples, 1, 0
    for inner, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        frames = (frames - kernel) // stride + 1
        convolved += frames * kernel * below * inner
        below = inner
    positions = config.num_conv_pos_embeddings * width**2 // config.num_conv_pos_embedding_groups
    queries = min(targets, frames) if task == "contrastive" and not scan else frames
    total = convolved + frames * (below * width + positions) + encoder_products(config, frames, queries)
    match task:
        case "ctc":
            total += frames * width * config.vocab_size
        case "sequence-classification":
            averaged = (config.num_hidden_layers + 1) * width if config.use_weighted_layer_sum else 0
            total += frames * (averaged + width * config.classifier_proj_size)
            total += config.classifier_proj_size * config.num_labels
        case "contrastive":
            entries = config.num_codevector_groups * config.num_codevectors_per_group
            quantised = below * entries + config.num_codevectors_per_group * config.codevector_dim
            total += targets * (quantised + (width + config.codevector_dim) * config.proj_codevector_dim)
    return 2.0 * rows * total
