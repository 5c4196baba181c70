from __future__ import annotations

import gzip
import io
import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpora import english
from fsspec.implementations.memory import MemoryFileSystem

from jaxptm.config import TextData
from jaxptm.data import sources
from jaxptm.data.corpus import Corpus
from jaxptm.data.prepare import prepare
from jaxptm.data.sources import DOCUMENT_END, Source, find_sources, read_blocks, split_dataset
from jaxptm.errors import JaxptmError

DOCUMENTS = english(120, seed=5)
TEXTS = ["\n".join(document) for document in DOCUMENTS]


def write(path: Path, texts: list[str] = TEXTS) -> Path:
    """Writes documents in the format that the name tells."""
    if path.suffix == ".parquet":
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=50)
        return path
    if ".jsonl" in path.name:
        content = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()
    else:
        content = "\n\n".join(texts).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.compress(content[:1000]) + zstandard.compress(content[1000:])  # frames follow each other
    path.write_bytes(content)
    return path


def read(path: Path | str, text_field: str = "text") -> list[list[str]]:
    """Documents as lists of lines, without the empty ones."""
    [source] = find_sources(str(path))
    blocks = list(read_blocks(source, text_field))
    assert blocks[-1].endswith(DOCUMENT_END)
    assert all(block.endswith(("\n", DOCUMENT_END)) for block in blocks)
    documents = ["".join(document.split("\r")) for document in "".join(blocks).split(DOCUMENT_END)]
    lines = [[line for line in document.split("\n") if line.strip()] for document in documents]
    return [document for document in lines if document]


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("block", [1, 700, 2**20])
def test_every_format_gives_the_same_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, block: int
) -> None:
    monkeypatch.setattr(sources, "BLOCK", block)
    assert read(write(tmp_path / f"corpus.{suffix}")) == DOCUMENTS


def test_text_is_read_with_any_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n \t\r\n\r\nthree\0x\rfour\n\n\nfive".encode())
    assert read(path) == [["one", "two"], ["three x", "four"], ["five"]]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one\\r\\ntwo\\u0000x"}\r\n\n{"text": null}\n{"text": "a\\n\\n\\nb"}')
    assert read(path) == [["one", "two x"], ["a", "b"]]


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "no", "body": "yes"}')
    assert read(path, "body") == [["yes"]]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["no"], "body": ["yes"]}), path)
    assert read(path, "body") == [["yes"]]


def test_globs_lists_and_directories_are_sorted_and_hold_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    names = ["b.txt", "a.jsonl.gz", "deep/c.parquet"]
    for name in names:
        write(tmp_path / name, ["x"])
    (tmp_path / "README.md").write_text("no corpus")

    def found(*patterns: str) -> list[str]:
        return [str(Path(source.name).relative_to(tmp_path)) for source in find_sources([*patterns])]

    assert found(str(tmp_path)) == ["a.jsonl.gz", "b.txt", "deep/c.parquet"]
    assert found(f"{tmp_path}/*.txt", f"{tmp_path}/**/*.*[tz]") == ["b.txt", "a.jsonl.gz", "deep/c.parquet"]
    assert found(f"{tmp_path}/b.txt", f"{tmp_path}/deep/../b.txt") == ["b.txt"]


@pytest.mark.parametrize(
    "pattern", ["{}/none*.txt", "{}/missing.txt", "missing.jsonl", "/no/such/thing", "~/no such name", "data/**/*"]
)
def test_a_pattern_without_a_file_is_named(tmp_path: Path, pattern: str) -> None:
    pattern = pattern.format(tmp_path)
    with pytest.raises(JaxptmError) as error:
        find_sources(pattern)
    assert str(error.value) == f"{pattern}: matches no file."


