"""Masking against its laws, the sequential rule it vectorises, and the statistics of the papers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxptm.ops.masking import (
    SPAN_LENGTHS,
    SPAN_PROBABILITIES,
    Masked,
    mask_tokens,
    prediction_counts,
    select_spans,
    select_words,
    vocabulary_tables,
    word_bounds,
)

STRATEGIES = ["tokens", "words", "spans"]
VOCAB, MASK, CLS, SEP, PAD = 5000, 4, 2, 3, 0
FIRST_ORDINARY = 5


def corpus(rows: int, length: int, seed: int = 0, continues: float = 0.25, padding: bool = True) -> dict:
    """Rows [CLS] ... [SEP] ... [SEP] [PAD]*, a third of them shorter than `length`."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(rows) < padding / 3, rng.integers(8, length + 1, rows), length)
    ids = rng.integers(FIRST_ORDINARY, VOCAB, (rows, length))
    index = np.arange(length)
    ids[:, 0] = CLS
    ids[index == lengths[:, None] // 2] = SEP
    ids[index == lengths[:, None] - 1] = SEP
    ids[index >= lengths[:, None]] = PAD
    return {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "eligible": jnp.asarray(ids >= FIRST_ORDINARY),
        "word_start": jnp.asarray(rng.random((rows, length)) >= continues),
        "lengths": jnp.asarray(lengths, jnp.int32),
    }


STATIC = ("strategy", "probability", "max_predictions", "mask_id", "vocab_size")
jitted = jax.jit(mask_tokens, static_argnames=STATIC)
jitted_words, jitted_spans = jax.jit(select_words), jax.jit(select_spans)


def mask(batch: dict, strategy: str, key: int | jax.Array = 0, probability=0.15, slots=10, function=jitted) -> Masked:
    keys = jax.random.split(jax.random.key(key), len(batch["lengths"])) if isinstance(key, int) else key
    options = {"probability": probability, "max_predictions": slots, "mask_id": MASK, "vocab_size": VOCAB}
    return jax.tree.map(np.asarray, function(keys, **batch, strategy=strategy, **options))


def check_laws(batch: dict, masked: Masked) -> np.ndarray:
    """What holds for every masked batch; returns the chosen tokens as bool [B, L]."""
    ids, eligible = np.asarray(batch["input_ids"]), np.asarray(batch["eligible"])
    filled = masked.weights == 1
    assert np.isin(masked.weights, (0, 1)).all()
    assert (np.diff(masked.weights) <= 0).all(), "filled slots come first"
    assert not masked.positions[~filled].any()
    assert not masked.labels[~filled].any()
    row, slot = np.nonzero(filled)
    chosen = np.zeros_like(eligible)
    chosen[row, masked.positions[row, slot]] = True
    assert chosen.sum() == filled.sum(), "no position twice"
    assert eligible[chosen].all(), "special and padding tokens are never chosen"
    np.testing.assert_array_equal(masked.labels[filled], ids[row, masked.positions[row, slot]])
    np.testing.assert_array_equal(masked.input_ids[~chosen], ids[~chosen])
    return chosen


def python_words(eligible, word_start) -> list[list[int]]:
    """Words as lists of positions, built token by token as in create_masked_lm_predictions."""
    words: list[list[int]] = []
    for i, ok in enumerate(eligible):
        if not ok:
            continue
        if word_start[i] or not words or words[-1][-1] != i - 1:
            words.append([])
        words[-1].append(i)
    return words


@pytest.fixture(scope="module", params=STRATEGIES)
def million(request):
    batch = corpus(4096, 256)
    masked = mask(batch, request.param, slots=39)
    return request.param, batch, masked, check_laws(batch, masked)


class TestAMillionTokens:
    def test_number_of_predictions(self, million):
        strategy, batch, _, chosen = million
        lengths = np.asarray(batch["lengths"])
        target = np.array([min(39, max(1, round(n * 0.15))) for n in lengths.tolist()])
        target = np.minimum(target, np.asarray(batch["eligible"]).sum(1))
        counts = chosen.sum(1)
        if strategy == "tokens":
            np.testing.assert_array_equal(counts, target)
        else:
            assert (counts <= target).all()
            assert counts.sum() > 0.995 * target.sum()
            # What falls short is smaller than every word left over.
            for row in np.nonzero(counts < target)[0]:
                words = python_words(np.asarray(batch["eligible"][row]), np.asarray(batch["word_start"][row]))
                left = [len(word) for word in words if not chosen[row, word[0]]]
                assert min(left) > target[row] - counts[row]

    def test_eighty_ten_ten(self, million):
        _, batch, masked, chosen = million
        shown, true = masked.input_ids[chosen], np.asarray(batch["input_ids"])[chosen]
        n = len(shown)
        # A random id is the true one, or the mask, once in VOCAB times.
        for share, seen in [
            (0.8 + 0.1 / VOCAB, shown == MASK),
            (0.1 + 0.1 / VOCAB, shown == true),
            (0.1 * (1 - 2 / VOCAB), (shown != MASK) & (shown != true)),
        ]:
            assert abs(seen.sum() - n * share) < 4 * np.sqrt(n * share * (1 - share))
        drawn = shown[(shown != MASK) & (shown != true)]
        assert drawn.min() < FIRST_ORDINARY
        assert drawn.max() > VOCAB - 20
        buckets = np.bincount(drawn // 50, minlength=VOCAB // 50)
        assert stats.chisquare(buckets).pvalue > 1e-4

    def test_fates_are_independent(self, million):
        _, _, masked, _ = million
        hidden = np.take_along_axis(masked.input_ids, masked.positions, 1) == MASK
        pairs = (masked.weights[:, :-1] == 1) & (masked.weights[:, 1:] == 1)
        together = (hidden[:, :-1] & hidden[:, 1:])[pairs]
        assert abs(together.mean() - 0.64) < 4 * np.sqrt(0.64 * 0.36 * 2 / len(together))

    def test_whole_words(self, million):
        strategy, batch, _, chosen = million
        _, begin, _ = jax.vmap(word_bounds)(batch["eligible"], batch["word_start"])
        of_first = np.take_along_axis(chosen, np.asarray(begin), 1)
        eligible = np.asarray(batch["eligible"])
        split = (chosen != of_first)[eligible].any()
        assert split == (strategy == "tokens")

    @pytest.mark.parametrize("million", ["tokens"], indirect=True)
    def test_positions_are_uniform(self, million):
        _, batch, _, chosen = million
        chosen = chosen[np.asarray(batch["lengths"]) == 256]
        counts = np.delete(chosen.sum(0), [0, 128, 255])  # [CLS], [SEP], [SEP]
        assert stats.chisquare(counts).pvalue > 1e-4
        # Without replacement, two neighbours come together a little less often than two independent draws.
        both = (chosen[:, 5:100] & chosen[:, 6:101]).sum()
        expected = 95 * len(chosen) * (38 / 253) * (37 / 252)
        assert abs(both - expected) < 4 * np.sqrt(1.5 * expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whole_word_selection_follows_the_sequential_rule(data):
    length = data.draw(st.sampled_from([1, 24]))
    eligible = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    word_start = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    count = data.draw(st.integers(0, length))
    words = data.draw(st.permutations(python_words(eligible, word_start)))
    firsts = [word[0] for word in words]
    order = firsts + [i for i in range(length) if i not in firsts]

    expected: list[int] = []
    for word in words:
        if len(expected) >= count:
            break
        if len(expected) + len(word) > count:
            continue
        expected += word

    chosen = jitted_words(jnp.array(order), jnp.array(eligible), jnp.array(word_start), jnp.int32(count))
    assert np.nonzero(chosen)[0].tolist() == sorted(expected)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.sampled_from([1, 24]),
    eligibility=st.sampled_from([0.5, 0.9, 1.0]),
    share=st.floats(0, 1),
)
def test_span_selection_follows_the_sequential_rule(seed, length, eligibility, share):
    rng = np.random.default_rng(seed)
    eligible = rng.random(length) < eligibility
    word_start = rng.random(length) < 0.75
    count = round(share * length)
    words = python_words(eligible, word_start)
    visits = rng.permutation(len(words)).tolist()
    spans = rng.integers(1, 11, length)
    firsts = [words[i][0] for i in visits]
    order = firsts + [i for i in range(length) if i not in firsts]

    expected: set[int] = set()
    for visit, span in zip(visits, spans, strict=False):
        if len(expected) == count:
            break
        if words[visit][0] in expected:
            continue
        for i in range(visit, min(visit + span, len(words))):
            if i > visit and words[i][0] != words[i - 1][-1] + 1:  # an ineligible token between
                break
            if len(expected | set(words[i])) > count:
                break
            expected |= set(words[i])

    args = jnp.array(order), jnp.array(spans), jnp.array(eligible), jnp.array(word_start), jnp.int32(count)
    assert np.nonzero(jitted_spans(*args))[0].tolist() == sorted(expected)


def spanbert_runs(rng, length: int, count: int) -> int:
    """Runs of masked words after SpanBERT's rejection sampling on a row of `length` one-token words."""
    chosen = np.zeros(length + 1, bool)
    while chosen.sum() < count:
        span = rng.choice(SPAN_LENGTHS, p=SPAN_PROBABILITIES)
        start = rng.integers(length)
        if chosen[start]:
            continue
        for i in range(start, min(start + span, length)):
            if chosen.sum() < count:
                chosen[i] = True
    return int((np.diff(chosen.astype(int), prepend=0) == 1).sum())


def test_spans_have_the_lengths_of_spanbert():
    assert SPAN_PROBABILITIES.sum() == pytest.approx(1)
    np.testing.assert_allclose(SPAN_LENGTHS @ SPAN_PROBABILITIES, 3.8, atol=0.01)  # the mean that the paper gives
    rows, length = 600, 400
    batch = {
        "input_ids": jnp.full((rows, length), 9),
        "eligible": jnp.ones((rows, length), bool),
        "word_start": jnp.ones((rows, length), bool),
        "lengths": jnp.full(rows, length),
    }
    chosen = check_laws(batch, mask(batch, "spans", 1, slots=60))
    assert (chosen.sum(1) == 60).all()
    runs = (np.diff(chosen.astype(int), axis=1, prepend=0) == 1).sum(1)
    rng = np.random.default_rng(0)
    reference = np.array([spanbert_runs(rng, length, 60) for _ in range(300)])
    error = np.sqrt(runs.var() / len(runs) + reference.var() / len(reference))
    assert abs(runs.mean() - reference.mean()) < 4 * error
    assert 60 / runs.mean() == pytest.approx(3.8, abs=0.6)  # spans that touch count as one, the last one is cut


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_are_a_function_of_the_key_and_of_the_row_alone(strategy):
    batch = corpus(8, 40, seed=1)
    keys = jax.random.split(jax.random.key(7), 8)
    together = mask(batch, strategy, keys)
    jax.tree.map(np.testing.assert_array_equal, together, mask(batch, strategy, keys))
    for row in range(8):
        alone = mask({name: value[row : row + 1] for name, value in batch.items()}, strategy, keys[row : row + 1])
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_array_equal(ours[row], theirs[0])
    other = mask(batch, strategy, 8)
    assert (other.positions != together.positions).any(axis=1).all()
    same_rows = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), batch)
    assert len({tuple(row) for row in mask(same_rows, strategy, keys).positions.tolist()}) == 8


