"""Runs here and in transformers + torch side by side, as Markdown.

    python experiments/fine_tuning/table.py runs/glue runs/glue_transformers

Each directory holds `<task>/seed_<n>/results.json`. p is that of Welch's test: how often the means of two such samples
of one distribution are at least so far apart.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from scipy.stats import ttest_ind


def scores(directory: Path) -> dict[str, list[float]]:
    """Score of each run, in the order of the seeds, by task; of SQuAD the F1."""
    found: dict[str, list[float]] = {}
    for path in sorted(directory.glob("*/seed_*/results.json")):
        figures = json.loads(path.read_text())["eval"]
        found.setdefault(path.parent.parent.name, []).append(
            100 * figures["score"] if "score" in figures else figures["f1"]
        )
    return found


def main() -> None:
    ours, theirs = (scores(Path(directory)) for directory in sys.argv[1:3])
    print("| task | jaxptm | transformers + torch | difference of the means | p |")
    print("|---|---|---|---|---|")
    for task in ours:
        if task not in theirs:
            continue
        sides = ours[task], theirs[task]
        said = [f"{statistics.median(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})" for values in sides]
        gap = statistics.mean(sides[0]) - statistics.mean(sides[1])
        p = f"{ttest_ind(*sides, equal_var=False).pvalue:.2f}" if min(map(len, sides)) > 1 else "-"
        print(f"| {task} | {said[0]} | {said[1]} | {gap:+.1f} | {p} |")


if __name__ == "__main__":
    main()
