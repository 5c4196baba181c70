"""What predictions are worth: the figures of the benchmarks, as shares of 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int


def one_label(logits: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"]) -> dict[str, float]:
    """`accuracy`, `f1` (of label 1 where there are two; else `macro_f1`) and `matthews_correlation`, 0 if undefined."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    said = logits.argmax(axis=1)
    two = logits.shape[1] == 2
    known = None if two else list(range(logits.shape[1]))
    return {
        "accuracy": float(np.mean(said == labels)),
        "f1" if two else "macro_f1": float(
            f1_score(labels, said, labels=known, average="binary" if two else "macro", zero_division=0)
        ),
        "matthews_correlation": float(matthews_corrcoef(labels, said)) if len({*labels, *said}) > 1 else 0.0,
    }


def several_labels(logits: Float[np.ndarray, "N K"], labels: Int[np.ndarray, "N K"]) -> dict[str, float]:
    """`accuracy` (all labels of an example right), `micro_f1`, `macro_f1`; a label is said if its logit is above 0."""
    from sklearn.metrics import f1_score

    said = (logits > 0).astype(int)
    return {
        "accuracy": float(np.mean(np.all(said == labels, axis=1))),
        **{f"{kind}_f1": float(f1_score(labels, said, average=kind, zero_division=0)) for kind in ("micro", "macro")},
    }


def numbers(predictions: Float[np.ndarray, " N"], targets: Float[np.ndarray, " N"]) -> dict[str, float]:
    """`pearson` and `spearman` correlation, 0 where one side is constant, and `mean_squared_error`."""
    from scipy.stats import pearsonr, spearmanr

    x, y = predictions.astype(np.float64), targets.astype(np.float64)
    varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return {
        "pearson": float(pearsonr(x, y).statistic) if varies else 0.0,
        "spearman": float(spearmanr(x, y).statistic) if varies else 0.0,
        "mean_squared_error": float(np.mean((x - y) ** 2)),
    }


def entities(said: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """`precision`, `recall` and `f1` of whole entities by the rules of conlleval, and `accuracy` of words.

    Args:
        said: a tag for each word of each sentence: O, or B-, I-, E- or S- and a type. A word with any other tag, such
            as a part of speech, is an entity by itself.
        right: the same words.
    """
    ours = {(at, *entity) for at, tags in enumerate(said) for entity in chunks(tags)}
    theirs = {(at, *entity) for at, tags in enumerate(right) for entity in chunks(tags)}
    hits = len(ours & theirs)
    precision, recall = hits / max(len(ours), 1), hits / max(len(theirs), 1)
    words = [a == b for tags, wanted in zip(said, right, strict=True) for a, b in zip(tags, wanted, strict=True)]
    return {
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "precision": precision,
        "recall": recall,
        "accuracy": sum(words) / max(len(words), 1),
    }


PLACES = ("B", "I", "E", "S")
"""Where in an entity a word stands: at its beginning, inside, at its end, or alone."""


def chunks(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, first word, last word + 1) of each entity.

    An entity ends where another begins, the type changes, or O comes; an I- that continues nothing begins one
    (Tjong Kim Sang & De Meulder 2003, conlleval).
    """
    start, kind = 0, None
    before = "O"
    for at, tag in enumerate([*tags, "O"]):
        place, _, name = tag.partition("-")
        if tag != "O" and place not in PLACES:
            place, name = "S", tag
        goes_on = kind is not None and place in ("I", "E") and name == kind and before not in ("E", "S")
        if kind is not None and not goes_on:
            yield kind, start, at
            kind = None
        if kind is None and place != "O":
            start, kind = at, name
        before = place


def choices(logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> dict[str, float]:
    """`accuracy`."""
    return {"accuracy": float(np.mean(logits.argmax(axis=1) == labels))}


def transcripts(said: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """`wer` and `cer`: substitutions, deletions and insertions of words and of characters over the right ones' count.

    Over all utterances together, as jiwer counts.
    """
    import jiwer

    words, characters = jiwer.process_words(list(right), list(said)), jiwer.process_characters(list(right), list(said))
    return {"wer": float(words.wer), "cer": float(characters.cer)}