def test_jit_changes_nothing():
    batch = corpus(8, 40, seed=1)
    jax.tree.map(np.testing.assert_array_equal, mask(batch, "tokens"), mask(batch, "tokens", function=mask_tokens))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("length", "slots", "probability"), [(1, 5, 0.5), (12, 20, 0.15)])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_odd_rows(strategy, length, slots, probability, data):
    row = st.lists(st.sampled_from([PAD, SEP, 7, 8, 9]), min_size=length, max_size=length)
    ids = np.array([*data.draw(st.lists(row, min_size=3, max_size=3)), [PAD] * length, [SEP] * length, [SEP] * length])
    ids[5, -1] = 9  # a single eligible token
    batch = {
        "input_ids": jnp.asarray(ids),
        "eligible": jnp.asarray(ids >= FIRST_ORDINARY),
        "word_start": jnp.asarray(ids != 8),
        "lengths": jnp.asarray((ids != PAD).sum(1)),
    }
    masked = mask(batch, strategy, data.draw(st.integers(0, 5)), probability, slots)
    counts = check_laws(batch, masked).sum(1)
    assert counts[3:].tolist() == [0, 0, 1]
    for tokens, eligible, count in zip((ids != PAD).sum(1), (ids >= FIRST_ORDINARY).sum(1), counts, strict=True):
        target = min(slots, max(1, round(int(tokens) * probability)), eligible)
        assert count == target if strategy == "tokens" else count <= target


