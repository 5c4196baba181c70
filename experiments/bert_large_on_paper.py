"""What pre-training BERT-large costs on machines that nobody here has: the tables of docs/bert_large_on_paper.md.

    python experiments/bert_large_on_paper.py

Computes in seconds on any CPU. Nothing is measured; `jaxptm.cost` counts, and the constants below are assumptions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import jax.numpy as jnp

from jaxptm.cost import Device, Efficiency, StepCost, least_seconds, step_cost, step_seconds, utilisation
from jaxptm.models.bert import PRESETS
from jaxptm.nn.core import Execution
from jaxptm.nn.text import forward_flops

# What the vendors say; the page gives the sources. Links: bytes a second in one direction, all links together.
V5E = Device("TPU v5e", flops=197e12, memory=16e9, memory_bandwidth=819e9, link_bandwidth=200e9)
H200 = Device("H200 SXM", flops=989e12, memory=141e9, memory_bandwidth=4.8e12, link_bandwidth=450e9)
V5E_AXIS = replace(V5E, link_bandwidth=V5E.link_bandwidth / 2)
"""The same chip where it talks along one axis of the torus at a time."""
A100 = Device("A100 SXM 80 GB", flops=312e12, memory=80e9, memory_bandwidth=2.039e12, link_bandwidth=300e9)
V100 = Device("V100 SXM 32 GB", flops=125e12, memory=32e9, memory_bandwidth=0.9e12, link_bandwidth=150e9)

# The two ends of what is expected; the page says why.
SLOW = Efficiency(matmul=0.80, memory=0.85, links=0.84, passes=2.0, overlap=0.0)
FAST = Efficiency(matmul=0.80, memory=0.85, links=0.84, passes=1.0, overlap=2 / 3)

MODEL, TASK, LENGTH, PREDICTIONS = PRESETS["bert-large"], "pretraining", 128, 20
PAPER_ROWS = 900_000 * 256
"""Rows of the paper's first phase: 900,000 steps of 256 (Devlin et al. 2019, appendix A.2)."""


@dataclass(frozen=True)
class Plan:
    """A batch on a machine."""

    device: Device
    rows: int
    data: int
    fsdp: int = 1
    accumulate: int = 1
    remat: bool | Literal["dots"] = False

    def __str__(self) -> str:
        layout = f"data {self.data}" if self.data > 1 else ""
        if self.fsdp > 1:
            layout += f"{' x ' if layout else ''}fsdp {self.fsdp}"
        if self.accumulate > 1:
            layout += f", accumulate {self.accumulate}"
        return layout + {False: "", True: ", remat", "dots": ", remat dots"}[self.remat]

    @property
    def devices(self) -> int:
        return self.data * self.fsdp

    @property
    def slow(self) -> float:
        """Seconds a step, at the slow end."""
        return step_seconds(cost(self), self.device, SLOW)

    @property
    def fast(self) -> float:
        """Seconds a step, at the fast end: after microbatches, the sum over devices has nothing to hide behind."""
        return step_seconds(cost(self), self.device, FAST if self.accumulate == 1 else replace(FAST, overlap=0.0))


PLANS = [
    Plan(V5E, 256, data=256),
    Plan(V5E, 256, data=1, fsdp=256),
    Plan(V5E, 4096, data=256),
    Plan(V5E, 4096, data=256, remat="dots"),
    Plan(V5E, 4096, data=256, remat=True),
    Plan(V5E_AXIS, 4096, data=16, fsdp=16),
    Plan(V5E, 32768, data=256, accumulate=8),
    Plan(H200, 256, data=8),
    Plan(H200, 4096, data=8, accumulate=4),
    Plan(H200, 4096, data=8, remat="dots"),
    Plan(H200, 4096, data=8, remat=True),
    Plan(H200, 4096, data=1, fsdp=8, accumulate=4),
]

# Rows a second on one GPU, mixed precision, NVIDIA/DeepLearningExamples, BERT for PyTorch; batches of 65,536 with LAMB.
PUBLISHED = [(Plan(A100, 8192, data=1, accumulate=64), 580), (Plan(V100, 8192, data=1, accumulate=128), 224)]


@cache
def cost(plan: Plan) -> StepCost:
    """One step of a plan: bfloat16, float32 parameters, Adam, layers scanned as in configs/pretrain/bert_large.yaml."""
    return step_cost(
        MODEL,
        TASK,
        Execution(dtype=jnp.bfloat16, scan=True, remat=plan.remat),
        rows=plan.rows,
        length=LENGTH,
        predictions=PREDICTIONS,
        moments=2,
        accumulate=plan.accumulate,
        data=plan.data,
        fsdp=plan.fsdp,
    )


def forward_operations(rows: int) -> float:
    """Of a forward pass, layers scanned."""
    return forward_flops(MODEL, TASK, rows, LENGTH, PREDICTIONS, scan=True)


