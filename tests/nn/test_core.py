"""The transformer core against torch's, and the laws that its options obey."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxptm.models.bert import BertConfig
from jaxptm.models.params import initialise
from jaxptm.nn.activations import ACTIVATIONS
from jaxptm.nn.core import (
    Attention,
    Execution,
    Transformer,
    TransformerConfig,
    layer_norm,
    linear,
    stack_layers,
    unstack_layers,
    visible_keys,
)
from jaxptm.nn.primitives import Dense, spread
from jaxptm.nn.text import TextModel
from jaxptm.types import Params

BATCH, LENGTH, WIDTH, HEADS, INNER, LAYERS = 4, 13, 32, 4, 48, 2
CONFIG = TransformerConfig(
    hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=INNER, num_hidden_layers=LAYERS, layer_norm_eps=1e-5
)
NORMS = ("post", "pre")


def key(seed: int) -> Any:
    return jax.random.key(seed, impl="rbg")  # compiles in half the time of threefry


def hidden_input(seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32)


def forward(config: TransformerConfig, execution: Execution, params: Params, x: Any, mask: Any, **options: Any) -> Any:
    module = Transformer(config, execution)
    out = module.apply({"params": params}, x, mask, **{"train": False, "output_hidden_states": True, **options})
    return out[:2]


def random_params(config: TransformerConfig) -> Params:
    init = Transformer(config, Execution()).init
    shapes = jax.eval_shape(
        lambda: init(jax.random.key(0), hidden_input(), None, train=False, output_hidden_states=False)
    )
    return oracle.random_params(shapes["params"])


@pytest.fixture(scope="module", params=NORMS)
def torch_stack(request: pytest.FixtureRequest) -> tuple[TransformerConfig, torch.nn.Module, Params]:
    """A stack of torch's own layers with noise on every parameter, and the same parameters here."""
    torch.manual_seed(0)
    pre = request.param == "pre"
    layer = torch.nn.TransformerEncoderLayer(
        WIDTH, HEADS, INNER, dropout=0.0, activation="gelu", batch_first=True, norm_first=pre
    )
    final = torch.nn.LayerNorm(WIDTH) if pre else None
    stack = torch.nn.TransformerEncoder(layer, LAYERS, norm=final, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))

    def dense(weight: torch.Tensor, bias: torch.Tensor) -> Params:
        return {"kernel": jnp.asarray(weight.detach().numpy().T), "bias": jnp.asarray(bias.detach().numpy())}

    def norm(module: Any) -> Params:
        return {"scale": jnp.asarray(module.weight.detach().numpy()), "bias": jnp.asarray(module.bias.detach().numpy())}

    params: Params = {}
    for index, theirs in enumerate(stack.layers):
        fused = zip(theirs.self_attn.in_proj_weight.chunk(3), theirs.self_attn.in_proj_bias.chunk(3), strict=True)
        query, key, value = (dense(*part) for part in fused)
        output = dense(theirs.self_attn.out_proj.weight, theirs.self_attn.out_proj.bias)
        params[f"layer_{index}"] = {
            "attention": {"query": query, "key": key, "value": value, "output": output},
            "attention_norm": norm(theirs.norm1),
            "mlp": {
                "up": dense(theirs.linear1.weight, theirs.linear1.bias),
                "down": dense(theirs.linear2.weight, theirs.linear2.bias),
            },
            "mlp_norm": norm(theirs.norm2),
        }
    if final is not None:
        params["norm"] = norm(stack.norm)
    return CONFIG.model_copy(update={"norm": request.param}), stack, params


@pytest.mark.parametrize("masked", ["nothing", "padding", "causal", "causal and padding"])
def test_layers_agree_with_torch(torch_stack: tuple[TransformerConfig, torch.nn.Module, Params], masked: str) -> None:
    config, stack, params = torch_stack
    padding = np.ones((BATCH, LENGTH), np.int32)
    padding[1, 5:] = 0
    future = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
    x = hidden_input()
    with torch.no_grad():
        expected = stack(
            torch.tensor(np.asarray(x)),
            mask=torch.tensor(future) if "causal" in masked else None,
            src_key_padding_mask=torch.tensor(padding == 0) if "padding" in masked else None,
        )
    mask = visible_keys(jnp.asarray(padding)) if "padding" in masked else None
    if "causal" in masked:
        past = jnp.broadcast_to(~future, (BATCH, 1, LENGTH, LENGTH))
        mask = past if mask is None else mask & past
    out, states = forward(config, Execution(), params, x, mask)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert len(states) == LAYERS + 1
    np.testing.assert_array_equal(states[0], x)
    np.testing.assert_array_equal(states[-1], out)