def test_unknown_kinds_are_named(tmp_path: Path) -> None:
    (tmp_path / "book.pdf").write_bytes(b"")
    for pattern in (f"{tmp_path}/book.pdf", f"{tmp_path}/*"):
        with pytest.raises(JaxptmError, match=r"book.pdf: is not a .txt, .jsonl .* or .parquet file"):
            find_sources(pattern)
    with pytest.raises(JaxptmError, match=r"the directory holds no .txt"):
        find_sources(str(tmp_path))


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "txt.zst"])
def test_text_that_is_not_utf8_is_named_by_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"latin.{suffix}"
    content = b"plain text\n" * 20_000 + b"caf\xe9\n" + b"more\n" * 20_000
    pack = {"txt": bytes, "gz": gzip.compress, "zst": zstandard.compress}[path.suffix[1:]]
    path.write_bytes(pack(content))
    with pytest.raises(JaxptmError, match=r"latin\.txt.*: line 20001: byte 3 of the line \(0xe9\) is not UTF-8"):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"a\.jsonl: line 3: is not JSON"),
        (b'{"id": 1, "title": "x"}', r"a\.jsonl: line 3: has no field 'text' \(data.text_field\), only: id, title"),
        (b'["text"]', r"a\.jsonl: line 3: has no field 'text' .*only: list"),
        (b'{"text": 5}', r"a\.jsonl: line 3: field 'text' holds no text but int"),
        (b'{"text": "caf\xe9"}', r"a\.jsonl: line 3: byte 13 of the line is not UTF-8"),
    ],
)
def test_bad_records_are_named_by_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(JaxptmError, match=message):
        read(path)


