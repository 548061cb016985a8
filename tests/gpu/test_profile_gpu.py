"""On a GPU the profile knows its kernels: their parts, tensor cores, ranges, with a graph in the run or without."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbits.lab.bench import bench
from fewbits.ranges import PREFIX
from fewbits.train.config import load_recipe
from fewbits.train.trainer import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def small(text: Path, out: Path | None = None, graph: str = "auto"):
    config = load_recipe("nano")
    model = replace(config.model, n_layer=2, n_embd=256, n_head=4, context=256, vocab_size=512)
    train_config = replace(
        config.train, out_dir=str(out or ""), batch_size=16, max_steps=10, device="cuda", compile="false", graph=graph,
        eval_every=0, eval_batches=1, sample_every=0, save_every=0,
    )  # fmt: skip
    data = replace(config.data, data=str(text), tokenizer="bytes")
    optim = replace(config.optim, warmup_steps=2)
    return replace(config, precision="bf16-mixed", model=model, train=train_config, data=data, optim=optim)


@pytest.mark.parametrize("graph", ["auto", "false"])
def test_a_profiled_training_knows_its_kernels(texts, tmp_path, graph):
    train(small(texts, tmp_path / "run", graph), quiet=True, profile=2)
    found = json.loads((tmp_path / "run" / "profile.json").read_text(encoding="utf-8"))
    assert found["on"] == "cuda" and found["steps"] == 2
    assert found["attributed"] >= 0.95, found["unknown"]
    assert found["tensor_cores"] >= 0.9 and found["matmul_formats"]["bf16"] > 0
    assert {"forward", "backward", "loss head", "block 1", "clip and update"} <= set(found["stages"])
    with gzip.open(tmp_path / "run" / "trace.json.gz", "rt", encoding="utf-8") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert PREFIX + "step" in names


def test_profiling_changes_no_loss(texts, tmp_path):
    ends = [train(small(texts, tmp_path / str(steps)), quiet=True, profile=steps)["final_loss"] for steps in (0, 3)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)  # sums of attention's backward and of embeddings have no order


def test_a_bench_measures_ceilings_and_parts(texts, tmp_path):
    found = bench(small(texts), ["fp32", "bf16-mixed"], tmp_path / "b", seconds=0.2, quiet=True)
    rates = found.document["ceilings"]["matmul"]
    assert rates["bf16"] > rates["fp32"] and found.document["ceilings"]["copy"] > 1e11
    for row in found.rows:
        assert row["status"] == "ok" and row["profile"]["attributed"] >= 0.95, row["profile"]["unknown"]
        busy = sum(entry["ms"] for entry in row["parts"])
        assert busy >= 0.9 * row["ms_per_step"] and row["floor_ms"] > 0
