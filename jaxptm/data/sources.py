"""Where text comes from: files, globs and directories, here or behind an URL, and Hugging Face datasets.

All are read as a stream of text blocks. URLs (`gs://bucket/books/*.txt.gz`, `s3://...`, `https://...`, `hf://...`) go
through fsspec, which takes credentials and options from where each driver looks for them and from its own configuration
(`FSSPEC_S3='{"anon": true}'`).
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxptm.errors import JaxptmError

DOCUMENT_END = "\0"
"""Ends a document in a text block; within a document lines end with a newline."""
BLOCK = 2**20
"""Characters a block holds, about: what bounds the memory of reading."""
DATASET_ROWS = 50_000
"""Rows of a Hugging Face dataset that make one source."""
UNKNOWN_SIZE = 2**25
"""Bytes that a source is taken for where nothing tells its size."""

_KINDS = {"txt": "text", "jsonl": "jsonl", "parquet": "parquet"}
_FILE = re.compile(r"\.(?:(txt|jsonl)(\.gz|\.zst)?|(parquet))(?:\?.*)?$")  # an URL may end with a query
_URL = re.compile(r"[A-Za-z][\w+.-]+://(?!.*::)")  # neither a drive letter nor one of fsspec's chains
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")
_DRIVERS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "http": "aiohttp", "https": "aiohttp"}
_VERSIONS = "md5Hash ETag etag blob_id Content-MD5 Last-Modified LastModified last_modified mtime created".split()
"""What file systems call that which changes with the content, the surest first."""
_KNOWN = ".txt, .jsonl (both also .gz or .zst) or .parquet"


@dataclass(frozen=True)
class Source:
    """A file, or a stretch of rows of a Hugging Face dataset: what becomes one token shard."""

    name: str
    kind: str
    rows: tuple[int, int] | None = None
    fingerprint: str | None = None
    """Changes when a dataset or a remote file does."""
    bytes: int | None = None
    """Of a remote file, where its file system tells."""

    @property
    def remote(self) -> bool:
        """Whether the name is an URL. Its size and fingerprint are those of when it was found: asking takes time."""
        return _URL.match(self.name) is not None

    @property
    def key(self) -> str:
        """What it is, whatever the working directory."""
        if self.kind == "dataset":
            return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"
        return self.name if self.remote else os.path.abspath(self.name)

    @property
    def stamp(self) -> list[int | str]:
        """Changes when the content does: size in bytes and time of modification, or a fingerprint."""
        if self.kind == "dataset" or self.remote:
            return [part for part in (self.bytes, self.fingerprint) if part is not None]
        status = os.stat(self.name)
        return [status.st_size, status.st_mtime_ns]

    @property
    def size(self) -> int:
        """Bytes of the file; a guess for rows of a dataset."""
        if self.kind == "dataset" or self.remote:
            return UNKNOWN_SIZE if self.bytes is None else self.bytes
        return os.stat(self.name).st_size


def find_sources(patterns: str | list[str]) -> list[Source]:
    """The sources that paths, URLs, globs, directories and dataset names stand for, each once.

    Globs and directories are sorted. A dataset comes back as one source; `split_dataset` opens it.

    Raises:
        JaxptmError: a pattern stands for nothing, for a file of an unknown kind, or for what cannot be reached.
    """
    found: dict[str, Source] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for source in _find_remote(pattern) if _URL.match(pattern) else _find(pattern):
            found.setdefault(source.key, source)
    return list(found.values())


def split_dataset(source: Source) -> list[Source]:
    """A dataset as sources of at most `DATASET_ROWS` rows; a file as itself."""
    if source.kind != "dataset":
        return [source]
    dataset = load_dataset(source.name)
    stops = range(0, len(dataset), DATASET_ROWS)
    fingerprint = str(dataset._fingerprint)
    return [Source(source.name, "dataset", (i, min(i + DATASET_ROWS, len(dataset))), fingerprint) for i in stops]


def read_blocks(source: Source, text_field: str) -> Iterator[str]:
    """The text as blocks of about `BLOCK` characters of whole lines; a line, or a record, is held in memory whole.

    Each block ends with a newline or `DOCUMENT_END`, the last one with `DOCUMENT_END`. Carriage returns are line ends
    and NUL characters blanks.

    Raises:
        JaxptmError: what is not UTF-8, JSON or Parquet, has no such field, is damaged or cannot be reached, with the
            file and the line.
    """
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet, "dataset": _read_dataset}
    try:
        yield from readers[source.kind](source, text_field)
    except (EOFError, zlib.error, OSError, ValueError) as error:  # pyarrow's errors derive from the last two
        reason = _reason(error)
        raise JaxptmError(f"{source.name}: cannot read it, the file may be truncated or damaged: {reason}") from error


def _find(pattern: str) -> list[Source]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*") if file.is_file() and _FILE.search(file.name))
        if not files:
            raise JaxptmError(f"{pattern}: the directory holds no {_KNOWN} file.")
    elif path.is_file():
        files = [str(path)]
    else:
        files = sorted(file for file in glob.glob(str(path), recursive=True) if os.path.isfile(file))
    if files:
        return [_file(file) for file in files]
    if glob.has_magic(pattern) or _FILE.search(pattern) or not _DATASET.fullmatch(pattern):
        raise JaxptmError(f"{pattern}: matches no file.")
    return [Source(pattern, "dataset")]


def _find_remote(url: str) -> list[Source]:
    with _network(url):
        fs, path = _file_system(url)
        fs.invalidate_cache()  # what was listed before may have changed since
        if glob.has_magic(url):
            found = fs.glob(path, detail=True)
        elif _FILE.search(url) and (info := fs.info(path))["type"] != "directory":
            found = {path: info}
        else:
            found = {file: info for file, info in fs.find(path, detail=True).items() if _FILE.search(file)}
        found = {file: info for file, info in sorted(found.items()) if info.get("type") != "directory"}
        if not found:
            fs.ls(re.split(r"/[^/]*[*?[]", path)[0])  # raises what `glob` and `find` pass over
        # Web servers list names only.
        infos = {file: info if info.get("size") is not None else fs.info(file) for file, info in found.items()}
        versions = {file: _version(info) or str(fs.checksum(file)) for file, info in infos.items()}
    if not found:
        raise JaxptmError(f"{url}: matches no {_KNOWN} file.")
    head, here = url.removesuffix("/"), path.removesuffix("/")
    sources = []
    for file, info in infos.items():
        name = head.removesuffix(here) + file if head.endswith(here) else fs.unstrip_protocol(file)
        sources.append(replace(_file(name), fingerprint=versions[file], bytes=info.get("size")))
    return sources


def _version(info: dict[str, Any]) -> str | None:
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), None)


def _file(path: str) -> Source:
    match = _FILE.search(path)
    if match is None:
        raise JaxptmError(f"{path}: is not a {_KNOWN} file.")
    return Source(path, _KINDS[match[1] or match[3]])


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of an URL, and what it calls the place."""
    import fsspec

    return fsspec.url_to_fs(url)