@pytest.mark.parametrize("suffix", ["txt.gz", "txt.zst", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("damage", ["half", "empty", "foreign"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str, damage: str) -> None:
    path = write(tmp_path / f"bad.{suffix}")
    content = path.read_bytes()
    path.write_bytes({"half": content[: len(content) // 2], "empty": b"", "foreign": b"plain text\n" * 50}[damage])
    with pytest.raises(JaxptmError, match=rf"bad\.{suffix}: cannot read it, the file may be truncated or damaged"):
        read(path)


def test_columns_of_parquet_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "title": ["x"]}), path)
    with pytest.raises(JaxptmError, match=r"a\.parquet: has no column 'text' \(data.text_field\), only: id, title"):
        read(path)
    with pytest.raises(JaxptmError, match=r"column 'id' holds no text but int"):
        read(path, "id")


def test_datasets_are_read_by_stretches_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(len(TEXTS)))})
    asked = []

    def load_dataset(path: str, name: str | None = None, split: str | None = None) -> datasets.Dataset:
        asked.append((path, name, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "DATASET_ROWS", 50)
    for name, call in {
        "org/name": ("org/name", None, "train"),
        "wiki:en": ("wiki", "en", "train"),
        "org/name:en:test": ("org/name", "en", "test"),
        "org/name::test": ("org/name", None, "test"),
    }.items():
        [whole] = find_sources(name)
        pieces = split_dataset(whole)
        assert asked[-1] == call
        assert [piece.rows for piece in pieces] == [(0, 50), (50, 100), (100, 120)]
        assert len({piece.key for piece in pieces}) == 3
        text = "".join(block for piece in pieces for block in read_blocks(piece, "text"))
        assert [document.split("\n") for document in text.split(DOCUMENT_END) if document] == DOCUMENTS
    with pytest.raises(JaxptmError, match=r"has no column 'body' \(data.text_field\), only: text, id"):
        list(read_blocks(pieces[0], "body"))


def test_a_real_dataset_directory_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `datasets` itself, which takes a relative directory of Parquet files for a dataset's name."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    write(tmp_path / "org" / "name" / "train.parquet")
    source = Source("org/name", "dataset")
    text = "".join(block for piece in split_dataset(source) for block in read_blocks(piece, "text"))
    assert [document.split("\n") for document in text.split(DOCUMENT_END) if document] == DOCUMENTS


def test_an_unknown_dataset_is_named() -> None:
    with pytest.raises(
        JaxptmError, match="nobody/nothing: matches no file, and does not open as a Hugging Face dataset"
    ):
        split_dataset(find_sources("nobody/nothing")[0])


FORMATS = ["txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"]


class Bucket(MemoryFileSystem):
    """Names files and keeps listings as cloud file systems do, and may refuse to list, open or read them."""

    protocol = "bucket"
    version: ClassVar[dict[str, object]] = {}
    listed: ClassVar[dict[str, dict[str, Any]]] = {}
    error: Exception | None = None
    refused = "ls"
    find = fsspec.AbstractFileSystem.find

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("bucket://").strip("/")

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        if self.error and self.refused == "ls":
            raise self.error
        return super().ls(path, detail, **kwargs)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        if self.error and self.refused == "ls":
            raise self.error
        if path not in self.listed:
            self.listed[path] = super().info(path, **kwargs) | self.version
        return self.listed[path]

    def invalidate_cache(self, path: str | None = None) -> None:
        self.listed.clear()

    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        if self.error and self.refused == "open":
            raise self.error
        file = super()._open(path, mode, *args, **kwargs)
        return Breaking(file.getvalue(), self.error) if self.error else file


class Breaking(io.BytesIO):
    """Its connection breaks after 500 bytes, and for good."""

    def __init__(self, content: bytes, error: Exception):
        super().__init__(content)
        self._error = error

    def readinto(self, buffer: Any) -> int:
        if self.tell() >= 500:
            raise self._error
        return super().readinto(memoryview(buffer)[:500])


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> type[Bucket]:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    return Bucket


def upload(path: Path, url: str) -> str:
    fsspec.filesystem(url.partition(":")[0]).pipe_file(url, path.read_bytes())
    return url


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("scheme", ["bucket", "memory", "file"])
def test_urls_are_read_as_files_are(tmp_path: Path, bucket: type[Bucket], scheme: str, suffix: str) -> None:
    path = write(tmp_path / f"corpus.{suffix}")
    url = f"file://{path}" if scheme == "file" else upload(path, f"{scheme}://books/corpus.{suffix}")
    [source] = find_sources(url)
    assert (source.name, source.key, source.size) == (url, url, path.stat().st_size)
    assert source.kind == find_sources(str(path))[0].kind
    assert read(url) == DOCUMENTS


@pytest.mark.parametrize("root", ["bucket://books", "memory://books", "file://{}"])
def test_remote_globs_and_directories_hold_what_local_ones_hold(
    tmp_path: Path, bucket: type[Bucket], root: str
) -> None:
    root = root.format(tmp_path)
    for name in ("b.txt", "a.jsonl.gz", "deep/c.parquet", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        path = write(tmp_path / name, ["x"])
        if not root.startswith("file"):
            upload(path, f"{root}/{name}")

    for pattern in ("", "/", "/*.txt", "/**/*.*[tz]", "/deep", "/b.txt", "/deep/*"):
        remote = [source.name.removeprefix(root) for source in find_sources(root + pattern)]
        local = [source.name.removeprefix(str(tmp_path)) for source in find_sources(f"{tmp_path}{pattern}")]
        assert sorted(remote) == sorted(local), pattern
        assert remote == sorted(remote)
    assert len(find_sources([f"{root}/b.txt", f"{root}/*.txt", root])) == 3
    assert len(find_sources(f"{root}//")) == 3
    for pattern in ("/none*.txt", "/missing.txt", "/missing", "/missing/*.txt"):
        with pytest.raises(JaxptmError, match=rf"^{re.escape(root + pattern)}: matches no "):
            find_sources(root + pattern)
    with pytest.raises(JaxptmError, match=r"README\.md: is not a \.txt"):
        find_sources(f"{root}/*")


def test_the_stamp_of_an_url_changes_with_its_content(bucket: type[Bucket], monkeypatch: pytest.MonkeyPatch) -> None:
    def stamp() -> list[int | str]:
        stamps = [find_sources(pattern)[0].stamp for pattern in ("bucket://books/a.txt", "bucket://books/a.txt")]
        assert stamps[0] == stamps[1]
        return stamps[0]

    files = fsspec.filesystem("bucket")
    files.pipe_file("books/a.txt", b"one")
    before = stamp()
    files.pipe_file("books/a.txt", b"two")
    assert stamp() != before and stamp()[0] == 3
    monkeypatch.setattr(Bucket, "version", {"ETag": '"5f"', "created": "today", "mtime": 1.5})
    assert stamp() == [3, '"5f"']
    monkeypatch.setattr(Bucket, "version", {"ETag": '"5f"', "created": "tomorrow", "mtime": 2.5})
    assert stamp() == [3, '"5f"']
    monkeypatch.setattr(Bucket, "version", {"created": None, "shelf": 1})  # nothing known: all of it counts
    unknown = stamp()
    monkeypatch.setattr(Bucket, "version", {"created": None, "shelf": 2})
    assert stamp() != unknown
    monkeypatch.setattr(Bucket, "version", {"ETag": '"5f"', "size": None})
    assert stamp() == ['"5f"'] and find_sources("bucket://books/a.txt")[0].size == sources.UNKNOWN_SIZE
    assert read("bucket://books/a.txt") == [["two"]]


@pytest.mark.parametrize("suffix", ["txt", "jsonl.gz", "txt.zst", "parquet"])
@pytest.mark.parametrize("refused", ["ls", "open", "read"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError("Access Denied"), "access is refused, check that your credentials allow it: Access Denied"),
        (FileNotFoundError("books"), "matches no file."),
        (ConnectionError("no route to host"), "cannot be read, check the address, .*: no route to host"),
        (TimeoutError(), "cannot be read, check the address, .*: TimeoutError"),
        (RuntimeError("token expired\nlog in"), "cannot be read, .* your credentials: token expired"),
    ],
)
def test_what_a_remote_file_system_refuses_is_named(
    tmp_path: Path,
    bucket: type[Bucket],
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    refused: str,
    error: Exception,
    message: str,
) -> None:
    url = upload(write(tmp_path / f"a.{suffix}"), f"bucket://books/a.{suffix}")
    monkeypatch.setattr(Bucket, "error", error)
    monkeypatch.setattr(Bucket, "refused", refused)
    with pytest.raises(JaxptmError, match=rf"^{url}: {message}$"):
        read(url)
    if refused == "ls":  # which fsspec's `glob` and `find` would pass over
        for pattern in ("bucket://books/*.txt", "bucket://books"):
            with pytest.raises(JaxptmError, match=rf"^{re.escape(pattern)}: {message}$"):
                find_sources(pattern)


@pytest.mark.parametrize("suffix", ["txt.gz", "txt.zst", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("damage", ["half", "empty", "foreign"])
def test_damaged_remote_files_are_named(tmp_path: Path, bucket: type[Bucket], suffix: str, damage: str) -> None:
    path = write(tmp_path / f"bad.{suffix}")
    content = path.read_bytes()
    path.write_bytes({"half": content[: len(content) // 2], "empty": b"", "foreign": b"plain text\n" * 50}[damage])
    url = upload(path, f"bucket://books/bad.{suffix}")
    with pytest.raises(JaxptmError, match=rf"^{url}: cannot read it, the file may be truncated or damaged: "):
        read(url)


def test_remote_text_that_is_not_utf8_is_named_by_line(tmp_path: Path, bucket: type[Bucket]) -> None:
    (tmp_path / "a.txt").write_bytes(b"plain\ncaf\xe9\n")
    url = upload(tmp_path / "a.txt", "bucket://books/a.txt")
    with pytest.raises(JaxptmError, match=rf"^{url}: line 2: byte 3 of the line \(0xe9\) is not UTF-8"):
        read(url)


@pytest.mark.parametrize(
    ("scheme", "module", "package"),
    [("gs", "gcsfs", "gcsfs"), ("s3", "s3fs", "s3fs"), ("https", "fsspec.implementations.http", "aiohttp")],
)
def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(JaxptmError) as error:
        find_sources(f"{scheme}://bucket/*.txt")
    message = f"{scheme}://bucket/*.txt: needs a driver that is not installed: pip install {package}."
    assert str(error.value) == message


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(JaxptmError, match=r"^nowhere://a\.txt: cannot be read, .*: Protocol not known: nowhere"):
        find_sources("nowhere://a.txt")


@pytest.mark.parametrize("name", ["C://a.txt", "C:\\a.txt", "zip://a.txt::file:///books.zip"])
def test_drive_letters_and_chains_are_no_urls(name: str) -> None:
    with pytest.raises(JaxptmError) as error:
        find_sources(name)
    assert str(error.value) == f"{name}: matches no file."


def vocabulary(path: Path) -> str:
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.!?"]))
    return str(path)


def prepare_by_two(url: str, directory: Path, tokenizer: str) -> tuple[list[int], list[str]]:
    """The tokens that two processes make of an URL's text, and what the progress says."""
    said: list[str] = []
    data = TextData(files=url, tokenizer=tokenizer)
    prepare(data, directory, workers=2, progress=lambda share, message: said.append(message))
    return [int(token) for shard in Corpus.open(directory).shards for token in shard], said


def test_two_processes_prepare_an_url(tmp_path: Path) -> None:
    tokenizer = vocabulary(tmp_path / "vocab.txt")
    (tmp_path / "books").mkdir()
    for number, suffix in enumerate(FORMATS):
        write(tmp_path / "books" / f"{number}.{suffix}", TEXTS[number * 10 : number * 10 + 10])
    local, _ = prepare_by_two(f"{tmp_path}/books", tmp_path / "local", tokenizer)
    remote, said = prepare_by_two(f"file://{tmp_path}/books/*", tmp_path / "remote", tokenizer)
    assert remote == local and len(said) == len(FORMATS)
    again, said = prepare_by_two(f"file://{tmp_path}/books/*", tmp_path / "remote", tokenizer)
    assert again == local and not said
    write(tmp_path / "books" / "0.txt", TEXTS[:11])
    again, said = prepare_by_two(f"file://{tmp_path}/books/*", tmp_path / "remote", tokenizer)
    assert len(again) > len(local)
    assert [line.partition(": ")[0] for line in said] == [
        "6 of 7 sources were done before",
        f"file://{tmp_path}/books/0.txt",
    ]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a server of `tmp_path`."""
    pytest.importorskip("aiohttp", reason="fsspec reads the web with aiohttp")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_the_web_is_read(tmp_path: Path, web: str) -> None:
    tokenizer = vocabulary(tmp_path / "vocab.txt")
    (tmp_path / "books").mkdir()
    for number, suffix in enumerate(FORMATS):
        write(tmp_path / "books" / f"{number}.{suffix}", TEXTS)
        assert read(f"{web}/books/{number}.{suffix}") == DOCUMENTS
    assert read(f"{web}/books/0.txt?download=true") == DOCUMENTS
    names = [f"{web}/books/{number}.{suffix}" for number, suffix in enumerate(FORMATS)]
    for pattern in ("/books", "/books/", "/books/*"):
        assert [source.name for source in find_sources(web + pattern)] == names
        assert find_sources(web + pattern)[0].size == (tmp_path / "books" / "0.txt").stat().st_size
    local, _ = prepare_by_two(f"{tmp_path}/books", tmp_path / "local", tokenizer)
    remote, said = prepare_by_two(f"{web}/books", tmp_path / "remote", tokenizer)
    assert remote == local and len(said) == len(FORMATS)
    assert not prepare_by_two(f"{web}/books", tmp_path / "remote", tokenizer)[1]
    for pattern in ("/books/none.txt", "/none", "/none/*.txt"):
        with pytest.raises(JaxptmError, match=rf"^{re.escape(web + pattern)}: matches no file"):
            find_sources(web + pattern)
    with pytest.raises(JaxptmError, match=r"^http://127\.0\.0\.1:1/a\.txt: matches no file that can be read: Connect"):
        find_sources("http://127.0.0.1:1/a.txt")
