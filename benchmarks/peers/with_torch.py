"""A step of transformers + torch: python with_torch.py WORK

The attention is SDPA. With COMPILE=1 in the environment the models are compiled, with DTYPE=bfloat16 they run under
autocast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers.models.wav2vec2 import modeling_wav2vec2
from turns import serve
from work import (
    CHARACTERS,
    CLIP,
    DROPOUTS,
    EPSILON,
    IGNORED,
    LEARNING_RATE,
    MASKS,
    SIZES,
    WEIGHT_DECAY,
    Work,
    batch,
    named,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Loss = Callable[[], torch.Tensor]


def prepared(model: Any) -> Any:
    model = model.train().to(DEVICE)
    return torch.compile(model) if os.environ.get("COMPILE") else model


def loss_of(work: Work, arrays: dict[str, torch.Tensor]) -> tuple[list[torch.nn.Module], Loss]:
    """What has parameters, and the loss of one pass through it."""
    attention = {"attn_implementation": "sdpa"}
    match work.objective:
        case "masked-lm" | "causal-lm":
            of_family = transformers.BertConfig if work.objective == "masked-lm" else transformers.GPT2Config
            config = of_family(**SIZES.get(work.preset, {}))
            kind = (
                transformers.AutoModelForMaskedLM
                if work.objective == "masked-lm"
                else transformers.AutoModelForCausalLM
            )
            model = prepared(kind.from_config(config, **attention))
            names = ("input_ids", "attention_mask", "labels")
            return [model], lambda: model(**{name: arrays[name] for name in names}).loss
        case "replaced-token":
            return electra(arrays, attention)
        case "ctc":
            config = transformers.Wav2Vec2Config(vocab_size=CHARACTERS, ctc_loss_reduction="mean", **DROPOUTS, **MASKS)
            model = prepared(transformers.AutoModelForCTC.from_config(config, **attention))
            return [model], lambda: model(**arrays).loss
        case "contrastive":
            config = transformers.Wav2Vec2Config(**DROPOUTS)
            bare = transformers.AutoModelForPreTraining.from_config(config, **attention)
            frames = int(bare._get_feat_extract_output_lengths(torch.tensor(work.length)))
            mask = modeling_wav2vec2._compute_mask_indices(
                (work.rows, frames), MASKS["mask_time_prob"], MASKS["mask_time_length"]
            )
            negatives = modeling_wav2vec2._sample_negative_indices((work.rows, frames), 100, mask)
            inputs = {
                "input_values": arrays["input_values"],
                "attention_mask": arrays["attention_mask"],
                "mask_time_indices": torch.tensor(mask, device=DEVICE),
                "sampled_negative_indices": torch.tensor(negatives, device=DEVICE),
            }
            model, targets = prepared(bare), int(mask.sum())
            return [model], lambda: model(**inputs).loss / targets
    raise ValueError(work.objective)


def electra(arrays: dict[str, torch.Tensor], attention: dict[str, str]) -> tuple[list[torch.nn.Module], Loss]:
    """Clark et al. 2020: the generator fills the masks, the discriminator judges all tokens; the tables are shared."""
    config = transformers.ElectraConfig()
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 256}
    generator = transformers.ElectraForMaskedLM._from_config(transformers.ElectraConfig(**sizes), **attention)
    discriminator = transformers.ElectraForPreTraining._from_config(config, **attention)
    generator.electra.embeddings = discriminator.electra.embeddings
    generator.tie_weights()
    models = [prepared(generator), prepared(discriminator)]
    masked = arrays["labels"] != IGNORED

    def loss() -> torch.Tensor:
        inputs = {"attention_mask": arrays["attention_mask"]}
        filled = models[0](input_ids=arrays["input_ids"], labels=arrays["labels"], **inputs)
        with torch.no_grad():
            drawn = torch.distributions.Categorical(logits=filled.logits[masked].float()).sample()
        ids = arrays["original_ids"].clone()
        ids[masked] = drawn
        replaced = (ids != arrays["original_ids"]).float()
        logits = models[1](input_ids=ids, **inputs).logits
        return filled.loss + 50 * binary_cross_entropy_with_logits(logits.float(), replaced)

    return models, loss


def main() -> None:
    work = named(sys.argv[1])
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - transformers draws masks and negatives from it
    arrays = {
        name: torch.tensor(array, dtype=torch.float32 if array.dtype == np.float32 else torch.int64, device=DEVICE)
        for name, array in batch(work).items()
    }
    models, loss = loss_of(work, arrays)
    parameters = list({id(p): p for model in models for p in model.parameters()}.values())
    adam = torch.optim.AdamW(parameters, lr=LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True)
    half = os.environ.get("DTYPE") == "bfloat16"
    if DEVICE == "cuda":  # there jax takes TensorFloat-32 for float32, and torch when told to
        torch.set_float32_matmul_precision("high")

    def step() -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16) if half else nullcontext():
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        adam.step()
        adam.zero_grad()
        return value.detach()

    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    serve(("transformers", "torch"), device, sum(p.numel() for p in parameters), step, float)


if __name__ == "__main__":
    main()
