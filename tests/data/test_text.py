from __future__ import annotations

import numpy as np
import pytest
from corpora import FIRST, SPECIAL, numbered_corpus, only_documents, random_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxptm.data import text
from jaxptm.data.corpus import Corpus
from jaxptm.data.text import PackedSentences, PairPlan, RunningText, SentencePairs, TokenStream
from jaxptm.errors import JaxptmError

DOCUMENTS = st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=12), min_size=1, max_size=5)
LENGTHS = st.lists(DOCUMENTS, min_size=1, max_size=3)


def pairs(corpus: Corpus, length: int = 64, seed: int = 0, short_probability: float = 0.1) -> SentencePairs:
    return SentencePairs(corpus, SPECIAL, length, seed, short_probability)


def packed(corpus: Corpus, length: int = 64, seed: int = 0, separate_documents: bool = False) -> PackedSentences:
    return PackedSentences(corpus, SPECIAL, length, seed, separate_documents)


def stream(corpus: Corpus, length: int = 64, seed: int = 0, separate_documents: bool = False) -> TokenStream:
    return TokenStream(corpus, SPECIAL.pad, length, seed, separate_documents)


def untruncated(monkeypatch: pytest.MonkeyPatch, source: SentencePairs, epoch: int = 0) -> list[tuple[int, ...]]:
    """Rows of the plan as the walk made them, by the place of A."""
    with monkeypatch.context() as patch:
        patch.setattr(text, "_truncate", lambda plan, most, random: plan)
        plan = source.plan(epoch)
    return sorted(zip(*(field.tolist() for field in plan), strict=True))


class Document:
    """A document in plain Python: the stream positions of its sentences, without the separator."""

    def __init__(self, corpus: Corpus, number: int):
        first = corpus.document_ends[number - 1] if number else 0
        last = corpus.document_ends[number]
        ends = corpus.sentence_ends[first:last].tolist()
        start = int(corpus.sentence_ends[first - 1]) if first else 0
        self.sentences = list(zip([start, *ends[:-1]], [*ends[:-1], ends[-1] - 1], strict=True))
        self.start, self.end = start, ends[-1] - 1

    def gather(self, sentence: int, target: int, stop: int | None = None) -> int:
        """Adds sentences until there are `target` tokens or none is left; the number of the next sentence."""
        length = 0
        while sentence < (len(self.sentences) if stop is None else stop):
            start, end = self.sentences[sentence]
            length += end - start
            sentence += 1
            if length >= target:
                break
        return sentence


def owner(documents: list[Document], position: int) -> int:
    return next(number for number, document in enumerate(documents) if document.start <= position < document.end)