def test_prediction_counts_round_as_the_reference():
    counts = prediction_counts(512, 0.15, 77)
    assert counts[[0, 1, 3, 10, 30, 50, 128, 512]].tolist() == [0, 1, 1, 2, 4, 8, 19, 77]
    assert prediction_counts(128, 0.15, 10).max() == 10


class FakeTokenizer:
    def __init__(self, tokens, special):
        self.tokens, self.all_special_ids = tokens, special

    def __len__(self):
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[i] for i in ids]


@pytest.mark.parametrize(
    ("tokens", "continuing"),
    [
        (["[PAD]", "play", "##ing", "##s", "Ġ"], {"##ing", "##s"}),
        (["<s>", "Ġplay", "Ġthe", "Ġ", "ing", "s", "##"], {"ing", "s", "##"}),
        (["<s>", "▁play", "▁the", "ing", "."], {"ing", "."}),
        (["<pad>", "play", None, "ing"], set()),
    ],
)
def test_vocabulary_tables(tokens, continuing):
    tables = vocabulary_tables(FakeTokenizer(tokens, [0]))
    assert tables.is_special.tolist() == [True] + [False] * (len(tokens) - 1)
    assert {token for token, continues in zip(tokens, tables.continues_word, strict=True) if continues} == continuing


@pytest.mark.parametrize("name", ["bert-base-uncased", "gpt2", "roberta-base"])
def test_vocabulary_tables_of_real_tokenizers(name, shared_data):
    import transformers

    folder = shared_data / "tokenizers" / name
    if name == "bert-base-uncased":
        tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    else:
        tokenizer = transformers.GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tables = vocabulary_tables(tokenizer)
    ids = np.array(tokenizer(" the pterodactyls flew unbelievably")["input_ids"])
    ids = ids[~tables.is_special[ids]]
    words = np.split(ids, np.nonzero(~tables.continues_word[ids])[0][1:])
    assert len(ids) > 4
    assert tables.is_special[tokenizer.all_special_ids].all()
    assert [tokenizer.decode(word).strip() for word in words] == ["the", "pterodactyls", "flew", "unbelievably"]