@contextmanager
def _network(url: str) -> Iterator[None]:
    """Says plainly what a remote file system refuses; each raises its own kinds."""
    try:
        yield
    except ImportError as error:
        driver = _DRIVERS.get(url.partition(":")[0])
        remedy = f"pip install {driver}" if driver else _reason(error)
        raise JaxptmError(f"{url}: needs a driver that is not installed: {remedy}.") from error
    except FileNotFoundError as error:  # fsspec says so of all that a web server refuses; the cause tells
        cause = f" that can be read: {_reason(error.__cause__)}" if error.__cause__ else "."
        raise JaxptmError(f"{url}: matches no file{cause}") from error
    except PermissionError as error:
        raise JaxptmError(
            f"{url}: access is refused, check that your credentials allow it: {_reason(error)}"
        ) from error
    except Exception as error:
        raise JaxptmError(
            f"{url}: cannot be read, check the address, the network and your credentials: {_reason(error)}"
        ) from error


class _RemoteFile(io.RawIOBase):
    """A file behind an URL, whose errors name it."""

    def __init__(self, url: str, file: Any):
        self._url = url
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _network(self._url):
            return self._file.readinto(buffer)

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_raw(source: Source) -> io.BufferedReader:
    if not source.remote:
        return open(source.name, "rb")
    with _network(source.name):
        fs, path = _file_system(source.name)
        return io.BufferedReader(_RemoteFile(source.name, fs.open(path, "rb")), BLOCK)


@contextmanager
def _open(source: Source) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    match = _FILE.search(source.name)
    compression = match and match[2]
    if compression and source.size == 0:
        raise EOFError("the file is empty")
    with _open_raw(source) as raw:
        if compression == ".gz":
            yield gzip.GzipFile(fileobj=raw)
        elif compression == ".zst":
            import pyarrow

            yield io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"), BLOCK)
        else:
            yield raw


