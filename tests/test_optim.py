"""Optimizers and schedules against torch, transformers and float64 transcriptions of the published rules."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from jaxptm.config import OptimizerConfig
from jaxptm.models.params import stacked
from jaxptm.optim import apply_updates, decayed_leaves, layer_factors, optimizer, schedule
from jaxptm.types import JaxptmError

STEPS = 20


def tree(seed: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    return {
        "embeddings": {"token": {"embedding": draw(11, 4)}},
        "encoder": {
            "layer_0": {
                "attention": {"query": {"kernel": draw(4, 4), "bias": draw(4)}},
                "attention_norm": {"scale": 1 + draw(4), "bias": draw(4)},
            },
            "layers": {"mlp": {"kernel": draw(2, 4, 4), "bias": draw(2, 4)}},  # stacked for a scan: a bias of rank 2
        },
    }


DECAYED = ["embeddings/token/embedding", "encoder/layer_0/attention/query/kernel", "encoder/layers/mlp/kernel"]
# Norms from far below the clip of 1 to far above it.
GRADS = [tree(100 + step, scale=10.0 ** (step % 4 - 3)) for step in range(STEPS)]


def flat(params) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(part.key for part in path): np.asarray(leaf) for path, leaf in leaves}


def config(name: str = "adamw", **fields) -> OptimizerConfig:
    return OptimizerConfig(**{"name": name, "learning_rate": 0.01, "warmup": 5, "weight_decay": 0.1} | fields)


def run(config: OptimizerConfig, params, grads=GRADS, state=None):
    transform = optimizer(config, STEPS, params)
    state = transform.init(params) if state is None else state

    @jax.jit
    def step(params, state, grad):
        updates, state = transform.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    for grad in grads:
        params, state = step(params, state, grad)
    return params, state


def clipped(grads: dict[str, np.ndarray], limit: float) -> dict[str, np.ndarray]:
    grads = {path: grad.astype(np.float64) for path, grad in grads.items()}
    norm = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
    return {path: grad * min(1, limit / norm) for path, grad in grads.items()}


def reference(config: OptimizerConfig, rates, update) -> dict[str, np.ndarray]:
    """Runs `update(m, v, t, p, decay)`, the published step direction, in float64."""
    params = {path: leaf.astype(np.float64) for path, leaf in flat(tree(0)).items()}
    m = {path: np.zeros_like(leaf) for path, leaf in params.items()}
    v = {path: np.zeros_like(leaf) for path, leaf in params.items()}
    for t, (rate, tree_) in enumerate(zip(rates, GRADS, strict=True)):
        for path, grad in clipped(flat(tree_), config.clip).items():
            m[path] = config.beta1 * m[path] + (1 - config.beta1) * grad
            v[path] = config.beta2 * v[path] + (1 - config.beta2) * grad**2
            decay = config.weight_decay if path in DECAYED else 0.0
            params[path] -= rate * update(m[path], v[path], t + 1, params[path], decay)
    return params


def assert_close(params, expected):
    """To 3e-5 of how far the parameters went, and the float32 rounding of twenty sums."""
    for path, leaf in flat(params).items():
        moved = np.abs(expected[path] - flat(tree(0))[path]).max()
        assert moved > 1e-3
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=3e-5 * moved + 1e-6, err_msg=path)


def linear_rates(peak: float = 0.01, warmup: int = 5) -> list[float]:
    return [peak * min(t / warmup, (STEPS - t) / (STEPS - warmup)) for t in range(STEPS)]


@pytest.mark.parametrize("clip", [1.0, None])
def test_adamw_follows_torch(clip):
    import transformers

    leaves = {path: torch.tensor(leaf, dtype=torch.float64) for path, leaf in flat(tree(0)).items()}
    weights = {path: leaf.requires_grad_() for path, leaf in leaves.items()}
    groups = [
        {"params": [weights[path] for path in DECAYED], "weight_decay": 0.1},
        {"params": [leaf for path, leaf in weights.items() if path not in DECAYED], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-6)
    rates = transformers.get_linear_schedule_with_warmup(theirs, 5, STEPS)
    for grads in GRADS:
        for path, grad in flat(grads).items():
            weights[path].grad = torch.tensor(grad, dtype=torch.float64)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(weights.values(), clip)
        theirs.step()
        rates.step()
    ours, _ = run(config(beta2=0.98, clip=clip), tree(0))
    assert_close(ours, {path: leaf.detach().numpy() for path, leaf in weights.items()})


def test_bert_adam_follows_the_published_rule():
    settings = config("bert_adam", schedule="bert_linear")

    def update(m, v, t, p, decay):
        return m / (np.sqrt(v) + 1e-6) + decay * p

    rates = [0.01 * (t / 5 if t < 5 else 1 - t / STEPS) for t in range(STEPS)]
    ours, _ = run(settings, tree(0))
    assert_close(ours, reference(settings, rates, update))
    corrected, _ = run(config("adamw", schedule="bert_linear"), tree(0))
    assert max(np.abs(flat(ours)[path] - leaf).max() for path, leaf in flat(corrected).items()) > 1e-3


def test_lamb_follows_the_published_rule():
    settings = config("lamb")

    def update(m, v, t, p, decay):
        direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6) + decay * p
        axes = tuple(range(1 if p.ndim == 3 else 0, p.ndim))  # stacked layers have a ratio each
        norm, of_direction = (np.sqrt(np.square(x).sum(axes, keepdims=True)) for x in (p, direction))
        return direction * (norm / of_direction if decay else 1.0)

    ours, _ = run(settings, tree(0))
    assert_close(ours, reference(settings, linear_rates(), update))


def test_lamb_moves_a_leaf_of_zeros():
    params = jax.tree.map(np.zeros_like, tree(0))
    ours, _ = run(config("lamb", warmup=0), params, GRADS[:1])
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in flat(ours).values())


@pytest.mark.parametrize("name", ["adamw", "bert_adam", "lamb"])
def test_a_resumed_run_is_the_same_run(name):
    whole, whole_state = run(config(name), tree(0))
    params, state = run(config(name), tree(0), GRADS[:7])
    params, state = run(config(name), params, GRADS[7:], state)
    jax.tree.map(np.testing.assert_array_equal, (whole, whole_state), (params, state))


def test_decayed_leaves_are_kernels_and_tables():
    assert decayed_leaves(tree(0)) == DECAYED
    assert decayed_leaves(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree(0)))) == DECAYED
    # With the gradients at zero only the decay moves anything.
    zeros = [jax.tree.map(np.zeros_like, GRADS[0])] * 6
    ours, _ = run(config(), tree(0), zeros)
    before, after = flat(tree(0)), flat(ours)
    assert [path for path in before if (before[path] != after[path]).any()] == DECAYED
    for path in DECAYED:
        np.testing.assert_allclose(after[path], before[path] * np.prod([1 - 0.1 * r for r in linear_rates()[:6]]), 1e-5)


def test_an_unknown_leaf_is_an_error():
    params = tree(0) | {"head": {"gain": np.ones(3), "kernel": np.ones((2, 2)), "offset": np.ones(3)}}
    for call in (lambda: decayed_leaves(params), lambda: optimizer(config(), STEPS, params)):
        with pytest.raises(JaxptmError, match="head/gain, head/offset;"):
            call()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", {0: 0, 1: 0.25, 4: 1, 8: 0.75, 12: 0.5, 19: 0.0625, 20: 0, 25: 0}),
        ("bert_linear", {0: 0, 1: 0.25, 3: 0.75, 4: 0.8, 12: 0.4, 19: 0.05, 20: 0, 25: 0}),
        ("cosine", {0: 0, 1: 0.25, 4: 1, 8: 0.5 + 0.5**1.5, 12: 0.5, 20: 0, 25: 0}),
        ("constant", {0: 0, 1: 0.25, 4: 1, 12: 1, 20: 1}),
        ("inverse_sqrt", {0: 0, 1: 0.25, 4: 1, 16: 0.5, 100: 0.2}),
        ("tri_stage", {0: 0.01, 2: 0.505, 4: 1, 8: 1, 12: 1, 16: 0.05**0.5, 20: 0.05, 25: 0.05}),
    ],
)
def test_schedules_by_hand(name, expected):
    for warmup in (4, 0.2):
        rate = jax.jit(schedule(config(schedule=name, warmup=warmup, learning_rate=0.5), 20))
        for step, share in expected.items():
            assert rate(jnp.int32(step)) == pytest.approx(0.5 * share, rel=1e-6, abs=1e-8), step
            assert float(rate(step)) == rate(jnp.int32(step))


@pytest.mark.parametrize("name", ["linear", "bert_linear", "cosine", "constant", "tri_stage"])
def test_without_warmup_the_peak_is_at_the_start(name):
    assert schedule(config(schedule=name, warmup=0), 20)(0) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("name", "warmup"),
    [
        ("linear", 0),
        ("linear", 1),
        ("linear", 99),
        ("cosine", 0),
        ("cosine", 30),
        ("inverse_sqrt", 1),
        ("inverse_sqrt", 30),
    ],
)
def test_schedules_agree_with_transformers(name, warmup):
    import transformers

    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    rates = {
        "linear": lambda: transformers.get_linear_schedule_with_warmup(theirs, warmup, 100),
        "cosine": lambda: transformers.get_cosine_schedule_with_warmup(theirs, warmup, 100),
        "inverse_sqrt": lambda: transformers.get_inverse_sqrt_schedule(theirs, warmup),
    }[name]()
    expected = []
    for _ in range(101):
        expected.append(theirs.param_groups[0]["lr"])
        theirs.step()
        rates.step()
    ours = jax.vmap(schedule(config(schedule=name, warmup=warmup), 100))(jnp.arange(101))
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "bert_linear", "cosine", "tri_stage"])
def test_a_warmup_as_long_as_the_run_is_an_error(name):
    with pytest.raises(JaxptmError, match=r"optimizer\.warmup is 20 steps, but train\.steps is 20"):
        schedule(config(schedule=name, warmup=20), 20)
    schedule(config(schedule=name, warmup=19 if name != "tri_stage" else 11), 20)


def test_a_long_warmup_is_fine_where_nothing_has_to_fall():
    assert schedule(config(schedule="constant", warmup=40), 20)(20) == pytest.approx(0.005)
    with pytest.raises(JaxptmError, match=r"optimizer\.warmup is 0 steps"):
        schedule(config(schedule="inverse_sqrt", warmup=0), 20)


@pytest.mark.parametrize("name", ["adamw", "bert_adam", "lamb"])
def test_no_buffer_stands_twice_in_the_state(name: str) -> None:
    params = {"layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    config = OptimizerConfig(name=name, learning_rate=1e-3, schedule="constant")
    leaves = [leaf for leaf in jax.tree.leaves(optimizer(config, 10, params).init(params)) if leaf.ndim]
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves) == 4


@pytest.mark.parametrize("name", ["adamw", "bert_adam", "lamb"])
def test_stacked_layers_are_updated_as_single_ones(name: str) -> None:
    params, grads = tree(0), tree(1)

    def single(tree: dict) -> dict:
        layers = tree["encoder"]["layers"]["mlp"]
        apart = {f"layer_{i}": {"mlp": {key: leaf[i] for key, leaf in layers.items()}} for i in range(2)}
        return {"encoder": apart}

    def step(params: dict, grads: dict) -> dict:
        transform = optimizer(config(name, clip=None, weight_decay=0.1), STEPS, params)
        return transform.update(grads, transform.init(params), params)[0]

    stacked = single(
        step({"encoder": {"layers": params["encoder"]["layers"]}}, {"encoder": {"layers": grads["encoder"]["layers"]}})
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stacked, step(single(params), single(grads)))


def test_bfloat16_parameters_keep_small_updates_on_average() -> None:
    values = jnp.repeat(jnp.array([1.0, -1.0, 0.02, 300.0], jnp.bfloat16)[:, None], 100_000, axis=1)
    step = 1e-3 * values.astype(jnp.float32)  # a quarter of what rounding to the nearest would lose
    moved = apply_updates({"kernel": values}, {"kernel": step}, jax.random.key(0))["kernel"]
    assert moved.dtype == jnp.bfloat16
    assert bool((values + step.astype(jnp.bfloat16) == values).all())
    for start, row in zip(values[:, 0], np.asarray(moved, np.float64), strict=True):
        gap = float(np.spacing(np.float32(abs(start)))) * 2**16  # between neighbours in bfloat16
        assert set(np.unique(row)) == {float(start), float(start) + np.sign(float(start)) * gap}
        # five standard deviations of the mean
        assert row.mean() == pytest.approx(float(start) * 1.001, abs=5 * gap / 2 / np.sqrt(len(row)))


def test_rounding_at_random_leaves_what_is_exact_and_what_is_not_finite() -> None:
    values = jnp.array([0.0, -0.0, 1.5, -(2.0**-120), jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16)
    same = apply_updates({"bias": values}, {"bias": jnp.zeros(7)}, jax.random.key(1))["bias"]
    np.testing.assert_array_equal(np.asarray(same, np.float32), np.asarray(values, np.float32))


def test_float32_parameters_are_not_rounded() -> None:
    params, updates = (jax.tree.map(jnp.asarray, tree(seed)) for seed in (0, 1))
    moved = apply_updates(params, updates, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, moved, optax.apply_updates(params, updates))


def test_moments_of_bfloat16_parameters_are_float32() -> None:
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), tree(0))
    transform = optimizer(config(), STEPS, params)
    state = transform.init(params)
    updates, state = transform.update(params, state, params)
    floats = [leaf for leaf in jax.tree.leaves((updates, state)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats and {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}


def test_electra_multiplies_warmup_and_decay() -> None:
    """google-research/electra, optimization.py: polynomial_decay(lr, step, steps) * min(1, step / warmup)."""
    config = OptimizerConfig(learning_rate=5e-4, schedule="electra_linear", warmup=100)
    rates = np.array([float(schedule(config, 1000)(step)) for step in range(0, 1001, 10)])
    steps = np.arange(0, 1001, 10)
    np.testing.assert_allclose(rates, 5e-4 * (1 - steps / 1000) * np.minimum(1, steps / 100), rtol=1e-5, atol=1e-12)
    assert rates.max() < 5e-4 * 0.91  # it never reaches the peak


ENCODER = {
    "embeddings": {"token": {"embedding": jnp.ones((5, 2))}, "norm": {"scale": jnp.ones(2)}},
    "embeddings_project": {"kernel": jnp.ones((2, 2))},
    "encoder": {f"layer_{i}": {"mlp": {"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}} for i in range(12)},
    "pooler": {"dense": {"kernel": jnp.ones((2, 2))}},
    "classifier": {"dense": {"kernel": jnp.ones((2, 2))}},
}


@pytest.mark.parametrize(("form", "extra"), [("paper", 0), ("code", 1)])
def test_layers_near_the_input_learn_slower(form: str, extra: int) -> None:
    """google-research/electra#51: the code gives the top layer decay^2 where the paper says decay."""
    factors = layer_factors(ENCODER, 0.8, form)
    assert factors["classifier"]["dense"]["kernel"] == factors["pooler"]["dense"]["kernel"] == 1.0
    for index in range(12):
        for leaf in jax.tree.leaves(factors["encoder"][f"layer_{index}"]):
            assert leaf == pytest.approx(0.8 ** (12 - index + extra))
    assert factors["embeddings"]["token"]["embedding"] == pytest.approx(0.8 ** (13 + extra))
    assert factors["embeddings_project"]["kernel"] == pytest.approx(0.8 ** (13 + extra))
    scanned = layer_factors(stacked(ENCODER), 0.8, form)["encoder"]["layers"]["mlp"]["up"]["kernel"]
    assert scanned.shape == (12, 1, 1)
    np.testing.assert_allclose(scanned[:, 0, 0], [0.8 ** (12 - index + extra) for index in range(12)], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "bert_adam", "lamb"])
