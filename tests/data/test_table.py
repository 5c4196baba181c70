"""Tables and what is encoded from them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxptm.config import IGNORED
from jaxptm.data.labelled import (
    encode_choices,
    encode_texts,
    encode_words,
    found_labels,
    label_ids,
    label_sets,
    labels_in,
    numbers,
    words_said,
)
from jaxptm.data.table import Table, from_dataset, read_table
from jaxptm.data.tokenizer import train_bpe, train_wordpiece
from jaxptm.types import JaxptmError

SENTENCES = ["The old cat sat on the mat.", "A dog slept under the long log all day."]


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return train_wordpiece(SENTENCES * 4, 90) if request.param == "wordpiece" else train_bpe(SENTENCES * 4, 290)


def written(path: Path, text: str) -> str:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'text,label\n"one, ""two""\nthree",1\nfour,0\n'),
        ("a.csv.gz", '\ufefftext,label\r\n"one, ""two""\nthree",1\r\nfour,0\r\n'),
        ("a.jsonl", '{"text": "one, \\"two\\"\\nthree", "label": "1"}\n\n{"text": "four", "label": "0"}\n'),
    ],
)
def test_files_of_each_kind(name: str, text: str, tmp_path: Path) -> None:
    table = read_table(written(tmp_path / name, text))
    assert table.columns == {"text": ['one, "two"\nthree', "four"], "label": ["1", "0"]}


def test_a_quote_that_is_not_closed_is_told_where_it_is_opened(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'text,label\n"one\nand more",1\n"two,1\nthree,0\nfour,1\n')
    with pytest.raises(JaxptmError, match=r"a\.csv:4: a quote is opened in this row and not closed"):
        read_table(path)


def test_tab_separated_text_keeps_its_quotes(tmp_path: Path) -> None:
    table = read_table(written(tmp_path / "a.tsv", 'text\tlabel\n"one\t1\n\u2028two\r\t0\r\n'))
    assert table.columns == {"text": ['"one', "\u2028two\r"], "label": ["1", "0"]}
    assert table.where(1).endswith("a.tsv:3")


def test_parquet_and_datasets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    columns = {"text": ["a", "b"], "label": [1, 0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert read_table(str(tmp_path / "a.parquet")).columns == columns
    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-X"])),
            "label": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    rows = {"tokens": [["c"], ["a", "b"], ["d"]], "tags": [[0], [0, 1], [1]], "label": [-1, 1, None]}
    made = datasets.Dataset.from_dict(rows, features=features)
    table = from_dataset("x", made)
    assert table.columns == {"tokens": [["a", "b"]], "tags": [["O", "B-X"]], "label": ["yes"]}
    assert table.where(0) == "x:2" and "x: 2 row(s) without a label (-1) are passed over" in caplog.text
    assert from_dataset("x", made, unlabelled=True).columns["label"] == [None, "yes", None]
    with pytest.raises(JaxptmError, match="x: no row has a label"):
        from_dataset("x", made.select([0]))


def test_conll(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nsays VBZ O\n\n\n# SYM O\n"
    table = read_table(written(tmp_path / "a.conll", text))
    assert table.columns["0"] == [["EU", "says"], ["#"]] and table.columns["-1"] == [["B-ORG", "O"], ["O"]]
    assert list(table.rows) == [3, 7]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "a\tb\n1\t2\n3\n", r"a.tsv:3: has 1 fields, expected 2 \(a, b\)"),
        ("a.csv", 'a,b\n"1,2\n', "a.csv:2: "),
        (
            "a.csv",
            "id;text\n1;a\n2;so, it is\n",
            r"a.csv:3: has 2 fields, expected 1 \(id;text\): these seem to be part",
        ),
        ("a.csv", "a,a\n1,2\n", "names a column twice"),
        ("a.csv", "a,b\n", "a.csv: holds no rows"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl:2: is not JSON"),
        ("a.jsonl", '{"a": 1}\n{"b": 1}\n', "a.jsonl:2: has other fields"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: is no JSON object"),
        ("a.conll", "a O\nb\n", "a.conll:2: has 1 columns, the lines before it 2"),
        ("a.doc", "x", r"a.doc: is none of .csv"),
    ],
)
def test_broken_files_name_the_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(JaxptmError, match=message):
        read_table(written(tmp_path / name, text))


def test_other_bad_input(tmp_path: Path) -> None:
    with pytest.raises(JaxptmError, match=r"gone\.csv: there is no such file"):
        read_table(str(tmp_path / "gone.csv"))
    (tmp_path / "latin.tsv").write_bytes(b"a\tb\nx\t\xe9\n")
    with pytest.raises(JaxptmError, match=r"latin\.tsv:2: is not UTF-8"):
        read_table(str(tmp_path / "latin.tsv"))
    table = read_table(written(tmp_path / "a.tsv", "text\tlabel\nx\tgood\ny\tbad\n"))
    with pytest.raises(JaxptmError, match="has no column 'titel', only 'text', 'label'"):
        table.column("titel")
    with pytest.raises(JaxptmError, match=r"a\.tsv:3: the label 'bad' is not one of good, evil"):
        label_ids(table, "label", ["good", "evil"])
    with pytest.raises(JaxptmError, match=r"a\.tsv:2: 'label' holds 'good', expected a number"):
        numbers(table, "label")
    with pytest.raises(JaxptmError, match=r"a\.tsv:2: 'label' holds 'good', expected a list"):
        label_sets(table, "label", ["good"])
    with pytest.raises(JaxptmError, match=r"a\.tsv:2: 'label' holds 'good', expected 0 or 1"):
        label_sets(table, ["label"], ["good"])


def test_labels(tmp_path: Path) -> None:
    assert found_labels([10, 9, "2", True, 3.0]) == ["1", "2", "3", "9", "10"]
    assert found_labels(["b", "a"]) == ["a", "b"]
    lines = '{"l": ["x", "z"], "p": 0, "q": 1, "s": 1.5}\n{"l": [], "p": 1, "q": 1, "s": "2"}\n'
    table = read_table(written(tmp_path / "a.jsonl", lines))
    assert label_sets(table, "l", ["x", "y", "z"]).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert label_sets(table, ["p", "q"], ["p", "q"]).tolist() == [[0, 1], [1, 1]]
    assert label_ids(table, "p", ["1", "0"]).tolist() == [1, 0]
    assert numbers(table, "s").tolist() == [1.5, 2.0] and numbers(table, ["s", "p"]).shape == (2, 2)


def test_texts_are_what_the_tokenizer_says(tokenizer: Any) -> None:
    a, b = SENTENCES, [SENTENCES[1] * 3, "cat"]
    examples = encode_texts(tokenizer, [a, b], 20, np.zeros(2, np.int32))
    rows = np.split(examples.tokens["input_ids"], examples.ends[:-1])
    assert [row.tolist() for row in rows] == tokenizer(a, b, truncation=True, max_length=20)["input_ids"]
    whole = tokenizer(a, b)["input_ids"]
    assert len(rows[0]) == 20 and examples.cut == sum(len(row) > 20 for row in whole) > 0


def test_choices(tokenizer: Any) -> None:
    examples = encode_choices(
        tokenizer, [["cat", "dog"], ["the", "a"]], [["mat", "log"], ["day", "old"]], 30, np.array([1, 0])
    )
    wanted = tokenizer(["cat", "cat", "dog", "dog"], ["the mat", "the day", "a log", "a old"])["input_ids"]
    assert [row.tolist() for row in np.split(examples.tokens["input_ids"], examples.ends[:-1])] == wanted
    assert len(examples) == 2


def test_words_are_the_tokens_of_the_text_that_they_make(tokenizer: Any) -> None:
    """As what is asked later is: byte-level BPE has other tokens for a word behind a space."""
    words = ["The", "old", "cat", "sat"]
    encoded = encode_words(tokenizer, [words], [[0, 1, 2, 3]], 64)
    assert encoded.examples.tokens["input_ids"].tolist() == tokenizer(" ".join(words))["input_ids"]
    marks = encoded.examples.tokens["labels"]
    assert marks[marks != IGNORED].tolist() == [0, 1, 2, 3]


def test_no_word_is_lost_however_long_the_sentence(tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    words = "The old cat sat dog slept under long log day unheardofword \u200b".split(" ")
    sentences = [rng.choice(words, size).tolist() for size in (1, 40, 7, 90)]
    labels = [rng.integers(0, 5, len(sentence)).tolist() for sentence in sentences]
    encoded = encode_words(tokenizer, sentences, labels, 16)
    assert np.diff(encoded.examples.ends, prepend=0).max() <= 16
    rows = np.split(encoded.examples.tokens["labels"], encoded.examples.ends[:-1])
    said = words_said(encoded, [np.where(row == IGNORED, 4, row) for row in rows], list(map(len, sentences)), 9)
    for sentence, (tags, right) in enumerate(zip(said, labels, strict=True)):
        wanted = [9 if (sentence, word) in encoded.silent else tag for word, tag in enumerate(right)]
        assert tags == wanted


def test_a_label_stands_at_the_first_token_of_its_word(tokenizer: Any) -> None:
    sentence = ["The", "unheardofword", "sat"]
    encoded = encode_words(tokenizer, [sentence], [[1, 2, 3]], 64)
    whole = tokenizer(" ".join(sentence))
    assert encoded.examples.tokens["input_ids"].tolist() == whole["input_ids"]
    wanted, before = [], None
    for word in whole.word_ids():
        wanted.append(IGNORED if word is None or word == before else word + 1)
        before = word
    assert encoded.examples.tokens["labels"].tolist() == wanted


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "", "b"], r"rows:2: 'label' holds no label"),
        (["a", None, "b"], r"rows:2: 'label' holds no label"),
        (["a", float("nan"), "b"], r"rows:2: 'label' holds no label"),
        ([["a"], None, ["b"]], r"rows:2: 'label' holds no label"),
        ([["a"], ["b", " "]], r"rows:2: 'label' holds no label"),
        (["a", " a", "b"], r"rows: 'label' holds ' a' and 'a', which differ by spaces alone"),
        (["a", "a"], r"rows: 'label' holds one label, 'a'; there is nothing to tell apart"),
        (["0.25", "4"], r"rows: 'label' holds numbers such as .*; set objective.problem_type=regression"),
        ([0.25, 4.0], r"rows: 'label' holds numbers such as .*; set objective.problem_type=regression"),
    ],
)
def test_labels_that_are_none(labels: list[Any], message: str) -> None:
    table = Table("rows", {"label": labels}, list(range(1, len(labels) + 1)))
    with pytest.raises(JaxptmError, match=message):
        labels_in(table, "label")


@pytest.mark.parametrize(
    ("labels", "found"),
    [([1, 2.0, True], ["1", "2"]), (["b", "a"], ["a", "b"]), ([["x"], [], ["y", "x"]], ["x", "y"])],
)
def test_labels_of_a_column(labels: list[Any], found: list[str]) -> None:
    assert labels_in(Table("rows", {"label": labels}, list(range(len(labels)))), "label") == found
