"""The page that compares runs holds their figures, and no damage to a run gets past it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxptm.report import report
from jaxptm.types import JaxptmError

VOID = {"meta", "path", "use", "link", "br", "rect", "circle"}


class Page(HTMLParser):
    """Rows of tables by their first cell, ids and references; fails where a tag is not closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.rows: dict[str, list[tuple[str, bool]]] = {}
        self._row: list[tuple[str, bool]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.references += [value[1:] for name, value in attrs if name.endswith("href") and value.startswith("#")]
        self.references += re.findall(r"url\(#(.*?)\)", " ".join(str(value) for value in given.values()))
        if tag == "tr":
            self._row = []
        if tag in ("td", "th"):
            self._row.append(("", "best" in given.get("class", "")))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open.pop() == tag
        if tag == "tr" and self._row:
            self.rows.setdefault(self._row[0][0], self._row[1:])

    def handle_data(self, data: str) -> None:
        if self.open and self._row and self.open[-1] in ("td", "th"):
            self._row[-1] = (self._row[-1][0] + data, self._row[-1][1])


def write_run(directory: Path, *, rate: float, loss: float, wer: float, finished: bool = True, **more: Any) -> Path:
    directory.mkdir()
    config = {"model": "<b>ert & co", "optimizer": {"learning_rate": rate, "frozen": []}, "train": {"steps": 2000}}
    config |= {"objective": {"name": "masked-lm"}, "data": {"seed": 0}, "out": "runs/one"} | more
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"step": 1000, "train/loss": 3.0, "train/learning_rate": rate},
        {"step": 2000, "train/loss": 2.0, "train/learning_rate": rate, "eval/loss": loss, "eval/wer": wer},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {
        "finished": True,
        "step": 2000,
        "exported_step": 2000,
        "train": {"loss": 2.0},
        "eval": {"loss": loss, "wer": wer},
        "seconds": 61.5,
        "parameters": 11_000_000,
        "utilisation": 0.5,
        "tokens_per_second": 12_345.6,
        "devices": ["cpu", "cpu"],
        "versions": {"jax": "0.10.2"},
    }
    if finished:
        (directory / "results.json").write_text(json.dumps(results))
    return directory


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "slow", rate=1e-4, loss=2.5, wer=0.25),
        write_run(tmp_path / "fast", rate=1e-3, loss=2.25, wer=0.5),
        write_run(tmp_path / "open", rate=1e-3, loss=4.0, wer=0.75, finished=False),
    ]
    text = report(runs, tmp_path / "report.html").read_text()
    page = Page(text)
    # The lower loss and the lower error rate are ahead.
    assert page.rows["eval/loss"] == [("2.5", False), ("2.25", True), ("4", False)]
    assert not any(best for name, row in page.rows.items() if not name.startswith("eval/") for _, best in row)
    assert page.rows["eval/wer"] == [("0.25", True), ("0.5", False), ("0.75", False)]
    assert [value for value, _ in page.rows["tokens_per_second"]] == ["12,346", "12,346", ""]
    assert [value for value, _ in page.rows["parameters"]] == ["11,000,000", "11,000,000", ""]
    assert [value for value, _ in page.rows["step"]] == ["2,000"] * 3
    assert [value for value, _ in page.rows["devices"]] == ["2 x cpu", "2 x cpu", ""]
    assert [value for value, _ in page.rows["optimizer.learning_rate"]] == ["0.0001", "0.001", "0.001"]
    assert page.rows["model"] == [("<b>ert & co", False)]  # shared by all: one column
    assert f"Not finished: {runs[2]}." in text
    assert text.count("<svg") == 3  # loss, wer, learning rate
    for colour in ("#0072b2", "#d55e00", "#009e73"):
        assert f"stroke: {colour}" in text
    assert len(page.ids) == len(set(page.ids)) and set(page.references) <= set(page.ids)
    assert not re.search(r"(src|href)=\"(https?:)?//", text)  # nothing to fetch
    assert report(runs, tmp_path / "again.html").read_text() == text


