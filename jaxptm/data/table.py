"""Labelled examples from tables: CSV, TSV, JSONL, Parquet, CoNLL columns and Hugging Face datasets."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxptm.config import IGNORED
from jaxptm.data.examples import Examples
from jaxptm.errors import JaxptmError

log = logging.getLogger("jaxptm")

KINDS = (".csv", ".tsv", ".jsonl", ".parquet", ".conll")
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")


@dataclass(frozen=True)
class Table:
    """Named columns of equal length, and for messages where each row comes from.

    Attributes:
        columns: name -> values: strings, numbers or lists of them.
        rows: of each row, its line or number in `source`.
    """

    source: str
    columns: dict[str, list[Any]]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """The values of a column.

        Raises:
            JaxptmError: there is no such column; those that are there are listed.
        """
        if name not in self.columns:
            raise JaxptmError(f"{self.source}: has no column {name!r}, only {', '.join(map(repr, self.columns))}.")
        return self.columns[name]

    def texts(self, name: str) -> list[str]:
        """The values of a column as strings.

        Raises:
            JaxptmError: no such column, or a cell that holds no text.
        """
        values = self.column(name)
        for at, value in enumerate(values):
            if value is None or isinstance(value, list | dict):
                raise JaxptmError(f"{self.where(at)}: {name!r} holds {value!r}, expected text.")
        return [str(value) for value in values]

    def where(self, at: int) -> str:
        """File and line of a row."""
        return f"{self.source}:{self.rows[at]}"

    def take(self, chosen: Sequence[int]) -> Table:
        """The rows of these indices."""
        columns = {name: [values[i] for i in chosen] for name, values in self.columns.items()}
        return Table(self.source, columns, [self.rows[i] for i in chosen])


def read_table(source: str) -> Table:
    """Reads a file (`.csv`, `.tsv`, `.jsonl`, `.parquet`, `.conll`; also `.gz`), or a dataset by its name.

    `.csv` has commas and quotes (RFC 4180), `.tsv` tabs and no quotes; both begin with the names of their columns.
    `.conll` has a token a line, columns parted by white space, and a blank line between sentences; a row is a sentence,
    its columns are called "0", "1", ... and, for the last, "-1", and `-DOCSTART-` lines are passed over. A dataset is
    named as `name[:config][:split]` and is looked for on the Hugging Face hub; its class labels come as their names.

    Raises:
        JaxptmError: nothing of that name opens, or a line does not fit; the line is named.
    """
    path = Path(source)
    name = path.name.removesuffix(".gz")
    kind = next((kind for kind in KINDS if name.endswith(kind)), None)
    if kind is None or not path.exists():
        if path.exists() or kind is not None or not _DATASET.fullmatch(source):
            reason = f"is none of {', '.join(KINDS)} (or .gz of them)" if path.exists() else "there is no such file"
            raise JaxptmError(f"{source}: {reason}.")
        return _read_dataset(source)
    if kind == ".parquet":
        import pyarrow.parquet

        try:
            columns = pyarrow.parquet.read_table(path).to_pydict()
        except (OSError, ValueError) as error:
            raise JaxptmError(f"{source}: is no Parquet file: {str(error).splitlines()[0]}.") from error
        return Table(source, columns, range(1, 1 + len(next(iter(columns.values()), []))))
    text = read_text(path)
    if kind in (".csv", ".tsv"):
        return read_delimited(source, text, quoted=kind == ".csv")
    return _read_jsonl(source, text) if kind == ".jsonl" else _read_conll(source, text)


def read_delimited(
    source: str,
    text: str,
    *,
    quoted: bool,
    names: Sequence[str] | None = None,
    skip_ragged: bool = False,
) -> Table:
    """A table whose first line names its columns, unless `names` does.

    Args:
        quoted: see `delimited_rows`.
        skip_ragged: pass over rows with too few or too many fields, and say so.

    Raises:
        JaxptmError: a row has more or fewer fields than there are columns, or there is none at all.
    """
    rows: list[list[str]] = []
    lines: list[int] = []
    ragged: list[int] = []
    for line, row in delimited_rows(source, text, quoted=quoted):
        if names is None:
            names = row
        elif len(row) == len(names):
            rows.append(row)
            lines.append(line)
        elif skip_ragged:
            ragged.append(line)
        else:
            raise JaxptmError(f"{source}:{line}: has {len(row)} fields, expected {len(names)} ({', '.join(names)}).")
    if ragged:
        shown = ", ".join(map(str, ragged[:5])) + (" and so on" if len(ragged) > 5 else "")
        log.warning("%s: %d row(s) without all of their fields are passed over: lines %s.", source, len(ragged), shown)
    if not rows or names is None:
        raise JaxptmError(f"{source}: holds no rows.")
    if len(set(names)) < len(names):
        raise JaxptmError(f"{source}: names a column twice: {', '.join(names)}.")
    return Table(
        source, {name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}, lines
    )


def found_labels(values: Iterable[Any]) -> list[str]:
    """The labels that occur, numbers by size and before all else by name."""

    def order(label: str) -> tuple[bool, float, str]:
        number = re.fullmatch(r"-?\d+", label)
        return number is None, float(label) if number else 0.0, label

    return sorted({label_of(value) for value in values}, key=order)


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
    encoded = tokenizer([list(words) for words in sentences], is_split_into_words=True, add_special_tokens=False)
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


def _id(table: Table, at: int, label: str, known: dict[str, int]) -> int:
    if label not in known:
        shown = ", ".join(list(known)[:20])
        raise JaxptmError(f"{table.where(at)}: the label {label!r} is not one of {shown}.")
    return known[label]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, which may begin with a byte order mark or be compressed (`.gz`).

    Raises:
        JaxptmError: it cannot be read, or is no such text; the line is named.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise JaxptmError(f"{path}:{line}: is not UTF-8 text.") from error
    except (OSError, EOFError) as error:
        raise JaxptmError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def delimited_rows(source: str, text: str, *, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Lines and their fields; empty lines are passed over.

    Args:
        quoted: commas part the fields, which may be quoted (RFC 4180); otherwise tabs do, and quotes are characters.

    Raises:
        JaxptmError: a quote is not closed.
    """
    if not quoted:
        yield from ((number, line.split("\t")) for number, line in _lines(text) if line)
        return
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise JaxptmError(f"{source}:{reader.line_num}: {error}.") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, line.removesuffix("\r")


