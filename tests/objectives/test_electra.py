"""Replaced-token detection against transformers + torch, and the details of ELECTRA that replications got wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
import transformers
from reference import pair_batch

from jaxptm.config import AllTokensMlmConfig, ReplacedTokenConfig
from jaxptm.hf import table as weights
from jaxptm.models.electra import FAMILY, PRESETS, ElectraConfig
from jaxptm.models.params import abstract_params, flatten, stacked, unflatten, unstacked
from jaxptm.nn.core import Execution
from jaxptm.nn.text import TextModel
from jaxptm.objectives import Objective
from jaxptm.objectives.electra import all_tokens_mlm, replaced_token_detection, restore
from jaxptm.ops.masking import Masked, VocabularyTables, mask_with_replacement, replace_masked
from jaxptm.pretrained import Model, from_pretrained
from jaxptm.step import gradients, row_keys
from jaxptm.types import JaxptmError

VOCAB, LENGTH, MASK, ROWS = 97, 24, 4, 6
SPECIAL = np.arange(VOCAB) < 5
CONFIG = ElectraConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=40,
    embedding_size=24,
    generator_size=0.5,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def objective_of(config: ElectraConfig = CONFIG, execution: Execution | None = None, **settings: Any) -> Objective:
    execution = execution or Execution()
    return replaced_token_detection(
        ReplacedTokenConfig(name="replaced-token", **settings),
        TextModel(config, "replaced-token", execution),
        TextModel(config.generator(), "masked-lm", execution),
        VocabularyTables(SPECIAL, np.zeros(VOCAB, bool)),
        MASK,
        LENGTH,
    )


def batch_of(seed: int = 0) -> dict[str, np.ndarray]:
    batch = pair_batch(np.random.default_rng(seed), ROWS, LENGTH, VOCAB)
    del batch["next_sentence_label"]
    batch["attention_mask"][3] = batch["input_ids"][3] = batch["token_type_ids"][3] = 0
    return batch


def all_tokens_of(execution: Execution | None = None) -> Objective:
    execution = execution or Execution()
    return all_tokens_mlm(
        AllTokensMlmConfig(name="all-tokens-mlm"),
        TextModel(CONFIG, "masked-lm", execution),
        TextModel(CONFIG.generator(), "masked-lm", execution),
        VocabularyTables(SPECIAL, np.zeros(VOCAB, bool)),
        MASK,
        LENGTH,
    )


@pytest.fixture(scope="module")
def theirs() -> tuple[torch.nn.Module, torch.nn.Module]:
    return pair_of("ElectraForPreTraining")


def pair_of(kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model and a generator of transformers with noise on every parameter and one stem, as ELECTRA trains."""
    torch.manual_seed(0)
    pair = []
    for config, name in ((CONFIG, kind), (CONFIG.generator(), "ElectraForMaskedLM")):
        model = getattr(transformers, name)(transformers.ElectraConfig(**FAMILY.to_hf(config))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        pair.append(model)
    discriminator, generator = pair
    generator.electra.embeddings = discriminator.electra.embeddings
    generator.tie_weights()
    assert generator.generator_lm_head.weight is discriminator.electra.embeddings.word_embeddings.weight
    return discriminator, generator


def params_of(pair: tuple[torch.nn.Module, torch.nn.Module], objective: Objective) -> Any:
    return jax.tree.map(jnp.asarray, objective.join(parts_of(pair, objective)))


def parts_of(pair: tuple[torch.nn.Module, torch.nn.Module], objective: Objective) -> dict[str, Any]:
    parts = {}
    for (name, module), model in zip(objective.modules.items(), pair, strict=True):
        tensors = {key: tensor.detach().numpy() for key, tensor in model.state_dict().items()}
        shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(module)).items()}
        table = FAMILY.table(module.config, module.task)
        parts[name] = unflatten(weights.load(table, tensors, shapes, source="oracle").params)
    return parts


