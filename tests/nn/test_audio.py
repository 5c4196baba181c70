"""The parts of a speech model against torch, their laws, and bad input."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxptm.models.params import abstract_params
from jaxptm.nn.audio import AudioModel, Convolution, ConvPositions, FeatureEncoder, forward_flops
from jaxptm.nn.audio_config import AudioConfig
from jaxptm.nn.convolution import grouped_convolution, strided_convolution
from jaxptm.nn.core import Execution, Transformer, stack_layers
from jaxptm.types import JaxptmError, Params

SMALL = AudioConfig(
    vocab_size=11,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    conv_dim=(16, 20, 12),
    conv_kernel=(10, 3, 2),
    conv_stride=(5, 2, 2),
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
    num_codevectors_per_group=7,
    codevector_dim=24,
    proj_codevector_dim=18,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    activation_dropout=0.0,
    layerdrop=0.0,
)


def audio(rows: int = 2, samples: int = 301, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, samples)), jnp.float32)


def params_of(config: AudioConfig, task: str | None = None) -> Params:
    return oracle.random_params(abstract_params(AudioModel(config, task)))


def run(config: AudioConfig, task: str | None = None, params: Params | None = None, **options: Any) -> dict[str, Any]:
    params = params_of(config, task) if params is None else params
    return AudioModel(config, task).apply({"params": params}, **{"input_values": audio(), **options})


# Parts


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("samples", [30, 41, 301])
def test_convolutions_agree_with_torch(norm: Any, samples: int) -> None:
    config = SMALL.model_copy(update={"feat_extract_norm": norm, "conv_bias": norm == "layer"})
    params = params_of(config)["embeddings"]["feature_encoder"]
    x = audio(samples=samples)
    found = FeatureEncoder(config, Execution()).apply({"params": params}, x)
    assert found.shape[1] == config.frames(samples)

    def tensor(array: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(array))

    expected = tensor(x)[:, None]
    for index, stride in enumerate(config.conv_stride):
        part = params[f"conv_{index}"]
        bias = tensor(part["conv"]["bias"]) if config.conv_bias else None
        expected = torch.nn.functional.conv1d(expected, tensor(part["conv"]["kernel"].T), bias, stride=stride)
        if norm == "layer":
            affine = tensor(part["norm"]["scale"]), tensor(part["norm"]["bias"])
            expected = torch.nn.functional.layer_norm(expected.mT, expected.shape[1:2], *affine).mT
        elif index == 0:
            affine = tensor(part["norm"]["scale"]), tensor(part["norm"]["bias"])
            expected = torch.nn.functional.group_norm(expected, expected.shape[1], *affine)
        expected = torch.nn.functional.gelu(expected)
    np.testing.assert_allclose(found, expected.mT, atol=5e-5)


@pytest.mark.parametrize("taps", [8, 7, 1])
@pytest.mark.parametrize("groups", [1, 4, 32])
def test_positions_agree_with_torch_and_its_weight_norm(taps: int, groups: int) -> None:
    update = {"num_conv_pos_embeddings": taps, "num_conv_pos_embedding_groups": groups}
    config = SMALL.model_copy(update=update)
    params = params_of(config)["embeddings"]["positions"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 13, 32)), jnp.float32)

    conv = torch.nn.Conv1d(32, 32, taps, padding=taps // 2, groups=groups)
    conv = torch.nn.utils.parametrizations.weight_norm(conv, dim=2)
    with torch.no_grad():
        conv.bias.copy_(torch.tensor(np.asarray(params["bias"])))
        conv.parametrizations.weight.original0.copy_(torch.tensor(np.asarray(params["scale"])).reshape(1, 1, -1))
        conv.parametrizations.weight.original1.copy_(torch.tensor(np.asarray(params["kernel"].T)))
    out = torch.nn.functional.gelu(conv(torch.tensor(np.asarray(x)).mT)[..., :13]).mT
    out.sin().sum().backward()

    def loss(params: Params) -> Any:
        found = ConvPositions(config, Execution()).apply({"params": params}, x)
        return jnp.sin(found).sum(), found

    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(found, out.detach(), atol=5e-5)
    pairs = {
        "bias": conv.bias.grad,
        "scale": conv.parametrizations.weight.original0.grad.reshape(-1),
        "kernel": conv.parametrizations.weight.original1.grad.permute(2, 1, 0),
    }
    for name, expected in pairs.items():
        limit = 1e-3 * float(expected.abs().max()) + 1e-6
        np.testing.assert_allclose(gradient[name], expected, atol=limit, err_msg=name)


# Frames and padding


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=4),
    more=st.integers(0, 40),
)
def test_frames_and_receptive_field(sizes: list[tuple[int, int]], more: int) -> None:
    kernels, strides = zip(*sizes, strict=True)
    config = AudioConfig(conv_dim=(1,) * len(sizes), conv_kernel=kernels, conv_stride=strides)
    assert config.frames(config.receptive_field) == 1
    assert config.frames(config.receptive_field - 1) <= 0
    assert config.frames(config.receptive_field + config.stride) == 2
    x = torch.zeros(1, 1, config.receptive_field + more)
    for kernel, stride in sizes:
        x = torch.nn.functional.conv1d(x, torch.zeros(1, 1, kernel), stride=stride)
    assert config.frames(config.receptive_field + more) == x.shape[-1]


def test_base_has_a_frame_every_20_ms_from_25_ms() -> None:
    config = AudioConfig()
    assert (config.stride, config.receptive_field, config.frames(16000)) == (320, 400, 49)


def test_padding_changes_nothing_where_norms_are_by_frame() -> None:
    """And it does where the group norm sees it, as in transformers."""
    short, seen = 221, SMALL.frames(221)
    x = audio().at[:, short:].set(0)
    mask = jnp.broadcast_to((jnp.arange(301) < short).astype(jnp.int32), (2, 301))
    for norm, same in (("layer", True), ("group", False)):
        config = SMALL.model_copy(update={"feat_extract_norm": norm})
        params = params_of(config)
        padded = run(config, params=params, input_values=x, attention_mask=mask)["last_hidden_state"]
        alone = run(config, params=params, input_values=x[:, :short])["last_hidden_state"]
        assert (np.abs(padded[:, :seen] - alone).max() < 5e-5) == same


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("task", [None, "ctc", "sequence-classification"])
def test_rows_with_lengths_come_out_as_they_do_alone(norm: str, task: str | None) -> None:
    config = SMALL.model_copy(update={"feat_extract_norm": norm})
    params, lengths = params_of(config, task), (221, 301)
    padded = audio().at[0, 221:].set(3.0)  # whatever stands there
    together = run(config, task, params, input_values=padded, lengths=jnp.array(lengths))
    for row, length in enumerate(lengths):
        alone = run(config, task, params, input_values=padded[row : row + 1, :length])
        for name, expected in alone.items():
            found = together[name][row : row + 1]
            if task != "sequence-classification":
                found = found[:, : SMALL.frames(length)]
            np.testing.assert_allclose(found, expected, atol=5e-5, err_msg=name)


def test_rows_are_pooled_without_their_padding() -> None:
    config = SMALL.model_copy(update={"feat_extract_norm": "layer"})
    params = params_of(config, "sequence-classification")
    x = audio().at[:, 221:].set(3.0)
    mask = jnp.broadcast_to((jnp.arange(301) < 221).astype(jnp.int32), (2, 301))
    padded = run(config, "sequence-classification", params, input_values=x, attention_mask=mask)["logits"]
    alone = run(config, "sequence-classification", params, input_values=x[:, :221])["logits"]
    np.testing.assert_allclose(padded, alone, atol=5e-5)


# Targets of the contrastive head


def test_targets_are_what_all_frames_give_there() -> None:
    params, frames = params_of(SMALL, "contrastive"), SMALL.frames(301)
    masked = np.random.default_rng(0).random((2, frames)) < 0.5
    positions = np.stack([np.flatnonzero(row)[:4] for row in masked])
    options = {"mask_time_indices": jnp.asarray(masked)}
    whole = run(SMALL, "contrastive", params, **options)
    some = run(SMALL, "contrastive", params, **options, target_positions=jnp.asarray(positions))
    for name in ("projected_states", "projected_quantized_states", "codes"):
        expected = np.take_along_axis(np.asarray(whole[name]), positions[..., None], axis=1)
        np.testing.assert_allclose(some[name], expected, atol=5e-5)
    assert whole["code_usage"].weight == masked.sum()
    weights = jnp.asarray([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    weighted = run(
        SMALL, "contrastive", params, **options, target_positions=jnp.asarray(positions), target_weights=weights
    )
    assert (some["code_usage"].weight, weighted["code_usage"].weight) == (8, 4)
    used = {
        (g, int(code))
        for row, n in ((0, 3), (1, 1))
        for codes in some["codes"][row, :n]
        for g, code in enumerate(codes)
    }
    assert {(int(g), int(n)) for g, n in zip(*np.nonzero(weighted["code_usage"].total), strict=True)} == used


def test_quantised_frames_are_unmasked_ones() -> None:
    params, frames = params_of(SMALL, "contrastive"), SMALL.frames(301)
    plain = run(SMALL, "contrastive", params)
    masked = run(SMALL, "contrastive", params, mask_time_indices=jnp.ones((2, frames), bool))
    np.testing.assert_array_equal(plain["projected_quantized_states"], masked["projected_quantized_states"])
    assert np.abs(plain["projected_states"] - masked["projected_states"]).max() > 0.01
    # All frames are masked alike: only their positions tell them apart.
    np.testing.assert_allclose(masked["projected_states"][0], masked["projected_states"][1], atol=5e-5)


def test_the_feature_penalty_is_the_mean_square_of_the_convolutions() -> None:
    params = params_of(SMALL, "contrastive")
    convolved = FeatureEncoder(SMALL, Execution()).apply({"params": params["embeddings"]["feature_encoder"]}, audio())
    np.testing.assert_allclose(
        run(SMALL, "contrastive", params)["feature_penalty"], (np.asarray(convolved) ** 2).mean(-1), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        (None, {}),
        ("ctc", {}),
        ("sequence-classification", {"num_labels": 5}),
        ("sequence-classification", {"use_weighted_layer_sum": True}),
        ("contrastive", {}),
    ],
)
def test_flops_are_those_of_the_products_in_the_program(task: str | None, changes: dict[str, Any]) -> None:
    config, rows, targets = SMALL.model_copy(update=changes), 2, 4
    options = {"target_positions": jnp.zeros((rows, targets), jnp.int32)} if task == "contrastive" else {}
    operations = oracle.equations(lambda params: run(config, task, params, **options), params_of(config, task))
    counted = oracle.product_flops(operations)
    for operation in operations:
        if operation.primitive.name == "conv_general_dilated":
            kernel, out = operation.invars[1].aval.shape, operation.outvars[0].aval.shape
            counted += 2 * kernel[0] * kernel[1] * math.prod(out)
    if task == "contrastive":  # the two means over the targets
        counted -= 2 * 2 * rows * targets * config.num_codevector_groups * config.num_codevectors_per_group
    assert forward_flops(config, task, rows, 301, targets) == counted


# Training


@pytest.mark.parametrize("scan", [False, True])
def test_layers_are_dropped_at_their_rate(scan: bool) -> None:
    # Each layer that stays adds 1 to a stream of zeros.
    layers = 6
    config = SMALL.model_copy(update={"norm": "pre", "num_hidden_layers": layers, "layerdrop": 0.3})
    module = Transformer(config, Execution(scan=scan))
    x = jnp.zeros((1, 2, 32))
    plain = Transformer(config, Execution())
    shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0), x, None, train=False, output_hidden_states=False))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes["params"])
    for index in range(layers):
        params[f"layer_{index}"]["mlp"]["down"]["bias"] += 1
    params = stack_layers(params) if scan else params

    @jax.jit
    def added(key: Any) -> Any:
        options = {"train": True, "output_hidden_states": True, "rngs": {"dropout": key}}
        _, states, _ = module.apply({"params": params}, x, None, **options)
        return jnp.diff(jnp.stack(states)[:, 0, 0, 0])

    drawn = np.stack([np.asarray(added(key)) for key in jax.random.split(jax.random.key(0), 400)])
    assert set(np.unique(drawn)) == {0.0, 1.0}
    limit = 5 * (0.3 * 0.7 / 400) ** 0.5
    assert (np.abs(drawn.mean(axis=0) - 0.7) < limit).all()
    together = np.corrcoef(drawn.T)[~np.eye(layers, dtype=bool)]  # each layer draws for itself
    assert np.abs(together).max() < 5 / 400**0.5


@pytest.mark.parametrize(
    ("rate", "task"),
    [
        ("hidden_dropout_prob", None),
        ("attention_probs_dropout_prob", None),
        ("activation_dropout", None),
        ("feat_proj_dropout", None),
        ("final_dropout", "ctc"),
        ("feat_quantizer_dropout", "contrastive"),
    ],
)
def test_each_dropout_is_on_in_training_alone(rate: str, task: str | None) -> None:
    none = {"feat_proj_dropout": 0.0, "final_dropout": 0.0, "feat_quantizer_dropout": 0.0}
    config, plain = (SMALL.model_copy(update=none | update) for update in ({rate: 0.5}, {}))
    params = params_of(config, task)
    frames = config.frames(301)
    noise = {"gumbel_noise": jnp.zeros((2, frames, 2, 7))} if task == "contrastive" else {}

    def first(config: AudioConfig, **options: Any) -> np.ndarray:
        outs = run(config, task, params, **noise, **options)
        return np.asarray(outs["projected_quantized_states" if task == "contrastive" else next(iter(outs))])

    expected = first(plain)
    np.testing.assert_array_equal(first(config), expected)
    # In training the quantiser's choice is 1 up to rounding.
    np.testing.assert_allclose(first(plain, train=True), expected, atol=1e-5)
    one, same, other = (first(config, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - expected).max() > 0.01 and np.abs(one - other).max() > 0.01


@pytest.mark.parametrize("task", [None, "ctc", "contrastive"])
def test_types_of_parameters_and_of_activations(task: str | None) -> None:
    module = AudioModel(SMALL, task, Execution(dtype=jnp.bfloat16, param_dtype=jnp.float16))
    outs, variables = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), audio()))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float16)}
    kinds = {name: out.dtype for name, out in outs.items() if hasattr(out, "dtype") and name != "codes"}
    assert set(kinds.values()) == {jnp.dtype(jnp.bfloat16 if task is None else jnp.float32)}


# Bad input


def broken(kind: str) -> dict[str, np.ndarray]:
    values, mask = np.zeros((2, 60), np.float32), np.ones((2, 60), np.int64)
    match kind:
        case "nan":
            values[1, 3] = np.nan
        case "infinite":
            values[0, 3] = np.inf
        case "hole":
            mask[1, 40:50] = 0
        case "left":
            mask[0, :10] = 0
        case "short row":
            mask[1, 29:] = 0
        case "silent row":
            mask[1] = 0
        case "two":
            mask[0, 0] = 2
    return {"input_values": values, "attention_mask": mask}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "give the model `input_values`, a float array of shape"),
        ({"input_values": np.zeros(60, np.float32)}, r"`input_values` has shape \[60\], expected \[batch, samples\]"),
        ({"input_values": np.zeros((1, 60), np.int16)}, "`input_values` holds int16, expected floats; divide 16-bit"),
        ({"input_values": np.zeros((1, 0), np.float32)}, r"`input_values` has shape \[1, 0\]: give at least one row"),
        ({"input_values": np.zeros((1, 29), np.float32)}, "is 29 samples long, the model needs 30 for one frame"),
        (broken("nan"), "`input_values` row 1 holds NaN or infinite samples; leave it out"),
        (broken("infinite"), "`input_values` row 0 holds NaN or infinite samples"),
        (broken("hole"), "`attention_mask` row 1 has 1 behind 0; pad on the right"),
        (broken("left"), "`attention_mask` row 0 has 1 behind 0; pad on the right"),
        (broken("short row"), "`attention_mask` row 1 has 29 samples, the model needs 30 for one frame"),
        (broken("silent row"), "`attention_mask` row 1 has 0 samples"),
        (broken("two"), "`attention_mask` has to hold 0 and 1"),
        (
            broken("") | {"attention_mask": np.ones((2, 3), int)},
            r"`attention_mask` has shape \[2, 3\], expected \[2, 60\]",
        ),
        (
            broken("") | {"mask_time_indices": np.ones((2, 60), bool)},
            r"`mask_time_indices` has shape \[2, 60\], expected \[2, 2\]",
        ),
        (broken("") | {"mask_feature_indices": np.ones((2, 32))}, "`mask_feature_indices` has to hold 0 and 1"),
        (broken("") | {"lengths": np.array([60, 30])}, "give `attention_mask` or `lengths`, not both"),
        (broken("") | {"lengths": np.array([60, 61])}, "`lengths` has to hold integers from"),
        (broken("") | {"lengths": np.array([60.0, 60.0])}, "`lengths` has to hold integers from"),
        (broken("") | {"lengths": np.array([60])}, "`lengths` has shape \\[1\\], expected \\[2\\]"),
        (broken("") | {"input_ids": np.ones((2, 60), int)}, "has no input `input_ids`, only input_values, attention_"),
    ],
)
def test_bad_inputs_are_named(arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(JaxptmError, match=message):
        SMALL.checked_inputs(None, arrays)


def test_no_masks_without_a_mask_embedding() -> None:
    config = SMALL.model_copy(update={"mask_time_prob": 0.0})
    assert "mask_embedding" not in abstract_params(AudioModel(config))
    with pytest.raises(JaxptmError, match="`mask_time_indices`: the model has no embedding for masked frames"):
        config.checked_inputs(None, broken("") | {"mask_time_indices": np.ones((2, 2), bool)})


def test_good_inputs_come_as_the_module_takes_them() -> None:
    arrays = broken("") | {"mask_time_indices": np.ones((2, 2), int)}
    found = SMALL.checked_inputs(None, arrays | {"input_values": np.zeros((2, 60))})
    kinds = {"input_values": "float32", "attention_mask": "int32", "mask_time_indices": "bool"}
    assert {name: str(array.dtype) for name, array in found.items()} == kinds


@pytest.mark.parametrize("taps", [1, 8, 9])
def test_groups_convolve_alike_together_and_one_by_one(taps: int) -> None:
    rng = np.random.default_rng(taps)
    x, cotangent = (rng.normal(size=(2, 13, 12)).astype(np.float32) for _ in range(2))
    kernel = rng.normal(size=(taps, 4, 12)).astype(np.float32)
    given = [torch.tensor(array, requires_grad=True) for array in (x, kernel.T.copy())]
    padded = torch.nn.functional.pad(given[0].mT, (taps // 2, (taps - 1) // 2))
    expected = torch.nn.functional.conv1d(padded, given[1], groups=3).mT
    (expected * torch.tensor(cotangent)).sum().backward()
    for one_by_one in (False, True):
        out, pullback = jax.vjp(partial(grouped_convolution, groups=3, one_by_one=one_by_one), x, kernel)
        of_x, of_kernel = pullback(cotangent)
        np.testing.assert_allclose(out, expected.detach(), atol=1e-5)
        np.testing.assert_allclose(of_x, given[0].grad, atol=1e-5)
        np.testing.assert_allclose(of_kernel.T, given[1].grad, atol=1e-5)


@pytest.mark.parametrize(("taps", "stride"), [(10, 5), (3, 2), (2, 2), (1, 1), (2, 3), (5, 2), (7, 3)])
@pytest.mark.parametrize("length", [24, 25])
def test_strided_convolutions_have_the_gradients_of_torch(taps: int, stride: int, length: int) -> None:
    rng = np.random.default_rng(taps)
    x = rng.normal(size=(2, length, 3)).astype(np.float32)
    kernel = rng.normal(size=(taps, 3, 5)).astype(np.float32)
    given = [torch.tensor(array, requires_grad=True) for array in (x, kernel.T.copy())]
    expected = torch.nn.functional.conv1d(given[0].mT, given[1], stride=stride).mT
    cotangent = rng.normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(cotangent)).sum().backward()
    for products in (False, True):
        convolve = partial(strided_convolution, stride=stride, products=products)
        out, pullback = jax.vjp(convolve, jnp.asarray(x), jnp.asarray(kernel))
        of_x, of_kernel = pullback(jnp.asarray(cotangent))
        np.testing.assert_allclose(out, expected.detach(), atol=1e-5)
        np.testing.assert_allclose(of_x, given[0].grad, atol=1e-5)
        np.testing.assert_allclose(of_kernel.T, given[1].grad, atol=2e-5)


def test_gradients_of_biases_are_summed_in_float32() -> None:
    """16,384 frames with a slope of 1 make 16,384; added up in bfloat16 they stop long before."""
    execution, x = Execution(dtype=jnp.bfloat16), jnp.zeros((8, 2048, 32), jnp.bfloat16)
    for layer in (Convolution(1, 32, 1, True, execution), ConvPositions(SMALL, execution)):
        params = layer.init(jax.random.key(0), x)["params"]
        params["bias"] = jnp.full(32, 8.0)  # where the activation is x

        def total(params: Any, layer: Any = layer) -> Any:
            return jnp.sum(layer.apply({"params": params}, x).astype(jnp.float32))

        np.testing.assert_array_equal(jax.jit(jax.grad(total))(params)["bias"], np.full(32, 8 * 2048))