@pytest.mark.parametrize("scan", [False, True])
def test_layer_decay_scales_the_whole_update(name: str, scan: bool) -> None:
    params = stacked(ENCODER) if scan else ENCODER
    grads = jax.tree.map(lambda leaf: 0.1 * jnp.ones_like(leaf), params)
    found = []
    for decay in (1.0, 0.5):
        config = OptimizerConfig(name=name, learning_rate=1e-2, schedule="constant", layer_decay=decay, clip=None)
        transform = optimizer(config, 10, params)
        found.append(transform.update(grads, transform.init(params), params)[0])
    factors = layer_factors(params, 0.5, "paper")
    jax.tree.map(lambda a, b, f: np.testing.assert_allclose(b, a * f, rtol=1e-5), *found, factors)


def test_models_of_one_layer_or_two_encoders_have_no_layer_decay() -> None:
    for params in ({"encoder": {"shared_layer": {}}}, {"generator": ENCODER, "discriminator": ENCODER}):
        with pytest.raises(JaxptmError, match=r"optimizer\.layer_decay: needs one model whose layers have parameters"):
            layer_factors(params, 0.8, "paper")


def with_head(body: dict, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    head = {"kernel": rng.normal(size=(4, 3)).astype(np.float32), "bias": rng.normal(size=3).astype(np.float32)}
    return body | {"classifier": {"dense": head}}


def test_the_heads_learn_first_as_if_they_were_alone() -> None:
    params, grads = with_head(tree(0), 1), [with_head(grad, 50 + i) for i, grad in enumerate(GRADS)]
    learnt, _ = run(config(head_first=7), params, grads[:7])
    for path, leaf in flat({name: learnt[name] for name in ("embeddings", "encoder")}).items():
        np.testing.assert_array_equal(leaf, flat(params)[path], err_msg=path)  # neither gradients nor decay
    head = {"classifier": params["classifier"]}
    alone, _ = run(config(), head, [{"classifier": grad["classifier"]} for grad in grads[:7]])
    for path, leaf in flat(alone).items():
        np.testing.assert_array_equal(leaf, flat(learnt)[path], err_msg=path)  # clipped by their own norm


@pytest.mark.parametrize("share", [7, 0.35])
def test_what_is_below_the_heads_begins_without_moments(share: float) -> None:
    params, grads = with_head(tree(0), 1), [with_head(grad, 50 + i) for i, grad in enumerate(GRADS)]
    silent = [jax.tree.map(np.zeros_like, grad) | {"classifier": grad["classifier"]} for grad in grads[:7]]
    learnt, _ = run(config(head_first=share, weight_decay=0.0), params, grads)
    expected, _ = run(config(weight_decay=0.0), params, silent + grads[7:])
    for path, leaf in flat(expected).items():
        # Two programs, whose roundings XLA orders as it likes.
        np.testing.assert_allclose(leaf, flat(learnt)[path], rtol=1e-6, atol=1e-8, err_msg=path)
        assert np.any(leaf != flat(params)[path]), path


def test_heads_that_learn_alone_to_the_end_are_refused() -> None:
    with pytest.raises(JaxptmError, match=r"optimizer\.head_first is 20 updates, and the run has 20"):
        optimizer(config(head_first=STEPS), STEPS, with_head(tree(0), 1))


@pytest.mark.parametrize(("steps", "share"), [(10, 0.05), (1000, 0.1), (333, 0.06)])
def test_a_share_of_warmup_is_rounded_as_transformers_rounds_it(steps: int, share: float) -> None:
    expected = transformers.TrainingArguments.get_warmup_steps(SimpleNamespace(warmup_steps=share), steps)
    rates = jax.vmap(schedule(config(schedule="constant", warmup=share), steps))(jnp.arange(steps))
    assert int(np.argmax(rates)) == expected


def test_the_embedding_of_masks_learns_as_slowly_as_the_embeddings() -> None:
    params = {name: {"embedding": jnp.zeros(1)} for name in ("embeddings", "mask_embedding")}
    params |= {"encoder": {"layer_0": {"bias": jnp.zeros(1)}}}
    factors = layer_factors(params, 0.5, "paper")
    assert factors["mask_embedding"] == factors["embeddings"] == {"embedding": 0.25}


def test_parameters_keep_their_type() -> None:
    params = {"bias": jnp.ones(3, jnp.float16)}
    assert apply_updates(params, {"bias": jnp.ones(3)}, jax.random.key(0))["bias"].dtype == jnp.float16