def draws(batch: Mapping[str, np.ndarray], keys: jax.Array, slots: int) -> tuple[Masked, jax.Array]:
    """The masks that the objective draws from these keys, and the keys that it samples with."""
    mask_keys, sample_keys, *_ = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)(keys)
    real = batch["attention_mask"].astype(bool)
    masked = mask_with_replacement(
        mask_keys,
        jnp.asarray(batch["input_ids"]),
        jnp.asarray(real & ~SPECIAL[batch["input_ids"]]),
        lengths=jnp.asarray(real.sum(1)),
        probability=0.15,
        max_predictions=slots,
        mask_id=MASK,
    )
    return masked, sample_keys


class Drawn(NamedTuple):
    """What torch's generator makes of a batch, with the masks and the noise of the objective."""

    generator_loss: torch.Tensor
    corrupted: torch.Tensor
    context: dict[str, torch.Tensor]

    @property
    def real(self) -> torch.Tensor:
        return self.context["attention_mask"].float()


def drawn_by(generator: torch.nn.Module, batch: Mapping[str, np.ndarray], keys: jax.Array, temperature: float) -> Drawn:
    masked, sample_keys = draws(batch, keys, 3)
    context = {name: torch.tensor(batch[name]) for name in ("attention_mask", "token_type_ids")}
    logits = generator(torch.tensor(np.array(masked.input_ids)).long(), **context).logits
    at = torch.tensor(np.array(masked.positions)).long()
    slots = torch.gather(logits, 1, at[..., None].expand(-1, -1, VOCAB))
    weight = torch.tensor(np.array(masked.weights))
    losses = torch.nn.functional.cross_entropy(
        slots.transpose(1, 2), torch.tensor(np.array(masked.labels)).long(), reduction="none"
    )
    # The same sampled tokens for both: what ours draws from torch's logits.
    corrupted = replace_masked(
        sample_keys, jnp.asarray(batch["input_ids"]), masked, jnp.asarray(slots.detach().numpy()), temperature
    )
    return Drawn((losses * weight).sum() / weight.sum(), torch.tensor(np.array(corrupted)).long(), context)


