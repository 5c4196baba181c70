"""What all preparation shares: shards that are whole or absent, made in parallel, and plain words about the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from jaxptm.errors import JaxptmError

Progress = Callable[[float, str], None]
"""Called with the share done (0 to 1) and a line that says what was done last."""
T = TypeVar("T")
R = TypeVar("R")


class NpyFile:
    """A one-dimensional .npy file that grows; its header gets the length when it is closed."""

    def __init__(self, path: Path, dtype: str):
        self._file = open(path, "wb")  # noqa: SIM115  (closed by __exit__)
        self._dtype = np.dtype(dtype)
        self.length = 0

    def __enter__(self) -> NpyFile:
        self._header()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._file.seek(0)
            self._header()
        finally:
            self._file.close()

    def write(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self._dtype).tobytes())
        self.length += len(values)

    def _header(self) -> None:
        # numpy leaves room in the header for the first axis to grow, so both headers are equally long.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


@contextmanager
def alone(directory: Path, host: int, report: Progress) -> Iterator[None]:
    """Makes `directory`, and waits while another process does this share there: it writes the same files."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / f"host-{host}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        report(0.0, f"another process is preparing {directory}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def fresh_shard(path: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `path` when all went well and is gone otherwise."""
    fresh = path.with_name(f"{path.name}.tmp")
    with disk(path.parent):
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            yield fresh
            shutil.rmtree(path, ignore_errors=True)
            os.replace(fresh, path)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise


def file_sizes(path: Path) -> dict[str, int]:
    """Bytes of each file of a directory, by name."""
    return {file.name: file.stat().st_size for file in sorted(path.iterdir())}


def content_digest(path: Path) -> str:
    """Names the files of a directory by what is in them, in 16 hexadecimal digits."""
    content = hashlib.sha256()
    for file in sorted(path.iterdir()):
        content.update(file.name.encode())
        with file.open("rb") as opened:
            hashlib.file_digest(opened, lambda: content)
    return content.hexdigest()[:16]


def damage_of(path: Path, files: Mapping[str, int]) -> str | None:
    """What is wrong with the files of a shard, by their sizes in bytes."""
    for name, size in files.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return f"{path / name}: is missing"
        if found != size:
            return f"{path / name}: has {found} bytes, not {size}"
    return None


def work_all(
    start: Callable[[], Callable[[T], R]],
    tasks: Sequence[T],
    sizes: Sequence[int],
    finish: Callable[[T, R], None],
    workers: int,
) -> None:
    """Does each task, by this process or by several, and calls `finish` here as each is done.

    Args:
        start: makes what does the tasks, once a process; it crosses into others, as tasks and results do.
        sizes: of the tasks; the largest go first where there are several processes.

    Raises:
        JaxptmError: a process died.
    """
    if workers <= 1:
        work = start()
        for task in tasks:
            finish(task, work(task))
        return
    # loky starts fresh processes, since a fork after jax has started its threads can hang, and unlike the standard
    # library's they do not import the calling script again.
    from loky import BrokenProcessPool, ProcessPoolExecutor

    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(start,))
    try:
        order = sorted(range(len(tasks)), key=lambda at: -sizes[at])
        futures = {pool.submit(_work, tasks[at]): tasks[at] for at in order}
        for future in as_completed(futures):
            finish(futures[future], future.result())
    except BrokenProcessPool as error:
        raise JaxptmError(
            "a process that prepares data died, most likely for want of memory. Finished shards are kept: run again, "
            "with fewer workers if it repeats."
        ) from error
    finally:
        pool.shutdown(kill_workers=True)


_worker: Callable[[Any], Any] | None = None
"""What a worker process keeps between tasks: an encoder's table of words above all."""


def _start_worker(start: Callable[[], Callable[[Any], Any]]) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = start()


def _work(task: Any) -> Any:
    assert _worker is not None
    return _worker(task)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def disk(directory: Path) -> Iterator[None]:
    """Says plainly what the file system refuses."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise JaxptmError(
                f"{directory}: the disk is full. Finished shards are kept: free some space and run again, or set "
                "data.prepared to a directory on another disk."
            ) from error
        raise JaxptmError(f"{error.filename or directory}: {error.strerror or error}.") from error


def check_share(host: int, hosts: int, workers: int | None) -> None:
    """Raises JaxptmError where no host does some part, or nobody works."""
    if not 0 <= host < hosts:
        raise JaxptmError(f"--host {host} --hosts {hosts}: hosts are counted from 0 to one less than there are.")
    if workers is not None and workers < 1:
        raise JaxptmError(f"--workers {workers}: at least 1.")


def write_json(path: Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(fresh, path)


def read_json(path: Path) -> Any:
    """The content, or None where the file is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
