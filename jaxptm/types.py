"""The few types that every layer of jaxptm shares.

Axis letters mean the same in every annotation: B batch rows, L sequence length in tokens, D model width,
H attention heads, V vocabulary entries, P predictions a row, C answer choices; of audio T samples, F frames,
U labels of a transcript, G codebooks, N entries of a codebook. E is the width of what stands below the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxptm.errors import JaxptmError as JaxptmError

Array = jax.Array
Params = dict[str, Any]
"""A plain nested dict of arrays; its "/"-joined paths are the left column of the weight tables."""
Batch = Mapping[str, Array | np.ndarray]
"""Named arrays whose first axis is the batch row."""


class Mean(NamedTuple):
    """A mean that has not been divided yet.

    Microbatches, devices and hosts add `total` and `weight` separately, so that the final quotient is the mean over
    all items and not a mean of means.
    """

    total: Array
    weight: Array

    @classmethod
    def of(cls, values: Array, weights: Array) -> Mean:
        """Sums `values * weights` and `weights` (equal shapes) in float32."""
        weights = weights.astype(jnp.float32)
        return cls(jnp.sum(values.astype(jnp.float32) * weights), jnp.sum(weights))

    @property
    def value(self) -> Array:
        """The quotient; 0 where nothing was counted."""
        return self.total / jnp.maximum(self.weight, 1e-5)


Means = dict[str, Mean]


class TrainState(NamedTuple):
    """All that a training step changes. The data position is `step`: batches are a function of (seed, step)."""

    step: Array
    params: Params
    opt_state: Any
