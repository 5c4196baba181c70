"""Figures against scikit-learn, scipy and the formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from jaxptm import scoring


@settings(deadline=None, max_examples=300)
@given(st.integers(2, 4), st.integers(1, 40), st.integers(0, 10**6))
def test_one_label(labels: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, right = rng.normal(size=(rows, labels)), rng.integers(0, labels, rows)
    figures, said = scoring.one_label(logits, right), logits.argmax(axis=1)
    assert figures["accuracy"] == pytest.approx(metrics.accuracy_score(right, said))

    def f1(label: int) -> float:
        hits = np.sum((said == label) & (right == label))
        return float(2 * hits / max(np.sum(said == label) + np.sum(right == label), 1))

    name, wanted = ("f1", f1(1)) if labels == 2 else ("macro_f1", np.mean([f1(k) for k in range(labels)]))
    assert figures[name] == pytest.approx(wanted)
    # The correlation of Gorodkin 2004 from the covariances of indicator matrices.
    x, y = np.eye(labels)[said], np.eye(labels)[right]
    xy, xx, yy = (np.sum((a - a.mean(0)) * (b - b.mean(0))) for a, b in ((x, y), (x, x), (y, y)))
    assert figures["matthews_correlation"] == pytest.approx(xy / np.sqrt(xx * yy) if xx * yy > 1e-12 else 0.0)


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 40), st.integers(0, 10**6))
def test_numbers(rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    said, right = rng.normal(size=rows), rng.integers(0, 6, rows).astype(float)
    figures = scoring.numbers(said, right)
    if np.ptp(right) == 0:
        assert figures["pearson"] == figures["spearman"] == 0
    else:
        assert figures["pearson"] == pytest.approx(np.corrcoef(said, right)[0, 1])
        ranks = np.corrcoef(stats.rankdata(said), stats.rankdata(right))[0, 1]
        assert figures["spearman"] == pytest.approx(ranks)
    assert figures["mean_squared_error"] == pytest.approx(metrics.mean_squared_error(right, said))


def test_several_labels_on_paper() -> None:
    logits = np.array([[1.0, -1.0, 2.0], [-1.0, -1.0, -3.0], [1.0, 1.0, -1.0]])
    right = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1]])
    figures = scoring.several_labels(logits, right)
    assert figures["accuracy"] == pytest.approx(1 / 3)
    assert figures["micro_f1"] == pytest.approx(2 * 4 / (4 + 6))
    assert figures["macro_f1"] == pytest.approx(np.mean([1.0, 2 / 3, 2 / 3]))


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("B-A I-A O B-B", [("A", 0, 2), ("B", 3, 4)]),
        ("I-A I-A B-A O", [("A", 0, 2), ("A", 2, 3)]),  # IOB1
        ("I-A I-B", [("A", 0, 1), ("B", 1, 2)]),
        ("S-A B-A E-A I-A", [("A", 0, 1), ("A", 1, 3), ("A", 3, 4)]),
        ("O O", []),
        ("E-A E-A", [("A", 0, 1), ("A", 1, 2)]),
        ("DET NOUN NOUN O NN-P", [("DET", 0, 1), ("NOUN", 1, 2), ("NOUN", 2, 3), ("NN-P", 4, 5)]),
    ],
)
def test_entities_of_a_sentence(tags: str, entities: list[tuple[str, int, int]]) -> None:
    assert list(scoring.chunks(tags.split())) == entities


def test_parts_of_speech_are_right_where_they_are_the_same() -> None:
    figures = scoring.entities([["VERB", "NOUN", "ADJ", "DET"]], [["DET", "ADJ", "NOUN", "DET"]])
    assert figures == {"f1": 0.25, "precision": 0.25, "recall": 0.25, "accuracy": 0.25}


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30))
def test_entity_figures_count_whole_entities(pairs: list[tuple[int, int]]) -> None:
    names = ["O", "B-A", "I-A", "B-B", "I-B", "E-A", "S-B"]
    said, right = ([names[i] for i in side] for side in zip(*pairs, strict=True))

    def begun(tags: list[str], at: int) -> bool:
        """conlleval's rule for the start of an entity, tag by tag."""
        tag, before = tags[at], tags[at - 1] if at else "O"
        if tag == "O":
            return False
        return tag[0] in "BS" or before == "O" or before[0] in "ES" or before[2:] != tag[2:]

    def spans(tags: list[str]) -> set[tuple[int, int, str]]:
        starts = [at for at in range(len(tags)) if begun(tags, at)]
        found = set()
        for start in starts:
            end = start + 1
            while end < len(tags) and tags[end] != "O" and not begun(tags, end):
                end += 1
            found.add((start, end, tags[start][2:]))
        return found

    ours, theirs = spans(said), spans(right)
    figures = scoring.entities([said], [right])
    hits = len(ours & theirs)
    assert figures["precision"] == pytest.approx(hits / len(ours) if ours else 0)
    assert figures["recall"] == pytest.approx(hits / len(theirs) if theirs else 0)
    assert figures["f1"] == pytest.approx(2 * hits / (len(ours) + len(theirs)) if hits else 0)
    assert figures["accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(said, right, strict=True)]))
