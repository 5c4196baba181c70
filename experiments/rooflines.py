"""What bounds a training step of each preset on one accelerator, on paper: the table of docs/speed.md.

    python experiments/rooflines.py

Computes in seconds on any CPU; `jaxptm.cost` counts, and nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import jax.numpy as jnp

from jaxptm.cost import Device, StepCost, step_cost
from jaxptm.models import PRESETS
from jaxptm.models.electra import ElectraConfig
from jaxptm.nn.core import Execution
from jaxptm.nn.text_config import TextConfig

H100 = Device("H100 SXM", flops=989e12, memory=80e9, memory_bandwidth=3.35e12, link_bandwidth=450e9)
PASSES = 2
"""Times that activations are written and read: 1 for what is kept, and once more for its gradient."""


@dataclass(frozen=True)
class Case:
    """A batch of a preset on one device, in bfloat16 with float32 parameters and Adam."""

    preset: str
    task: str
    rows: int
    length: int


CASES = [
    Case("bert-base", "masked-lm", 256, 128),
    Case("bert-base", "masked-lm", 64, 512),
    Case("bert-large", "masked-lm", 128, 128),
    Case("bert-large", "masked-lm", 32, 512),
    Case("roberta-base", "masked-lm", 64, 512),
    Case("electra-small", "replaced-token", 128, 128),
    Case("electra-base", "replaced-token", 64, 512),
    Case("gpt2-small", "causal-lm", 16, 1024),
    Case("bert-base", "masked-lm", 8, 128),
]


@cache
def cost(case: Case) -> StepCost:
    """One step; of an ELECTRA both models, which share the embeddings."""
    _, config = PRESETS[case.preset]
    assert isinstance(config, TextConfig)
    execution = Execution(dtype=jnp.bfloat16)

    def of(config: TextConfig, task: str, **options: bool) -> StepCost:
        predictions = case.length if task == "causal-lm" else round(0.15 * case.length)
        return step_cost(
            config, task, execution, rows=case.rows, length=case.length, predictions=predictions, **options
        )

    step = of(config, case.task)
    if isinstance(config, ElectraConfig):
        step += of(config.generator(), "masked-lm", shares_embeddings=True)
    return step


def attention_traffic(case: Case) -> float:
    """Bytes of the attention weights, [H, L, L] a row and layer: the share that grows with the square of the length."""
    halves = Case(case.preset, case.task, 2 * case.rows, case.length // 2)
    return 2 * PASSES * (cost(case).traffic["activations"] - cost(halves).traffic["activations"])


COLUMNS = (
    "preset",
    "rows x length",
    "TFLOP",
    "GB of weights",
    "GB of activations",
    "of them attention weights",
    "products, ms",
    "memory, ms",
    "utilisation",
    "with fused attention",
)


def line(case: Case) -> str:
    """A row of the table, in Markdown."""
    step, attention = cost(case), attention_traffic(case)
    weights, activations = step.traffic["weights"] + step.traffic["optimizer"], PASSES * step.traffic["activations"]
    products = step.model_flops / H100.flops
    memory, fused = ((weights + kept) / H100.memory_bandwidth for kept in (activations, activations - attention))
    cells = [case.preset, f"{case.rows} x {case.length}", f"{step.model_flops / 1e12:.2f}"]
    cells += [f"{size / 1e9:.1f}" for size in (weights, activations, attention)]
    cells += [f"{1e3 * products:.1f}", f"{1e3 * memory:.1f}"]
    cells += [f"{products / (products + moved):.0%}" for moved in (memory, fused)]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """All cases, in Markdown."""
    return "\n".join([f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}", *map(line, CASES)])


if __name__ == "__main__":
    print(table())
