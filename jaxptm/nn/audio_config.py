"""Sizes of a speech model, what they make of samples, and the inputs that it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeVar

import flax.linen as nn
import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from jaxptm.config import Positive, Share
from jaxptm.nn.activations import ACTIVATIONS
from jaxptm.nn.model import ModelConfig
from jaxptm.types import Array, JaxptmError

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
            arrays: `input_values` [B, T], and if wanted `attention_mask` [B, T] or `lengths` [B], `mask_time_indices`
                [B, F] and `mask_feature_indices` [B, D].

        Raises:
            JaxptmError: an input without a name here, of another shape or type, empty, samples that are no numbers,
                padding that is not on the right, or a row that is too short for one frame.
        """
        if "input_values" not in arrays:
            raise JaxptmError("give the model `input_values`, a float array of shape [batch, samples].")
        values = arrays["input_values"]
        if values.ndim != 2:
            raise JaxptmError(f"`input_values` has shape {list(values.shape)}, expected [batch, samples].")
        if not values.size:
            raise JaxptmError(f"`input_values` has shape {list(values.shape)}: give at least one row of samples.")
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
            "lengths": (rows,),
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
            if name == "lengths":
                if array.dtype.kind not in "iu" or not ((array >= self.receptive_field) & (array <= samples)).all():
                    raise JaxptmError(
                        f"`lengths` has to hold integers from {self.receptive_field} (one frame) to {samples}."
                    )
                checked[name] = array.astype(np.int32)
                continue
            if array.dtype.kind not in "iub" or not np.isin(array, (0, 1)).all():
                raise JaxptmError(f"`{name}` has to hold 0 and 1, or booleans.")
            checked[name] = array.astype(np.int32 if name == "attention_mask" else bool)
        if {"attention_mask", "lengths"} <= checked.keys():
            raise JaxptmError("give `attention_mask` or `lengths`, not both: the first has base models hear padding.")
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
