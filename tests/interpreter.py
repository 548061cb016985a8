"""Kernels in Triton on a CPU: its interpreter, which conftest.py chooses. Who imports this is skipped without."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available() or not triton.knobs.runtime.interpret,
    reason="tests/gpu has the device's own; or no interpreter",
)
