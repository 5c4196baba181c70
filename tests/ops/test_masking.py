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
    mask_with_replacement,
    prediction_counts,
    replace_masked,
    select_spans,
    select_words,
    static_keys,
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
        strategy, batch, masked, chosen = million
        shown, true = masked.input_ids[chosen], np.asarray(batch["input_ids"])[chosen]
        n = len(shown)
        alike = 8 if strategy == "spans" else 1  # tokens of one fate: E[s^2] / E[s] of spans of s tokens is below 8
        # A random id is the true one, or the mask, once in VOCAB times.
        for share, seen in [
            (0.8 + 0.1 / VOCAB, shown == MASK),
            (0.1 + 0.1 / VOCAB, shown == true),
            (0.1 * (1 - 2 / VOCAB), (shown != MASK) & (shown != true)),
        ]:
            assert abs(seen.sum() - n * share) < 4 * np.sqrt(alike * n * share * (1 - share))
        drawn = shown[(shown != MASK) & (shown != true)]
        assert drawn.min() < FIRST_ORDINARY
        assert drawn.max() > VOCAB - 20
        buckets = np.bincount(drawn // 50, minlength=VOCAB // 50)
        assert stats.chisquare(buckets).pvalue > 1e-4

    @pytest.mark.parametrize("million", ["tokens", "words"], indirect=True)
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
    begins: dict[int, int] = {}
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
            begins |= dict.fromkeys(set(words[i]) - expected, words[visit][0])
            expected |= set(words[i])

    args = jnp.array(order), jnp.array(spans), jnp.array(eligible), jnp.array(word_start), jnp.int32(count)
    chosen, found = map(np.asarray, jitted_spans(*args))
    assert np.nonzero(chosen)[0].tolist() == sorted(expected)
    assert {at: found[at] for at in expected} == begins


def test_the_tokens_of_a_span_have_one_fate():
    """SpanBERT, section 3.1: all tokens of a span become the mask, or random ones, or stay."""
    rows, length = 2000, 64
    batch = {
        "input_ids": jnp.full((rows, length), FIRST_ORDINARY),
        "eligible": jnp.ones((rows, length), bool),
        "word_start": jnp.ones((rows, length), bool),
        "lengths": jnp.full(rows, length),
    }
    masked = mask(batch, "spans", slots=2, probability=2 / length)  # one span of two words in most rows
    both = masked.positions[:, 1] == masked.positions[:, 0] + 1
    shown = np.take_along_axis(masked.input_ids, masked.positions, axis=1)[both]
    # A random id is one of the other two in one of VOCAB rows.
    fates = np.where(shown == MASK, 0, np.where(shown == FIRST_ORDINARY, 1, 2))
    assert both.sum() > 1000
    assert (fates[:, 0] != fates[:, 1]).mean() < 0.02
    assert np.bincount(fates[:, 0]) / len(fates) == pytest.approx([0.8, 0.1, 0.1], abs=0.04)
    random = shown[fates[:, 0] == 2]
    assert (random[:, 0] != random[:, 1]).mean() > 0.9  # each token draws its own


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


def test_static_masks_are_a_function_of_the_row_and_of_one_of_so_many_copies():
    """Each visit of a row has one of `dupe_factor` masks, wherever it stands and whatever its neighbours; all occur."""
    batch = corpus(64, 32)
    seen: dict[bytes, set[bytes]] = {}
    for visit in range(40):
        order = jnp.asarray(np.random.default_rng(visit).permutation(64))
        moved = {name: values[order] for name, values in batch.items()}
        keys = static_keys(jax.random.split(jax.random.key(visit), 64), moved["input_ids"], 3)
        masked = mask(moved, "tokens", keys)
        for row, shown in zip(np.asarray(moved["input_ids"]), masked.input_ids, strict=True):
            seen.setdefault(row.tobytes(), set()).add(shown.tobytes())
    assert len(seen) == 64 and {len(masks) for masks in seen.values()} == {3}


def test_static_masks_differ_between_rows_that_differ_in_one_token():
    row = corpus(1, 32, padding=False)["input_ids"]
    rows = jnp.repeat(row, 33, axis=0).at[jnp.arange(32), jnp.arange(32)].add(1)
    keys = jax.random.key_data(static_keys(jax.random.split(jax.random.key(0), 33), rows, 1))
    assert len(np.unique(np.asarray(keys), axis=0)) == 33
    swapped = jax.random.key_data(static_keys(jax.random.split(jax.random.key(0), 33), rows[:, ::-1], 1))
    assert not np.any(np.all(np.asarray(keys) == np.asarray(swapped), axis=1))


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


electra_mask = jax.jit(mask_with_replacement, static_argnames=("probability", "max_predictions", "mask_id"))


def mask_as_electra(batch: dict, key: int, probability: float = 0.15, slots: int = 10) -> Masked:
    fields = {name: batch[name] for name in ("input_ids", "eligible", "lengths")}
    keys = jax.random.split(jax.random.key(key), len(batch["lengths"]))
    options = {"probability": probability, "max_predictions": slots, "mask_id": MASK}
    return jax.tree.map(np.asarray, electra_mask(keys, **fields, **options))


def test_electra_masks_by_the_reference_s_rule() -> None:
    """google-research/electra, pretrain_helpers.py `mask`: counts, places, fates."""
    batch = corpus(4000, 64)
    ids, eligible = np.asarray(batch["input_ids"]), np.asarray(batch["eligible"])
    masked = mask_as_electra(batch, 0)
    filled = masked.weights > 0
    np.testing.assert_array_equal(filled.sum(axis=1), prediction_counts(64, 0.15, 10)[np.asarray(batch["lengths"])])
    rows = np.nonzero(filled)[0]
    assert eligible[rows, masked.positions[filled]].all()
    np.testing.assert_array_equal(masked.labels[filled], ids[rows, masked.positions[filled]])
    assert not masked.positions[~filled].any() and not masked.labels[~filled].any()

    changed = masked.input_ids != ids
    assert (masked.input_ids[changed] == MASK).all()  # no token becomes another one
    chosen = np.zeros_like(eligible)
    chosen[rows, masked.positions[filled]] = True
    assert not (changed & ~chosen).any()
    # A slot hides its token with a chance of 85%, whatever other slots of the position do.
    times = np.zeros(ids.shape, int)
    np.add.at(times, (rows, masked.positions[filled]), 1)
    for number, share in ((1, 0.85), (2, 1 - 0.15**2)):
        found, count = changed[times == number].mean(), (times == number).sum()
        assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / count), number
    # With replacement: positions repeat as often as independent uniform draws do.
    pairs, repeats = 0.0, 0
    for row in range(len(ids)):
        drawn = masked.positions[row][filled[row]]
        pairs += len(drawn) * (len(drawn) - 1) / 2 / max(eligible[row].sum(), 1)
        repeats += ((drawn[:, None] == drawn[None, :]).sum() - len(drawn)) // 2
    assert abs(repeats - pairs) < 4 * np.sqrt(pairs)


