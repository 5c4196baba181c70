"""Inputs from arguments, files and standard input: all forms, and what becomes of bad ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from pipeline_pairs import opened, save_small, texts_of_all_lengths

from jaxptm.pipelines import asking
from jaxptm.pipelines.asking import Answer, ask, parse_options, read_inputs
from jaxptm.types import JaxptmError


def values(task: str, *arguments: str | Path, columns: str | None = None) -> list[Any]:
    return [given.value for given in read_inputs(task, [str(argument) for argument in arguments], columns)]


def test_texts_and_objects_and_pairs_parted_by_a_tab(monkeypatch: pytest.MonkeyPatch) -> None:
    assert values("fill-mask", "a [MASK]", "b\t[MASK]") == ["a [MASK]", "b\t[MASK]"]
    assert values("fill-mask", "x" * 5000, "a\0b") == ["x" * 5000, "a\0b"]
    pair = {"question": "who", "context": "a cat"}
    assert values("question-answering", json.dumps(pair), "who\ta cat") == [pair, pair]
    couple = {"text": "one", "text_pair": "two"}
    assert values("text-classification", json.dumps(couple), "one") == [couple, "one"]
    monkeypatch.setattr("sys.stdin", io.StringIO('one\n\n{"text": "two"}\nthree\r\n'))
    found = list(read_inputs("fill-mask", []))
    assert found == [("line 1", "one"), ("line 3", "two"), ("line 4", "three")]


def test_files_of_each_kind(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"question": "who", "context": "a, cat", "id": "1"},
        {"question": "what", "context": 'the "dog"', "id": "2"},
    ]
    wanted = [{"question": row["question"], "context": row["context"]} for row in rows]
    (tmp_path / "a.csv").write_text('id,question,context\n1,who,"a, cat"\n2,what,"the ""dog"""\n')
    (tmp_path / "a.tsv").write_text('context\tquestion\na, cat\twho\nthe "dog"\twhat\n')
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "a.txt").write_text('who\ta, cat\nwhat\tthe "dog"\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for kind in ("csv", "tsv", "jsonl", "json", "txt", "parquet"):
        assert values("question-answering", tmp_path / f"a.{kind}") == wanted, kind
        if kind != "txt":
            assert values("fill-mask", tmp_path / f"a.{kind}", columns="context") == [w["context"] for w in wanted]
    both = {"text": "who", "text_pair": "a, cat"}
    assert values("text-classification", tmp_path / "a.csv", columns="question,context")[0] == both
    assert len(values("question-answering", tmp_path / "a.csv", tmp_path / "a.tsv")) == 4


def test_json_is_an_array_or_one_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(["a", {"text": "b"}, 3, {"words": "c"}], indent=1))
    found = list(read_inputs("fill-mask", [str(tmp_path / "a.json")]))
    assert [given.value for given in found[:2]] == ["a", "b"]
    assert [given.where for given in found] == [f"{tmp_path}/a.json[{at}]" for at in range(4)]
    assert all(isinstance(given.value, JaxptmError) for given in found[2:])
    (tmp_path / "one.json").write_text('{\n "text": "b"\n}\n')
    assert values("fill-mask", tmp_path / "one.json") == ["b"]
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(JaxptmError, match=r"lines\.json: is not JSON: Extra data.*one JSON object a line \.jsonl"):
        values("fill-mask", tmp_path / "lines.json")


def test_what_is_wrong_with_an_input_is_said_of_it_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n{"words": "b"}\n{"text": 3}\n"c"\n7\n')
    (tmp_path / "a.tsv").write_text("text\tlabel\na\t1\nb\nc\t2\n")
    found = list(read_inputs("fill-mask", [str(tmp_path / "a.jsonl"), str(tmp_path / "a.tsv"), "{not json"]))
    good = [given.value for given in found if not isinstance(given.value, JaxptmError)]
    bad = [(Path(given.where).name, str(given.value)) for given in found if isinstance(given.value, JaxptmError)]
    assert good == ["a", "c", "a", "c"]
    assert [where for where, _ in bad] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "a.jsonl:6", "a.tsv:3", "input 3"]
    for (_, message), part in zip(
        bad,
        (
            "is not JSON",
            "'text' is missing among words",
            "'text' holds 3, expected text",
            "is not",
            "has 1 fields, expected 2 (text, label)",
            "a line that begins with { is read as JSON",
        ),
        strict=True,
    ):
        assert part in message
    with pytest.raises(JaxptmError, match=r"a\.tsv: has no column 'question', only 'text', 'label'"):
        values("question-answering", tmp_path / "a.tsv")
    with pytest.raises(JaxptmError, match="--columns: question-answering takes question and context"):
        values("question-answering", "a", columns="text")
    with pytest.raises(JaxptmError, match="there is no pipeline 'fly'"):
        values("fly", "a")


