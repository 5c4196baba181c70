"""Speech models: convolutions from samples to frames under the transformer, and one head by task.

wav2vec 2.0 (Baevski et al. 2020) and HuBERT (Hsu et al. 2021), which differ in what they learn from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import BeforeValidator, Field, model_validator

from jaxptm.config import Positive, Share
from jaxptm.nn.core import ACTIVATIONS, Execution, Transformer, layer_norm, linear, visible_keys
from jaxptm.nn.heads import Classifier, ContrastiveHead, FrameClassifier
from jaxptm.nn.model import ModelConfig, PretrainedModule
from jaxptm.types import Array, JaxptmError

TASKS = ("ctc", "sequence-classification", "contrastive")
CONV_NORM_EPS = 1e-5
"""Of the norms between convolutions, whatever the config's epsilon is."""

Sizes = Annotated[tuple[Positive, ...], BeforeValidator(lambda sizes: tuple(sizes) if type(sizes) is list else sizes)]
"""One number a convolution; a list in JSON and YAML."""
Samples = TypeVar("Samples", int, np.ndarray, Array)


class AudioConfig(ModelConfig):
    """A transformer over audio samples at 16 kHz; the defaults are wav2vec 2.0 base."""

    vocab_size: Positive = 32
    """Symbols of CTC, the blank among them."""
    pad_token_id: Annotated[int, Field(ge=0)] | None = 0
    """The blank of CTC."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    activation_dropout: Share = 0.1
    layerdrop: Share = 0.1
    feat_proj_dropout: Share = 0.0
    """Dropout behind the projection of the convolutions' features."""
    final_dropout: Share = 0.1
    """Dropout under the CTC head."""

    conv_dim: Sizes = (512,) * 7
    conv_kernel: Sizes = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: Sizes = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    feat_extract_norm: Literal["group", "layer"] = "group"
    """`group`: behind the first convolution each channel is normalised over time, padding included. `layer`: behind
    every convolution each frame is normalised over its channels."""
    feat_extract_activation: str = "gelu"
    num_conv_pos_embeddings: Positive = 128
    """Frames that a convolutional position sees."""
    num_conv_pos_embedding_groups: Positive = 16

    mask_time_prob: Share = 0.05
    mask_feature_prob: Share = 0.0

    feat_quantizer_dropout: Share = 0.0
    """Dropout on the features that are quantised."""
    num_codevector_groups: Positive = 2
    num_codevectors_per_group: Positive = 320
    codevector_dim: Positive = 256
    proj_codevector_dim: Positive = 256
    """Width in which a frame is compared with quantised ones."""

    use_weighted_layer_sum: bool = False
    """Classify a learned average of all hidden states, and not the last one."""
    classifier_proj_size: Positive = 256

    input_names: ClassVar[tuple[str, ...]] = ("input_values", "attention_mask")
    own_fields: ClassVar[tuple[str, ...]] = ("num_labels",)
    optional_keys: ClassVar[tuple[str, ...]] = ()
    normed_states: ClassVar[bool] = False

    def initializer(self, *, residual: bool = False) -> nn.initializers.Initializer:
        """A plain normal (fairseq, `init_bert_params`)."""
        return nn.initializers.normal(self.initializer_range)

    @model_validator(mode="after")
    def _check_audio(self) -> AudioConfig:
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride) > 0:
            raise ValueError(
                f"`conv_dim` has {len(self.conv_dim)} entries, `conv_kernel` {len(self.conv_kernel)} and `conv_stride` "
                f"{len(self.conv_stride)}; give one a layer"
            )
        for name, whole, part in (
            ("hidden_size", self.hidden_size, "num_conv_pos_embedding_groups"),
            ("codevector_dim", self.codevector_dim, "num_codevector_groups"),
        ):
            if whole % getattr(self, part):
                raise ValueError(f"`{name}` {whole} is not a multiple of `{part}` {getattr(self, part)}")
        if self.feat_extract_activation not in ACTIVATIONS:
            raise ValueError(
                f"`feat_extract_activation` {self.feat_extract_activation!r} is not one of {', '.join(ACTIVATIONS)}"
            )
        return self

    @property
    def masks(self) -> bool:
        """Whether there is an embedding that stands in for masked frames, as transformers decides it."""
        return self.mask_time_prob > 0 or self.mask_feature_prob > 0

    @property
    def stride(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.conv_stride)

    @property
    def receptive_field(self) -> int:
        """Samples that one frame sees: the shortest input."""
        field = 1
        for kernel, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
            field = (field - 1) * stride + kernel
        return field

    def frames(self, samples: Samples) -> Samples:
        """How many frames come of so many samples; 0 or less where there are too few for one."""
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    def checked_inputs(self, task: str | None, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs of a call: samples as float32, masks as int32 and bool.

        Args:
            arrays: `input_values` [B, T], and if wanted `attention_mask` [B, T], `mask_time_indices` [B, F] and
                `mask_feature_indices` [B, D].

        Raises:
            JaxptmError: an input without a name here, of another shape or type, samples that are no numbers, padding
                that is not on the right, or a row that is too short for one frame.
        """
        if "input_values" not in arrays:
            raise JaxptmError("give the model `input_values`, a float array of shape [batch, samples].")
        values = arrays["input_values"]
        if values.ndim != 2:
            raise JaxptmError(f"`input_values` has shape {list(values.shape)}, expected [batch, samples].")
        if values.dtype.kind != "f":
            raise JaxptmError(f"`input_values` holds {values.dtype}, expected floats; divide 16-bit samples by 32768.")
        rows, samples = values.shape
        if samples < self.receptive_field:
            raise JaxptmError(
                f"the input is {samples} samples long, the model needs {self.receptive_field} for one frame; pad it "
                "or leave it out."
            )
        broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if broken.size:
            raise JaxptmError(f"`input_values` row {broken[0]} holds NaN or infinite samples; leave it out.")
        shapes = {
            "attention_mask": (rows, samples),
            "mask_time_indices": (rows, self.frames(samples)),
            "mask_feature_indices": (rows, self.hidden_size),
        }
        checked = {"input_values": values.astype(np.float32)}
        for name, array in arrays.items():
            if name == "input_values":
                continue
            if name not in shapes:
                raise JaxptmError(f"the model has no input `{name}`, only {', '.join(['input_values', *shapes])}.")
            if array.shape != shapes[name]:
                raise JaxptmError(f"`{name}` has shape {list(array.shape)}, expected {list(shapes[name])}.")
            if array.dtype.kind not in "iub" or not np.isin(array, (0, 1)).all():
                raise JaxptmError(f"`{name}` has to hold 0 and 1, or booleans.")
            checked[name] = array.astype(np.int32 if name == "attention_mask" else bool)
        if "mask_time_indices" in checked and not self.masks:
            raise JaxptmError(
                "`mask_time_indices`: the model has no embedding for masked frames, because its config says "
                "`mask_time_prob: 0` and `mask_feature_prob: 0`; leave the masks out, or raise one of them."
            )
        if "attention_mask" in checked:
            mask = checked["attention_mask"]
            holes = np.flatnonzero((np.diff(mask, axis=1) > 0).any(axis=1))
            if holes.size:
                raise JaxptmError(f"`attention_mask` row {holes[0]} has 1 behind 0; pad on the right.")
            short = np.flatnonzero(mask.sum(axis=1) < self.receptive_field)
            if short.size:
                raise JaxptmError(
                    f"`attention_mask` row {short[0]} has {mask[short[0]].sum()} samples, the model needs "
                    f"{self.receptive_field} for one frame; leave the row out."
                )
        return checked


class ConvLayer(nn.Module):
    """activation(norm(conv(x))), the first of which takes the samples as one channel."""

    config: AudioConfig
    execution: Execution
    index: int

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"]) -> Float[Array, "B F E2"]:
        config, execution = self.config, self.execution
        x = nn.Conv(
            config.conv_dim[self.index],
            (config.conv_kernel[self.index],),
            (config.conv_stride[self.index],),
            padding="VALID",
            use_bias=config.conv_bias,
            dtype=execution.dtype,
            param_dtype=execution.param_dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
            name="conv",
        )(x)
        options = {"dtype": execution.dtype, "param_dtype": execution.param_dtype, "use_fast_variance": False}
        if config.feat_extract_norm == "layer":
            x = nn.LayerNorm(CONV_NORM_EPS, **options, name="norm")(x)
        elif self.index == 0:
            x = nn.GroupNorm(None, group_size=1, epsilon=CONV_NORM_EPS, **options, name="norm")(x)
        return ACTIVATIONS[config.feat_extract_activation](x)


class FeatureEncoder(nn.Module):
    """From samples to frames, 20 ms apart (Baevski et al. 2020, section 2)."""

    config: AudioConfig
    execution: Execution

    @nn.compact
    def __call__(self, samples: Float[Array, "B T"]) -> Float[Array, "B F E"]:
        # The first layers hold most of what a backward pass needs.
        kind: Any = nn.remat(ConvLayer) if self.execution.remat else ConvLayer
        x = samples[..., None].astype(self.execution.dtype)
        for index in range(len(self.config.conv_dim)):
            x = kind(self.config, self.execution, index, name=f"conv_{index}")(x)
        return x


def grouped_convolution(
    x: Float[Array, "B F D"], kernel: Float[Array, "taps Dg D"], groups: int, *, one_by_one: bool | None = None
) -> Float[Array, "B F D"]:
    """Each group of channels convolved over time with its own kernel, as many frames out as in.

    Args:
        one_by_one: a convolution for each group, and not one for all; default on CPUs, where XLA takes fifteen times as
            long for the backward pass of the latter. GPUs are faster with it (benchmarks/README.md).
    """
    taps = len(kernel)
    if one_by_one is None:
        one_by_one = jax.default_backend() == "cpu"
    parts = groups if one_by_one else 1
    convolved = [
        jax.lax.conv_general_dilated(
            part,
            weights,
            window_strides=(1,),
            padding=[(taps // 2, (taps - 1) // 2)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups // parts,
        )
        for part, weights in zip(jnp.split(x, parts, axis=-1), jnp.split(kernel, parts, axis=-1), strict=True)
    ]
    return jnp.concatenate(convolved, axis=-1)


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
        out = grouped_convolution(x, kernel, groups) + bias.astype(self.execution.dtype)[None, None]
        return ACTIVATIONS[self.config.feat_extract_activation](out)


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
        real: Bool[Array, "B F"] | None,
        mask_embedding: Float[Array, " D"] | None,
        mask_time_indices: Bool[Array, "B F"] | None,
        mask_feature_indices: Bool[Array, "B D"] | None,
        *,
        train: bool,
    ) -> Frames:
        config, execution = self.config, self.execution
        convolved = FeatureEncoder(config, execution, name="feature_encoder")(input_values)
        extracted = layer_norm(config, execution, "feature_norm")(convolved)
        x = linear(execution, config.hidden_size, "feature_projection")(extracted)
        x = nn.Dropout(config.feat_proj_dropout, deterministic=not train)(x)
        if mask_time_indices is not None and mask_embedding is not None:
            x = jnp.where(mask_time_indices[..., None], mask_embedding.astype(x.dtype)[None, None], x)
        if mask_feature_indices is not None:
            x = jnp.where(mask_feature_indices[:, None], 0, x)
        if real is not None:
            x = jnp.where(real[..., None], x, 0)
        x += ConvPositions(config, execution, name="positions")(x)
        if config.norm == "post":
            x = layer_norm(config, execution, "norm")(x)
        return Frames(nn.Dropout(config.hidden_dropout_prob, deterministic=not train)(x), convolved, extracted)


class AudioModel(PretrainedModule):
    """A speech encoder with the head of `task`. Logits and what is compared are float32."""

    config: AudioConfig

    def example(self) -> Float[Array, "B T"]:
        """One frame."""
        return jnp.zeros((1, self.config.receptive_field))

    def flops(self, rows: int, length: int, targets: int = 0) -> float:
        """See `forward_flops`."""
        return forward_flops(self.config, self.task, rows, length, targets)

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
            target_positions: frames that the contrastive head runs on; default all.
            target_weights: how much each of them counts for the use of the codebooks; default 1, or where all frames
                are targets, 1 for the masked ones.
            gumbel_noise: of the quantiser in training; default drawn from the rng `gumbel`.
            temperature: of the quantiser's softmax in training.
            train: dropout on; needs the rng `dropout`.
            output_hidden_states: adds `hidden_states`, one [B, F, D] before each layer and one after the last, which no
                norm has seen where norms come before layers.
        """
        config, execution = self.config, self.execution
        real = None
        if attention_mask is not None:
            lengths = config.frames(jnp.sum(attention_mask, axis=1))
            real = jnp.arange(config.frames(input_values.shape[1]))[None] < lengths[:, None]
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
            input_values, real, mask_embedding, mask_time_indices, mask_feature_indices, train=train
        )
        classifies_states = self.task == "sequence-classification" and config.use_weighted_layer_sum
        hidden, states, _ = Transformer(config, execution, name="encoder")(
            frames.embedded,
            visible_keys(real),
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

                def at_targets(x: Float[Array, "B F *W"]) -> Float[Array, "B P *W"]:
                    return x if target_positions is None else jnp.take_along_axis(x, target_positions[..., None], 1)

                targets, features = at_targets(hidden), at_targets(frames.extracted)
                if target_weights is None:
                    counted = mask_time_indices if target_positions is None else None
                    target_weights = jnp.ones(targets.shape[:2]) if counted is None else counted.astype(jnp.float32)
                contrast = ContrastiveHead(
                    execution,
                    groups=config.num_codevector_groups,
                    entries=config.num_codevectors_per_group,
                    quantized_width=config.codevector_dim,
                    width=config.proj_codevector_dim,
                    name="contrastive_head",
                )
                out = contrast(
                    targets,
                    nn.Dropout(config.feat_quantizer_dropout, deterministic=not train)(features),
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


def forward_flops(config: AudioConfig, task: str | None, rows: int, samples: int, targets: int) -> float:
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
    layer = 4 * width**2 + 2 * width * config.intermediate_size + 2 * frames * width
    total = convolved + frames * (below * width + positions + config.num_hidden_layers * layer)
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
