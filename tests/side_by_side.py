"""Two that prepare the same data at the same time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import TypeVar

from jaxptm.data.shards import Progress

T = TypeVar("T")


def at_once(prepare: Callable[[Progress], T]) -> tuple[T, T]:
    """What both make of it. The second begins when the first has told of its first shard, and has to say that it waits.

    The first goes on when the second has said so.
    """
    waits = Event()
    with ThreadPoolExecutor() as pool:
        second: list[Future[T]] = []

        def of_second(share: float, message: str) -> None:
            if "another process is preparing" in message:
                waits.set()

        def of_first(share: float, message: str) -> None:
            if not second:
                second.append(pool.submit(prepare, of_second))
                assert waits.wait(60)

        return prepare(of_first), second[0].result()
