"""Objectives of speech against transformers and torch: the whole pre-training loss and CTC, values and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speech
import torch

from jaxptm.config import ContrastiveConfig, CtcConfig
from jaxptm.objectives import speech as objectives
from jaxptm.objectives.finetune import sequence_classification
from jaxptm.objectives.speech import collapse, contrastive, ctc
from jaxptm.ops.contrastive import draw_negatives, mask_frames
from jaxptm.pretrained import from_pretrained
from jaxptm.step import gradients

SETTINGS = ContrastiveConfig(
    name="contrastive", mask_length=3, negatives=6, temperature_decay=0.5, last_temperature=0.1
)


def batch_of(lengths: tuple[int, ...] = speech.LENGTHS) -> dict[str, np.ndarray]:
    arrays = speech.inputs(padded=True)
    mask = (np.arange(speech.SAMPLES)[None] < np.array(lengths)[:, None]).astype(np.int32)
    return {"input_values": np.where(mask == 1, arrays["input_values"], 0).astype(np.float32), "attention_mask": mask}


@pytest.mark.parametrize("style", speech.STYLES)
def test_the_pretraining_loss_and_its_gradient(style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = speech.saved(tmp_path, "contrastive", **speech.STYLES[style], **speech.NO_DROPOUT).train()
    ours, batch, step = from_pretrained(tmp_path, "contrastive"), batch_of((603, 350, 200)), 2
    keys = jax.random.split(jax.random.key(5), 3)
    objective = contrastive(SETTINGS, ours.module)  # type: ignore[arg-type]
    found, means = jax.jit(lambda params: gradients(objective, params, batch, keys, 1, step=step))(ours.params)

    # What it draws, drawn again.
    mask_keys, negative_keys, noise_keys, _ = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)(keys)
    frames = ours.config.frames(speech.SAMPLES)  # type: ignore[attr-defined]
    lengths = np.array([ours.config.frames(n) for n in (603, 350, 200)])  # type: ignore[attr-defined]
    masked = mask_frames(mask_keys, jnp.array(lengths), frames, probability=0.65, span=3)
    positions, counts = np.asarray(masked.positions), np.asarray(masked.weights).sum(axis=1).astype(int)
    slots = positions.shape[1]
    drawn = np.asarray(draw_negatives(negative_keys, jnp.array(counts), slots, 6))
    gumbel = np.asarray(jax.vmap(lambda key: jax.random.gumbel(key, (slots, 3, 7)))(noise_keys))
    noise = np.zeros((3, frames, 3, 7), np.float32)
    negatives = np.zeros((3, frames, 6), np.int64)
    for row in range(3):
        at = positions[row, : counts[row]]
        noise[row, at] = gumbel[row, : counts[row]]
        negatives[row, at] = positions[row][drawn[row, : counts[row]]] + row * frames

    def gumbel_softmax(logits: torch.Tensor, tau: float, hard: bool) -> torch.Tensor:
        soft = torch.softmax((logits + torch.tensor(noise).reshape(logits.shape)) / tau, dim=-1)
        return torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]) - soft.detach() + soft

    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", gumbel_softmax)
    theirs.set_gumbel_temperature(2.0 * 0.5**step)
    convolved: list[torch.Tensor] = []
    theirs.wav2vec2.feature_extractor.register_forward_hook(lambda module, given, out: convolved.append(out))
    out = theirs(
        torch.tensor(batch["input_values"]),
        attention_mask=torch.tensor(batch["attention_mask"]),
        mask_time_indices=torch.tensor(np.asarray(masked.mask)),
        sampled_negative_indices=torch.tensor(negatives),
    )
    real = torch.arange(frames)[None] < torch.tensor(lengths)[:, None]
    penalty = (convolved[0].transpose(1, 2).square().mean(-1) * real).sum() / real.sum()
    total = int(counts.sum())
    (out.loss / total + 10 * penalty).backward()
    for parameter in theirs.wav2vec2.feature_extractor.parameters():
        parameter.grad *= 0.1

    assert float(means["contrastive_loss"].total) == pytest.approx(out.contrastive_loss.item(), rel=1e-5)
    assert float(means["contrastive_loss"].weight) == total
    assert float(means["diversity_loss"].total) == pytest.approx(out.diversity_loss.item(), rel=1e-5)
    assert float(means["feature_penalty"].value) == pytest.approx(penalty.item(), rel=1e-5)
    whole = out.loss.item() / total + 10 * penalty.item()
    assert float(means["loss"].value) == pytest.approx(whole, rel=1e-5)
    used = sum(float(means[f"code_perplexity_{i}"].value) for i in (1, 2, 3))
    assert used == pytest.approx(out.codevector_perplexity.item(), rel=1e-5)
    assert float(means["audio_seconds"].total) == pytest.approx((603 + 350 + 200) / 16000)
    speech.assert_gradients_agree(ours, theirs, found)


def test_a_row_of_padding_changes_nothing(tmp_path: Path) -> None:
    speech.saved(tmp_path, "contrastive", **speech.STYLES["large"], **speech.NO_DROPOUT)
    ours = from_pretrained(tmp_path, "contrastive")
    objective, keys = contrastive(SETTINGS, ours.module), jax.random.split(jax.random.key(1), 3)  # type: ignore[arg-type]
    batch = batch_of((603, 350, 0))
    loss = jax.jit(lambda batch, keys: objective.loss(ours.params, batch, keys, train=True)[0])
    whole, part = loss(batch, keys), loss({name: rows[:2] for name, rows in batch.items()}, keys[:2])
    for name, mean in part.items():
        assert float(whole[name].value) == pytest.approx(float(mean.value), rel=1e-5), name


@pytest.mark.parametrize("task", ["ctc", "sequence-classification"])
def test_a_row_of_padding_breaks_nothing(task: str, tmp_path: Path) -> None:
    speech.saved(tmp_path, task, **speech.STYLES["large"], **speech.NO_DROPOUT)
    ours, keys = from_pretrained(tmp_path, task), jax.random.split(jax.random.key(1), 3)
    module: Any = ours.module
    if task == "ctc":
        objective = ctc(CtcConfig(name="ctc", mask_length=3, channel_mask_length=8), module)
        labels = np.array([[1, 2], [3, -100], [-100, -100]], np.int32)
    else:
        objective = sequence_classification(module, "single_label_classification")
        labels = np.array([1, 0, 0], np.int32)
    batch = {**batch_of((603, 350, 0)), "labels": labels}
    compiled = jax.jit(lambda batch, keys: gradients(objective, ours.params, batch, keys, 1))
    whole, means = compiled(batch, keys)
    part, fewer = compiled({name: rows[:2] for name, rows in batch.items()}, keys[:2])
    assert float(means["loss"].value) == pytest.approx(float(fewer["loss"].value), rel=1e-5)
    for ours_leaf, theirs_leaf in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        np.testing.assert_allclose(ours_leaf, theirs_leaf, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", speech.STYLES)
def test_ctc_and_its_gradient(style: str, tmp_path: Path) -> None:
    theirs = speech.saved(tmp_path, "ctc", **speech.STYLES[style], **speech.NO_DROPOUT, ctc_zero_infinity=True)
    ours, batch = from_pretrained(tmp_path, "ctc"), batch_of()
    labels = np.random.default_rng(2).integers(1, 11, (3, 6)).astype(np.int32)
    labels[1, 4:] = -100
    labels[2, 2:] = -100  # one frame is too few for two symbols
    objective = ctc(CtcConfig(name="ctc", mask_probability=0, channel_mask_probability=0), ours.module)  # type: ignore[arg-type]
    keys = jax.random.split(jax.random.key(0), 3)
    labelled = {**batch, "labels": labels}
    found, means = jax.jit(lambda params: gradients(objective, params, labelled, keys, 1))(ours.params)
    out = theirs(
        torch.tensor(batch["input_values"]),
        attention_mask=torch.tensor(batch["attention_mask"]),
        labels=torch.tensor(labels, dtype=torch.long),
    )
    (out.loss / 10).backward()
    assert float(means["ctc_loss"].total) == pytest.approx(out.loss.item(), rel=1e-5)
    assert float(means["ctc_loss"].weight) == 10  # symbols of the rows that fit
    speech.assert_gradients_agree(ours, theirs, found)
    paths = np.asarray(objective.predict(ours.params, batch)["path"])  # type: ignore[misc]
    best = out.logits.argmax(-1).numpy()
    lengths = [ours.config.frames(n) for n in speech.LENGTHS]  # type: ignore[attr-defined]
    for row, length in enumerate(lengths):
        assert paths[row, :length].tolist() == best[row, :length].tolist() and not paths[row, length:].any()
    blanks = sum(int((best[row, :length] == 0).sum()) for row, length in enumerate(lengths))
    assert float(means["blank_share"].value) == pytest.approx(blanks / sum(lengths))


def test_masks_of_ctc_are_of_training_alone(tmp_path: Path) -> None:
    speech.saved(tmp_path, "ctc", **speech.STYLES["large"], **speech.NO_DROPOUT)
    ours = from_pretrained(tmp_path, "ctc")
    batch: dict[str, Any] = {**batch_of(), "labels": np.array([[1, 2], [3, -100], [4, -100]], np.int32)}
    settings = {"mask_length": 3, "channel_mask_length": 8}
    values = {}
    for name, masks in {"both": {}, "none": {"mask_probability": 0.0, "channel_mask_probability": 0.0}}.items():
        objective = ctc(CtcConfig(name="ctc", **settings, **masks), ours.module)  # type: ignore[arg-type]
        for train in (True, False):
            keys = jax.random.split(jax.random.key(3), 3)
            values[name, train] = float(objective.loss(ours.params, batch, keys, train=train)[0]["ctc_loss"].value)
    assert values["both", False] == values["none", False] == pytest.approx(values["none", True], rel=1e-6)
    assert abs(values["both", True] - values["none", True]) > 1e-3


@pytest.mark.parametrize(
    ("loss", "accuracy", "used", "message"),
    [
        (3.0, 0.4, (60.0, 80.0), None),
        (4.61, 0.01, (60.0, 80.0), "stands at chance: 4.610 nats of 4.615, 6.651 bits"),
        (0.05, 0.99, (3.0, 80.0), "has become trivial: accuracy 99.0% with 3.0 entries"),
        (4.7, 0.01, (1.2, 1.0), "the codebooks have collapsed: each uses 1.2 of its entries"),
    ],
)
def test_a_collapse_is_named(loss: float, accuracy: float, used: tuple[float, float], message: str | None) -> None:
    values = {"contrastive_loss": loss, "contrastive_accuracy": accuracy}
    values |= {f"code_perplexity_{i}": value for i, value in enumerate(used, 1)}
    said = collapse(values, negatives=100)
    assert said is None if message is None else message in str(said)


def test_short_rows_of_which_too_much_is_hidden_are_named(tmp_path: Path) -> None:
    speech.saved(tmp_path, "ctc", **speech.STYLES["large"])
    ours = from_pretrained(tmp_path, "ctc")
    batch = {**batch_of(), "labels": np.array([[1, 2], [3, -100], [4, -100]], np.int32)}
    keys = jax.random.split(jax.random.key(3), 3)

    def alarm(**settings: Any) -> tuple[float, str | None]:
        objective = ctc(CtcConfig(name="ctc", **settings), ours.module)  # type: ignore[arg-type]
        scores = objective.loss(ours.params, batch, keys, train=True)[1]
        values = {name: float(mean.value) for name, mean in scores.items()}
        return values.get("hidden_share", 0.0), objective.alarm(values)

    share, said = alarm(mask_probability=0.1, mask_length=5)
    assert share > 0.3 and said is not None
    assert f"{share:.0%} of the frames are hidden in training, where objective.mask_probability says 10%" in said
    assert alarm(mask_probability=0.0) == (0.0, None)
    share, said = alarm(mask_probability=0.6, mask_length=2)
    assert 0 < share < 0.6 and said is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_whose_gradient_is_scaled_stay_to_the_bit(dtype: Any) -> None:
    params = {"embeddings": {"feature_encoder": {"kernel": jax.random.normal(jax.random.key(0), (999,), dtype)}}}
    scaled = jax.jit(lambda params: objectives._gradient_scaled(params, 0.1))
    leaf = params["embeddings"]["feature_encoder"]["kernel"]
    np.testing.assert_array_equal(scaled(params)["embeddings"]["feature_encoder"]["kernel"], leaf)
    gradient = jax.grad(lambda p: jnp.sum(scaled(p)["embeddings"]["feature_encoder"]["kernel"].astype(jnp.float32)))
    np.testing.assert_array_equal(gradient(params)["embeddings"]["feature_encoder"]["kernel"], jnp.asarray(0.1, dtype))
