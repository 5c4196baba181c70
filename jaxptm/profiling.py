"""Which parts of a model a step's time goes to: the profiler's operations, by the module that each came from."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.tree_util import tree_flatten_with_path

from jaxptm.types import Params

Direction = Literal["forward", "backward", "update"]
_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%?([\w.-]+) = .*? ([a-z][a-z-]*)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_WRAPPED = re.compile(r"^(?:\w+\()+(\w*)\)+$")
_REPEATED = re.compile(r"(?<![^/])((?:[^/]+/)+)\1+")
"""A path twice or more, one behind the other: what `jax.checkpoint` recomputes has the scope of both passes."""
_CONTAINERS = frozenset(("while", "conditional", "call"))
"""Their time is that of the operations within, which the profiler has as well."""


class Part(NamedTuple):
    """Operations of one module, of all layers together, in one direction.

    Attributes:
        module: its path in the parameters, such as `encoder/layer/mlp/up`, without what lies within a module of its
            own; empty for what belongs to none: the masks, the loss and, in direction `update`, the optimizer.
        seconds: of a step, all devices of this host and all cores added up.
        share: of all that was seen.
    """

    module: str
    direction: Direction
    seconds: float
    share: float


def time_by_module(step: Callable[[], Any], steps: int, program: str, params: Params) -> list[Part]:
    """Runs some steps under the profiler and adds up what their operations took; the longest first.

    XLA fuses operations; what was fused counts for the module of its last one.

    Args:
        step: takes one and returns what it computes.
        program: what XLA compiled for it (`jax.stages.Compiled.as_text`).
        params: of the model: their keys are the names of its modules.
    """
    modules = frozenset(str(getattr(key, "key", key)) for path, _ in tree_flatten_with_path(params)[0] for key in path)
    origins = {name: origin(op_name, modules) for name, op_name in instructions(program).items()}
    seconds: dict[tuple[str, Direction], float] = defaultdict(float)
    jax.block_until_ready(step())
    for operation, nanoseconds in operations(_profiles(step, steps)):
        if operation in origins:
            seconds[origins[operation]] += nanoseconds / 1e9 / steps
    whole = sum(seconds.values())
    parts = [Part(*place, spent, spent / whole) for place, spent in seconds.items()]
    return sorted(parts, key=lambda part: -part.seconds)


def instructions(program: str) -> dict[str, str]:
    """The operations of a compiled program by name, and of each the scope that it was traced in, empty if unknown."""
    found = {}
    for line in program.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction and instruction[2] not in _CONTAINERS:
            scope = _OP_NAME.search(line)
            found[instruction[1]] = scope[1] if scope else ""
    return found


def origin(op_name: str, modules: Set[str]) -> tuple[str, Direction]:
    """The module and the direction of an operation, of all layers as one, `layer`, be they scanned or not.

    Args:
        op_name: such as `jit(body)/transpose(jvp(TextModel))/encoder/layer_3/layer_3.mlp/mlp/up/dot_general`, where the
            last name is the operation's.
        modules: names that count, of all others none does.
    """
    direction: Direction = "update"
    if "jvp(" in op_name:
        direction = "backward" if "transpose(" in op_name else "forward"
    names = (_WRAPPED.sub(r"\1", name) for name in op_name.split("/")[:-1])
    path = ["layer" if name == "layers" else re.sub(r"_\d+$", "", name) for name in names if name in modules]
    return _REPEATED.sub(r"\1", "".join(f"{name}/" for name in path)).rstrip("/"), direction


def operations(profiles: Iterable[Any]) -> Iterator[tuple[str, float]]:
    """Names, as in the program, and nanoseconds of all that ran.

    Args:
        profiles: `jax.profiler.ProfileData`, one a host.
    """
    for profile in profiles:
        planes = list(profile.planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:")]
        for plane in devices or planes:  # beside an accelerator, the host has what starts its operations
            for line in plane.lines:
                if devices and not line.name.startswith(("Stream", "XLA Ops")):  # sums of what these have
                    continue
                for event in line.events:
                    name = str(dict(event.stats).get("hlo_op", event.name))
                    yield name.partition(" = ")[0].removeprefix("%"), event.duration_ns


def _profiles(step: Callable[[], Any], steps: int) -> list[Any]:
    with tempfile.TemporaryDirectory() as place:
        with jax.profiler.trace(place):
            for _ in range(steps):
                out = step()
            jax.block_until_ready(out)
        return [jax.profiler.ProfileData.from_file(str(file)) for file in Path(place).rglob("*.xplane.pb")]


def table(parts: list[Part], longest: int = 20) -> str:
    """The longest parts for people, milliseconds a step."""
    lines = [f"{'ms a step':>10}  {'share':>6}  part (all devices and cores added up)"]
    for part in parts[:longest]:
        what = f"{part.module or 'no module'}, {part.direction}"
        lines.append(f"{part.seconds * 1e3:>10,.2f}  {part.share:>6.1%}  {what}")
    if rest := parts[longest:]:
        seconds, share = (sum(getattr(part, name) for part in rest) for name in ("seconds", "share"))
        lines.append(f"{seconds * 1e3:>10,.2f}  {share:>6.1%}  {len(rest)} more")
    return "\n".join(lines)