def test_one_run_has_all_its_settings(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", rate=1e-4, loss=2.5, wer=0.25)
    page = Page(report([run], tmp_path / "report.html").read_text())
    assert {"model", "optimizer.learning_rate", "optimizer.frozen", "train.steps"} <= page.rows.keys()
    assert page.rows["eval/loss"] == [("2.5", False)]


def test_what_differs_is_shown_to_the_last_digit(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", rate=0.00012345678, loss=2.000001, wer=0.2, flag=True, seed=123456),
        write_run(tmp_path / "two", rate=0.00012345679, loss=2.000002, wer=0.2, flag=1, seed=123456),
    ]
    text = report(runs, tmp_path / "report.html").read_text()
    page = Page(text)
    assert [value for value, _ in page.rows["optimizer.learning_rate"]] == ["0.00012345678", "0.00012345679"]
    assert [value for value, _ in page.rows["flag"]] == ["True", "1"]
    assert [value for value, _ in page.rows["seed"]] == ["123456"]
    assert 'title="2.000001"' in text and 'title="2.000002"' in text


def test_no_run_is_ahead_of_one_with_another_objective_or_before_its_end(tmp_path: Path) -> None:
    def best(name: str, objectives: list[str], finished: bool) -> list[bool]:
        (tmp_path / name).mkdir()
        runs = [
            write_run(
                tmp_path / name / str(at), rate=1, loss=2 - at, wer=1, finished=finished or not at,
                objective={"name": objective},
            )
            for at, objective in enumerate(objectives)
        ]  # fmt: skip
        return [best for _, best in Page(report(runs, tmp_path / f"{name}.html").read_text()).rows["eval/loss"]]

    assert best("same", ["ctc", "ctc"], True) == [False, True]
    assert best("other", ["masked-lm", "ctc"], True) == [False, False]
    assert best("open", ["ctc", "ctc"], False) == [True, False]


def test_names_of_curves_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rate=1, loss=1, wer=1)
    lines = [{"step": step, "train/a_b": 1.0, "train/a/b": 2.0} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(report([run], tmp_path / "report.html").read_text())
    assert len(page.ids) == len(set(page.ids)) and set(page.references) <= set(page.ids)


def test_bad_input(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    report([write_run(tmp_path / "old", rate=1, loss=1, wer=1)], out)
    before = out.read_text()
    names = ("good", "damaged", "torn", "half", "other")
    good, damaged, torn, half, other = (write_run(tmp_path / name, rate=1, loss=1, wer=1) for name in names)
    (half / "results.json").write_text('{"step": 3}')
    (damaged / "results.json").write_text('{"step": ')
    (torn / "metrics.jsonl").write_text("nonsense\n")
    (other / "config.yaml").write_text("name: of another program\n")
    (tmp_path / "empty").mkdir()
    page = tmp_path / "page.html"
    page.write_text("<!doctype html>\n<html><title>mine</title></html>")
    for runs, message in (
        ([], "at least one run"),
        ([good, f"{good}/"], "is named twice"),
        ([good, good / ".." / "good"], "is named twice"),
        ([good, half], "half: config.yaml or results.json is not what a run writes"),
        ([good, other], "other: config.yaml or results.json is not what a run writes"),
        ([good, tmp_path / "nowhere"], r"nowhere: is no run directory, it holds no config.yaml"),
        ([good, tmp_path / "empty"], r"empty: is no run directory"),
        ([good, damaged], "damaged: config.yaml or results.json is damaged"),
        ([good, torn], "metrics.jsonl: line 1 is not a JSON object"),
    ):
        with pytest.raises(JaxptmError, match=message):
            report(runs, out)
    with pytest.raises(JaxptmError, match=r"there is no directory .*absent; make it first"):
        report([good], tmp_path / "absent/report.html")
    for line in ('{"step": Infinity}', '{"step": 1, "train/loss": null}', '{"step": "7"}', "[]"):
        (torn / "metrics.jsonl").write_text(line + "\n")
        with pytest.raises(JaxptmError, match=r"metrics\.jsonl: line 1 is not a JSON object of numbers with a `step`"):
            report([torn], out)
    for wrong in (
        [1],
        {"train": {}, "eval": {}, "versions": None},
        {"train": {}, "eval": {}, "versions": "0.10"},
        {"train": {}, "eval": {"loss": None}},
        {"train": {"loss": "low"}, "eval": {}},
        {"train": {}, "eval": {"loss": [1]}},
    ):
        (half / "results.json").write_text(json.dumps(wrong))
        with pytest.raises(JaxptmError, match=r"half: config\.yaml or results\.json is not what a run writes"):
            report([half], out)
    for taken in (good / "config.yaml", tmp_path / "empty", page):
        with pytest.raises(JaxptmError, match="is there and no page of a report; name another file"):
            report([good], taken)
    (half / "results.json").write_text(json.dumps({"train": {"loss": "nan"}, "eval": {"loss": 1.5}}))
    assert out.read_text() == before and "mine" in page.read_text()
    report([half], out)  # and takes the place of another report
    assert out.read_text() != before
    assert (good / "config.yaml").read_text().startswith("data:")