def test_no_query_sees_the_future_through_a_causal_mask() -> None:
    params = random_params(CONFIG)
    past = jnp.asarray(np.broadcast_to(np.tri(LENGTH, dtype=bool), (BATCH, 1, LENGTH, LENGTH)))
    x = hidden_input()
    changed = x.at[:, 5:].set(7.0)
    before, after = (forward(CONFIG, Execution(), params, y, past)[0] for y in (x, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(axis=-1).all()


@pytest.mark.parametrize(
    ("norm", "execution"),
    [
        ("post", Execution(remat=True)),
        ("pre", Execution(scan=True)),
        ("post", Execution(scan=True, remat=True)),
    ],
    ids=["post-remat", "pre-scan", "post-scan-remat"],
)
def test_scan_and_remat_change_nothing(norm: str, execution: Execution) -> None:
    config = CONFIG.model_copy(update={"norm": norm})
    params, x = random_params(config), hidden_input()
    mask = visible_keys(jnp.ones((BATCH, LENGTH), jnp.int32).at[1, 5:].set(0))

    def loss(params: Params, execution: Execution) -> Any:
        out, states = forward(config, execution, stack_layers(params) if execution.scan else params, x, mask)
        return jnp.sum(jnp.sin(out)), (out, states)

    (_, expected), slope = jax.value_and_grad(loss, has_aux=True)(params, Execution())
    (_, found), same_slope = jax.value_and_grad(loss, has_aux=True)(params, execution)
    assert len(found[1]) == LAYERS + 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max())), same_slope, slope)
    # The options are on: what they promise is in the program.
    operations = oracle.equations(lambda params: loss(params, execution)[0], params)
    assert ("scan" in [operation.primitive.name for operation in operations]) == execution.scan
    assert oracle.computes_products_again(operations) == execution.remat


@pytest.mark.parametrize(
    ("norm", "execution", "shared"),
    [
        ("post", Execution(), False),
        ("pre", Execution(), False),
        ("post", Execution(remat=True), False),
        ("pre", Execution(remat="dots"), False),
        ("post", Execution(), True),
        ("pre", Execution(scan=True), False),
    ],
    ids=["post", "pre", "post-remat", "pre-dots", "post-shared", "pre-scan"],
)
@pytest.mark.parametrize("told_apart", [False, True], ids=["one mask", "a mask a query"])
def test_the_last_state_at_some_positions(norm: str, execution: Execution, shared: bool, told_apart: bool) -> None:
    """Is that of all positions there, with its gradient; positions repeat, and are in no order."""
    kind = type("Shared", (TransformerConfig,), {"shared_layer": True, "__annotations__": {}}) if shared else None
    config = (kind or TransformerConfig)(**CONFIG.model_dump() | {"norm": norm})
    params, x = random_params(config), hidden_input()
    positions = jnp.asarray([[0, 5, 12], [3, 3, 1], [12, 0, 2], [4, 5, 6]])
    mask = visible_keys(jnp.ones((BATCH, LENGTH), jnp.int32).at[1, 5:].set(0))
    if told_apart:
        mask &= jnp.asarray(np.random.default_rng(1).random((BATCH, 1, LENGTH, LENGTH)) < 0.7)

    def loss(params: Params, x: Any, within: bool) -> Any:
        stacked = stack_layers(params) if execution.scan else params
        options = {"positions": positions} if within else {}
        out, _ = forward(config, execution, stacked, x, mask, output_hidden_states=False, **options)
        out = out if within else jnp.take_along_axis(out, positions[..., None], axis=1)
        return jnp.sum(jnp.sin(out)), out

    (_, found), slope = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x, True)
    (_, expected), whole_slope = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x, False)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max())), slope, whole_slope)


def test_the_last_state_at_some_positions_where_layers_are_dropped() -> None:
    config = CONFIG.model_copy(update={"layerdrop": 1.0})
    positions = jnp.asarray([[0, 5, 12], [3, 3, 1], [12, 0, 2], [4, 5, 6]])
    options: Any = {"train": True, "output_hidden_states": False, "positions": positions, "rngs": {"dropout": key(0)}}
    out, _ = forward(config, Execution(), random_params(config), hidden_input(), None, **options)
    np.testing.assert_array_equal(out, np.take_along_axis(hidden_input(), positions[..., None], axis=1))


