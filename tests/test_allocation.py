"""Memory that a step frees serves the next one, without new pages from the kernel."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

from jaxptm.allocation import keep_freed_memory

PAGE = resource.getpagesize()
COUNT_FAULTS = """
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would make few faults of many
if sys.argv[1] == "kept":
    from jaxptm.allocation import keep_freed_memory
    assert keep_freed_memory()
bytearray(50_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytearray(50_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", COUNT_FAULTS, mode]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_a_step_has_the_memory_of_the_one_before() -> None:
    pages = 4 * 50_000_000 // PAGE
    assert faults("fresh") >= pages
    assert faults("kept") < 0.01 * pages


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
