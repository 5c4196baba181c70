"""Runs side by side, on one HTML page that needs no other file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from jaxptm.checkpoint import is_better
from jaxptm.directories import leaves
from jaxptm.metrics import draw_curve, dress_axes, parse_metrics
from jaxptm.storage import is_remote, read_text
from jaxptm.types import JaxptmError
from jaxptm.writing import write_atomically

BEGINNING = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>jaxptm: '
"""By which a report is known: no other page is written over."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's, which the colour-blind tell apart; further runs begin anew, with dashes."""
DASHES = ("-", "--", ":", "-.")
COSTS = ("step", "exported_step", "seconds", "parameters", "utilisation")
"""What a run took, among the figures of `results.json`; rates are there, too."""
PARTS = ("train", "eval")
SECTIONS = {"model", "objective", "optimizer", "data", "train", "out"}
"""Of the config that every run writes."""
KNOWN = re.compile(r"(.*[/_])?(loss|perplexity|wer|cer|accuracy|f1|correlation|pearson|spearmanr?|score|exact_match)")
"""Figures of which it is known whether more is better (see `is_better`), by how their names end."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .8rem; text-align: left; }
thead th { border-bottom: 2px solid #222; } tbody tr { border-bottom: 1px solid #ddd; } td.number { text-align: right; }
th, td { vertical-align: top; } td.best { font-weight: bold; }
.line { display: inline-block; width: 1.6rem; border-top: 3px; margin-right: .4rem; vertical-align: middle; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)); gap: 1rem; }
.curves svg { width: 100%; height: auto; } .scroll { overflow-x: auto; } small { color: #666; }
"""


@dataclass(frozen=True)
class Logged:
    """What a run directory says.

    Attributes:
        name: as it was asked for.
        config: its keys, flat.
        lines: of `metrics.jsonl`.
        results: of `results.json`; empty while the run is not finished.
    """

    name: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    results: dict[str, Any]

    @property
    def figures(self) -> dict[str, float | str]:
        """The last of each, as `results.json` has them, or before it is there the log."""
        if self.results:
            return {f"{part}/{name}": value for part in PARTS for name, value in self.results[part].items()}
        return {name: value for line in self.lines for name, value in line.items() if name != "step"}

    @property
    def costs(self) -> dict[str, Any]:
        if not self.results:
            return {"step": self.lines[-1]["step"] if self.lines else 0}
        rates = (name for name in self.results if name.endswith("_per_second"))
        return {name: self.results.get(name) for name in (*COSTS, *rates)}


def report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Writes a page that compares runs: figures, curves, what their configs do not share, what they took.

    Args:
        runs: run directories, or their URLs; finished or under way.
        out: the HTML file.

    Raises:
        JaxptmError: there is no run, one is named twice or is no run directory, a file of it is damaged, or `out` is
            another file than a report. Nothing is written then.
    """
    names = [str(run).rstrip("/") for run in runs]
    if not names:
        raise JaxptmError("name at least one run directory.")
    places = [name if is_remote(name) else str(Path(name).resolve()) for name in names]
    twice = [name for at, name in enumerate(names) if places[at] in places[:at]]
    if twice:
        raise JaxptmError(f"{', '.join(twice)}: is named twice.")
    out = Path(out)
    if out.is_dir() or (out.exists() and not out.read_bytes().startswith(BEGINNING.encode())):
        raise JaxptmError(f"{out}: is there and no page of a report; name another file.")
    if not out.parent.is_dir():
        raise JaxptmError(f"{out}: there is no directory {out.parent}; make it first.")
    page = to_html([read_run(name) for name in names])
    try:
        write_atomically(out, page)
    except OSError as error:
        raise JaxptmError(f"{out}: cannot be written: {error.strerror}.") from error
    return out


def read_run(name: str) -> Logged:
    """What is in the directory of a run, or in its bucket.

    Raises:
        JaxptmError: it is no run directory, or a file of it is damaged.
    """
    texts = {file: read_text(name, file) for file in ("config.yaml", "metrics.jsonl", "results.json")}
    if texts["config.yaml"] is None:
        raise JaxptmError(f"{name}: is no run directory, it holds no config.yaml; name the `out` of a run.")
    try:
        config, results = yaml.safe_load(texts["config.yaml"]), json.loads(texts["results.json"] or "{}")
    except (yaml.YAMLError, ValueError) as error:
        raise JaxptmError(f"{name}: config.yaml or results.json is damaged: {error}") from error
    if not isinstance(config, dict) or not config.keys() >= SECTIONS or not _is_written_by_a_run(results):
        raise JaxptmError(f"{name}: config.yaml or results.json is not what a run writes.")
    lines = parse_metrics(texts["metrics.jsonl"] or "", f"{name}/metrics.jsonl")
    return Logged(name, leaves(config), lines, results)


def _is_written_by_a_run(results: Any) -> bool:
    """Whether a `results.json` has the two parts, of numbers alone; before the end of a run it is empty."""
    if results == {}:
        return True
    parts = [results.get(part) for part in PARTS] if isinstance(results, dict) else [None]
    figures = [value for part in parts if isinstance(part, dict) for value in part.values()]
    return (
        all(isinstance(part, dict) for part in parts)
        and all(_is_number(value) or value in ("nan", "inf", "-inf") for value in figures)
        and isinstance(results.get("versions", {}), dict)
        and isinstance(results.get("devices", []), list)
    )


def to_html(runs: Sequence[Logged]) -> str:
    """The page."""
    open_runs = [run.name for run in runs if not run.results]
    under_way = f"<p><small>Not finished: {escape(', '.join(open_runs))}.</small></p>" if open_runs else ""
    differing, shared = _settings(runs)
    figures = _rows(run.figures for run in runs)
    return "\n".join(
        [
            f"{BEGINNING}{escape(', '.join(run.name for run in runs))}</title><style>{STYLE}</style></head>",
            f"<body><h1>{'Runs' if len(runs) > 1 else 'Run'}</h1>{under_way}",
            "<h2>Held-out figures</h2>",
            _table(runs, {name: row for name, row in figures.items() if name.startswith("eval/")}, judged=True),
            "<h2>What they took</h2>",
            _table(runs, _rows(run.costs for run in runs)),
            "<h2>Curves</h2>",
            '<p><small>Thin: training. With dots: held out.</small></p><div class="curves">',
            *(_curve(place, quantity, runs) for place, quantity in enumerate(_quantities(runs))),
            "</div>",
            f"<h2>Settings{' that differ' if len(runs) > 1 else ''}</h2>",
            _table(runs, differing, said=_exactly) if differing else "<p>None.</p>",
            *(
                ["<details><summary>What they share</summary>", _table(runs[:1], shared, said=_exactly), "</details>"]
                if shared
                else []
            ),
            "<h2>Last figures of training</h2>",
            _table(runs, {name: row for name, row in figures.items() if name.startswith("train/")}),
            "<h2>Versions and devices</h2>",
            _table(runs, _rows(_machine(run) for run in runs)),
            "</body></html>",
            "",
        ]
    )


def _rows(columns: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Each name that occurs, with its value in every column."""
    columns = list(columns)
    return {name: [column.get(name) for column in columns] for name in dict.fromkeys(n for c in columns for n in c)}