@pytest.mark.parametrize("stretch", [4, 1024])
def test_pairs_follow_the_walk_of_bert(monkeypatch: pytest.MonkeyPatch, stretch: int) -> None:
    """Replays each document's walk one sentence at a time, given the plan's own random choices."""
    monkeypatch.setattr(text, "STRETCH", stretch)
    corpus = random_corpus(seed=1)
    documents = [Document(corpus, number) for number in range(len(corpus.document_ends))]
    target = 64 - 3
    rows = untruncated(monkeypatch, pairs(corpus, 64, short_probability=0))
    choices = []
    for number, document in enumerate(documents):
        own = [row for row in rows if document.start <= row[0] < document.end]
        position = 0
        for a_start, a_end, b_start, b_end, random_next in own:
            assert a_start == document.sentences[position][0], "A starts where the walk stands"
            stop = min(len(document.sentences), (position // stretch + 1) * stretch)
            end = document.gather(position, target, stop)
            a_ends = [document.sentences[index][1] for index in range(position, end)]
            a_sentences = a_ends.index(a_end) + 1
            assert 1 <= a_sentences <= max(1, len(a_ends) - 1)
            if len(a_ends) == 1:
                assert random_next
            else:
                choices.append(((a_sentences - 0.5) / (len(a_ends) - 1), random_next))
            if random_next:
                other = owner(documents, b_start)
                assert other != number
                sentence = [start for start, _ in documents[other].sentences].index(b_start)
                b_stop = documents[other].gather(sentence, max(1, target - (a_end - a_start)))
                assert b_end == documents[other].sentences[b_stop - 1][1]
                position += a_sentences  # the rest is put back
            else:
                assert (b_start, b_end) == (a_end, a_ends[-1])
                position = end
        assert position == len(document.sentences), "the walk ends with the document"
    shares, random_nexts = np.array(choices).T
    assert abs(random_nexts.mean() - 0.5) < 4 * 0.5 / len(choices) ** 0.5
    assert abs(shares.mean() - 0.5) < 4 * 0.29 / len(choices) ** 0.5, "A takes each number of sentences equally often"


def test_the_random_document_is_any_other_document(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = numbered_corpus([[[5] * 40] * 3, [[5] * 40] * 2])
    documents = [Document(corpus, number) for number in range(5)]
    source = pairs(corpus, 16)
    counts = np.zeros((5, 5), int)
    starts = []
    for epoch in range(30):
        for a_start, _, b_start, _, random_next in untruncated(monkeypatch, source, epoch):
            if random_next:
                own, other = owner(documents, a_start), owner(documents, b_start)
                counts[own, other] += 1
                starts.append((b_start - documents[other].start) // 5)
    assert np.all(np.diag(counts) == 0)
    others = counts[~np.eye(5, dtype=bool)]
    assert np.all(np.abs(others - others.mean()) < 5 * others.mean() ** 0.5)
    starts = np.bincount(starts, minlength=40)
    assert np.all(np.abs(starts - starts.mean()) < 5 * starts.mean() ** 0.5), "each sentence starts B equally often"


def test_one_pair_in_ten_aims_for_a_random_shorter_length(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = numbered_corpus([[[1] * 500] * 40])  # one-token sentences reach every target exactly
    for share in (0.1, 0.5):
        rows = untruncated(monkeypatch, pairs(corpus, 64, short_probability=share))
        last = [document.end for document in (Document(corpus, number) for number in range(40))]
        lengths = np.array(
            [a_end - a_start + b_end - b_start for a_start, a_end, b_start, b_end, _ in rows
             if min(abs(end - position) for end in last for position in (a_end, b_end)) > 61]
        )  # fmt: skip
        assert lengths.max() == 61
        assert lengths.min() == 2
        expected = share * 59 / 60  # a short target is the full one once in sixty
        assert abs((lengths < 61).mean() - expected) < 4 * (share / len(lengths)) ** 0.5
        short = lengths[lengths < 61]
        assert abs(short.mean() - 31) < 4 * 17 / len(short) ** 0.5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=20), st.integers(5, 125))
def test_truncation_drops_tokens_one_by_one_from_the_longer_segment(lengths: list[tuple[int, int]], most: int) -> None:
    a, b = np.array(lengths).T
    plan = PairPlan(np.full(len(a), 1000), 1000 + a, np.full(len(a), 5000), 5000 + b, np.zeros(len(a), bool))
    cut = text._truncate(plan, most, np.random.default_rng(0))
    for row, (a_length, b_length) in enumerate(lengths):
        while a_length + b_length > most:
            if a_length > b_length:
                a_length -= 1
            else:
                b_length -= 1
        assert cut.a_end[row] - cut.a_start[row] == a_length > 0
        assert cut.b_end[row] - cut.b_start[row] == b_length > 0
        assert cut.a_start[row] >= 1000
        assert cut.a_end[row] <= plan.a_end[row]
        assert cut.b_start[row] >= 5000
        assert cut.b_end[row] <= plan.b_end[row]


def test_truncation_takes_front_and_back_alike() -> None:
    rows = 2000
    zeros = np.zeros(rows, int)
    cut = text._truncate(PairPlan(zeros, zeros + 60, zeros, zeros + 60, zeros > 0), 60, np.random.default_rng(0))
    for front in (cut.a_start, cut.b_start):
        assert abs(front.mean() - 15) < 4 * (30 * 0.25 / rows) ** 0.5
        assert front.std() == pytest.approx((30 * 0.25) ** 0.5, rel=0.1)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(8, 40), st.integers(0, 5))
def test_pair_rows_are_what_the_plan_says(lengths: list[list[list[int]]], length: int, seed: int) -> None:
    corpus = numbered_corpus(lengths)
    if len(corpus.documents) == 1:
        return
    source = pairs(corpus, length, seed)
    documents = [Document(corpus, number) for number in corpus.documents]
    used = 0
    for index in range(len(source)):
        row = source[index]
        assert all(values.dtype == np.int32 for values in row.values())
        ids, tokens = row["input_ids"], int(row["attention_mask"].sum())
        used += tokens
        assert row["attention_mask"].tolist() == [1] * tokens + [0] * (length - tokens)
        assert ids[0] == SPECIAL.cls
        assert np.all(ids[tokens:] == SPECIAL.pad)
        first, second = np.flatnonzero(ids == SPECIAL.sep)
        assert second == tokens - 1
        assert row["token_type_ids"].tolist() == [0] * (first + 1) + [1] * (second - first) + [0] * (length - tokens)
        a, b = ids[1:first] - FIRST, ids[first + 1 : second] - FIRST
        assert len(a) > 0 < len(b)
        assert np.all(np.diff(a) == 1)
        assert np.all(np.diff(b) == 1)
        a_owner, b_owner = owner(documents, a[0]), owner(documents, b[0])
        assert a[-1] < documents[a_owner].end
        assert b[-1] < documents[b_owner].end
        assert row["next_sentence_label"] == (a_owner != b_owner)
        if a_owner == b_owner:
            assert b[0] > a[-1]
    assert source.token_share() == pytest.approx(used / len(source) / length)


def test_an_epoch_reads_all_text(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = random_corpus(seed=2)
    source = pairs(corpus)
    documents = [Document(corpus, number) for number in corpus.documents]
    want = {position for document in documents for position in range(document.start, document.end)}
    read: list[int] = []
    for a_start, a_end, b_start, b_end, random_next in untruncated(monkeypatch, source):
        read += range(a_start, a_end)
        read += [] if random_next else range(b_start, b_end)
    assert sorted(read) == sorted(want), "as A or as a true next sentence, every token once"
    kept = sum(int(source[index]["attention_mask"].sum()) - 3 for index in range(len(source)))
    assert kept > 0.9 * len(want)


@pytest.mark.parametrize("make", [pairs, packed, stream])
def test_rows_are_a_function_of_seed_and_index(make) -> None:
    corpus = random_corpus(seed=3)
    source, again = make(corpus, seed=4), make(corpus, seed=4)
    epoch = len(source)
    wanted = [0, 5, epoch - 1, epoch, 3 * epoch + 7, 1, 10 * epoch]
    for index in reversed(wanted):
        one = source[index]
        for name, values in again.rows([index]).items():
            np.testing.assert_array_equal(values[0], one[name])
    batch = source.rows(wanted)
    for at, index in enumerate(wanted):
        for name, values in again[index].items():
            np.testing.assert_array_equal(batch[name][at], values)

    def order(source, epoch: int) -> list[bytes]:
        rows = source.rows(range(epoch * len(source), (epoch + 1) * len(source)))
        return [row.tobytes() for row in rows["input_ids"]]

    first = order(source, 0)
    assert first == order(again, 0)
    assert first != order(source, 1)
    assert first != order(make(corpus, seed=5), 0)
    if make is not pairs:
        assert sorted(first) == sorted(order(source, 1)), "an epoch reads the same rows in another order"
    else:
        assert len(set(first) & set(order(source, 1))) < len(first) / 2, "an epoch pairs anew"


def test_all_epochs_have_about_the_same_length() -> None:
    source = pairs(random_corpus(seed=3, documents=150))
    lengths = [len(source.plan(epoch).a_start) for epoch in range(6)]
    assert lengths[0] == len(source)
    assert len(set(lengths)) > 1
    assert max(lengths) < 1.05 * min(lengths)


def test_a_view_reads_its_own_documents_only() -> None:
    corpus = random_corpus(seed=6)
    train, held_out = corpus.split(0.1)
    for view in (train, held_out):
        documents = [Document(corpus, number) for number in view.documents]
        allowed = {position for document in documents for position in range(document.start, document.end)}
        for source in (pairs(view), packed(view), stream(view)):
            ids = source.rows(range(len(source)))["input_ids"]
            assert {int(token) - FIRST for token in np.unique(ids[ids >= FIRST])} <= allowed
            if isinstance(source, RunningText):
                assert {int(token) - FIRST for token in np.unique(ids[ids >= FIRST])} == allowed


def test_pairs_need_two_documents() -> None:
    corpus = numbered_corpus([[[3, 4]] * 3])
    with pytest.raises(JaxptmError, match=r"need two documents at least.*blank lines, or use data.format: packed"):
        pairs(only_documents(corpus, 1, 2))
    with pytest.raises(JaxptmError, match="no text in this part of the corpus"):
        pairs(corpus.split(0)[1])


def greedy(corpus: Corpus, capacity: int) -> list[tuple[int, int]]:
    """Rows of whole sentences in plain Python: starts and ends in the stream."""
    rows: list[tuple[int, int]] = []
    for first, last in corpus.ranges:
        sentence = corpus.document_ends[first - 1] if first else 0
        start = end = int(corpus.sentence_ends[sentence - 1]) if sentence else 0
        for sentence_end in corpus.sentence_ends[sentence : corpus.document_ends[last - 1]].tolist():
            if sentence_end - start > capacity and (sentence_end - end > capacity or end > start):
                if end > start:
                    rows.append((start, end))
                start = end
                while sentence_end - start > capacity:
                    rows.append((start, start + capacity))
                    start += capacity
            end = sentence_end
        rows.append((start, end))
    return rows


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(8, 60))
def test_packed_rows_hold_the_stream_in_whole_sentences(lengths: list[list[list[int]]], length: int) -> None:
    corpus = numbered_corpus(lengths)
    source = packed(corpus, length, separate_documents=True)
    plan = source.plan()
    assert list(zip(plan.start.tolist(), plan.end.tolist(), strict=True)) == greedy(corpus, length - 2)
    rows = source.rows(range(len(source)))
    used = rows["attention_mask"].sum(axis=1)
    read = []
    for at in np.argsort([min(row[row >= FIRST]) if np.any(row >= FIRST) else 0 for row in rows["input_ids"]]):
        ids, segments, end = rows["input_ids"][at], rows["segment_ids"][at], used[at]
        assert rows["attention_mask"][at].tolist() == [1] * end + [0] * (length - end)
        assert (ids[0], ids[end - 1]) == (SPECIAL.cls, SPECIAL.sep)
        tokens = ids[1 : end - 1]
        read.append(tokens)
        # Segments change after a separator and nowhere else.
        number, want = 1, []
        for token in tokens:
            want.append(number)
            number += token == SPECIAL.sep
        assert segments.tolist() == [1, *want, want[-1]] + [0] * (length - end)
    if not any(np.all(tokens < FIRST) for tokens in read):  # a lone separator has no place of its own to sort by
        assert np.concatenate(read).tolist() == np.concatenate(corpus.shards).tolist()
    assert sum(map(len, read)) == corpus.token_count
    assert source.token_share() == pytest.approx(used.mean() / length)


def sliced(corpus: Corpus, length: int, pad: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Rows of the stream in plain Python: tokens, mask and segments."""
    tokens = np.concatenate(corpus.shards).tolist()
    rows = []
    for first, last in corpus.ranges.tolist():
        documents = [Document(corpus, number) for number in range(first, last)]
        text = tokens[documents[0].start : documents[-1].end + 1]
        owners = [number for number, document in enumerate(documents) for _ in range(document.start, document.end + 1)]
        for start in range(0, len(text), length):
            ids, within = text[start : start + length], owners[start : start + length]
            padding = length - len(ids)
            segments = [1 + number - within[0] for number in within]
            rows.append((ids + [pad] * padding, [1] * len(ids) + [0] * padding, segments + [0] * padding))
    return rows


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(8, 60), st.sampled_from([SPECIAL.pad, SPECIAL.sep]), st.sampled_from([0, 0.3]))
def test_stream_rows_hold_every_token_once_in_order(
    lengths: list[list[list[int]]], length: int, pad: int, held_out: float
) -> None:
    """With padding of its own, and with the separator in its place as for GPT-2."""
    corpus = numbered_corpus(lengths)
    if len(corpus.documents) >= 4:
        corpus = corpus.split(held_out)[0]
    source = TokenStream(corpus, pad, length, seed=0, separate_documents=True)
    want = sliced(corpus, length, pad)
    rows = source.rows(range(len(source)))
    assert list(rows) == ["input_ids", "attention_mask", "segment_ids"]
    assert all(values.dtype == np.int32 for values in rows.values())
    assert sorted(zip(*(values.tolist() for values in rows.values()), strict=True)) == sorted(want)
    plan = source.plan()
    walked = [corpus.tokens(*place).tolist() for place in zip(plan.start.tolist(), plan.end.tolist(), strict=True)]
    assert walked == [ids[: sum(mask)] for ids, mask, _ in want], "in the order of the corpus"
    assert source.token_share() == pytest.approx(corpus.token_count / len(want) / length)


@pytest.mark.parametrize("make", [packed, stream])
def test_running_text_has_segments_only_when_asked(make) -> None:
    assert set(make(random_corpus())[0]) == {"input_ids", "attention_mask"}