def test_options_are_the_arguments_of_the_pipeline() -> None:
    said = parse_options("token-classification", ["aggregation_strategy=simple", "stride=8", "ignore_labels=[]"])
    assert said == {"aggregation_strategy": "simple", "stride": 8, "ignore_labels": []}
    assert parse_options("feature-extraction", ["pooling=true"]) == {"pooling": True}
    with pytest.raises(
        JaxptmError, match="fill-mask has no such argument, only top_k, targets, tokenizer_kwargs, batch_size"
    ):
        parse_options("fill-mask", ["stride=8"])
    with pytest.raises(JaxptmError, match="write it as name=value"):
        parse_options("fill-mask", ["top_k"])


def test_bad_rows_are_set_aside_and_the_others_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = opened(tmp_path, "text-classification", "BertForSequenceClassification", num_labels=2)
    texts = texts_of_all_lengths(30, 18)
    wanted = ours(texts)
    texts[7] = "cat " * 60
    texts[20] = "{"
    for chunk in (128, 4):
        monkeypatch.setattr(asking, "CHUNK", chunk)
        answers = list(ask("text-classification", tmp_path, read_inputs("text-classification", texts), {}))
        assert all(isinstance(answer, Answer) for answer in answers)
        failed = {
            answer.input.where: str(answer.output) for answer in answers if isinstance(answer.output, JaxptmError)
        }
        assert list(failed) == ["input 8", "input 21"] and "the model takes 40" in failed["input 8"]
        for at, (answer, right) in enumerate(zip(answers, wanted, strict=True)):
            if at not in (7, 20):
                assert answer.output["label"] == right["label"]
                assert answer.output["score"] == pytest.approx(right["score"], abs=1e-5)
                assert answer.lines[0].startswith(right["label"]) and answer.lines[0].endswith(texts[at])
    with pytest.raises(JaxptmError, match="no text given"):
        list(ask("text-classification", tmp_path, [], {}))
    with pytest.raises(JaxptmError, match="top_k is 0"):  # of all, so it is said once
        list(ask("text-classification", tmp_path, read_inputs("text-classification", texts[:3]), {"top_k": 0}))


@pytest.mark.parametrize(
    ("task", "architecture", "text", "shown"),
    [
        ("token-classification", "BertForTokenClassification", "the cat", "LABEL_"),
        ("feature-extraction", "BertModel", "the cat", "32 numbers:"),
        ("question-answering", "BertForQuestionAnswering", "who\tthe cat sat", "[0:"),
        ("next-sentence", "BertForNextSentencePrediction", "the cat\tsat", "_next"),
    ],
)
def test_results_can_be_read_and_are_plain_json(
    tmp_path: Path, task: str, architecture: str, text: str, shown: str
) -> None:
    save_small(tmp_path, architecture)
    options = {"pooling": False} if task == "feature-extraction" else {}
    for texts in ([text], [text, text]):
        for answer in ask(task, tmp_path, read_inputs(task, texts), options):
            assert json.loads(json.dumps(answer.output)) == answer.output
            assert shown in "\n".join(answer.lines)


def test_names_of_files_are_no_texts(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("Rome NNP B-LOC\n")
    for argument, columns in (
        (tmp_path / "nowhere.csv", None),
        ("revews.jsonl", None),
        ("revews.json", None),
        ("some words", "text"),
        (tmp_path, None),
    ):
        with pytest.raises(JaxptmError, match=r": there is no such file\."):
            list(read_inputs("fill-mask", [str(argument)], columns))
    with pytest.raises(JaxptmError, match=r"a\.conll: holds tags beside its words; give plain texts"):
        list(read_inputs("fill-mask", [str(tmp_path / "a.conll")]))
    texts = ["the end.", "it is in notes.txt"]
    assert [value for _, value in read_inputs("fill-mask", texts)] == texts


def test_only_line_ends_part_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\x0cone\u2028one\r\ntwo\x85two\n")
    assert values("fill-mask", tmp_path / "a.txt") == ["one\x0cone\u2028one", "two\x85two"]