@pytest.mark.parametrize(("wanted", "count"), [(True, LAYERS + 1), (False, 0)])
@pytest.mark.parametrize("scan", [False, True])
def test_hidden_states_are_there_on_request(scan: bool, wanted: bool, count: int) -> None:
    def run(params: Params) -> Any:
        stacked = stack_layers(params) if scan else params
        return forward(CONFIG, Execution(scan=scan), stacked, hidden_input(), None, output_hidden_states=wanted)

    out, states = jax.eval_shape(run, random_params(CONFIG))
    assert [state.shape for state in (out, *states)] == [(BATCH, LENGTH, WIDTH)] * (1 + count)


@settings(max_examples=12, deadline=None)  # each number of layers is compiled
@given(layers=st.integers(1, 12), rest=st.booleans())
def test_stacked_layers_are_unstacked(layers: int, rest: bool) -> None:
    shapes = [(), (3, 2)]
    params: Params = {
        f"layer_{index}": {
            "part": {f"leaf_{i}": np.full(shape, 100 * index + i, np.float32) for i, shape in enumerate(shapes)}
        }
        for index in range(layers)
    }
    if rest:
        params["norm"] = {"scale": np.ones(2, np.float32)}
    stacked = stack_layers(params)
    assert set(stacked) == {"layers"} | ({"norm"} if rest else set())
    for i, shape in enumerate(shapes):
        leaf = stacked["layers"]["part"][f"leaf_{i}"]
        assert leaf.shape == (layers, *shape)
        np.testing.assert_array_equal(np.asarray(leaf).reshape(layers, -1)[:, 0], 100 * np.arange(layers) + i)
    again = unstack_layers(stacked)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_visible_keys_by_hand() -> None:
    mask, segments = jnp.asarray([[1, 1, 1, 0]]), jnp.asarray([[1, 1, 2, 2]])
    assert visible_keys(None) is None
    np.testing.assert_array_equal(visible_keys(mask), np.array([[[[True, True, True, False]]]]))
    same = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    np.testing.assert_array_equal(visible_keys(None, segments), np.array([[same]], bool))
    both = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
    np.testing.assert_array_equal(visible_keys(mask, segments), np.array([[both]], bool))
    past = jnp.tri(4, dtype=bool)
    np.testing.assert_array_equal(visible_keys(None, None, past), np.tri(4, dtype=bool)[None, None])
    all_three = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
    np.testing.assert_array_equal(visible_keys(mask, segments, past), np.array([[all_three]], bool))


def test_dropout_differs_by_key_and_is_off_in_evaluation() -> None:
    params, x = random_params(CONFIG), hidden_input()
    for rates in ({"hidden_dropout_prob": 0.3}, {"attention_probs_dropout_prob": 0.3}):
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config, plain = (CONFIG.model_copy(update=none | update) for update in (rates, {}))

        def train(seed: int, config: TransformerConfig = config) -> Any:
            return forward(config, Execution(), params, x, None, train=True, rngs={"dropout": key(seed)})[0]

        one, same, other = train(0), train(0), train(1)
        np.testing.assert_array_equal(one, same)
        assert np.abs(one - other).mean() > 0.02
        expected = forward(plain, Execution(), params, x, None)[0]
        np.testing.assert_array_equal(forward(config, Execution(), params, x, None)[0], expected)
        np.testing.assert_array_equal(train(0, plain), expected)


def test_scanned_layers_drop_different_elements() -> None:
    # Each layer adds 1 where its dropout lets 0.5 through. If all layers drew alike, only 0 and 2 would come out.
    config = CONFIG.model_copy(update={"norm": "pre", "hidden_dropout_prob": 0.5})
    params = stack_layers(jax.tree.map(jnp.zeros_like, random_params(config)))
    params["layers"]["mlp"]["down"]["bias"] += 0.5
    params["norm"]["scale"] += 1.0
    x = jnp.zeros((BATCH, LENGTH, WIDTH))
    options = {"train": True, "rngs": {"dropout": key(0)}}
    _, states = jax.jit(lambda params: forward(config, Execution(scan=True), params, x, None, **options))(params)
    assert set(np.unique(states[1])) == {0.0, 1.0}
    # The last state is normalised, so that each token has its own three values.
    assert {len(np.unique(np.round(np.asarray(token), 3))) for token in states[2].reshape(-1, WIDTH)} == {3}


def test_dropout_preserves_the_mean() -> None:
    config = CONFIG.model_copy(update={"attention_probs_dropout_prob": 0.4})
    params, x = random_params(config)["layer_0"]["attention"], hidden_input()[:1]
    keys = jax.random.split(key(0), 4000)

    def attend(key: Any) -> Any:
        return Attention(config, Execution(), True).apply({"params": params}, x, None, rngs={"dropout": key})[0]

    samples = np.asarray(jax.jit(jax.vmap(attend))(keys))
    expected, _ = Attention(config, Execution(), False).apply({"params": params}, x, None)
    deviation = samples.std(axis=0) / len(samples) ** 0.5
    assert (deviation > 0).all()
    assert (np.abs(samples.mean(axis=0) - expected) < 5 * deviation).all()