def _read_jsonl(source: str, text: str) -> Table:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in _lines(text):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise JaxptmError(f"{source}:{number}: is not JSON: {error}.") from error
        if not isinstance(record, dict):
            raise JaxptmError(f"{source}:{number}: is no JSON object with named fields.")
        if records and record.keys() != records[0].keys():
            odd = ", ".join(map(repr, sorted(record.keys() ^ records[0].keys())))
            raise JaxptmError(f"{source}:{number}: has other fields than the first row; they differ in {odd}.")
        records.append(record)
        lines.append(number)
    if not records:
        raise JaxptmError(f"{source}: holds no rows.")
    return Table(source, {name: [record[name] for record in records] for name in records[0]}, lines)


def _read_conll(source: str, text: str) -> Table:
    sentences: list[list[list[str]]] = []
    lines: list[int] = []
    open_sentence = False
    width = None
    for number, line in _lines(text):
        fields = line.split()
        if not fields or fields[0] == "-DOCSTART-":
            open_sentence = False
            continue
        width = width or len(fields)
        if len(fields) != width:
            raise JaxptmError(f"{source}:{number}: has {len(fields)} columns, the lines before it {width}.")
        if not open_sentence:
            sentences.append([])
            lines.append(number)
            open_sentence = True
        sentences[-1].append(fields)
    if width is None:
        raise JaxptmError(f"{source}: holds no tokens.")
    columns = {str(i): [[fields[i] for fields in sentence] for sentence in sentences] for i in range(width)}
    return Table(source, {**columns, "-1": columns[str(width - 1)]}, lines)


def _read_dataset(source: str) -> Table:
    import datasets

    name, config, split = [*source.split(":"), "", ""][:3]
    try:
        loaded = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # datasets and huggingface_hub raise their own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JaxptmError(f"{source}: no such file, and no such dataset on the Hugging Face hub: {reason}") from error
    return from_dataset(source, loaded)


def from_dataset(source: str, loaded: Any) -> Table:
    """A `datasets.Dataset` as a table, class labels by their names."""
    columns = {name: list(loaded[name]) for name in loaded.column_names}
    for name, feature in loaded.features.items():
        inner: Any = getattr(feature, "feature", None)
        if hasattr(feature, "int2str"):
            columns[name] = [value if value < 0 else feature.int2str(value) for value in columns[name]]
        elif hasattr(inner, "int2str"):
            columns[name] = [[inner.int2str(value) for value in values] for values in columns[name]]
    return Table(source, columns, range(1, len(loaded) + 1))
