"""TensorFlow's checkpoints (its "tensor bundle"), read without TensorFlow.

`model.ckpt.index` is a sorted table of the format of LevelDB: blocks of key and value pairs, in which a key says how
much of its beginning it shares with the one before, an index of those blocks, and a footer that says where the index
is. A value is a protocol buffer that says where in `model.ckpt.data-00000-of-00001` a tensor lies (tensorflow/core:
util/tensor_bundle/tensor_bundle.h, protobuf/tensor_bundle.proto, lib/io/format.h). Its checksums are not
looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxptm.types import JaxptmError

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
"""Bytes: two handles, padded, and the magic number."""
DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64, 14: ml_dtypes.bfloat16, 19: np.float16}
"""tensorflow/core/framework/types.proto"""
Fields = dict[int, list[int | bytes]]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        dtype: as numpy has it; None of what is no array of numbers (strings, resources).
        shard: which of the data files.
        offset: of its first byte there.
        size: in bytes.
    """

    dtype: type | None
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int


def read_entries(prefix: Path) -> tuple[int, dict[str, Entry]]:
    """What `prefix`.index lists: the number of data files, and an entry for each tensor.

    Raises:
        JaxptmError: the file is missing, damaged, compressed, or sliced tensors are in it.
    """
    path = prefix.with_name(prefix.name + ".index")
    try:
        table = path.read_bytes()
    except OSError as error:
        raise JaxptmError(f"{path}: cannot be read: {error.strerror}.") from error
    try:
        return _entries(table)
    except (ValueError, IndexError, TypeError) as error:
        raise JaxptmError(f"{path}: is no index of a TensorFlow checkpoint, or damaged ({error}).") from error


def read_tensors(prefix: Path, entries: Mapping[str, Entry], shards: int) -> dict[str, np.ndarray]:
    """The arrays of those entries.

    Raises:
        JaxptmError: a data file is missing or too short, or an entry is no array of numbers.
    """
    files = [prefix.with_name(f"{prefix.name}.data-{i:05}-of-{shards:05}") for i in range(shards)]
    tensors = {}
    for name, entry in entries.items():
        if entry.dtype is None:
            raise JaxptmError(f"{prefix}: {name} is no array of numbers.")
        if entry.shard >= shards or entry.size != math.prod(entry.shape) * np.dtype(entry.dtype).itemsize:
            raise JaxptmError(f"{prefix}.index: says of {name} what cannot be; the file is damaged, copy it again.")
        file = files[entry.shard]
        try:
            array: np.ndarray = np.fromfile(file, entry.dtype, math.prod(entry.shape), offset=entry.offset)
        except OSError as error:
            raise JaxptmError(f"{file}: cannot be read: {error.strerror}; copy it beside the index.") from error
        if array.nbytes != entry.size:
            raise JaxptmError(f"{file}: ends within {name}; copy the file again.")
        tensors[name] = array.reshape(entry.shape)
    return tensors


def _entries(table: bytes) -> tuple[int, dict[str, Entry]]:
    footer = table[-FOOTER:]
    if len(footer) < FOOTER or int.from_bytes(footer[-8:], "little") != MAGIC:
        raise ValueError("it does not end as one does")
    _, _, at = _handle(footer, 0)  # of the block of filters, which nobody writes
    offset, size, _ = _handle(footer, at)
    found: dict[str, Entry] = {}
    shards = 0
    for _, handle in _block(table, offset, size):
        offset, size, _ = _handle(handle, 0)
        for key, value in _block(table, offset, size):
            fields = _fields(value)
            if not key:  # the header
                shards = _number(fields, 1)
                if _number(fields, 2):
                    raise ValueError("its numbers are big-endian")
                continue
            if 7 in fields:
                raise ValueError(f"{key.decode()} is stored in slices")
            shape = _fields(_content(fields, 2)) if 2 in fields else {}
            sizes = tuple(_number(_fields(dim), 1) for dim in shape.get(2, []) if isinstance(dim, bytes))
            dtype = DTYPES.get(_number(fields, 1))
            found[key.decode()] = Entry(dtype, sizes, _number(fields, 3), _number(fields, 4), _number(fields, 5))
    return shards, found


def _block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of a block: (shared, unshared, length of the value), the bytes of both; behind them all, restarts."""
    block = table[offset : offset + size]
    if len(block) < size:
        raise ValueError("it is too short")
    if table[offset + size]:
        raise ValueError("it is compressed")
    end = size - 4 - 4 * int.from_bytes(block[-4:], "little")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + length]
        at += length


def _handle(buffer: bytes, at: int) -> tuple[int, int, int]:
    """Where a block begins and how many bytes it has; and where the next thing is."""
    offset, at = _varint(buffer, at)
    size, at = _varint(buffer, at)
    return offset, size, at


def _varint(buffer: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first; and where the next thing is."""
    value = shift = 0
    while True:
        byte = buffer[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(message: bytes) -> Fields:
    """The fields of a protocol buffer by their numbers, each as often as it occurs."""
    fields: Fields = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        value: int | bytes
        match tag & 7:
            case 0:
                value, at = _varint(message, at)
            case 2:
                length, at = _varint(message, at)
                value, at = message[at : at + length], at + length
            case 1 | 5 as kind:
                width = 8 if kind == 1 else 4
                value, at = int.from_bytes(message[at : at + width], "little"), at + width
            case kind:
                raise ValueError(f"it has a field of kind {kind}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: Fields, number: int) -> int:
    """The last value of a field of numbers, 0 where it is left out."""
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {number} is no number")
    return value


def _content(fields: Fields, number: int) -> bytes:
    value = fields[number][-1]
    if not isinstance(value, bytes):
        raise ValueError(f"field {number} is no message")
    return value
