"""What a run writes down about itself: `metrics.jsonl`, TensorBoard, `curves.png`, `results.json`, the progress bar.

Names: `step`, `train/<name>` and `eval/<name>`. Known units: losses in nats, accuracies and utilisation as shares of 1.
"""

from __future__ import annotations

import json
import math
import platform
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, SupportsFloat

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from jaxptm import __version__
from jaxptm.types import JaxptmError
from jaxptm.writing import whole_file, write_atomically

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "tokenizers",
    "numpy",
)
PACE_SECONDS = 120.0
"""Over how long the pace is measured that tells the time left."""


class MetricsLog:
    """Appends what a run measures to `metrics.jsonl`, and to `tensorboard/` for TensorBoard.

    A line is one JSON object, on disk when `write` returns. NaN and infinities, which JSON lacks, are written as the
    strings "nan", "inf" and "-inf"; `read_metrics` turns them back into floats.
    """

    def __init__(self, run_dir: str | Path, *, enabled: bool = True) -> None:
        """Opens the log of `run_dir` to append to, making the directory when absent.

        Args:
            enabled: false for the processes of a run that leave the log to another one; nothing is opened or written.
        """
        self.path = Path(run_dir) / "metrics.jsonl"
        self._enabled = enabled
        self._board: Any = None
        self._purge_step: int | None = None
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Appends one line `{"step": step, **metrics}`."""
        if not self._enabled:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(_to_json({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=self._purge_step)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def truncate(self, step: int) -> None:
        """Drops all lines after `step`, and a half-written last line: what a resumed run will write anew.

        To be called before the first `write`; TensorBoard is told to hide the same steps.
        """
        if not self._enabled:
            return
        self._purge_step = step + 1
        self._file.close()
        kept = [_to_json(line) for line in _lines(_text_of(self.path), str(self.path)) if line["step"] <= step]
        write_atomically(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Writes out what TensorBoard still buffers."""
        if not self._enabled:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, oldest first; a half-written last line is left out.

    Raises:
        JaxptmError: the file cannot be read, or a line before the last is not a JSON object with a `step`.
    """
    path = Path(path)
    return parse_metrics(_text_of(path), str(path))


def parse_metrics(text: str, name: str) -> list[dict[str, Any]]:
    """The same of what such a file holds; `name` is what errors call it."""
    return [{name: _to_float(value) for name, value in line.items()} for line in _lines(text, name)]


def versions() -> dict[str, str]:
    """Of Python, of jaxptm and of the packages that figures depend on; "unknown" of one that runs from its sources."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "unknown"

    own = {"python": platform.python_version(), "jaxptm": __version__}
    return own | {name: version(name) for name in PACKAGES}


def write_results(run_dir: str | Path, results: Mapping[str, Any]) -> Path:
    """Writes `results.json` in one go, numbers that are not finite as strings, and returns its path."""
    path = Path(run_dir) / "results.json"
    write_atomically(path, _to_json(results, indent=2) + "\n")
    return path


PANELS = {
    "Loss (nats)": "loss",
    "Accuracy (%)": "accuracy",
    "Errors and blanks (%)": "wer|cer|blank_share",
    "Entries of a codebook in use": r"code_perplexity_\d+",
    "Learning rate": "learning_rate",
    "Tokens per second": "tokens_per_second",
    "Seconds of audio per second": "audio_seconds_per_second",
}
"""What curves show, by title: the figures with names that end so; a panel without any is left out."""


def draw_curve(axes: Any, lines: Sequence[Mapping[str, Any]], name: str, scale: float = 1, **look: Any) -> None:
    """Draws one figure of a log over its steps; held-out ones have dots."""
    points = [(line["step"], scale * line[name]) for line in lines if name in line]
    held_out = name.startswith("eval/")
    dots = {"linewidth": 1.8, "marker": "o", "markersize": 4} if held_out else {"linewidth": 1, "alpha": 0.7}
    if points:
        axes.plot(*zip(*points, strict=True), **dots, **look)


