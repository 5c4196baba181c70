"""Two-way weight tables: a list of rows, each our path(s), their name, and how to get from one to the other and back.

Import reads the rows from right to left, export the same rows from left to right, so neither can drift from the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from jaxptm.types import Array, JaxptmError

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Operation:
    """How one of their tensors becomes one or several of ours (`load`), and the exact inverse (`save`)."""

    load: Callable[[np.ndarray], Sequence[np.ndarray]]
    save: Callable[[Sequence[np.ndarray]], np.ndarray]


KEEP = Operation(lambda theirs: [theirs], lambda ours: ours[0])
TRANSPOSE = Operation(lambda theirs: [theirs.T], lambda ours: ours[0].T)
"""torch.nn.Linear keeps (out, in), our kernels are (in, out)."""


def split(parts: int) -> Operation:
    """A fused tensor whose last axis holds `parts` of equal size, such as a qkv projection."""
    return Operation(lambda theirs: np.split(theirs, parts, axis=-1), lambda ours: np.concatenate(ours, axis=-1))


@dataclass(frozen=True)
class Row:
    """One line of a table; `ours` is a "/"-joined parameter path, or several for a fused tensor."""

    ours: str | tuple[str, ...]
    theirs: str
    operation: Operation = KEEP

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


def dense(ours: str, theirs: str) -> list[Row]:
    """The rows of a linear layer."""
    return [Row(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSE), Row(f"{ours}/bias", f"{theirs}.bias")]


def norm(ours: str, theirs: str) -> list[Row]:
    """The rows of a layer norm."""
    return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


@dataclass(frozen=True)
class Table:
    """The weights of one model with one head.

    Attributes:
        rows: what is loaded and saved.
        tied: their name -> their name of the tensor it shares. Checked for equality on load, written again on save.
        dead: their name -> their name. Parameters that no output depends on; they are kept aside on load, and on save
            written back as they were, or as a copy where there was none.
        spare: their names of such parameters that are no copy of others, and are written back only where they were.
        ignored: regular expressions of their names that hold no weights (buffers of old versions).
    """

    rows: list[Row]
    tied: Mapping[str, str] = field(default_factory=dict)
    dead: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        """Every name of theirs that this table knows."""
        return {row.theirs for row in self.rows} | set(self.tied) | set(self.dead) | set(self.spare)


@dataclass(frozen=True)
class Loaded:
    """What `load` found.

    Attributes:
        params: ours, flat.
        absent: top-level modules that the source lacks.
        dead: tensors that no output depends on.
        unused: names of tensors that belong to the family's other heads.
    """

    params: dict[str, np.ndarray]
    absent: list[str]
    dead: dict[str, np.ndarray]
    unused: list[str]


def renamed(tensors: Tensors, name: Callable[[str], str], source: str) -> dict[str, np.ndarray]:
    """The tensors under other names.

    Raises:
        JaxptmError: two that are not the same come to have one name; one of them would be lost.
    """
    by_name: dict[str, str] = {}
    for theirs in tensors:
        first = by_name.setdefault(name(theirs), theirs)
        if not _identical(tensors[first], tensors[theirs]):
            raise JaxptmError(f"{source}: {first} and {theirs} are both {name(theirs)}, and differ; delete one.")
    return {modern: tensors[theirs] for modern, theirs in by_name.items()}


def stored_type(tensors: Tensors) -> np.dtype:
    """The type of floats that all tensors have, if float32 holds it; otherwise float32."""
    types = {tensor.dtype for tensor in tensors.values() if jnp.issubdtype(tensor.dtype, jnp.floating)}
    return types.pop() if len(types) == 1 and max(kind.itemsize for kind in types) <= 4 else np.dtype(np.float32)


def refuse_to_round(tensors: Tensors, kind: np.dtype, source: str) -> None:
    """Raises JaxptmError where a type of parameters has not all the digits that the tensors have."""
    rounded = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype.itemsize > kind.itemsize
        and jnp.issubdtype(tensor.dtype, jnp.floating)
        and not np.array_equal(tensor.astype(kind).astype(tensor.dtype), tensor, equal_nan=True)
    ]
    if rounded:
        raise JaxptmError(
            f"{source}: {', '.join(rounded[:5])}{' ...' if len(rounded) > 5 else ''}: {kind} has not all their digits; "
            "round them where they come from."
        )


def _identical(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two tensors are the same to the bit, NaN included."""
    same_kind = (first.shape, first.dtype) == (second.shape, second.dtype)
    return first is second or (same_kind and first.tobytes() == second.tobytes())


