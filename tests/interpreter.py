"""Kernels in Triton on a CPU: its interpreter, chosen before Triton is imported. Who imports this is skipped without."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
triton = pytest.importorskip("triton")

INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available() or not triton.knobs.runtime.interpret,
    reason="tests/gpu has the device's own; or no interpreter",
)
