"""Words that are wrong by labelled clips of each word: a dot for each run, a line through the means.

python experiments/spoken_digits/plot.py experiments/spoken_digits/digits.json PICTURE.png
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    wrong: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in ("pre-trained", "random weights")}
    for name, figures in json.loads(arguments.figures.read_text()).items():
        run = re.fullmatch(r"(?:arm|pre-trained again): (\d+) a word(, pre-trained|, random)?(, seed \d)?", name)
        if run is not None:
            side = "random weights" if run[2] == ", random" else "pre-trained"
            wrong[side][int(run[1])].append(100 * figures["eval"]["wer"])
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (side, runs), marker in zip(wrong.items(), "os", strict=True):
        clips = sorted(runs)
        (line,) = axes.plot(clips, [statistics.mean(runs[at]) for at in clips], label=side)
        dots = [(at, each) for at in clips for each in runs[at]]
        axes.plot(*zip(*dots, strict=True), marker, color=line.get_color(), alpha=0.6)
    axes.set(xscale="log", xlabel="labelled clips of each word", ylabel="held-out words wrong, %", ylim=(0, 105))
    axes.set_xticks(sorted({at for runs in wrong.values() for at in runs}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.picture, dpi=150)


if __name__ == "__main__":
    main()
