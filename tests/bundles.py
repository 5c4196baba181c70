"""Writes checkpoints as TensorFlow does, for tests that have no TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

DTYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}
MAGIC = bytes.fromhex("57fb808b247547db")


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block(pairs: list[tuple[bytes, bytes]], shares: bool = True) -> bytes:
    """One of a sorted table, with a restart at its beginning alone."""
    out, before = b"", b""
    for key, value in pairs:
        shared = 0
        while shares and shared < min(len(key), len(before)) and key[shared] == before[shared]:
            shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    return out + (0).to_bytes(4, "little") + (1).to_bytes(4, "little")


def write_bundle(
    prefix: Path, arrays: Mapping[str, np.ndarray], *, shards: int = 1, keys: int = 7, compression: int = 0
) -> None:
    """`prefix`.index and `prefix`.data-...; the index in blocks of `keys` entries, tensors on the shards in turns."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    data = [b""] * shards
    pairs = [(b"", field(1, shards) + field(3, field(1, 1)))]
    for count, name in enumerate(sorted(arrays)):
        array, shard = np.asarray(arrays[name]), count % shards
        shape = b"".join(field(2, field(1, size)) for size in array.shape)
        entry = field(1, DTYPES[array.dtype.name]) + field(2, shape) + field(3, shard)
        entry += field(4, len(data[shard])) + field(5, array.nbytes)
        pairs.append((name.encode(), entry + varint(6 << 3 | 5) + bytes(4)))
        data[shard] += np.ascontiguousarray(array).tobytes()
    table, index = b"", []
    for at in range(0, len(pairs), keys):
        content = block(pairs[at : at + keys])
        index.append((pairs[at : at + keys][-1][0], varint(len(table)) + varint(len(content))))
        table += content + bytes([compression]) + bytes(4)  # and a checksum that nobody looks at
    filters, directory = block([]), block(index, shares=False)
    footer = varint(len(table)) + varint(len(filters))
    footer += varint(len(table) + len(filters) + 5) + varint(len(directory))
    table += filters + bytes(5) + directory + bytes(5) + footer.ljust(40, b"\0") + MAGIC
    prefix.with_name(f"{prefix.name}.index").write_bytes(table)
    for shard, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{shards:05}").write_bytes(content)
