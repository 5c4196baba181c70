"""What a discriminator does beyond calling every token original, on held-out text.

python experiments/electra_small/plot.py METRICS.jsonl PICTURE.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from jaxptm.metrics import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    lines = [line for line in read_metrics(arguments.metrics) if "eval/discriminator_loss" in line]
    steps = [line["step"] for line in lines]

    def series(name: str) -> list[float]:
        return [line[f"eval/{name}"] for line in lines]

    def percent(values: list[float]) -> list[float]:
        return [100 * value for value in values]

    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels[0].plot(steps, percent(series("discriminator_accuracy")), "o-", label="discriminator")
    majority = [1 - share for share in series("replaced_share")]
    panels[0].plot(steps, percent(majority), "s--", label="majority: all original")
    panels[1].plot(steps, percent(series("discriminator_precision")), "o-", label="precision")
    panels[1].plot(steps, percent(series("discriminator_recall")), "o-", label="recall")
    panels[1].plot(steps, percent(series("replaced_share")), "s--", label="share of replaced tokens")
    panels[2].plot(steps, series("generator_loss"), "o-", label="generator")
    for panel, title in zip(panels, ("Accuracy (%)", "Replaced tokens (%)", "Generator loss (nats)"), strict=True):
        panel.set(title=title, xlabel="Step")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(arguments.picture, dpi=100)


if __name__ == "__main__":
    main()