def _settings(runs: Sequence[Logged]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """The keys whose values differ, and the others."""
    rows = _rows(run.config for run in runs)
    differ = {key: row for key, row in rows.items() if len(runs) == 1 or len(set(map(repr, row))) > 1}
    return differ, {key: row[:1] for key, row in rows.items() if key not in differ}


def _machine(run: Logged) -> dict[str, Any]:
    devices = run.results.get("devices", [])
    return {"devices": f"{len(devices)} x {devices[0]}" if devices else None} | run.results.get("versions", {})


def _exactly(value: Any) -> str:
    return "" if value is None else escape(str(value))


def _shortly(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}"
    return f"{value:,}" if _is_number(value) else escape(str(value))


def _table(
    runs: Sequence[Logged],
    rows: Mapping[str, Sequence[Any]],
    *,
    said: Callable[[Any], str] = _shortly,
    judged: bool = False,
) -> str:
    """A row a name, a column a run, each value as it is `said`; where figures are judged, the best of a row is bold."""
    if not rows:
        return "<p>None yet.</p>"
    heads = "".join(f"<th>{_line(place)}{escape(run.name)}</th>" for place, run in enumerate(runs))
    lines = []
    for name, row in rows.items():
        best = _best(name, row, runs) if judged and len(runs) > 1 else None
        cells = "".join(
            f'<td class="{"number" if _is_number(value) else ""}{" best" if place == best else ""}"'
            f' title="{_exactly(value)}">{said(value)}</td>'
            for place, value in enumerate(row)
        )
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    head = f"<thead><tr><th></th>{heads}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _best(name: str, row: Sequence[Any], runs: Sequence[Logged]) -> int | None:
    """Which finished run is ahead in a figure; None where two are, or where it cannot be said."""
    if not KNOWN.fullmatch(name) or len({run.config.get("objective.name") for run in runs}) > 1:
        return None
    best: int | None = None
    for place, value in enumerate(row):
        if not runs[place].results:
            continue
        if _is_number(value) and is_better(name, value, None if best is None else row[best]):
            best = place
    return best if best is not None and list(row).count(row[best]) == 1 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _colour(place: int) -> tuple[str, str]:
    return COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]


def _line(place: int) -> str:
    colour, dash = _colour(place)
    kind = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashed"}[dash]
    return f'<span class="line" style="border-top-style:{kind};border-top-color:{colour}"></span>'


def _quantities(runs: Sequence[Logged]) -> list[str]:
    """What there is a curve of: the names of the log without `train/` and `eval/`."""
    names = (name.split("/", 1)[-1] for run in runs for line in run.lines for name in line if name != "step")
    return list(dict.fromkeys(names))


def _curve(number: int, quantity: str, runs: Sequence[Logged]) -> str:
    """One quantity over the steps, of all runs, as SVG; its number among all curves makes its ids its own."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for place, run in enumerate(runs):
        colour, dash = _colour(place)
        for part in ("train", "eval"):
            draw_curve(axes, run.lines, f"{part}/{quantity}", color=colour, linestyle=dash)
    dress_axes(axes, quantity.replace("_", " "))
    drawn = io.StringIO()
    # The same page for the same runs: no date, and ids that do not change from call to call.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": quantity}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>curve-{number}-", svg[svg.index("<svg") :])