def _reason(error: BaseException) -> str:
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _read_text(source: Source, text_field: str) -> Iterator[str]:
    """Documents part at blank lines; they may be longer than a block."""
    with _open(source) as binary, io.TextIOWrapper(binary, encoding="utf-8") as file:
        first = True
        try:
            while lines := file.readlines(BLOCK):
                if first:
                    lines[0] = lines[0].removeprefix("\ufeff")  # a byte order mark is no text
                    first = False
                if not lines[-1].endswith("\n"):
                    lines[-1] += "\n"
                yield "".join(DOCUMENT_END if line.isspace() else line.replace("\0", " ") for line in lines)
        except UnicodeDecodeError as error:
            raise JaxptmError(_not_utf8(source)) from error
    yield DOCUMENT_END


def _not_utf8(source: Source) -> str:
    with _open(source) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte {error.start} of the line (0x{line[error.start]:02x})"
                place = f"{source.name}: line {number}"
                return f"{place}: {byte} is not UTF-8 text: convert the file, for example with iconv."
    return f"{source.name}: is not UTF-8 text: convert the file, for example with iconv."


def _read_jsonl(source: Source, text_field: str) -> Iterator[str]:
    def texts() -> Iterator[str | None]:
        with _open(source) as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                place = f"{source.name}: line {number}"
                try:
                    record = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                except UnicodeDecodeError as error:
                    byte = f"byte {error.start} of the line"
                    raise JaxptmError(f"{place}: {byte} is not UTF-8 text: convert the file with iconv.") from error
                except json.JSONDecodeError as error:
                    raise JaxptmError(f"{place}: is not JSON: {error.msg} (column {error.colno}).") from error
                if not isinstance(record, dict) or text_field not in record:
                    fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                    raise JaxptmError(f"{place}: has no field {text_field!r} (data.text_field), only: {fields}.")
                text = record[text_field]
                if text is not None and not isinstance(text, str):
                    raise JaxptmError(f"{place}: field {text_field!r} holds no text but {type(text).__name__}.")
                yield text

    return _blocks(texts())


def _read_parquet(source: Source, text_field: str) -> Iterator[str]:
    import pyarrow.parquet

    with _open_raw(source) as raw, pyarrow.parquet.ParquetFile(raw) as file:
        _check_column(source, text_field, file.schema_arrow.names)
        batches = file.iter_batches(batch_size=1000, columns=[text_field])
        yield from _blocks(text for batch in batches for text in _column(source, text_field, batch.column(0)))


def _read_dataset(source: Source, text_field: str) -> Iterator[str]:
    dataset = load_dataset(source.name)
    _check_column(source, text_field, dataset.column_names)
    first, last = source.rows or (0, len(dataset))
    dataset = dataset.select_columns([text_field]).with_format("arrow")
    tables = (dataset[start : min(start + 1000, last)] for start in range(first, last, 1000))
    return _blocks(text for table in tables for text in _column(source, text_field, table.column(0)))


def _check_column(source: Source, text_field: str, names: Iterable[str]) -> None:
    if text_field not in names:
        raise JaxptmError(f"{source.name}: has no column {text_field!r} (data.text_field), only: {', '.join(names)}.")


def _column(source: Source, text_field: str, column: Any) -> list[str | None]:
    texts = column.to_pylist()
    wrong = next((text for text in texts if text is not None and not isinstance(text, str)), None)
    if wrong is not None:
        raise JaxptmError(f"{source.name}: column {text_field!r} holds no text but {type(wrong).__name__}.")
    return texts


def _blocks(texts: Iterable[str | None]) -> Iterator[str]:
    """Documents gathered to blocks."""
    block: list[str] = []
    size = 0
    for text in texts:
        text = (text or "").replace("\0", " ").replace("\r\n", "\n").replace("\r", "\n")
        block += text, DOCUMENT_END
        size += len(text) + 1
        if size >= BLOCK:
            yield "".join(block)
            block, size = [], 0
    yield "".join([*block, DOCUMENT_END])


def load_dataset(name: str) -> Any:
    import datasets

    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        return datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # datasets and huggingface_hub each raise their own kinds
        raise JaxptmError(
            f"{name}: matches no file, and does not open as a Hugging Face dataset (name, name:config or "
            f"name:config:split): {_reason(error)}"
        ) from error