def test_electra_chooses_every_token_as_often_as_another() -> None:
    batch = {name: jnp.repeat(rows[:1], 20000, axis=0) for name, rows in corpus(1, 24, padding=False).items()}
    masked = mask_as_electra(batch, 1)
    counts = np.bincount(masked.positions[masked.weights > 0], minlength=24)
    eligible = np.asarray(batch["eligible"][0])
    assert not counts[~eligible].any()
    assert stats.chisquare(counts[eligible]).pvalue > 1e-3


def test_electra_never_chooses_the_first_token_and_leaves_empty_rows_alone() -> None:
    ids = jnp.full((200, 12), 9, jnp.int32)
    eligible = jnp.ones((200, 12), bool).at[100:].set(False)
    masked = mask_as_electra({"input_ids": ids, "eligible": eligible, "lengths": jnp.full(200, 12)}, 0, slots=4)
    assert (masked.positions[:100][masked.weights[:100] > 0] > 0).all()
    assert not masked.weights[100:].any() and (masked.input_ids[100:] == 9).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_electra_rows_do_not_see_each_other(seed: int) -> None:
    batch = corpus(6, 32, seed)
    together = mask_as_electra(batch, seed)
    keys = jax.random.split(jax.random.key(seed), 6)
    fields = {name: batch[name][2:4] for name in ("input_ids", "eligible", "lengths")}
    alone = electra_mask(keys[2:4], **fields, probability=0.15, max_predictions=10, mask_id=MASK)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[2:4]), alone, together)