def load(
    table: Table,
    tensors: Tensors,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    source: str,
    heads: Sequence[str] = (),
    known: Set[str] = frozenset(),
) -> Loaded:
    """Reads their tensors into our flat "/"-joined parameters.

    Args:
        shapes: of every parameter that the module wants, by path.
        source: the file or directory that errors name.
        heads: top-level modules that may be absent as a whole.
        known: names of theirs that belong to the family's other heads, and are passed over.

    Raises:
        JaxptmError: missing, unexpected and mis-shaped weights, integers, and tied tensors that differ, all at once.
    """
    # Of tensors that share their memory, some versions of transformers save one, others the other.
    partners = {original: name for name, original in {**table.tied, **table.dead}.items()}
    tensors = {o: tensors[n] for o, n in partners.items() if n in tensors and o not in tensors} | dict(tensors)
    params: dict[str, np.ndarray] = {}
    problems = []
    modules = {path.split("/")[0] for row in table.rows for path in row.paths}
    present = {path.split("/")[0] for row in table.rows for path in row.paths if row.theirs in tensors}
    absent = sorted(module for module in modules - present if module in heads)
    for row in table.rows:
        if row.paths[0].split("/")[0] in absent:
            continue
        if row.theirs not in tensors:
            problems.append(f"missing    {row.theirs}  (for {', '.join(row.paths)})")
            continue
        theirs = tensors[row.theirs]
        wanted = row.operation.save([np.broadcast_to(np.float32(0), shapes[path]) for path in row.paths]).shape
        if theirs.shape != wanted:
            problems.append(f"mis-shaped {row.theirs}: {list(theirs.shape)} in the file, {list(wanted)} in the model")
            continue
        if not jnp.issubdtype(theirs.dtype, jnp.floating):
            problems.append(f"no floats  {row.theirs}: {theirs.dtype}, as quantised weights are, which are not read")
            continue
        params.update(zip(row.paths, row.operation.load(theirs), strict=True))
    for name, original in {**table.tied, **table.dead}.items():
        if name not in tensors or original not in tensors:
            continue
        if tensors[name].shape != tensors[original].shape:
            problems.append(f"mis-shaped {name}: {list(tensors[name].shape)}, and {original} has another shape")
        elif name in table.tied and not _identical(tensors[name], tensors[original]):
            problems.append(f"untied     {name} differs from {original}, though config.json says they are tied")
    unexpected = sorted(set(tensors) - table.names - known)
    unexpected = [name for name in unexpected if not any(re.search(pattern, name) for pattern in table.ignored)]
    problems += [f"unexpected {name} {list(tensors[name].shape)}" for name in unexpected]
    if problems:
        raise JaxptmError("\n  ".join([f"{source}: {len(problems)} weight(s) do not fit the model:", *problems]))
    dead = {name: tensors[name] for name in (*table.dead, *table.spare) if name in tensors}
    return Loaded(params, absent, dead, sorted(set(tensors) & known - table.names))


def save(table: Table, params: Mapping[str, np.ndarray | Array]) -> dict[str, np.ndarray]:
    """Our flat parameters as their tensors, tied and dead ones included.

    Raises:
        JaxptmError: parameters that no row names; they would be lost.
    """
    lost = sorted(set(params) - {path for row in table.rows for path in row.paths})
    if lost:
        raise JaxptmError(f"the weight table has no place for the parameters {', '.join(lost)}.")
    tensors = {row.theirs: row.operation.save([np.asarray(params[path]) for path in row.paths]) for row in table.rows}
    for name, original in {**table.tied, **table.dead}.items():
        tensors[name] = tensors[original]
    return tensors
