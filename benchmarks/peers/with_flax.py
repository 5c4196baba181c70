"""A step of transformers' own Flax models, which its version 5 no longer has: python with_flax.py WORK"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
import transformers
from turns import serve
from work import CLIP, EPSILON, IGNORED, LEARNING_RATE, SIZES, WEIGHT_DECAY, batch, named


def main() -> None:
    work = named(sys.argv[1])
    kinds = {
        "masked-lm": (transformers.FlaxBertForMaskedLM, transformers.BertConfig),
        "causal-lm": (transformers.FlaxGPT2LMHeadModel, transformers.GPT2Config),
    }
    kind, config = kinds[work.objective]
    model = kind(config(**SIZES.get(work.preset, {})), seed=0)
    adam = optax.chain(
        optax.clip_by_global_norm(CLIP), optax.adamw(LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY)
    )
    arrays = jax.device_put({name: jnp.asarray(array) for name, array in batch(work).items()})

    def loss(params: Any, key: Any) -> Any:
        inputs = {name: arrays[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, params=params, dropout_rng=key, train=True).logits
        labels = arrays["labels"]
        if work.objective == "causal-lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        counted = labels != IGNORED
        values = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, labels, 0))
        return jnp.sum(values * counted) / jnp.sum(counted)

    def update(params: Any, moments: Any, key: Any) -> Any:
        key, mine = jax.random.split(key)
        value, gradients = jax.value_and_grad(loss)(params, mine)
        updates, moments = adam.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, key, value

    compiled = jax.jit(update, donate_argnums=(0, 1))
    params, moments, key = model.params, adam.init(model.params), jax.random.key(0)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))

    def step() -> Any:
        nonlocal params, moments, key
        params, moments, key, value = compiled(params, moments, key)
        return value

    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else device.device_kind
    serve(("transformers", "jax", "flax", "optax"), kind, parameters, step, float)


if __name__ == "__main__":
    main()
