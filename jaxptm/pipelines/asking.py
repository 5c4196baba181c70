"""Many inputs asked one after the other: from arguments, files and standard input, bad ones set aside."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from jaxptm.data.table import delimited_rows, filled_lines, read_table, read_text, wrong_fields
from jaxptm.pipelines import pipeline, pipeline_kind
from jaxptm.types import JaxptmError

CHUNK = 128
"""Inputs that are answered before the next ones are read."""
FILES = r"\S+\.(txt|((csv|tsv|jsonl|json)(\.gz)?)|parquet)"
"""Names of files, which are no texts."""
SET_BY_INPUT = ("self", "inputs", "question", "context", "first")
"""Arguments of pipelines that are no options."""


class Input(NamedTuple):
    """What is asked, or what is wrong with it, and where it stands."""

    where: str
    value: str | dict[str, str] | JaxptmError


class Answer(NamedTuple):
    """What a model says to an input, or why it does not, as plain JSON values and as lines for people to read."""

    input: Input
    output: Any
    lines: Sequence[str]


def ask(
    task: str, path: str | os.PathLike[str], inputs: Iterable[Input], options: Mapping[str, Any]
) -> Iterator[Answer]:
    """Answers inputs in their order, some at a time.

    Args:
        path: of the model.
        options: arguments of the pipeline.

    Yields:
        An answer for each input; where one cannot be answered, its `output` is the error.

    Raises:
        JaxptmError: there is no input, the model cannot be opened, or all inputs fail for one reason.
    """
    rows = iter(inputs)
    first = list(islice(rows, CHUNK))
    if not first:
        raise JaxptmError("no text given: pass it as arguments, in a file, or on standard input.")
    model = pipeline(task, path)
    done = 0
    while first:
        yield from _answers(model, first, done, options)
        done += len(first)
        first = list(islice(rows, CHUNK))


def read_inputs(task: str, arguments: Sequence[str], columns: str | None = None) -> Iterator[Input]:
    """Inputs of a task from texts and files, or where there are none from standard input.

    Args:
        arguments: texts, or paths of files that exist: tables (`.csv`, `.tsv`, `.parquet`), `.jsonl`, `.json` (an
            array), and else a text a line.
        columns: names of columns or keys to take instead of the task's own, parted by commas.

    Raises:
        JaxptmError: an unknown task, a file cannot be read, or has no such columns.
    """
    kind = pipeline_kind(task)
    names = kind.fields if columns is None else tuple(name.strip() for name in columns.split(","))
    if not kind.needed <= len(names) <= len(kind.fields):
        raise JaxptmError(f"--columns: {task} takes {' and '.join(kind.fields[: kind.needed])}.")
    if not arguments:
        for number, line in enumerate(sys.stdin, 1):
            if line.strip():
                yield Input(f"line {number}", _of_line(kind, names, line.rstrip("\r\n")))
    if kind.reads_files:
        yield from (Input(argument, argument) for argument in arguments)
        return
    for number, argument in enumerate(arguments, 1):
        if not _is_file(argument):
            if columns is not None or re.fullmatch(FILES, argument) or _is_directory(argument):
                raise JaxptmError(f"{argument}: there is no such file.")
            yield Input(f"input {number}", _of_line(kind, names, argument))
        elif argument.endswith((".csv", ".tsv", ".csv.gz", ".tsv.gz")):
            yield from _of_delimited(kind, names, Path(argument))
        elif argument.endswith((".json", ".json.gz")):
            yield from _of_array(kind, names, argument)
        elif argument.endswith((".conll", ".conllu")):
            raise JaxptmError(f"{argument}: holds tags beside its words; give plain texts, one a line.")
        elif argument.endswith(".parquet"):
            table = read_table(argument)
            cells = {
                name: table.column(name) for name in names if name in table.columns or name in names[: kind.needed]
            }
            for at in range(len(table)):
                record = {name: values[at] for name, values in cells.items()}
                yield Input(table.where(at), _of_record(kind, names, record))
        else:
            json_lines = argument.endswith((".jsonl", ".jsonl.gz"))
            for line_number, line in filled_lines(read_text(Path(argument))):
                yield Input(f"{argument}:{line_number}", _of_line(kind, names, line, json_lines))


def parse_options(task: str, options: Sequence[str]) -> dict[str, Any]:
    """Arguments of a task's pipeline from `name=value`.

    Raises:
        JaxptmError: there is no such argument, or it is written otherwise.
    """
    arguments = inspect.signature(pipeline_kind(task).__call__, eval_str=True).parameters
    known = {name: argument.annotation for name, argument in arguments.items() if name not in SET_BY_INPUT}
    parsed = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise JaxptmError(f"--option {option}: write it as name=value.")
        if name not in known:
            raise JaxptmError(f"--option {name}: {task} has no such argument, only {', '.join(known)}.")
        try:
            parsed[name] = _value(known[name], value)
        except ValueError:
            expected = inspect.formatannotation(known[name])
            raise JaxptmError(f"--option {option}: expected {expected}.") from None
    return parsed


def _value(kind: Any, text: str) -> Any:
    """What the text is as YAML or, where `kind` takes no such value, itself; a ValueError where it takes neither."""
    accepts = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return accepts.validate_python(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError):
        return accepts.validate_python(text)


def _answers(model: Any, rows: Sequence[Input], done: int, options: Mapping[str, Any]) -> Iterator[Answer]:
    good = [row for row in rows if not isinstance(row.value, JaxptmError)]
    try:
        said: list[Any] = _said(model, [row.value for row in good], done, options)
    except JaxptmError:
        said = []
        for at, row in enumerate(good):  # one by one, to tell which it is
            try:
                said += _said(model, [row.value], done + at, options)
            except JaxptmError as error:
                said.append(error)
        messages = {str(output) for output in said if isinstance(output, JaxptmError)}
        if len(messages) == 1 and all(isinstance(output, JaxptmError) for output in said):
            raise said[0] from None
    outputs = iter(said)
    for row in rows:
        output = row.value if isinstance(row.value, JaxptmError) else next(outputs)
        if isinstance(output, JaxptmError):
            yield Answer(row, output, [])
        else:
            plain = output.tolist() if hasattr(output, "tolist") else output
            yield Answer(row, plain, list(model.lines(row.value, output)))


def _said(model: Any, values: list[Any], done: int, options: Mapping[str, Any]) -> list[Any]:
    if not values:
        return []
    # So that what is drawn does not depend on how many are asked at a time.
    place = {"first": done} if "first" in inspect.signature(model.__call__).parameters else {}
    results = model(values, **options, **place)
    return [results] if model.bare and len(values) == 1 else list(results)


def _is_file(argument: str) -> bool:
    try:
        return Path(argument).is_file()
    except (OSError, ValueError):  # too long a name, or a zero character: a text
        return False


def _is_directory(argument: str) -> bool:
    try:
        return Path(argument).is_dir() and os.sep in argument
    except (OSError, ValueError):
        return False


def _of_line(kind: Any, names: Sequence[str], line: str, json_lines: bool = False) -> Any:
    if json_lines or line.lstrip().startswith("{"):
        try:
            record = json.loads(line)
        except ValueError as error:
            hint = "" if json_lines else "; a line that begins with { is read as JSON"
            return JaxptmError(f"is not JSON: {error}{hint}.")
        return _of_json(kind, names, record)
    return _of_text(kind, names, line)


def _of_text(kind: Any, names: Sequence[str], text: str) -> Any:
    parts = text.split("\t") if kind.needed > 1 else [text]
    if len(parts) != kind.needed or not parts[0]:
        form = json.dumps(dict.fromkeys(names[: kind.needed], "..."))
        return JaxptmError(
            f"{text[:60]!r} is not {form}" + (", nor two texts parted by a tab." if kind.needed > 1 else ".")
        )
    return _of_record(kind, names, dict(zip(names, parts, strict=False)))


def _of_json(kind: Any, names: Sequence[str], value: Any) -> Any:
    if isinstance(value, dict):
        return _of_record(kind, names, value)
    return _of_text(kind, names, value if isinstance(value, str) else "")


def _of_record(kind: Any, names: Sequence[str], record: Mapping[str, Any]) -> Any:
    given = {}
    for at, (name, field) in enumerate(zip(names, kind.fields, strict=False)):
        value = record.get(name)
        if value is None and at >= kind.needed:
            continue
        if not isinstance(value, str):
            found = f"holds {value!r}" if name in record else f"is missing among {', '.join(record)}"
            return JaxptmError(f"{name!r} {found}, expected text.")
        given[field] = value
    return given if len(given) > 1 else given[kind.fields[0]]


def _of_array(kind: Any, names: Sequence[str], path: str) -> Iterator[Input]:
    try:
        content = json.loads(read_text(Path(path)))
    except ValueError as error:
        raise JaxptmError(f"{path}: is not JSON: {error}; call a file of one JSON object a line .jsonl.") from error
    for at, value in enumerate(content if isinstance(content, list) else [content]):
        yield Input(f"{path}[{at}]", _of_json(kind, names, value))


def _of_delimited(kind: Any, names: Sequence[str], path: Path) -> Iterator[Input]:
    header: list[str] | None = None
    for line, row in delimited_rows(str(path), read_text(path), quoted=".csv" in path.name[-7:]):
        if header is None:
            header = row
            missing = [name for name in names[: kind.needed] if name not in header]
            if missing:
                raise JaxptmError(
                    f"{path}: has no column {missing[0]!r}, only {', '.join(map(repr, header))}; name those to take "
                    "by --columns."
                )
        elif len(row) != len(header):
            yield Input(f"{path}:{line}", JaxptmError(wrong_fields(row, header)))
        else:
            yield Input(f"{path}:{line}", _of_record(kind, names, dict(zip(header, row, strict=True))))