def assert_gradients_agree(objective: Objective, grads: Any, theirs: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    for (name, module), model in zip(objective.modules.items(), theirs, strict=True):
        found = flatten(objective.split(grads)[name])
        torch_grads = {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}
        rows = FAMILY.table(module.config, module.task).rows
        assert {path for row in rows for path in row.paths} == set(found)
        scale = max(float(np.linalg.norm(grad)) for grad in torch_grads.values())
        for row in rows:
            (expected,) = row.operation.load(torch_grads[row.theirs])
            size = np.linalg.norm(expected)
            floor = 1e-5 * scale  # a key's bias has no gradient but rounding
            assert np.linalg.norm(found[row.paths[0]] - expected) <= 1e-4 * max(size, floor), row.theirs


def test_the_joint_loss_and_all_its_gradients_are_those_of_torch(
    theirs: tuple[torch.nn.Module, torch.nn.Module],
) -> None:
    discriminator, generator = theirs
    objective = objective_of(temperature=0.9)
    params, batch = params_of(theirs, objective), batch_of()
    keys = row_keys(jax.random.key(3), batch)
    grads, means = jax.jit(lambda params: gradients(objective, params, batch, keys, 1))(params)

    generator_loss, corrupted, context = drawn = drawn_by(generator, batch, keys, 0.9)
    real, replaced = drawn.real, corrupted != torch.tensor(batch["input_ids"])
    assert replaced.sum() > 0
    judged = discriminator(corrupted, **context).logits
    binary = torch.nn.functional.binary_cross_entropy_with_logits(judged, replaced.float(), reduction="none")
    discriminator_loss = (binary * real).sum() / real.sum()
    for model in theirs:
        model.zero_grad()
    total = generator_loss + 50 * discriminator_loss
    total.backward()

    assert float(means["generator_loss"].value) == pytest.approx(generator_loss.item(), abs=1e-5)
    assert float(means["discriminator_loss"].value) == pytest.approx(discriminator_loss.item(), abs=1e-5)
    assert float(means["loss"].value) == pytest.approx(total.item(), abs=2e-4)
    said = judged > 0
    assert float(means["discriminator_accuracy"].value) == pytest.approx(
        ((said == replaced) * real).sum().item() / real.sum().item(), abs=1e-6
    )
    for name, among in (("precision", said), ("recall", replaced)):
        expected = (said & replaced & (real > 0)).sum().item() / max((among & (real > 0)).sum().item(), 1e-5)
        assert float(means[f"discriminator_{name}"].value) == pytest.approx(expected, abs=1e-6)
    assert_gradients_agree(objective, grads, theirs)


def test_all_tokens_mlm_and_its_gradients_are_those_of_torch() -> None:
    theirs = pair_of("ElectraForMaskedLM")
    model, generator = theirs
    objective = all_tokens_of()
    copies = torch.nn.Linear(CONFIG.hidden_size, 1)
    head = {"kernel": jnp.asarray(copies.weight.detach().numpy().T), "bias": jnp.asarray(copies.bias.detach().numpy())}
    parts = parts_of(theirs, objective)
    own = {name: {key: part for key, part in parts[name].items() if key != "embeddings"} for name in parts}
    params = jax.tree.map(jnp.asarray, {"embeddings": parts["model"]["embeddings"]} | own)
    params["copy_head"] = {"output": head}
    batch = batch_of()
    keys = row_keys(jax.random.key(3), batch)
    grads, means = jax.jit(lambda params: gradients(objective, params, batch, keys, 1))(params)

    generator_loss, corrupted, context = drawn = drawn_by(generator, batch, keys, 1.0)
    real, original = drawn.real, torch.tensor(batch["input_ids"]).long()
    out = model(corrupted, **context, output_hidden_states=True)
    copied = torch.sigmoid(copies(out.hidden_states[-1]))
    chances = (1 - copied) * out.logits.softmax(-1) + copied * torch.nn.functional.one_hot(corrupted, VOCAB)
    nats = -torch.gather(chances, -1, original[..., None])[..., 0].log()
    model_loss = (nats * real).sum() / real.sum()
    for module in (*theirs, copies):
        module.zero_grad()
    total = generator_loss + model_loss / 0.15
    total.backward()

    assert float(means["generator_loss"].value) == pytest.approx(generator_loss.item(), abs=1e-5)
    assert float(means["model_loss"].value) == pytest.approx(model_loss.item(), abs=1e-5)
    assert float(means["loss"].value) == pytest.approx(total.item(), abs=1e-4)
    right, replaced = (chances.argmax(-1) == original) & (real > 0), (corrupted != original) & (real > 0)
    for name, among in (("model_accuracy", real > 0), ("restored_share", replaced)):
        assert float(means[name].value) == pytest.approx((right & among).sum().item() / among.sum().item(), abs=1e-6)
    assert_gradients_agree(objective, grads, theirs)
    found = grads["copy_head"]["output"]
    np.testing.assert_allclose(found["kernel"], copies.weight.grad.numpy().T, atol=1e-5)
    np.testing.assert_allclose(found["bias"], copies.bias.grad.numpy(), atol=1e-5)


@pytest.mark.parametrize("odds", [-200.0, 0.3, 200.0])
def test_a_token_is_restored_from_the_vocabulary_or_by_copying(odds: float) -> None:
    rng = np.random.default_rng(0)
    logits, original = rng.normal(size=(2, 5, VOCAB)) * 3, rng.integers(0, VOCAB, (2, 5))
    read = np.where(rng.random((2, 5)) < 0.5, original, (original + 1) % VOCAB)
    nats, right = restore(
        jnp.full((2, 5), odds, jnp.float32), jnp.asarray(logits, jnp.float32), jnp.asarray(read), jnp.asarray(original)
    )
    copied = scipy.special.expit(np.longdouble(odds))
    of_vocabulary = scipy.special.softmax(logits.astype(np.longdouble), axis=-1)
    chances = scipy.special.expit(np.longdouble(-odds)) * of_vocabulary + copied * np.eye(VOCAB)[read]
    expected = np.take_along_axis(chances, original[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.asarray(nats), -np.log(expected).astype(float), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(right), chances.argmax(-1) == original)


def test_all_tokens_mlm_is_the_same_in_parts_in_a_scan_and_nearly_in_bfloat16() -> None:
    objective, batch = all_tokens_of(), batch_of()
    params, keys = objective.init(jax.random.key(0)), row_keys(jax.random.key(1), batch)
    whole, means = jax.jit(lambda p: gradients(objective, p, batch, keys, 1))(params)
    parts, values = jax.jit(lambda p: gradients(objective, p, batch, keys, 3))(params)
    for name, mean in means.items():
        np.testing.assert_allclose(np.array(values[name]), np.array(mean), rtol=2e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), parts, whole)
    scan = all_tokens_of(Execution(scan=True))
    grads, values = jax.jit(lambda p: gradients(scan, p, batch, keys, 1))(stacked(params))
    assert float(values["loss"].value) == pytest.approx(float(means["loss"].value), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), unstacked(grads), whole)
    half = all_tokens_of(Execution(dtype=jnp.bfloat16))
    _, values = jax.jit(lambda p: gradients(half, p, batch, keys, 1))(params)
    assert float(values["loss"].value) == pytest.approx(float(means["loss"].value), rel=0.05)


