"""A step of KerasHub on JAX: python with_keras.py WORK"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import keras_hub
import numpy as np
from turns import serve
from work import CLIP, EPSILON, LEARNING_RATE, SIZES, VOCABULARY, WEIGHT_DECAY, batch, named


def main() -> None:
    work = named(sys.argv[1])
    assert work.objective == "masked-lm", "KerasHub has a masked LM alone"
    sizes = SIZES[work.preset]
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        hidden_dim=sizes["hidden_size"],
        intermediate_dim=sizes["intermediate_size"],
        dropout=0.1,
        max_sequence_length=512,
    )
    model = keras_hub.models.BertMaskedLM(backbone, preprocessor=None)
    model.compile(
        optimizer=keras.optimizers.AdamW(
            LEARNING_RATE, weight_decay=WEIGHT_DECAY, epsilon=EPSILON, global_clipnorm=CLIP
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=None,
        jit_compile=True,
    )
    arrays = batch(work)
    inputs = {
        "token_ids": arrays["input_ids"],
        "segment_ids": np.zeros_like(arrays["input_ids"]),
        "padding_mask": arrays["attention_mask"],
        "mask_positions": arrays["positions"],
    }
    labels = np.take_along_axis(arrays["original_ids"], arrays["positions"], 1)

    def step() -> Any:
        model.reset_metrics()  # or the loss would be the mean of all steps
        return model.train_on_batch(inputs, labels)

    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else device.device_kind
    packages = ("keras", "keras-hub", "jax")
    serve(packages, kind, model.count_params(), step, lambda out: float(np.asarray(out).reshape(-1)[0]))


if __name__ == "__main__":
    main()
