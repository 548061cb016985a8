"""Without a compiler everything runs as the definitions say, and the choice says why."""

import os
import subprocess
import sys

import pytest

from fewbits.kernels import cpp

STEP = """
import torch, fewbits
from fewbits.kernels import dispatch
shape = fewbits.ModelConfig(vocab_size=64, context=16, n_layer=1, n_head=2, n_embd=32)
tokens = torch.arange(32).view(2, 16)
for precision in ("bf16-mixed", "int8", "fp8"):
    model = fewbits.prepare(fewbits.Transformer(shape), precision)
    step = fewbits.Step(model, fewbits.AdamW(model.parameters(), lr=1e-3), precision)
    losses = [float(step([{"input_ids": tokens, "labels": tokens}]).loss) for _ in range(3)]
    assert losses[-1] < losses[0]
    print(precision, *losses)
print(dispatch.quantize_execution(torch.device("cpu")))
"""


def steps(environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", STEP], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_a_compiler_the_definitions_run_and_the_choice_says_why(tmp_path):
    lines = steps({"CXX": "/nonexistent", "FEWBITS_CACHE": str(tmp_path)})
    assert "definition" in lines[-1]
    assert "CXX=/nonexistent is not there" in lines[-1]
    assert not (tmp_path / "kernels").exists()


@pytest.mark.skipif(not cpp.compiler(), reason="no C++ compiler is installed")
def test_a_library_is_compiled_once_a_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))
    first = cpp._built("quantize_cpu", cpp.compiler())
    stamp = first.stat().st_mtime_ns
    assert cpp._built("quantize_cpu", cpp.compiler()) == first
    assert first.stat().st_mtime_ns == stamp
    assert [path.name for path in first.parent.iterdir()] == [first.name]
