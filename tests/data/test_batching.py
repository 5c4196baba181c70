from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
from corpora import SPECIAL, random_corpus

from jaxptm.data.batching import batches, one_pass, pad_rows
from jaxptm.data.text import PackedSentences, SentencePairs, TextSource, TokenStream

SOURCES = {
    "pairs": lambda: SentencePairs(random_corpus(), SPECIAL, 32, seed=1),
    "packed": lambda: PackedSentences(random_corpus(), SPECIAL, 32, seed=1, separate_documents=True),
    "stream": lambda: TokenStream(random_corpus(), SPECIAL.pad, 32, seed=1, separate_documents=True),
}


@pytest.fixture(params=SOURCES.values(), ids=SOURCES)
def make(request: pytest.FixtureRequest) -> Callable[[], TextSource[Any]]:
    return request.param


@pytest.fixture
def source(make: Callable[[], TextSource[Any]]) -> TextSource[Any]:
    return make()


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name])


def test_seeking_is_replaying(make: Callable[[], TextSource[Any]], source: TextSource[Any]) -> None:
    steps = 3 * len(source) // 16  # over the ends of epochs
    replayed = list(batches(source, 16, 0, steps))
    assert len(replayed) == steps
    for start in (1, steps // 2, steps - 1):
        sought = list(batches(make(), 16, start, steps - start))
        assert len(sought) == steps - start
        for one, other in zip(replayed[start:], sought, strict=True):
            assert_equal(one, other)
    assert_equal(replayed[7], source.rows(range(7 * 16, 8 * 16)))


def test_seeking_touches_no_earlier_row(source: TextSource[Any], monkeypatch) -> None:
    touched: list[int] = []
    rows = type(source).rows
    monkeypatch.setattr(type(source), "rows", lambda self, indices: touched.extend(indices) or rows(self, indices))
    assert len(list(batches(source, 8, 10**6, 3))) == 3
    assert sorted(touched) == list(range(8 * 10**6, 8 * 10**6 + 24))


def test_hosts_read_their_parts_of_the_same_batches(source: TextSource[Any]) -> None:
    whole = list(batches(source, 12, 5, 10))
    parts = [list(batches(source, 12, 5, 10, rows)) for rows in np.split(np.arange(12), [3, 4])]
    for step, batch in enumerate(whole):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in batch}
        assert_equal(batch, joined)


@pytest.mark.parametrize("hosts", [1, 2])
def test_one_pass_reads_every_row_once(source: TextSource[Any], hosts: int) -> None:
    assert len(source) % 48 not in (0, 47)
    parts = [list(one_pass(source, 48, rows=rows)) for rows in np.split(np.arange(48), hosts)]
    assert {len(part) for part in parts} == {-(-len(source) // 48)}
    ids = np.concatenate([np.concatenate([part[step]["input_ids"] for part in parts]) for step in range(len(parts[0]))])
    mask = np.concatenate(
        [np.concatenate([part[step]["attention_mask"] for part in parts]) for step in range(len(parts[0]))]
    )
    assert len(ids) % 48 == 0
    np.testing.assert_array_equal(ids[: len(source)], source.rows(range(len(source)))["input_ids"])
    assert not ids[len(source) :].any()
    assert not mask[len(source) :].any()
    assert len(list(one_pass(source, 48, limit=2))) == 2


def test_batches_may_be_left_early(source: TextSource[Any]) -> None:
    assert len(list(islice(batches(source, 4, 0, 10**9), 3))) == 3


def test_padding_rows_are_zeros_of_the_same_kind() -> None:
    batch = {"input_ids": np.ones((2, 3), np.int32), "next_sentence_label": np.ones(2, np.int32)}
    padded = pad_rows(batch, 4)
    assert padded["input_ids"].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert padded["next_sentence_label"].tolist() == [1, 1, 0, 0]
    assert all(values.dtype == np.int32 for values in padded.values())
