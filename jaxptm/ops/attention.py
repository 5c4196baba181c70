"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), by XLA or by the kernels of `ops.tiles`."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Key

from jaxptm.ops.dropout import dropout
from jaxptm.types import Array

UNSEEN = float(jnp.finfo(jnp.float32).min)
"""Score of a key that a query may not see. Finite: where there is no other, all keys weigh alike."""


def attention(
    query: Float[Array, "B Q H W"],
    key: Float[Array, "B K H W"],
    value: Float[Array, "B K H W"],
    mask: Bool[Array, "#B 1 #Q K"] | None = None,
    rng: Key[Array, ""] | None = None,
    rate: float = 0.0,
    *,
    causal: bool = False,
    tiled: bool | None = None,
) -> Float[Array, "B Q H W"]:
    """softmax(q kT / sqrt(W)) v for each head; scores and softmax are float32 whatever the type of the inputs.

    Args:
        mask: which keys each query may see; None for all.
        rng: of dropout; None for none.
        rate: share of the weights that dropout takes.
        causal: as the mask says, too, no query sees a key after it. The kernels then leave those out, even for a query
            that sees no key at all.
        tiled: by kernels that keep the weights out of a GPU's memory; default where `runs_tiles` and `fits_tiles`.
    """
    if causal and mask is None:
        raise ValueError("`causal` says what the mask has; give the mask as well")
    if rng is not None and rate == 1:
        return jnp.zeros_like(query)
    if rate == 0:
        rng = None
    if tiled is None:
        tiled = fits_tiles(query) and runs_tiles()
    if tiled:
        from jaxptm.ops.tiles import attention_in_tiles  # Pallas takes long to import, and not every jax has its Triton

        return attention_in_tiles(query, key, value, mask, rng, rate, causal)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, UNSEEN)
    weights = jax.nn.softmax(scores).astype(query.dtype)
    if rng is not None:
        weights = dropout(weights, rng, rate)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def fits_tiles(query: Float[Array, "B Q H W"]) -> bool:
    """Whether the kernels are for inputs like these: half precision, several queries, a width of 16, 32, 64 or 128."""
    return query.dtype.itemsize == 2 and query.shape[1] > 1 and query.shape[-1] in (16, 32, 64, 128)


@cache
def runs_tiles() -> bool:
    """Whether the kernels run here: on an NVIDIA GPU from Ampere on (before it there is no bfloat16), with a jax that
    has Pallas for Triton, which version 0.11 announces the end of.
    """
    if jax.default_backend() != "gpu" or find_spec("jax.experimental.pallas.triton") is None:
        return False
    generation = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")[0]
    return generation.isdecimal() and int(generation) >= 8