def test_all_tokens_mlm_costs_its_head_on_all_tokens() -> None:
    objective = all_tokens_of()
    model, generator = objective.modules["model"], objective.modules["generator"]
    expected = model.flops(ROWS, LENGTH, LENGTH) + generator.flops(ROWS, LENGTH, 3) + 2 * ROWS * LENGTH * 32
    assert objective.flops(ROWS, LENGTH) == expected
    assert objective.coefficients["model_loss"] == 1 / 0.15


def test_the_models_of_all_tokens_mlm_leave_the_head_for_copying_behind() -> None:
    objective = all_tokens_of()
    params = objective.init(jax.random.key(0))
    assert set(params) == {"embeddings", "model", "generator", "copy_head"}
    parts = objective.split(params)
    assert set(parts["model"]) == {"embeddings", "embeddings_project", "encoder", "mlm_head"}
    with pytest.raises(JaxptmError, match="its head for copying is in the checkpoints of a run alone"):
        objective.join(parts)


def test_no_gradient_of_the_discriminator_reaches_the_generator() -> None:
    objective = objective_of(generator_weight=0.0)
    params, batch = objective.init(jax.random.key(0)), batch_of()
    keys = row_keys(jax.random.key(1), batch)
    grads, _ = jax.jit(lambda params: gradients(objective, params, batch, keys, 1))(params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["generator"]))
    assert np.any(grads["embeddings"]["token"]["embedding"]) and np.any(
        grads["discriminator"]["embeddings_project"]["kernel"]
    )


def test_what_the_two_share_and_what_they_do_not() -> None:
    objective = objective_of()
    params = objective.init(jax.random.key(0))
    assert set(params) == {"embeddings", "discriminator", "generator"}
    assert set(params["embeddings"]) == {"token", "position", "token_type", "norm"}
    assert set(params["discriminator"]) == {"embeddings_project", "encoder", "replaced_token_head"}
    assert set(params["generator"]) == {"embeddings_project", "encoder", "mlm_head"}
    assert "embedding" not in params["generator"]["mlm_head"]  # its output table is the token table
    assert params["generator"]["embeddings_project"]["kernel"].shape == (24, 16)
    again = objective.join(objective.split(params))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    parts = objective.split(params)
    parts["generator"] = jax.tree.map(lambda leaf: leaf + 1, parts["generator"])
    with pytest.raises(JaxptmError, match="do not have the same embeddings, which they share"):
        objective.join(parts)


def test_stacking_reaches_both_encoders() -> None:
    params = objective_of().init(jax.random.key(0))
    scanned = stacked(params)
    for name in ("discriminator", "generator"):
        assert set(scanned[name]["encoder"]) == {"layers"}
    jax.tree.map(np.testing.assert_array_equal, unstacked(scanned), params)
    batch = batch_of()
    keys = row_keys(jax.random.key(1), batch)
    plain, means = jax.jit(lambda p: gradients(objective_of(), p, batch, keys, 1))(params)
    for options in ({"scan": True}, {"scan": True, "remat": True}):
        other = objective_of(execution=Execution(**options))
        grads, values = jax.jit(lambda p, o=other: gradients(o, p, batch, keys, 1))(scanned)
        assert float(values["loss"].value) == pytest.approx(float(means["loss"].value), rel=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), unstacked(grads), plain)


