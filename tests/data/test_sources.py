from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpora import english

from jaxptm.data import sources
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