def tables() -> dict[str, str]:
    """The tables of the page in Markdown, by name."""
    return {
        "model": _table(
            ["of BERT-large, phase 1", ""],
            [
                ["parameters", f"{cost(PLANS[0]).parameters / 4:,.0f}"],
                ["GFLOP forward, a row", f"{forward_operations(1) / 1e9:.1f}"],
                ["GFLOP forward and backward, a row", f"{3 * forward_operations(1) / 1e9:.1f}"],
                *(
                    [f"TFLOP a step of {rows:,} rows", f"{3 * forward_operations(rows) / 1e12:,.1f}"]
                    for rows in (256, 4096)
                ),
                ["EFLOP, 900,000 steps x 256 rows", f"{3 * forward_operations(PAPER_ROWS) / 1e18:.1f}"],
            ],
        ),
        "machines": _table(
            ["device", "bf16 TFLOP/s", "memory GB", "memory GB/s", "links GB/s, one way"],
            [
                [
                    d.name,
                    f"{d.flops / 1e12:.0f}",
                    *(f"{x / 1e9:,.0f}" for x in (d.memory, d.memory_bandwidth, d.link_bandwidth)),
                ]
                for d in (V5E, H200)
            ],
        ),
        "memory": _table(
            [
                "machine",
                "rows",
                "layout",
                "rows a device at once",
                "parameters",
                "optimizer",
                "gradients",
                "activations",
                "GB in all",
                "of",
            ],
            [
                [
                    *_name(plan),
                    f"{plan.rows // plan.devices // plan.accumulate}",
                    *(f"{x / 1e9:.2f}" for x in (c.parameters, c.optimizer, c.gradients, c.activations)),
                    f"{c.peak / 1e9:.1f}",
                    f"{plan.device.memory / 1e9:.0f}" + ("" if c.peak < plan.device.memory else " (does not fit)"),
                ]
                for plan, c in _costs()
            ],
        ),
        "collectives": _table(
            ["machine", "rows", "layout", "what a device sends", "GB", "ms at peak", "ms expected"],
            [
                [
                    *_name(plan),
                    what,
                    f"{size / 1e9:.2f}",
                    f"{1e3 * size / plan.device.link_bandwidth:.1f}",
                    f"{1e3 * size / plan.device.link_bandwidth / SLOW.links:.1f}",
                ]
                for plan, c in _costs()
                if plan.remat is False
                for what, size in c.collectives.items()
            ],
        ),
        "time": _table(
            [
                "machine",
                "rows",
                "layout",
                "TFLOP a device",
                "products",
                "weights, optimizer",
                "activations",
                "collectives",
                "least ms",
                "expected ms",
            ],
            [
                [
                    *_name(plan),
                    f"{c.executed_flops / 1e12:.2f}",
                    f"{1e3 * c.executed_flops / plan.device.flops / SLOW.matmul:.1f}",
                    *(
                        f"{1e3 * x / plan.device.memory_bandwidth / SLOW.memory:.1f}"
                        for x in (c.traffic["weights"] + c.traffic["optimizer"], SLOW.passes * c.traffic["activations"])
                    ),
                    f"{1e3 * sum(c.collectives.values()) / plan.device.link_bandwidth / SLOW.links:.1f}",
                    f"{1e3 * least_seconds(c, plan.device):.1f}",
                    f"{1e3 * plan.fast:.0f} to {1e3 * plan.slow:.0f}",
                ]
                for plan, c in _costs()
            ],
        ),
        "published": _table(
            ["one GPU, length 128", "rows a second published", "slow end", "fast end"],
            [
                [plan.device.name, f"{measured}", f"{plan.rows / plan.slow:.0f}", f"{plan.rows / plan.fast:.0f}"]
                for plan, measured in PUBLISHED
            ],
        ),
        "hours": _table(
            [
                "machine",
                "rows",
                "layout",
                "utilisation at most",
                "utilisation expected",
                "rows a second expected",
                "steps",
                "hours at least",
                "hours expected",
            ],
            [
                [
                    *_name(plan),
                    f"{utilisation(c, plan.device, least_seconds(c, plan.device)):.0%}",
                    " to ".join(f"{utilisation(c, plan.device, seconds):.0%}" for seconds in (plan.slow, plan.fast)),
                    " to ".join(f"{float(f'{plan.rows / seconds:.2g}'):,.0f}" for seconds in (plan.slow, plan.fast)),
                    f"{PAPER_ROWS / plan.rows:,.0f}",
                    f"{_hours(plan, least_seconds(c, plan.device)):.1f}",
                    " to ".join(f"{_hours(plan, seconds):.1f}" for seconds in (plan.fast, plan.slow)),
                ]
                for plan, c in _costs()
            ],
        ),
    }


def _costs() -> Iterable[tuple[Plan, StepCost]]:
    return [(plan, cost(plan)) for plan in PLANS]


def _name(plan: Plan) -> list[str]:
    return [f"{plan.devices} x {plan.device.name}", f"{plan.rows:,}", str(plan)]


def _hours(plan: Plan, seconds: float) -> float:
    return PAPER_ROWS / plan.rows * seconds / 3600


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    print("\n\n".join(tables().values()))
