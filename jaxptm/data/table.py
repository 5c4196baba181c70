"""Tables from files: CSV, TSV, JSONL, Parquet, CoNLL columns and Hugging Face datasets."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
        if not any(columns.values()):
            raise JaxptmError(f"{source}: holds no rows.")
        return Table(source, columns, range(1, 1 + len(next(iter(columns.values()), []))))
    text = read_text(path)
    if kind in (".csv", ".tsv"):
        return read_delimited(source, text, quoted=kind == ".csv")
    return _read_jsonl(source, text) if kind == ".jsonl" else _read_conll(source, text)


def wrong_fields(row: Sequence[str], names: Sequence[str]) -> str:
    """What is wrong with a row that has more or fewer fields than there are columns."""
    said = f"has {len(row)} fields, expected {len(names)} ({', '.join(names)})"
    if len(names) == 1 and ";" in names[0]:
        return f"{said}: these seem to be parted by semicolons; a .csv has commas, save it so."
    return f"{said}."


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
            raise JaxptmError(f"{source}:{line}: {wrong_fields(row, names)}")
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
        raise JaxptmError(f"{path}:{line}: is not UTF-8 text: save it as UTF-8, or convert it with iconv.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise JaxptmError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def delimited_rows(source: str, text: str, *, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Lines and their fields; empty lines are passed over.

    Args:
        quoted: commas part the fields, which may be quoted (RFC 4180); otherwise tabs do, and quotes are characters.

    Raises:
        JaxptmError: a quote is not closed.
    """
    if not quoted:
        lines = (line.removesuffix("\r") for line in text.split("\n"))
        yield from ((number, line.split("\t")) for number, line in enumerate(lines, start=1) if line)
        return
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begun = 1
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
            begun = reader.line_num + 1
    except csv.Error as error:
        if str(error) == "unexpected end of data":
            raise JaxptmError(
                f"{source}:{begun}: a quote is opened in this row and not closed; a quote within a quoted field is "
                'written twice, "".'
            ) from error
        raise JaxptmError(f"{source}:{reader.line_num}: {error}.") from error


def filled_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers, and without the end that Windows gives them."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def json_objects(source: str | Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of JSON lines, with the numbers of these.

    Raises:
        JaxptmError: a line holds something else; it is named.
    """
    for number, line in filled_lines(text):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise JaxptmError(f"{source}:{number}: is not JSON: {error}.") from error
        if not isinstance(record, dict):
            raise JaxptmError(f"{source}:{number}: is no JSON object with named fields.")
        yield number, record


def _read_jsonl(source: str, text: str) -> Table:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, record in json_objects(source, text):
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
    for number, line in enumerate(text.split("\n"), start=1):
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


def from_dataset(source: str, loaded: Any, *, unlabelled: bool = False) -> Table:
    """A `datasets.Dataset` as a table, class labels by their names.

    Data sets of the hub mark by -1 what nobody has labelled (rows of SNLI, test sets of GLUE).

    Args:
        unlabelled: keep such rows, with the label None; otherwise they are passed over, and that is said.

    Raises:
        JaxptmError: no row is left.
    """
    columns = {name: list(loaded[name]) for name in loaded.column_names}
    labelled = np.ones(len(loaded), bool)
    for name, feature in loaded.features.items():
        inner: Any = getattr(feature, "feature", None)
        if hasattr(feature, "int2str"):
            there = [value is not None and value >= 0 for value in columns[name]]
            columns[name] = [
                feature.int2str(value) if ok else None for value, ok in zip(columns[name], there, strict=True)
            ]
            labelled &= there
        elif hasattr(inner, "int2str"):
            columns[name] = [values and [inner.int2str(value) for value in values] for values in columns[name]]
    table = Table(source, columns, range(1, len(loaded) + 1))
    if unlabelled or labelled.all():
        return table
    if not labelled.any():
        raise JaxptmError(f"{source}: no row has a label (all are -1, as in test sets that are kept secret).")
    log.warning("%s: %d row(s) without a label (-1) are passed over.", source, np.count_nonzero(~labelled))
    return table.take(np.flatnonzero(labelled).tolist())
