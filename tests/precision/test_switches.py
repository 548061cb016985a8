"""torch's global switches are set inside, put back outside, and readable by both of torch's interfaces throughout."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fewbits.precision.precision import Precision
from fewbits.precision.switches import torch_switches

READ = """
import torch
def read(get):
    try:
        return get()
    except RuntimeError:
        return "raises"
def state():
    backends = torch.backends
    matmul = backends.cuda.matmul
    getters = [lambda: matmul.allow_tf32, lambda: backends.cudnn.allow_tf32, torch.get_float32_matmul_precision]
    old = [read(getter) for getter in getters]
    owners = [matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    new = [getattr(owner, "fp32_precision", None) for owner in owners]
    return old, new, [matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction]
"""
CHECK = """
import os, sys
from fewbits.precision.precision import Precision
from fewbits.precision.switches import torch_switches
for setting in SETTINGS:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, setting
        continue
    exec(setting)
    before = state()
    for name in ("fp32", "tf32", "bf16-mixed", "fp16-mixed"):
        for device in ("cpu", "cuda"):
            with torch_switches(Precision.parse(name), device):
                inside = state()
            tf32 = name == "tf32" and device == "cuda"
            assert inside[0] == [tf32, tf32, "high" if tf32 else "highest"], (name, device, inside)
            assert inside[2] == [False, False], inside
            assert state() == before, (name, device, before, state())
    os._exit(0)
"""
BEFORE = {
    "nothing": "",
    "the old switch": "torch.backends.cuda.matmul.allow_tf32 = True",
    "the old precision": "torch.set_float32_matmul_precision('medium')",
    "the old cudnn switch": "torch.backends.cudnn.allow_tf32 = False",
    "the new switch": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "the new global switch": "torch.backends.fp32_precision = 'tf32'",
    "a new one beside an old one": "torch.backends.cudnn.conv.fp32_precision = 'ieee'; "
    "torch.set_float32_matmul_precision('high')",
    "reductions": "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork for every state")
def test_switches_are_set_and_put_back_whatever_was_there_before():
    """In forks of another process: torch cannot undo every state that its newer interface can be put in."""
    code = "\n".join([f"SETTINGS = {list(BEFORE.values())!r}", READ, CHECK])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_switches_are_put_back_after_an_exception():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), torch_switches(Precision.parse("tf32"), "cuda"):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