def dress_axes(axes: Any, title: str) -> None:
    """How all curves look."""
    axes.set(title=title, xlabel="Step")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def plot_curves(run_dir: str | Path) -> Path:
    """Draws `curves.png` from `metrics.jsonl`: loss, accuracies, learning rate and throughput over the steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    run_dir = Path(run_dir)
    lines = read_metrics(run_dir / "metrics.jsonl")
    names = dict.fromkeys(name for line in lines for name in line)
    panels = {
        title: shown
        for title, ends in PANELS.items()
        if (shown := [name for name in names if re.fullmatch(rf"(train|eval)/(.*[/_])?({ends})", name)])
    }
    rows = max(1, math.ceil(len(panels) / 2))
    figure = Figure(figsize=(11, 3.5 * rows), layout="constrained")
    figure.suptitle(run_dir.resolve().name)
    places = list(figure.subplots(rows, 2).flat)
    for spare in places[len(panels) :]:
        spare.set_axis_off()
    for axes, (title, shown) in zip(places, panels.items(), strict=False):
        scale = 100 if "%" in title else 1
        quantities = list(dict.fromkeys(name.split("/")[-1] for name in shown))
        for name in shown:
            colour = f"C{quantities.index(name.split('/')[-1])}"  # one a quantity
            draw_curve(axes, lines, name, scale, label=name.replace("/", " ").replace("_", " "), color=colour)
        dress_axes(axes, title)
        if len(shown) > 1:
            axes.legend(frameon=False, fontsize=9)
        if title.endswith("per second"):
            axes.yaxis.set_major_formatter(EngFormatter())
        if "(nats)" not in title:
            axes.set_ylim(bottom=0)
        if title == "Learning rate":
            axes.ticklabel_format(axis="y", scilimits=(-3, 3))
    path = run_dir / "curves.png"
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return path


class TrainingProgress:
    """A progress bar on a terminal; elsewhere (a file, a CI log) one plain line for each `log`.

    Use it as a context manager.
    """

    def __init__(self, total: int, start: int = 0, console: Console | None = None) -> None:
        """Counts steps from `start` to `total`; `console` defaults to standard error."""
        self._console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self._total = total
        self._bar = Progress(
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=len(f"{total}/{total}"))),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[shown]}"),
            TextColumn("{task.fields[eta]}", table_column=Column(no_wrap=True)),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=start, shown="", eta="")
        self._logged: deque[tuple[float, int]] = deque()

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar to `step` steps begun. The first is done, for it has compiled: the pace counts from here on."""
        if not self._logged:
            self._logged.append((time.monotonic(), step))
        self._bar.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Shows the loss, accuracies, tokens a second, utilisation and the time left.

        `metrics` has the names of `metrics.jsonl`; what is not shown is passed over.
        """
        eta = self._eta(step)
        if self._console.is_terminal:
            # The bar keeps to the newest training figures, which fit beside it; evaluations stay in lines above.
            held_out = {name: value for name, value in metrics.items() if name.startswith("eval/")}
            if held_out:
                self.print(f"step {step}/{self._total} {' '.join(_shown(held_out))}")
            shown = " ".join(_shown({name: value for name, value in metrics.items() if name not in held_out}))
            self._bar.update(self._task, completed=step, shown=shown, eta=eta)
        else:
            self._console.print(
                " ".join(filter(None, [f"step {step}/{self._total}", *_shown(metrics), eta])), markup=False
            )

    def _eta(self, step: int) -> str:
        """By the pace of the last minutes, from log to log: in between, steps are begun far ahead of what is done."""
        now = time.monotonic()
        self._logged.append((now, step))
        while len(self._logged) > 2 and now - self._logged[1][0] > PACE_SECONDS:
            self._logged.popleft()
        began, before = self._logged[0]
        if step >= self._total or step == before:
            return ""
        return f"ETA {_duration((self._total - step) * (now - began) / (step - before))}"

    def print(self, message: str) -> None:
        """Prints a line above the bar."""
        self._console.print(message, markup=False)


def progress_lines(emit: Callable[[str], None]) -> Callable[[float, str], None]:
    """A callback (share done, message) that emits lines with the share and the time left."""
    began, before = time.monotonic(), None

    def report(share: float, message: str) -> None:
        nonlocal began, before
        if before is None:  # what an earlier run had done says nothing about the speed of this one
            began, before = time.monotonic(), share
        speed = (share - before) / max(time.monotonic() - began, 1e-9)
        eta = f", ETA {_duration((1 - share) / speed)}" if speed > 0 and share < 1 else ""
        emit(f"preparing {share:.0%}: {message}{eta}")

    return report


def _shown(metrics: Mapping[str, SupportsFloat]) -> list[str]:
    parts = []
    for name, value in ((name, float(value)) for name, value in metrics.items()):
        label = name.removeprefix("train/").replace("/", " ").replace("_", " ")
        if label in ("loss", "eval loss"):
            parts.append(f"{label} {value:.3f}")
        elif name.endswith("accuracy"):
            parts.append(f"{label.removesuffix('accuracy')}acc {value:.1%}")
        elif name.endswith("tokens_per_second"):
            parts.append(f"{value / 1000:.1f}k tokens/s")
        elif name.endswith("audio_seconds_per_second"):
            parts.append(f"{value:.0f} s/s")
        elif "perplexity" in name:
            parts.append(f"{label} {value:.1f}")
        elif name.endswith(("wer", "cer", "blank_share")):
            parts.append(f"{label} {value:.1%}")
        elif name.endswith("utilisation"):
            parts.append(f"util {value:.0%}")
    return parts


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise JaxptmError(f"{path}: cannot read the metrics: {error.strerror}.") from error


def _lines(text: str, name: str) -> list[dict[str, Any]]:
    lines = []
    for number, written in enumerate(text.split("\n")[:-1], start=1):  # what follows the last newline was not finished
        try:
            line = json.loads(written)
            whole = type(line["step"]) is int and all(
                isinstance(_to_float(value), int | float) for value in line.values()
            )
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise JaxptmError(
                f"{name}: line {number} is not a JSON object of numbers with a `step`; delete that line to go on."
            )
        lines.append(line)
    return lines


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item"):  # numpy and jax scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _to_float(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
