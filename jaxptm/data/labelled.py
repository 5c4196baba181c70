"""Labels and examples of the rows of a table, and back from predictions to its words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxptm.config import IGNORED
from jaxptm.data.examples import Examples
from jaxptm.data.table import Table
from jaxptm.errors import JaxptmError


def found_labels(values: Iterable[Any]) -> list[str]:
    """The labels that occur, numbers by size and before all else by name."""

    def order(label: str) -> tuple[bool, float, str]:
        number = re.fullmatch(r"-?\d+", label)
        return number is None, float(label) if number else 0.0, label

    return sorted({label_of(value) for value in values}, key=order)


def labels_in(table: Table, name: str) -> list[str]:
    """The labels of a column of labels, or of lists of them.

    Raises:
        JaxptmError: one is missing, two differ by spaces alone, there is only one, or they are numbers to be estimated.
    """
    column = table.column(name)
    several = any(isinstance(cell, list) for cell in column)
    cells = [cell if isinstance(cell, list) else [cell] for cell in column]
    for at, labels in enumerate(cells):
        if (several and not isinstance(column[at], list)) or not all(map(_is_label, labels)):
            raise JaxptmError(f"{table.where(at)}: {name!r} holds no label; leave that row out, or label it.")
    found = found_labels(label for labels in cells for label in labels)
    by_text: dict[str, str] = {}
    for label in found:
        if by_text.setdefault(label.strip(), label) != label:
            first = by_text[label.strip()]
            raise JaxptmError(f"{table.source}: {name!r} holds {first!r} and {label!r}, which differ by spaces alone.")
    if len(found) < 2:
        raise JaxptmError(f"{table.source}: {name!r} holds one label, {found[0]!r}; there is nothing to tell apart.")
    if all(re.fullmatch(r"-?\d*\.?\d+", label) for label in found) and any("." in label for label in found):
        raise JaxptmError(
            f"{table.source}: {name!r} holds numbers such as {found[0]}; set objective.problem_type=regression and "
            "train.metric=spearman, or name them all in data.labels to take them for classes."
        )
    return found


def label_ids(table: Table, name: str, labels: Sequence[str]) -> np.ndarray:
    """[N] int32: a label's place in `labels`.

    Raises:
        JaxptmError: a label is not among them.
    """
    known = {label: i for i, label in enumerate(labels)}
    return np.array([_id(table, at, label_of(v), known) for at, v in enumerate(table.column(name))], np.int32)


def label_sets(table: Table, names: str | Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """[N, K] int32 of 0 and 1, from a column that lists labels, or from a column of 0 and 1 for each.

    Raises:
        JaxptmError: a label is unknown, or a cell holds something else.
    """
    marks = np.zeros((len(table), len(labels)), np.int32)
    if isinstance(names, str):
        known = {label: i for i, label in enumerate(labels)}
        for at, cell in enumerate(table.column(names)):
            if not isinstance(cell, list):
                raise JaxptmError(f"{table.where(at)}: {names!r} holds {cell!r}, expected a list of labels.")
            for label in cell:
                marks[at, _id(table, at, label_of(label), known)] = 1
        return marks
    for i, name in enumerate(names):
        for at, cell in enumerate(table.column(name)):
            if label_of(cell) not in ("0", "1"):
                raise JaxptmError(f"{table.where(at)}: {name!r} holds {cell!r}, expected 0 or 1.")
            marks[at, i] = int(label_of(cell))
    return marks


def numbers(table: Table, names: str | Sequence[str]) -> np.ndarray:
    """[N] float32, or [N, K] of several columns.

    Raises:
        JaxptmError: a cell is no finite number.
    """
    columns = []
    for name in [names] if isinstance(names, str) else names:
        values = []
        for at, cell in enumerate(table.column(name)):
            try:
                value = float(cell)
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value):
                raise JaxptmError(f"{table.where(at)}: {name!r} holds {cell!r}, expected a number.")
            values.append(value)
        columns.append(np.array(values, np.float32))
    return columns[0] if isinstance(names, str) else np.stack(columns, axis=1)


def encode_texts(tokenizer: Any, texts: Sequence[Sequence[str]], max_length: int, labels: np.ndarray) -> Examples:
    """Examples of one text or a pair each, the longer of a pair cut first.

    Args:
        texts: one or two lists of N texts.
    """
    return Examples.of(tokenizer(*map(list, texts), truncation=True, max_length=max_length), {"labels": labels})


def encode_choices(
    tokenizer: Any,
    texts: Sequence[Sequence[str]],
    endings: Sequence[Sequence[str]],
    max_length: int,
    labels: np.ndarray,
) -> Examples:
    """Examples of several rows each: the first text with an ending, which begins as the second text says, if any.

    Args:
        texts: one or two lists of N texts.
        endings: C lists of N texts.
    """
    starts = list(texts[1]) if len(texts) > 1 else [""] * len(texts[0])
    contexts = [context for context in texts[0] for _ in endings]
    seconds = [f"{start} {ending[at]}".strip() for at, start in enumerate(starts) for ending in endings]
    encoded = tokenizer(contexts, seconds, truncation=True, max_length=max_length)
    return Examples.of(encoded, {"labels": labels}, choices=len(endings))


@dataclass(frozen=True)
class LabelledWords:
    """Sentences of labelled words, cut to rows at the borders of words.

    Attributes:
        examples: `labels` at the first token of each word, -100 elsewhere.
        sentence: [N] the sentence of each row, in order.
        words: of each row, how many words it has; those without a token, which no row asks for, are in none.
        silent: (sentence, word) of the words that the tokenizer makes nothing of.
    """

    examples: Examples
    sentence: np.ndarray
    silent: frozenset[tuple[int, int]]


def encode_words(
    tokenizer: Any, sentences: Sequence[Sequence[str]], labels: Sequence[Sequence[int]], max_length: int
) -> LabelledWords:
    """Rows for token classification (Devlin et al. 2019, section 5.3): the first token of a word has its label.

    A sentence that is longer than `max_length` tokens goes on in a further row, so that no word is lost; of a word that
    alone is longer, the end is.
    """
    room = max_length - tokenizer.num_special_tokens_to_add()
    space = "" if _parts_words(tokenizer) else " "
    encoded = tokenizer(
        [[*words[:1], *(space + word for word in words[1:])] for words in sentences],
        is_split_into_words=True,
        add_special_tokens=False,
    )
    rows: list[list[int]] = []
    row_labels: list[list[int]] = []
    sentence: list[int] = []
    silent = set()
    for at, (ids, tags) in enumerate(zip(encoded["input_ids"], labels, strict=True)):
        of_word: dict[int, list[int]] = {}
        for token, word in zip(ids, encoded.word_ids(at), strict=True):
            of_word.setdefault(word, []).append(token)
        silent |= {(at, word) for word in range(len(tags)) if word not in of_word}
        row: list[int] = []
        marks: list[int] = []
        pieces = [(tags[word], tokens[:room]) for word, tokens in sorted(of_word.items())]
        for tag, tokens in [*pieces, (IGNORED, [])]:
            if row and (not tokens or len(row) + len(tokens) > room):
                rows.append(row)
                row_labels.append(marks)
                sentence.append(at)
                row, marks = [], []
            row, marks = row + tokens, marks + [tag] * bool(tokens) + [IGNORED] * (len(tokens) - 1)
    before, after = _frame(tokenizer)
    framed = {
        "input_ids": [[*before, *row, *after] for row in rows],
        "labels": [[*[IGNORED] * len(before), *marks, *[IGNORED] * len(after)] for marks in row_labels],
    }
    return LabelledWords(Examples.of(framed), np.array(sentence, np.int64), frozenset(silent))


def words_said(
    encoded: LabelledWords, tags: Sequence[np.ndarray], lengths: Sequence[int], silent: int
) -> list[list[int]]:
    """What was said of each word of each sentence.

    Args:
        tags: for each row, an id for each of its positions.
        lengths: words of each sentence.
        silent: the id for a word that the tokenizer made nothing of.
    """
    flat = encoded.examples.tokens["labels"]
    said: list[list[int]] = [[] for _ in lengths]
    start = 0
    for sentence, end, row in zip(encoded.sentence, encoded.examples.ends, tags, strict=True):
        asked = flat[start:end] != IGNORED
        said[sentence] += np.asarray(row)[: end - start][asked].tolist()
        start = end
    for sentence, word in sorted(encoded.silent):
        said[sentence].insert(word, silent)
    return said


def _parts_words(tokenizer: Any) -> bool:
    """Whether words given one by one become the tokens of the text that they make; byte-level BPE glues them."""
    text, words = (
        tokenizer(given, is_split_into_words=isinstance(given, list), add_special_tokens=False)["input_ids"]
        for given in ("a a", ["a", "a"])
    )
    return bool(text == words)


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and behind a text."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def label_of(value: Any) -> str:
    """A label as it is named: numbers and truth values as whole numbers."""
    if isinstance(value, bool):
        return str(int(value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_label(value: Any) -> bool:
    return value is not None and value == value and bool(label_of(value).strip())  # NaN is no label


def _id(table: Table, at: int, label: str, known: dict[str, int]) -> int:
    if label not in known:
        shown = ", ".join(list(known)[:20])
        raise JaxptmError(f"{table.where(at)}: the label {label!r} is not one of {shown}.")
    return known[label]
