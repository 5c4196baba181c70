"""Runs in a bucket (`out: gs://bucket/runs/x`): what is written there, and what is written here and copied there.

Checkpoints go straight to the bucket: Orbax has every process write its part. All else that a run writes is small and
comes from libraries that know disks only, so it lies in a local directory that process 0 copies from and to the bucket.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxptm.errors import JaxptmError
from jaxptm.hosts import is_main

log = logging.getLogger("jaxptm")

_URL = re.compile(r"[A-Za-z][\w+.-]+://")  # no drive letter


def is_remote(path: str) -> bool:
    """Whether `path` is an URL."""
    return _URL.match(path) is not None


def local_directory(out: str) -> Path:
    """Where the small files of the run `out` are written: `out` itself, or for an URL a directory named after it."""
    if not is_remote(out):
        return Path(out)
    place = out.rstrip("/")
    name = re.sub(r"[^\w.]+", "-", place.partition("://")[2])
    return Path("runs/remote") / f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:6]}"  # others may read alike


def checkpoint_directory(out: str) -> Path | Any:
    """Where the checkpoints of the run `out` are: a `Path`, or an `epath.Path` that has the same methods.

    Raises:
        JaxptmError: Orbax cannot write to this kind of URL.
    """
    if not is_remote(out):
        return Path(out) / "checkpoints"
    if not out.startswith("gs://"):
        raise JaxptmError(
            f"out: {out} can hold no checkpoints, which Orbax writes to disks and gs:// only; name a gs:// URL, or a "
            "directory that all hosts share."
        )
    import fsspec
    from etils import epath

    # Other processes, and tensorstore in this one, change the bucket behind the back of a cached listing.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it would log, it raises as well
    return epath.Path(out) / "checkpoints"


class Mirror:
    """The local directory of a run, and its copy in the bucket; where `out` is no URL, nothing is ever copied."""

    def __init__(self, out: str) -> None:
        """Takes what lies in the local directory already, of an earlier run, for copied."""
        self.out = out.rstrip("/")
        self.local = local_directory(out)
        self._remote = is_remote(out)
        self._pushed = _stamps(self.local) if self._remote else {}

    def pull(self, name: str, *, missing_ok: bool = False) -> Path:
        """Copies a file or directory of the run here, and returns where it lies.

        Raises:
            JaxptmError: the bucket cannot be read, or there is no such file.
        """
        if not self._remote:
            return self.local / name
        with reachable(self.out):
            fs, root = _file_system(self.out)
            fs.invalidate_cache()  # another host may have written since
            files = fs.find(f"{root}/{name}")
            for file in files:
                target = self.local / file.removeprefix(f"{root}/")
                target.parent.mkdir(parents=True, exist_ok=True)
                fs.get_file(file, str(target))
                self._pushed[target] = _stamp(target)
        if not files and not missing_ok:
            raise JaxptmError(
                f"{self.out}/{name}: there is no such file; check the address (a run writes model/ when it ends)."
            )
        return self.local / name

    def push(self) -> None:
        """Copies the files that have changed since the last time to the bucket; on process 0 alone.

        Raises:
            JaxptmError: the bucket cannot be written to; a later push copies what this one could not.
        """
        if not self._remote or not is_main():
            return
        with reachable(self.out):
            fs, root = _file_system(self.out)
            for path, stamp in _stamps(self.local).items():
                if self._pushed.get(path) != stamp:
                    fs.put_file(str(path), f"{root}/{path.relative_to(self.local).as_posix()}")
                    self._pushed[path] = stamp

    def try_push(self) -> None:
        """Pushes in the middle of a run, which must not die of it."""
        try:
            self.push()
        except JaxptmError as error:
            log.warning("%s The run goes on, and tries again at its next checkpoint.", error)


def read_text(out: str, name: str) -> str | None:
    """A file of the run `out`, from where it was written; None where there is none. Nothing is copied here.

    Raises:
        JaxptmError: it cannot be read.
    """
    if not is_remote(out):
        path = Path(out) / name
        try:
            return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
        except OSError as error:
            raise JaxptmError(f"{path}: cannot be read: {error.strerror}.") from error
    with reachable(out):
        fs, root = _file_system(out)
        fs.invalidate_cache()
        place = f"{root}/{name}"
        return fs.cat_file(place).decode("utf-8", errors="replace") if fs.exists(place) else None


@contextmanager
def reachable(url: str) -> Iterator[None]:
    """Says in a sentence what a bucket refuses; each driver raises its own kinds."""
    try:
        yield
    except ImportError as error:  # fsspec's words name the package to install
        raise JaxptmError(f"{url}: needs a driver that is not installed: {_reason(error)}.") from error
    except Exception as error:
        raise JaxptmError(
            f"{url}: cannot be used, check that the bucket exists, the network, and your credentials: {_reason(error)}."
        ) from error


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    fs, path = fsspec.url_to_fs(url)
    return fs, path.rstrip("/")


def _stamps(directory: Path) -> dict[Path, tuple[int, int]]:
    return {path: _stamp(path) for path in sorted(directory.rglob("*")) if path.is_file()}


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _reason(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
