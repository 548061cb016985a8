"""The heap keeps what a step frees, unless the user has decided about it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from fewbits.kernels.heap import keep_freed_memory

FAULTS = """
import resource, sys, torch
from fewbits.kernels.heap import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory().value, keep_freed_memory().reason
def churn():
    for rows in (20 << 20, 24 << 20):
        torch.ones(rows)
for _ in range(8):
    churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    environment = {key: value for key, value in os.environ.items() if "MALLOC" not in key and key != "GLIBC_TUNABLES"}
    result = subprocess.run(
        [sys.executable, "-c", FAULTS, how], env=environment, capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    # 176 MiB are touched and freed eight times: 360,448 small pages where every block is mapped anew, none where it is kept
    assert 20 * faults("keep") < faults("leave")


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_a_setting_of_the_user_stands(monkeypatch, name):
    monkeypatch.setenv(name, "glibc.malloc.trim_threshold=1" if name == "GLIBC_TUNABLES" else "1")
    choice = keep_freed_memory.__wrapped__()
    assert not choice.value
    assert name in choice.reason or platform.libc_ver()[0] != "glibc"