def test_replacements_come_from_the_generator_and_each_position_has_one() -> None:
    batch = corpus(3000, 32)
    ids, masked = np.asarray(batch["input_ids"]), mask_as_electra(batch, 0, slots=5)
    chances = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.full((3000, 5, VOCAB), -np.inf, np.float32)
    logits[..., 100:104] = np.log(chances)
    keys = jax.random.split(jax.random.key(1), 3000)
    for temperature, expected in ((1.0, chances), (0.5, chances**2 / (chances**2).sum())):
        found = np.asarray(replace_masked(keys, batch["input_ids"], masked, jnp.asarray(logits), temperature))
        chosen = np.zeros(ids.shape, bool)
        filled = masked.weights > 0
        chosen[np.nonzero(filled)[0], masked.positions[filled]] = True
        np.testing.assert_array_equal(found[~chosen], ids[~chosen])
        counts = np.bincount(found[chosen] - 100, minlength=4)
        assert len(counts) == 4 and stats.chisquare(counts, expected * counts.sum()).pvalue > 1e-3


def test_of_two_slots_at_one_position_the_first_decides() -> None:
    masked = Masked(
        jnp.array([[2, 4, 4, 3]]),
        jnp.array([[1, 2, 1, 0]]),
        jnp.array([[7, 8, 7, 0]]),
        jnp.array([[1.0, 1.0, 1.0, 0.0]]),
    )
    logits = jnp.full((1, 4, 50), -jnp.inf).at[0, jnp.arange(4), 20 + jnp.arange(4)].set(0.0)
    ids = jnp.array([[2, 7, 8, 3]])
    keys = jax.random.split(jax.random.key(0), 1)
    np.testing.assert_array_equal(replace_masked(keys, ids, masked, logits, 1.0), [[2, 20, 21, 3]])
    guessed = logits.at[0, 0].set(jnp.where(jnp.arange(50) == 7, 0.0, -jnp.inf))
    np.testing.assert_array_equal(
        replace_masked(keys, ids, masked, guessed, 1.0), [[2, 7, 21, 3]]
    )  # right: the original


def test_no_gradient_passes_through_the_samples() -> None:
    masked = Masked(jnp.array([[2, 4, 3]]), jnp.array([[1]]), jnp.array([[7]]), jnp.array([[1.0]]))
    keys = jax.random.split(jax.random.key(0), 1)

    def value(logits: jax.Array) -> jax.Array:
        return replace_masked(keys, jnp.array([[2, 7, 3]]), masked, logits, 1.0).astype(jnp.float32).sum()

    assert not np.any(jax.grad(value)(jnp.zeros((1, 1, 30))))


def test_an_id_that_is_never_drawn_is_not_among_the_random_ones() -> None:
    """RoBERTa counts positions by its padding, which must not appear in the middle of a row."""
    ids = jnp.full((200, 60), 3)
    every = {"word_start": ids > 0, "lengths": jnp.full(200, 60), "strategy": "tokens", "probability": 1.0}
    keys = jax.random.split(jax.random.key(0), 200)
    for never in (None, 1):
        masked = mask_tokens(keys, ids, ids > 0, **every, max_predictions=60, mask_id=4, vocab_size=5, never_id=never)
        found = np.bincount(np.asarray(masked.input_ids).ravel(), minlength=5) / ids.size
        assert found[1] == (0 if never else pytest.approx(0.02, abs=0.005))
        assert found[4] == pytest.approx(0.82, abs=0.02) and found[0] == pytest.approx(0.02, abs=0.005)