def test_microbatches_change_nothing() -> None:
    params, batch = objective_of().init(jax.random.key(0)), batch_of()
    keys = row_keys(jax.random.key(1), batch)
    run = jax.jit(lambda parts: gradients(objective_of(), params, batch, keys, parts), static_argnums=0)
    (whole, means), (parts, others) = run(1), run(3)
    for name, mean in means.items():
        np.testing.assert_allclose(np.array(others[name]), np.array(mean), rtol=2e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole, parts)


def test_the_loss_counts_all_tokens_that_are_no_padding_and_all_slots() -> None:
    batch = batch_of()
    terms, scores = objective_of().loss(
        objective_of().init(jax.random.key(0)), batch, row_keys(jax.random.key(1), batch), train=False
    )
    tokens = batch["attention_mask"].sum(axis=1)
    assert float(terms["discriminator_loss"].weight) == tokens.sum()
    assert float(terms["generator_loss"].weight) == sum(min(3, max(1, round(0.15 * n))) for n in tokens if n)
    assert float(scores["token_share"].total) == tokens.sum()
    assert float(objective_of().total(terms)) == pytest.approx(
        float(terms["generator_loss"].value + 50 * terms["discriminator_loss"].value), rel=1e-6
    )


def test_slots_are_those_of_the_reference() -> None:
    # int((mask_prob + 0.005) * max_seq_length), configure_pretraining.py
    for length, probability, slots in ((128, 0.15, 19), (512, 0.15, 79), (512, 0.25, 130)):
        assert ReplacedTokenConfig(name="replaced-token", mask_probability=probability).slots(length) == slots


def test_the_defaults_are_the_paper_s() -> None:
    config = ReplacedTokenConfig(name="replaced-token")
    assert (config.discriminator_weight, config.generator_weight, config.temperature) == (50.0, 1.0, 1.0)
    assert config.mask_probability == 0.15


@pytest.mark.parametrize(("preset", "width", "heads"), [("electra-small", 64, 1), ("electra-small++", 256, 4)])
def test_both_small_generators(preset: str, width: int, heads: int) -> None:
    # google-research/electra#73: a generator of full width and one of a quarter are both called small.
    generator = PRESETS[preset].generator()
    assert (generator.hidden_size, generator.num_attention_heads, generator.intermediate_size) == (
        width,
        heads,
        4 * width,
    )
    assert (generator.num_hidden_layers, generator.embedding_size) == (12, 128)  # depth and embeddings stay


def exported(objective: Objective, directory: Path, seed: int = 0) -> dict[str, Model]:
    params = objective.init(jax.random.key(seed))
    for name, module in objective.modules.items():
        Model(FAMILY, module.config, module.task, module, objective.split(params)[name]).save_pretrained(
            directory / name
        )
    return {name: from_pretrained(directory / name, "auto") for name in objective.modules}


def test_two_directories_open_in_transformers_with_the_same_tables(tmp_path: Path) -> None:
    models = exported(objective_of(), tmp_path)
    assert {name: model.task for name, model in models.items()} == {"model": "replaced-token", "generator": "masked-lm"}
    assert models["model"].config.generator_size == 0.5  # the checkpoint says what it was trained against
    tables = []
    for name, kind in (("model", "ElectraForPreTraining"), ("generator", "ElectraForMaskedLM")):
        model, info = getattr(transformers, kind).from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        tables.append(model.electra.embeddings.state_dict())
    assert tables[0].keys() == tables[1].keys()
    assert all(torch.equal(tables[0][key], tables[1][key]) for key in tables[0])
    batch = batch_of()
    with torch.no_grad():
        expected = model.eval()(**{name: torch.tensor(rows).long() for name, rows in batch.items()}).logits.numpy()
    real = batch["attention_mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(models["generator"](**batch).logits)[real], expected[real], atol=2e-5)


def test_a_generator_that_does_not_divide_is_refused() -> None:
    config = PRESETS["electra-base"].model_copy(update={"generator_size": 0.3})
    with pytest.raises(JaxptmError, match=r"model.generator_size: 0.3 of the width 768 is 230, which 3 heads do not"):
        config.generator()
