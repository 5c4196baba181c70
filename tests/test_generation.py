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
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import jaxptm.generation as generation
from jaxptm.generation import Sampling, filter_logits
from jaxptm.models.gpt2 import Gpt2Config
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


ROWS = st.lists(st.integers(-6, 6), min_size=2, max_size=30).map(lambda row: np.array(row, np.float32) / 2)


@settings(max_examples=200, deadline=None)
@given(
    ROWS | st.integers(0, 10**6).map(lambda seed: np.random.default_rng(seed).normal(0, 3, 30).astype(np.float32)),
    st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    st.integers(1, 40),
    st.sampled_from([0.05, 0.31, 0.62, 0.9, 0.999, 1.0]),
)
def test_filtered_logits_are_those_of_transformers(row: np.ndarray, temperature: float, k: int, p: float) -> None:
    found = np.asarray(filter_logits(jnp.asarray(row)[None], temperature, min(k, len(row)), p))[0]
    scores = TopKLogitsWarper(k)(None, TemperatureLogitsWarper(temperature)(None, torch.tensor(row)[None]))
    np.testing.assert_allclose(
        np.asarray(filter_logits(jnp.asarray(row)[None], temperature, min(k, len(row)), 1.0))[0],
        scores[0].numpy(),
        rtol=1e-6,
    )
    wanted = TopPLogitsWarper(p)(None, scores)[0].numpy() if p < 1 else scores[0].numpy()
    # Which of several equal tokens at the border stay is anybody's choice, and how many of them stay is not.
    assert np.isfinite(found).sum() == pytest.approx(np.isfinite(wanted).sum(), abs=_border(scores[0].numpy(), p))
    inside = np.sort(found[np.isfinite(found)])[::-1]
    np.testing.assert_allclose(inside, np.sort(scores[0].numpy())[::-1][: len(inside)], rtol=1e-6)


def _border(scores: np.ndarray, p: float) -> int:
    """How many tokens have better ones that sum to `p` itself, but for rounding, which then decides."""
    share = np.exp(scores.astype(np.float64) - scores.max())
    share = np.sort(share / share.sum())[::-1]
    better = np.cumsum(share) - share
    return int((np.abs(better[share > 0] - p) < 1e-6).sum())


def test_distinct_logits_keep_exactly_the_tokens_of_transformers() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (50, VOCAB)).astype(np.float32)
    for temperature, k, p in ((0.7, 50, 0.9), (1.3, 5, 0.5), (1.0, 97, 0.8), (0.5, 1, 0.1)):
        scores = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
        wanted = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, scores)).numpy()
        np.testing.assert_allclose(filter_logits(jnp.asarray(logits), temperature, k, p), wanted, rtol=1e-6)


def test_tokens_are_drawn_with_their_chances(pair: tuple[Any, Model]) -> None:
    _, ours = pair
    rows = 4000
    prompt = np.tile(prompts()[0][1, -4:], (rows, 1))
    out = ours.generate(prompt, max_new_tokens=1, do_sample=True, temperature=1.5, top_k=8, top_p=0.9, seed=3)
    logits = np.asarray(ours(input_ids=prompt[:1]).logits)[0, -1]
    scores = TopKLogitsWarper(8)(None, TemperatureLogitsWarper(1.5)(None, torch.tensor(logits)[None]))
    chances = torch.softmax(TopPLogitsWarper(0.9)(None, scores), -1)[0].numpy().astype(np.float64)
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


def test_settings_of_sampling_do_not_compile_again(pair: tuple[Any, Model]) -> None:
    _, ours = pair
    ids, mask = prompts()
    ours.generate(ids, mask, max_new_tokens=12, do_sample=True)
    before = generation._decode._cache_size()
    for options in ({"temperature": 0.3}, {"top_k": 7}, {"top_p": 0.5}, {"seed": 9}, {"top_k": None}):
        ours.generate(ids, mask, max_new_tokens=12, do_sample=True, **options)
    ours.generate(ids[:, 3:], mask[:, 3:], max_new_tokens=12, do_sample=True)  # the same multiple of 32
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


def test_a_token_costs_the_same_wherever_it_stands() -> None:
    # The loop's body works on one token and the whole cache, so its products are those of one token at any place.
    config = Gpt2Config(
        vocab_size=50, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=600
    )
    module = TextModel(config, "causal-lm")
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]

    def products(cached: int) -> int:
        def step(params: Any, token: jax.Array) -> Any:
            caches = tuple(
                cache._replace(start=jnp.int32(cached)) for cache in empty_caches(config, module.execution, 1, 512)
            )
            return module.apply({"params": params}, token, position_ids=jnp.full((1, 1), cached), caches=caches)[
                "logits"
            ]

        found = [eqn for eqn in oracle.equations(step, params, jnp.zeros((1, 1), jnp.int32))]  # noqa: C416
        return sum(
            2
            * int(np.prod(eqn.outvars[0].aval.shape))
            * int(np.prod([eqn.invars[0].aval.shape[i] for i in eqn.params["dimension_numbers"][0][0]]))  # noqa: E501
            for eqn in found
            if eqn.primitive.name == "dot_general"
        )

    layer = 4 * 32**2 + 2 * 32 * 128 + 2 * 512 * 32
    assert products(50) == products(500) == 2 * (2 * layer + 32 * 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 100}, "a prompt of 40 tokens and 100 new ones are 140, the model takes 128"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
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
