"""Optimizers and learning-rate schedules, put together from optax."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from jaxptm.config import OptimizerConfig
from jaxptm.nn.model import KEPT
from jaxptm.types import Array, JaxptmError, Params

LAYERS, LAYER = "encoder/layers/", "encoder/layer_"
"""In a path: layers stacked for a scan, and one layer."""
TRI_STAGE_START, TRI_STAGE_HOLD, TRI_STAGE_END = 0.01, 0.4, 0.05
"""Of `tri_stage`: the share of the peak that it begins at, of the run that it stays there, of the peak that is left."""
DECAYED = {"kernel": True, "embedding": True, "bias": False, "scale": False}
"""Whether weight decay touches a leaf, by its name: matrices and tables shrink, biases and norm scales do not."""


def optimizer(config: OptimizerConfig, steps: int, params: Params) -> optax.GradientTransformation:
    """Global-norm clipping, then the named optimizer over `schedule(config, steps)`.

    - `adamw`: Loshchilov & Hutter 2019, as `torch.optim.AdamW`: bias correction, decay times the learning rate.
    - `bert_adam`: google-research/bert `optimization.py`: the same without bias correction.
    - `lamb`: You et al. 2020, algorithm 2. Leaves without decay also go without the trust ratio, as in the reference
      implementations (google-research/albert `lamb_optimizer.py`, NVIDIA apex `FusedLAMB`).

    With `layer_decay` the learning rate of each leaf, decay included, is multiplied by `layer_factors`. What is
    `frozen` stays as it is; its gradient has to be 0 (see `stop_frozen`), or it would count for the clipping. In the
    first `head_first` updates, all but the heads stays as it is, and its gradients count for nothing.

    Args:
        config: what to build.
        steps: length of the run in optimizer steps.
        params: the parameters, or their shapes; only the paths are read.

    Raises:
        JaxptmError: a leaf of unknown name, a warmup or a `head_first` that does not fit the run, or a frozen part that
            is not there.
    """
    decayed = _decay_mask(params)
    _check_frozen(params, config.frozen)
    learning_rate = schedule(config, steps)
    parts = [] if config.clip is None else [_clip_by_global_norm(config.clip)]
    if config.name == "bert_adam":
        parts += [_scale_by_uncorrected_adam(config.beta1, config.beta2, config.epsilon)]
    else:
        parts += [optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)]
    parts += [optax.add_decayed_weights(config.weight_decay, decayed)]
    if config.name == "lamb":
        parts += [optax.masked(_scale_by_trust_ratio(), decayed)]
    if config.layer_decay < 1:
        parts += [_scaled(lambda params: layer_factors(params, config.layer_decay, config.layer_decay_form))]
    if config.frozen:
        parts += [_scaled(lambda params: _by_leaf(params, lambda path: float(not _is_frozen(path, config.frozen))))]
    whole = optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
    head_first = config.head_first if isinstance(config.head_first, int) else round(config.head_first * steps)
    if head_first >= steps:
        raise JaxptmError(
            f"optimizer.head_first is {head_first} updates, and the run has {steps}: what is below the heads would "
            "not learn; lower it, or name what is to stay in optimizer.frozen."
        )
    return _in_float32(_heads_first(whole, head_first) if head_first else whole)


def apply_updates(params: Params, updates: Params, key: Array) -> Params:
    """params + updates. Parameters in bfloat16 are rounded at random, so that on average no update is lost.

    Rounded to the nearest, an update below 1/512 of its parameter would never change it (Gupta et al. 2015, 3.2).
    """
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def add(leaf: Any, update: Any, key: Array) -> Array:
        value = leaf.astype(jnp.float32) + update
        return _round_at_random(value, key) if leaf.dtype == jnp.bfloat16 else value.astype(leaf.dtype)

    return jax.tree.unflatten(tree, map(add, leaves, jax.tree.leaves(updates), keys))


def _round_at_random(value: Array, key: Array) -> Array:
    """float32 -> one of the two nearest bfloat16, each with the chance that makes the mean exact."""
    # bfloat16 is the upper half of a float32: carry over from the lower half with its share of 2**16.
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
    noise = jax.random.bits(key, value.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(value), rounded, value).astype(jnp.bfloat16)


def _in_float32(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Moments and updates in float32, whatever the type of the parameters."""

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return transform.update(cast(grads), state, cast(params))

    return optax.GradientTransformation(lambda params: transform.init(cast(params)), update)


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the updates done so far; each rises from 0 to the peak over the warmup.

    `linear` and `cosine` fall to 0 at `steps`, `constant` stays, `inverse_sqrt` falls as sqrt(warmup / step).
    `bert_linear` falls from step 0 on, so that it never reaches the peak after a warmup (google-research/bert
    `optimization.py`). `electra_linear` does so too, and the warmup multiplies what has fallen (google-research/electra
    `optimization.py`). `tri_stage` begins at 1% of the peak, stays there for 40% of the run after the warmup, and falls
    exponentially to 5% (Baevski et al. 2020, section 4.3; fairseq `tri_stage_lr_scheduler.py`, with the figures of its
    wav2vec configs).

    A share of warmup is rounded up, as transformers does, or down where that would be the whole run.

    Raises:
        JaxptmError: the warmup leaves no step to decay in, or `inverse_sqrt` has none.
    """
    peak = config.learning_rate
    warmup = config.warmup if isinstance(config.warmup, int) else math.ceil(config.warmup * steps)
    hold = round(TRI_STAGE_HOLD * steps) if config.schedule == "tri_stage" else 0
    if isinstance(config.warmup, float) and warmup + hold >= steps:  # a run of a few steps
        warmup = math.floor(config.warmup * steps)
    held = warmup + hold
    if config.schedule in ("linear", "bert_linear", "electra_linear", "cosine", "tri_stage") and held >= steps:
        raise JaxptmError(
            f"optimizer.warmup is {warmup} steps, but train.steps is {steps} and the {config.schedule} schedule has to "
            "fall after the warmup: shorten optimizer.warmup or raise train.steps."
        )
    if config.schedule == "inverse_sqrt" and warmup == 0:
        raise JaxptmError("optimizer.warmup is 0 steps, but the inverse_sqrt schedule scales with it: give at least 1.")

    def after_warmup(step: Array) -> Any:
        match config.schedule:
            case "linear":
                return optax.linear_schedule(peak, 0.0, steps - warmup)(step - warmup)
            case "bert_linear" | "electra_linear":
                return optax.linear_schedule(peak, 0.0, steps)(step)
            case "cosine":
                return optax.cosine_decay_schedule(peak, steps - warmup)(step - warmup)
            case "inverse_sqrt":
                return peak * jnp.sqrt(warmup / jnp.maximum(step, warmup))
            case "tri_stage":
                share = jnp.clip((step - held) / (steps - held), 0.0, 1.0)
                return peak * TRI_STAGE_END**share
            case "constant":
                return peak

    def learning_rate(step: Any) -> Array:
        step = jnp.asarray(step)
        rising = step / max(warmup, 1)
        if config.schedule == "electra_linear":
            return jnp.minimum(rising if warmup else 1.0, 1.0) * after_warmup(step)
        if config.schedule == "tri_stage":
            rising = TRI_STAGE_START + (1 - TRI_STAGE_START) * rising
        return jnp.where(step < warmup, peak * rising, after_warmup(step))

    return learning_rate


def decayed_leaves(params: Params) -> list[str]:
    """The "/"-joined paths of the leaves that weight decay touches.

    Raises:
        JaxptmError: a leaf of unknown name.
    """
    return [_join(path) for path, decays in jax.tree_util.tree_leaves_with_path(_decay_mask(params)) if decays]


def layer_factors(params: Params, decay: float, form: Literal["paper", "code"]) -> Params:
    """What multiplies the learning rate of each leaf: `decay` once for every layer between it and the heads.

    With n layers a head keeps 1, the top layer has decay, the bottom one decay^n and the embeddings decay^(n + 1)
    (Clark et al. 2020, appendix B). `code` has one factor more on all but the heads, as `_get_layer_lrs` of
    google-research/electra. For layers that are stacked, one factor each along the first axis.

    Raises:
        JaxptmError: the parameters are not those of one model with layers of their own.
    """
    if "shared_layer" in params.get("encoder", {"shared_layer": None}):
        raise JaxptmError(
            "optimizer.layer_decay: needs one model whose layers have parameters of their own (not ALBERT, nor "
            "ELECTRA's pre-training with its two); leave it at 1."
        )
    extra = 1 if form == "code" else 0

    encoder = params["encoder"]
    depth = sum(name.startswith("layer_") for name in encoder)
    if "layers" in encoder:
        depth = jax.tree.leaves(encoder["layers"])[0].shape[0]

    def factor(path: str) -> float:
        match path.split("/"):
            case ["embeddings" | "embeddings_project" | "mask_embedding", *_]:
                return decay ** (depth + 1 + extra)
            case ["encoder", name, *_] if name.startswith("layer_"):
                return decay ** (depth - int(name.removeprefix("layer_")) + extra)
        return 1.0  # heads, and a norm behind the top layer

    return _by_leaf(params, factor)


def stop_frozen(params: Params, frozen: Sequence[str]) -> Params:
    """The same parameters; those whose paths begin with one of `frozen` get no gradient.

    XLA then computes none for what lies below the lowest part that learns.
    """
    if not frozen:
        return params

    def stop(leaf: Array, factor: Any) -> Array:
        if np.ndim(factor) == 0 or np.all(factor == factor.flat[0]):
            return jax.lax.stop_gradient(leaf) if np.all(factor == 1) else leaf
        return jnp.where(jnp.broadcast_to(factor == 1, leaf.shape), jax.lax.stop_gradient(leaf), leaf)

    return jax.tree.map(stop, params, _by_leaf(params, lambda path: float(_is_frozen(path, frozen))))


def _is_frozen(path: str, frozen: Sequence[str]) -> bool:
    return any(path == part or path.startswith(f"{part}/") for part in frozen)


def _check_frozen(params: Params, frozen: Sequence[str]) -> None:
    flat = flatten_dict(params, sep="/")
    paths: set[str] = set()
    for path, leaf in flat.items():
        depth = leaf.shape[0] if LAYERS in path else 1
        paths |= {path.replace(LAYERS, f"{LAYER}{i}/") for i in range(depth)}
    for part in frozen:
        if not any(_is_frozen(path, [part]) for path in paths):
            parts = sorted({path.split("/")[0] for path in paths})
            raise JaxptmError(
                f"optimizer.frozen: no parameter's path begins with {part!r}; the parts are {', '.join(parts)}, and "
                "encoder/layer_0 and so on."
            )
    if all(_is_frozen(path, frozen) for path in paths):
        raise JaxptmError("optimizer.frozen: names all parameters, so that nothing would learn; leave a part out.")


def _by_leaf(params: Params, value: Callable[[str], float]) -> Params:
    """`value` of the "/"-joined path of each leaf; of layers that are stacked, one each along the first axis."""

    def of(path: Any, leaf: Any) -> Any:
        name = _join(path)
        if LAYERS not in name:
            return value(name)
        values = [value(name.replace(LAYERS, f"{LAYER}{i}/")) for i in range(leaf.shape[0])]
        return np.array(values, np.float32).reshape(-1, *[1] * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(of, params)


def _clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Gradients whose norm, over all of them, is above `most` are scaled down to it.

    `optax.clip_by_global_norm` chooses for each element between the gradient and its quotient by the norm. XLA on CPUs
    then writes all quotients to memory, and both moments read them and the gradients: 15 passes over the parameters a
    step instead of 11.
    """

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        scale = jnp.minimum(1.0, most / optax.tree.norm(updates))
        return jax.tree.map(lambda leaf: leaf * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scaled(factors: Callable[[Params], Params]) -> optax.GradientTransformation:
    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return jax.tree.map(lambda u, factor: u * factor, updates, factors(updates)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class HeadsFirstState(NamedTuple):
    """How many updates there have been, and the state of what makes them."""

    updates: Array
    inner: optax.OptState


def _heads_first(transform: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """In the first `steps` updates all but the heads has neither gradients nor updates (fairseq, `wav2vec2_asr.py`,
    `freeze_finetune_updates`; there its moments are corrected for a beginning of their own).
    """

    def init(params: optax.Params) -> HeadsFirstState:
        return HeadsFirstState(jnp.zeros([], jnp.int32), transform.init(params))

    def update(
        grads: optax.Updates, state: HeadsFirstState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, HeadsFirstState]:
        def gated(tree: Any) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, leaf: jnp.where(state.updates < steps, 0, leaf) if path[0].key in KEPT else leaf, tree
            )

        updates, inner = transform.update(gated(grads), state.inner, params)
        return gated(updates), HeadsFirstState(optax.safe_increment(state.updates), inner)

    return optax.GradientTransformation(init, update)


def _decay_mask(params: Params) -> Params:
    leaves = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    unknown = [_join(path) for path in leaves if path[-1].key not in DECAYED]
    if unknown:
        raise JaxptmError(
            f"weight decay does not know these parameters: {', '.join(unknown)}; "
            f"name a leaf {', '.join(DECAYED)}, or add its name to jaxptm.optim.DECAYED."
        )
    return jax.tree_util.tree_map_with_path(lambda path, _: DECAYED[path[-1].key], params)


def _join(path: Any) -> str:
    return "/".join(str(part.key) for part in path)


def _scale_by_trust_ratio() -> optax.GradientTransformation:
    """The update of each kernel and table times norm(parameter) / norm(update), or 1 where either norm is 0.

    As `optax.scale_by_trust_ratio`, but layers that are stacked for a scan have a ratio each, as they do unstacked.
    """

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        def scale(path: Any, update: Any, param: Any) -> Array:
            axes = tuple(range(1 if "layers" in _join(path).split("/") else 0, update.ndim))
            of_update, of_param = (jnp.sqrt(jnp.sum(x**2, axes, keepdims=True)) for x in (update, param))
            known = (of_update > 0) & (of_param > 0)
            return update * jnp.where(known, of_param / jnp.where(known, of_update, 1.0), 1.0)

        return jax.tree_util.tree_map_with_path(scale, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale_by_uncorrected_adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """The direction m / (sqrt(v) + epsilon), where m and v start at 0 and are not corrected for it."""

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        # Two trees of zeros: a buffer that stood in both could not be donated.
        mu, nu = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        grads: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        mu = optax.tree.update_moment(grads, state.mu, beta1, 1)
        nu = optax.tree.update_moment(grads, state.nu, beta2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mu, nu)
        return updates, optax.ScaleByAdamState(state.count + 1, mu, nu)

    return optax.GradientTransformation(init, update)