def test_initial_parameters() -> None:
    config = BertConfig(**{**oracle.SIZES, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 300})
    params = initialise(TextModel(config, "pretraining", Execution(scan=True)), key(0))
    flat = {
        "/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)
    }
    assert {path.rpartition("/")[2] for path in flat} == {"kernel", "bias", "scale", "embedding"}
    # A normal distribution that is cut at two deviations has 0.87963 of its deviation left.
    left = 0.02 * 0.87962566
    for path, leaf in flat.items():
        match path.rpartition("/")[2]:
            case "bias":
                assert not leaf.any(), path
            case "scale":
                assert (leaf == 1).all(), path
            case _:
                assert np.abs(leaf).max() <= 0.04, path
                assert abs(leaf.mean()) < 5 * left / leaf.size**0.5, path
                assert abs(leaf.std() / left - 1) < 5 / (2 * leaf.size) ** 0.5, path
    for path, leaf in flat.items():  # each scanned layer has its own
        if "/layers/" in path and path.endswith("kernel"):
            assert (leaf[0] != leaf[1]).all()


def test_types_of_parameters_and_of_activations() -> None:
    execution = Execution(dtype=jnp.bfloat16, param_dtype=jnp.float16)
    module = Transformer(CONFIG, execution)
    x = hidden_input().astype(jnp.bfloat16)
    (out, states, _), variables = jax.eval_shape(
        lambda: module.init_with_output(jax.random.key(0), x, None, train=False, output_hidden_states=True)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float16)}
    assert {state.dtype for state in (out, *states)} == {jnp.dtype(jnp.bfloat16)}


def test_norms_keep_their_digits_where_the_mean_is_large() -> None:
    x = hidden_input() + 256.0
    module = layer_norm(CONFIG, Execution(), None)
    found = module.apply({"params": {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}}, x)
    expected = torch.nn.functional.layer_norm(
        torch.tensor(np.asarray(x, np.float64)), (WIDTH,), eps=CONFIG.layer_norm_eps
    )
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_size": 30, "num_attention_heads": 4},
            "`hidden_size` 30 is not a multiple of `num_attention_heads` 4",
        ),
        ({"hidden_act": "gelo"}, "`hidden_act` 'gelo' is not one of gelu, gelu_new"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob"),
        ({"norm": "middle"}, "norm"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"heads": 3}, "heads"),
    ],
)
def test_configs_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**fields)


def test_gradients_of_biases_are_summed_in_float32() -> None:
    """16,384 ones make 16,384; added up in bfloat16 they stop where one more is below half of a last digit."""
    x = jnp.zeros((64, 256, 8), jnp.bfloat16)
    layer = linear(Execution(dtype=jnp.bfloat16), 4, "layer")
    params = layer.init(key(0), x)["params"]

    def total(params: Params) -> Any:
        return jnp.sum(layer.apply({"params": params}, x).astype(jnp.float32))

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(params)["bias"], np.full(4, 64 * 256))
    drawn = jax.random.normal(key(1), x.shape, jnp.bfloat16) + 1
    vector = jnp.zeros(8)
    gradient = jax.jit(jax.grad(lambda vector: jnp.sum(spread(vector, drawn) * drawn)))(vector)
    np.testing.assert_allclose(gradient, np.asarray(drawn, np.float64).sum(axis=(0, 1)), rtol=1e-5)


def test_a_dense_layer_is_that_of_flax() -> None:
    import flax.linen as nn

    x = jax.random.normal(key(0), (3, 5, 8))
    for use_bias in (True, False):
        init = nn.initializers.truncated_normal(0.02)
        ours, theirs = Dense(4, init, use_bias, name="layer"), nn.Dense(4, use_bias, kernel_init=init, name="layer")
        params = ours.init(key(1), x)
        oracle.assert_equal(params["params"], theirs.init(key(1), x)["params"])
        np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), atol=1e-6)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_in_half_precision_are_rounded_once(name: str) -> None:
    x = jnp.linspace(-12, 12, 4001, dtype=jnp.bfloat16)
    wide = x.astype(jnp.float32)
    activation = ACTIVATIONS[name]
    slope = jax.vmap(jax.grad(lambda x: activation(x).astype(jnp.float32)))
    for ours, expected in ((activation(x), activation(wide)), (slope(x), slope(wide))):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, expected.astype(jnp.bfloat16))
