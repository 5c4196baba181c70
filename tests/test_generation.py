"""Generation against transformers: the same tokens, the same distributions, rows that do not see each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxpr_as_fun
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import jaxptm.generation as generation
from jaxptm.generation import Sampling, filter_logits
from jaxptm.models.gpt2 import Gpt2Config
from jaxptm.models.params import abstract_params
from jaxptm.nn.text import TextModel, empty_caches
from jaxptm.pretrained import Model, from_pretrained
from jaxptm.types import JaxptmError

VOCAB, END, CONTEXT = 97, 7, 128
LENGTHS = [3, 40, 17, 1, 25, 33, 8, 12]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    directory = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=END, eos_token_id=END
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(directory)
    return theirs, from_pretrained(directory, "causal-lm")


def prompts() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(8, VOCAB, (len(LENGTHS), max(LENGTHS)))
    mask = (np.arange(max(LENGTHS)) >= max(LENGTHS) - np.array(LENGTHS)[:, None]).astype(np.int64)
    return ids * mask, mask


def expected(theirs: Any, ids: np.ndarray, mask: np.ndarray, end: int) -> np.ndarray:
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    return theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **options).numpy()


@pytest.mark.parametrize("end", [1, END, 23, 80])
def test_greedy_text_is_that_of_transformers(pair: tuple[Any, Model], end: int) -> None:
    theirs, ours = pair
    ids, mask = prompts()
    wanted = expected(theirs, ids, mask, end)
    found = ours.generate(ids, mask, max_new_tokens=64, eos_token_id=end, pad_token_id=0)
    np.testing.assert_array_equal(found, wanted)
    if end == 1:
        assert found.shape == (8, 40 + 64)  # no row ends before
        for row, length in enumerate(LENGTHS):  # and one by one, without padding
            alone = ours.generate(ids[row : row + 1, -length:], max_new_tokens=64, eos_token_id=end, pad_token_id=0)
            np.testing.assert_array_equal(alone[0], wanted[row, -length - 64 :])


def test_some_rows_end_and_others_go_on(pair: tuple[Any, Model]) -> None:
    theirs, ours = pair
    ids, mask = prompts()
    free = ours.generate(ids, mask, max_new_tokens=64, eos_token_id=1, pad_token_id=0)
    end = int(free[0, 40 + 5])
    ended = [np.flatnonzero(row == end) for row in free[:, 40:]]
    assert any(len(at) for at in ended)
    found = ours.generate(ids, mask, max_new_tokens=64, eos_token_id=[end, 1], pad_token_id=3)
    for row, at in enumerate(ended):
        stop = int(at[0]) + 1 if len(at) else found.shape[1] - 40
        np.testing.assert_array_equal(found[row, 40 : 40 + stop], free[row, 40 : 40 + stop])
        assert (found[row, 40 + stop :] == 3).all()
    np.testing.assert_array_equal(
        ours.generate(ids, mask, max_new_tokens=64, eos_token_id=end, pad_token_id=0), expected(theirs, ids, mask, end)
    )


def test_each_row_has_its_own_limit(pair: tuple[Any, Model]) -> None:
    """Also one at the end of the context, beside which a longer prompt has come to it before."""
    _, ours = pair
    ids, mask = prompts()
    limits = [CONTEXT - LENGTHS[0], CONTEXT - LENGTHS[1], 1, 64, 2, 30, 31, 32]
    found = ours.generate(ids, mask, max_new_tokens=limits, eos_token_id=1, pad_token_id=0)
    assert found.shape == (8, 40 + max(limits))
    for row, (length, limit) in enumerate(zip(LENGTHS, limits, strict=True)):
        alone = ours.generate(ids[row : row + 1, -length:], max_new_tokens=limit, eos_token_id=1, pad_token_id=0)
        np.testing.assert_array_equal(found[row, 40 : 40 + limit], alone[0, length:])
        assert not found[row, 40 + limit :].any()


def test_the_loop_stops_when_all_rows_have_ended(pair: tuple[Any, Model]) -> None:
    _, ours = pair
    ids, _ = prompts()
    first = int(ours.generate(ids[1:2], max_new_tokens=1, eos_token_id=1)[0, -1])
    assert ours.generate(ids[1:2], max_new_tokens=50, eos_token_id=first).shape == (1, 41)


def test_the_end_is_what_config_json_says(pair: tuple[Any, Model]) -> None:
    _, ours = pair
    ids, mask = prompts()
    default = ours.generate(ids, mask, max_new_tokens=20)
    np.testing.assert_array_equal(default, ours.generate(ids, mask, max_new_tokens=20, eos_token_id=END))


TIES = st.lists(st.integers(-6, 6), min_size=30, max_size=30).map(lambda row: np.array(row, np.float32) / 2)
NO_TIES = st.integers(0, 10**6).map(lambda seed: np.random.default_rng(seed).normal(0, 3, 30).astype(np.float32))
FILTER = jax.jit(filter_logits)


def warped(logits: np.ndarray, temperature: float, k: int, p: float) -> np.ndarray:
    scores = TopKLogitsWarper(k)(None, TemperatureLogitsWarper(temperature)(None, torch.tensor(logits)))
    return (TopPLogitsWarper(p)(None, scores) if p < 1 else scores).numpy()  # as `generate` of transformers asks


@settings(max_examples=300, deadline=None)
@given(
    TIES | NO_TIES,
    st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    st.integers(1, 40),
    st.sampled_from([0.05, 0.31, 0.62, 0.9, 0.999, 1.0]),
)
def test_filtered_logits_are_those_of_transformers(row: np.ndarray, temperature: float, k: int, p: float) -> None:
    found = np.asarray(FILTER(row[None], temperature, min(k, len(row)), p))
    best = np.sort(warped(row[None], temperature, k, 1.0)[0].astype(np.float64))
    share = np.exp(best - best[-1])
    # Where the shares add up to `p` itself, rounding decides.
    assume(np.abs(np.cumsum(share / share.sum()) - (1 - p))[share > 0].min() > 1e-6)
    wanted = warped(row[None], temperature, k, p)
    # Which of equal tokens stay, where only some do, torch's sort leaves open; how many stay it does not.
    np.testing.assert_allclose(np.sort(found), np.sort(wanted), rtol=1e-6)
    stays = np.isfinite(found)
    np.testing.assert_allclose(found[stays], (row[None] / temperature)[stays], rtol=1e-6)


def test_tokens_that_tie_with_the_kth_stay_and_the_best_always() -> None:
    logits = np.array([[1, 3, 2, 2, 2, 0], [5, 0, 0, 0, 0, 5]], np.float32)
    kept = np.isfinite(FILTER(logits, 1.0, 2, 1.0))
    np.testing.assert_array_equal(kept, [[0, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 1]])
    kept = np.isfinite(FILTER(logits, 1.0, 6, 1e-9))
    np.testing.assert_array_equal(kept, [[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]])


def test_many_logits_keep_exactly_the_tokens_of_transformers() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (50, VOCAB)).astype(np.float32)
    for temperature, k, p in ((0.7, 50, 0.9), (1.3, 5, 0.5), (1.0, 97, 0.8), (0.5, 1, 0.1), (2.0, 97, 1.0)):
        found = FILTER(logits, temperature, k, p)
        np.testing.assert_allclose(found, warped(logits, temperature, k, p), rtol=1e-6)


def test_tokens_are_drawn_with_their_chances(pair: tuple[Any, Model]) -> None:
    _, ours = pair
    rows = 4000
    prompt = np.tile(prompts()[0][1, -4:], (rows, 1))
    out = ours.generate(prompt, max_new_tokens=1, do_sample=True, temperature=1.5, top_k=8, top_p=0.9, seed=3)
    logits = np.asarray(ours(input_ids=prompt[:1]).logits)[0, -1]
    chances = torch.softmax(torch.tensor(warped(logits[None], 1.5, 8, 0.9)), -1)[0].numpy().astype(np.float64)
    counts = np.bincount(out[:, -1], minlength=VOCAB)
    likely = chances > 0
    assert likely.sum() > 2 and counts[~likely].sum() == 0
    statistic = ((counts[likely] - rows * chances[likely]) ** 2 / (rows * chances[likely])).sum()
    assert statistic < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def test_a_row_depends_on_its_prompt_seed_and_number_alone(pair: tuple[Any, Model]) -> None:
    _, ours = pair
    ids, mask = prompts()
    options = {"max_new_tokens": 12, "do_sample": True, "eos_token_id": 1, "pad_token_id": 0, "seed": 5}
    together = ours.generate(ids, mask, **options)
    for row, length in enumerate(LENGTHS):
        alone = ours.generate(ids[row : row + 1, -length:], first_row=row, **options)
        text = alone[0, length:]
        np.testing.assert_array_equal(text, together[row, 40 : 40 + len(text)])
        assert len(text) == 12 or text[-1] == 1
    np.testing.assert_array_equal(together, ours.generate(ids, mask, **options))
    assert (ours.generate(ids, mask, **{**options, "seed": 6}) != together).any()


def test_every_step_and_row_is_drawn_anew(pair: tuple[Any, Model]) -> None:
    _, ours = pair
    prompt = np.tile(prompts()[0][1], (50, 1))
    hot = {"do_sample": True, "temperature": 1e6, "top_k": None, "eos_token_id": []}  # all tokens are as likely
    drawn = ours.generate(prompt, max_new_tokens=60, **hot)[:, 40:]
    counts = np.bincount(drawn.ravel(), minlength=VOCAB)
    expected = drawn.size / VOCAB
    assert ((counts - expected) ** 2 / expected).sum() < 145  # chi-square, 96 degrees of freedom, p = 0.001
    # Neighbours in time, and in the batch, agree as often as chance has it: once in 97, +- 4 sigma.
    for one, other in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):
        assert abs((one == other).mean() - 1 / VOCAB) < 4 * (1 / VOCAB / one.size) ** 0.5


@pytest.mark.parametrize("sampled", [False, True])
def test_bfloat16(pair: tuple[Any, Model], sampled: bool) -> None:
    """Each token is one that the same bfloat16 model, without a cache, finds the best or among the 5 best."""
    _, ours = pair
    half = from_pretrained(str(ours.source), "causal-lm", dtype=jnp.bfloat16)
    ids, mask = prompts()
    out = half.generate(ids, mask, max_new_tokens=20, do_sample=sampled, top_k=5, eos_token_id=[])
    logits = np.asarray(
        half(
            input_ids=out[:, :-1],
            attention_mask=np.pad(mask, ((0, 0), (0, 19)), constant_values=1),
            position_ids=np.maximum(np.cumsum(np.pad(mask, ((0, 0), (0, 19)), constant_values=1), axis=1) - 1, 0),
        ).logits
    )[:, 39:]
    chosen = np.take_along_axis(logits, out[:, 40:, None], axis=-1)[..., 0]
    least = np.sort(logits, axis=-1)[..., -5 if sampled else -1]
    assert logits.std() > 1 and (chosen > least - 0.1).all()


def test_settings_of_sampling_do_not_compile_again(pair: tuple[Any, Model]) -> None:
    _, ours = pair
    ids, mask = prompts()
    ours.generate(ids, mask, max_new_tokens=12, do_sample=True)
    before = generation._decode._cache_size()
    for options in ({"temperature": 0.3}, {"top_k": 7}, {"top_p": 0.5}, {"seed": 9}, {"top_k": None}):
        ours.generate(ids, mask, max_new_tokens=12, do_sample=True, **options)
    # The same multiples of 32.
    ours.generate(ids[:, 3:], mask[:, 3:], max_new_tokens=12, do_sample=True)
    ours.generate(ids, mask, max_new_tokens=[12, 32, *range(1, 7)], do_sample=True)
    assert generation._decode._cache_size() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_changes_no_logits(pair: tuple[Any, Model], dtype: str) -> None:
    _, ours = pair
    module = TextModel(ours.config, "causal-lm", generation_execution(dtype))
    ids = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (3, 100)))
    whole = jax.jit(lambda ids: module.apply({"params": ours.params}, ids)["logits"])(ids)
    caches = empty_caches(ours.config, module.execution, 3, 112)

    @jax.jit
    def piece(ids: jax.Array, caches: Any, start: jax.Array) -> Any:
        positions = (start + jnp.arange(ids.shape[1]))[None].repeat(3, axis=0)
        return module.apply({"params": ours.params}, ids, position_ids=positions, caches=caches)

    at = 0
    for size in [37, *[1] * 63]:
        out = piece(ids[:, at : at + size], caches, jnp.int32(at))
        caches = out["caches"]
        tolerance = 1e-4 if dtype == "float32" else 0.1 * float(jnp.std(whole))
        np.testing.assert_allclose(out["logits"], whole[:, at : at + size], atol=tolerance)
        at += size
    assert int(caches[0].start) == 100


def generation_execution(dtype: str) -> Any:
    from jaxptm.nn.core import Execution

    return Execution(jnp.dtype(dtype))


def products(equations: list[Any]) -> int:
    """Floating point operations of the matrix products among these."""
    total = 0
    for equation in equations:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            width = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            total += 2 * int(width * np.prod(equation.outvars[0].aval.shape))
    return total


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_costs_one_token_whatever_came_before(rows: int) -> None:
    """The loop has one body for all steps; its products are those of one token over all that the cache has room for."""
    width, layers, vocab = 32, 2, 50
    config = Gpt2Config(
        vocab_size=vocab,
        hidden_size=width,
        num_attention_heads=4,
        num_hidden_layers=layers,
        max_position_embeddings=1000,
    )
    module = TextModel(config, "causal-lm")
    params = abstract_params(module)

    def loop_and_prompt(prompt: int, new: int) -> tuple[int, int]:
        ids = jnp.zeros((rows, prompt), jnp.int32)
        ends, keys = jnp.zeros(1, jnp.int32), jax.vmap(jax.random.key)(jnp.arange(rows))
        limits = jnp.full(rows, new, jnp.int32)
        sampling = Sampling(1.0, 5, 0.9)
        found = oracle.equations(
            lambda params: generation._decode(module, new, params, ids, ids + 1, limits, keys, sampling, ends, 0),
            params,
        )
        # jax's own loops, such as those of random numbers, hold no products.
        loop = sum(
            products(oracle.equations(jaxpr_as_fun(equation.params["body_jaxpr"]), *shapes(equation)))
            for equation in found
            if equation.primitive.name == "while"
        )
        return loop, products(found) - loop

    def shapes(equation: Any) -> list[Any]:
        held = equation.params["body_jaxpr"].in_avals
        return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in held]

    def forward(queries: int, keys: int, predictions: int) -> int:
        keys_and_values = layers * queries * 2 * width**2
        outputs = (layers - 1) * queries + predictions  # of the last layer no others are computed
        return 2 * rows * (keys_and_values + outputs * (10 * width**2 + 2 * keys * width) + predictions * width * vocab)

    for prompt, new in ((64, 448), (480, 32)):  # few and many tokens before, in a cache of the same size
        assert loop_and_prompt(prompt, new) == (forward(1, 512, 1), forward(prompt, 512, 1))
    for length in (50, 500):  # without a cache, each token costs as much as all before it
        ids = jnp.zeros((rows, length), jnp.int32)
        found = oracle.equations(lambda params, ids=ids: module.apply({"params": params}, ids)["logits"], params)
        assert products(found) == forward(length, length, length) > length / 2 * forward(1, length, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 100}, "a prompt of 40 tokens and 100 new ones are 140, the model takes 128"),
        ({"max_new_tokens": [1, 89, 88, 1, 1, 1, 1, 1]}, "a prompt of 40 tokens and 89 new ones are 129"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"max_new_tokens": [1] * 7}, "max_new_tokens holds 7 numbers for 8 prompts"),
        ({"input_ids": np.zeros((2, 0), int), "attention_mask": None}, "prompt 0 is empty"),
        ({"attention_mask": np.zeros((8, 40), int)}, "prompt 0 is empty: give at least one token"),
        ({"attention_mask": np.eye(8, 40, 7, dtype=int)[:, ::-1]}, "pad prompts on the left"),
        ({"attention_mask": np.ones((8, 3), int)}, r"has shape \[8, 3\], `input_ids` \[8, 40\]"),
        ({"input_ids": np.full((8, 40), VOCAB)}, "goes from 97 to 97; the model takes 0 to 96"),
        ({"input_ids": np.full((8, 40), -1)}, "goes from -1 to -1"),
        ({"input_ids": np.zeros((8, 40))}, "expected integers"),
        ({"temperature": 0.0, "do_sample": True}, "temperature is 0.0, expected more than 0"),
        ({"top_k": 0, "do_sample": True}, "top_k is 0, expected at least 1"),
        ({"top_p": 1.5, "do_sample": True}, "top_p is 1.5, expected more than 0 and at most 1"),
        ({"eos_token_id": VOCAB}, "eos_token_id is 97, outside the vocabulary of 97"),
        ({"pad_token_id": -1}, "pad_token_id is -1, outside the vocabulary"),
    ],
)
def test_bad_input(pair: tuple[Any, Model], change: dict[str, Any], message: str) -> None:
    ids, mask = prompts()
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, **change}
    with pytest.raises(JaxptmError, match=message):
        pair[1].generate(**arguments)


def test_only_causal_models_generate(pair: tuple[Any, Model], tmp_path: Path) -> None:
    pair[1].save_pretrained(tmp_path)
    with pytest.raises(JaxptmError, match="a bare model does not generate text; open a GPT-2 with the task causal-lm"):
        from_pretrained(tmp_path).generate([[1]], max_new_tokens=1)


def test_sampling_settings_are_plain_numbers() -> None:
    assert generation._in_range(Sampling(1.0, 10**9, 1.0), 50) == Sampling(1.0, 50, 1.0)
