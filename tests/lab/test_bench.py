"""A bench measures what it says: ceilings, whole steps, parts that add up to them, floors that follow from both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbits
from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.lab import bench as lab
from fewbits.lab.bench import bench, bench_config, native_precisions, part_times
from fewbits.lab.ceilings import Ceilings, measure_ceilings
from fewbits.lab.floors import Floor, Linears, elementwise_bytes, floors, linears_of, quantized_bytes
from fewbits.nn.prepare import prepare
from fewbits.nn.transformer import ModelConfig, Transformer
from fewbits.precision.hardware import Hardware, describe
from fewbits.precision.precision import Precision
from fewbits.precision.recipe import Recipe
from fewbits.train.attribution import ATTENTION_PART, GAPS, LOSS_PART, MATMUL, OPTIMIZER, QUANTIZATION, UNKNOWN
from fewbits.train.config import Config, load_recipe
from fewbits.train.trace import Breakdown

H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
CARD = Ceilings(3e12, {"fp32": 5e13, "bf16": 7e14, "fp8_e4m3": 1.3e15}, {})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Config:
    """Nano made tiny, and ceilings that take no time."""
    monkeypatch.setattr(lab, "measure_ceilings", lambda device, hardware: Ceilings(1e10, {"fp32": 1e11}, {}))
    config = load_recipe("nano")
    model = replace(config.model, n_layer=2, n_embd=32, n_head=2, context=32, vocab_size=64)
    return replace(
        config, precision="fp32", model=model, train=replace(config.train, batch_size=4, device="cpu", compile="false")
    )


def test_a_bench_says_how_fast_and_where_the_time_goes(small: Config, tmp_path: Path) -> None:
    found = bench(small, out_dir=tmp_path / "b", seconds=0.05, quiet=True)
    (row,) = found.rows
    assert row["status"] == "ok" and row["precision"] == "fp32"
    assert row["tok_per_s"] == pytest.approx(1e3 * 4 * 32 / row["ms_per_step"])
    assert sum(entry["ms"] for entry in row["parts"]) == pytest.approx(row["ms_per_step"])
    assert row["floor_ms"] == pytest.approx(sum(entry["floor_ms"] for entry in row["parts"]))
    assert row["profile"]["attributed"] == 1.0 and row["peak_memory_bytes"] > 0
    stored = json.loads(found.path.read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(found.document)) and stored["status"] == "finished"
    assert (tmp_path / "b" / "traces" / "fp32" / "trace.json.gz").is_file()
    assert Config.from_toml(stored["config"]).model == small.model


def test_tokens_a_second_are_those_of_all_timed_steps_slow_ones_too(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "time_steps", lambda *_, **__: ([0.1, 0.1, 0.4], 3, 3))
    (row,) = bench(small, out_dir=tmp_path / "b", seconds=0.05, quiet=True).rows
    assert row["tok_per_s"] == pytest.approx(3 * 4 * 32 / 0.6) and row["ms_range"] == pytest.approx([100, 400])


def test_the_front_door_has_it() -> None:
    assert fewbits.bench is bench


def test_a_precision_that_fails_is_a_row_with_its_reason_and_the_bench_goes_on(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = lab.build_step

    def failing(config: Config, precision: Precision, *rest: Any) -> Any:
        if precision.name == "fp16-mixed":
            raise torch.OutOfMemoryError("no")
        return build(config, precision, *rest)

    monkeypatch.setattr(lab, "build_step", failing)
    found = bench(small, ["fp16-mixed", "fp32"], tmp_path / "b", seconds=0.01, quiet=True)
    assert [row["status"] for row in found.rows] == ["failed", "ok"]
    assert found.rows[0]["reason"] == "it does not fit into memory"


def test_mistakes_are_refused_before_anything_is_measured(small: Config, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="seconds=0"):
        bench(small, seconds=0)
    with pytest.raises(FewbitsError, match="bf17"):
        bench(small, ["bf17"], tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(FewbitsError, match="not empty"):
        bench(small, out_dir=tmp_path / "full")
    assert not (tmp_path / "b").exists()


def test_what_runs_natively_is_asked_of_the_hardware() -> None:
    names, left_out = native_precisions(H100)
    assert {"fp32", "tf32", "bf16-mixed", "fp16-mixed", "fp8", "fp8-delayed, head=fp8", "fp8-row", "fp8-block"} <= set(
        names
    )
    assert set(left_out) == {"mxfp8", "nvfp4"} and all(left_out.values())
    old, refused = native_precisions(Hardware("cuda", "Tesla V100", (7, 0)))
    assert "bf16-mixed" in refused and "fp16-mixed" in old


def test_a_step_is_one_micro_batch_and_smaller_where_a_cpu_would_take_minutes() -> None:
    config, notes = bench_config(load_recipe("gpt2-124m"), torch.device("cuda"))
    assert config.train.batch_size == 32 and config.train.micro_batches == 1 and len(notes) == 1
    config, notes = bench_config(load_recipe("gpt2-124m"), torch.device("cpu"))
    assert config.train.batch_size == 1 and "1 of 32 sequences" in notes[1]
    _, notes = bench_config(load_recipe("llama-1b"), torch.device("cuda"))
    assert any("masks documents" in note for note in notes)  # the recipe masks documents, the bench has none


def test_parts_on_cuda_keep_their_time_and_the_gap_is_the_rest() -> None:
    found = Breakdown(3, "cuda", 90.0, {MATMUL: 40.0, UNKNOWN: 5.0, GAPS: 45.0})
    times = part_times(found, 50.0)
    assert times[MATMUL] == 40.0 and times[UNKNOWN] == 5.0 and times[GAPS] == 5.0
    assert part_times(found, 30.0)[GAPS] == 0.0


def everywhere(model: ModelConfig, precision: Precision) -> list[Linears]:
    """The linear layers of a GPT that all have the recipe of a precision."""
    D, F, recipe = model.n_embd, model.ff, str(precision.recipe) if precision.recipe else ""
    return [Linears(*shape, recipe, model.n_layer) for shape in ((D, 3 * D), (D, D), (D, F), (F, D))]


def test_floors_of_gpt2_on_an_h100_are_those_of_the_design() -> None:
    """32,768 tokens: matmuls 36 ms in bf16 and about 21 in fp8 (DESIGN section 9 at 670 TFLOP/s; here 700)."""
    model, device = ModelConfig(), torch.device("cpu")

    def least(name: str) -> dict[str, Floor]:
        precision = Precision.parse(name)
        state = 26 * model.parameter_count()
        return floors(model, 32768, precision, H100, device, CARD, state, everywhere(model, precision))

    bf16 = least("fp32")
    assert bf16[MATMUL].ms == pytest.approx(14 * 34.7, rel=0.01)  # 14 times slower at 50 TFLOP/s of fp32
    fp8 = least("fp8")
    head = 6 * 32768 * 50304 * 768
    blocks = 6 * 32768 * 12 * 12 * 768**2
    rate = 7e14 if fp8[ATTENTION_PART].why.count("bf16") else 5e13  # what this CPU does with bf16 decides
    assert fp8[MATMUL].ms == pytest.approx(1e3 * (blocks / 1.3e15 + head / rate), rel=0.01)
    assert fp8[OPTIMIZER].ms == pytest.approx(26 * 124.5e6 / 3e9, rel=0.02)
    assert fp8[LOSS_PART].ms == pytest.approx(32768 * 50304 * 4 / 3e9, rel=0.01)
    assert fp8[QUANTIZATION].ms > 0 == bf16[QUANTIZATION].ms == fp8[GAPS].ms
    whole = least("fp8, head=fp8")
    assert whole[MATMUL].ms == pytest.approx(1e3 * (blocks + head) / 1.3e15, rel=0.01)
    assert whole[LOSS_PART].ms == pytest.approx(fp8[LOSS_PART].ms * 3 / 4, rel=0.01)  # a byte a gradient, not two
    operands = whole[QUANTIZATION].ms - fp8[QUANTIZATION].ms
    assert operands == pytest.approx(3 * (32768 + 50304) * 768 / 3e9, rel=0.01)


def test_bytes_of_the_elementwise_part_are_those_of_fused_passes() -> None:
    model = ModelConfig(vocab_size=64, n_layer=1, n_embd=8, n_head=1, n_ff=32, context=4)
    # two fused add-and-norm passes (4 D each way), GELU (2 F forward, 3 F backward), the embedding
    assert elementwise_bytes(model, tokens=1, width=2) == 2 * (16 * 8 + 5 * 32 + 4 * 8)
    assert quantized_bytes(model, 1, Precision.parse("fp32"), 4, everywhere(model, Precision.parse("fp32"))) == 0


def test_floors_go_by_what_each_layer_multiplies_in() -> None:
    config = ModelConfig(vocab_size=64, n_layer=2, n_embd=64, n_head=2, context=16)
    precision, output = Precision.parse("fp8, layers=auto"), "output=e4m3/tensor x e4m3/tensor"
    names = [
        f"blocks.{i}.{layer}" for i in range(2) for layer in ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
    ]
    chosen = dict.fromkeys(names, Choice("bf16", "a test")) | {"blocks.1.mlp.up": Choice(output, "a test")}
    found = linears_of(prepare(Transformer(config), precision, layers=chosen))
    up = next(alike for alike in found if alike.recipe)
    assert (up.inputs, up.outputs, up.layers) == (64, 256, 1) and Recipe.parse(up.recipe) == Recipe.parse(output)
    assert sum(alike.layers for alike in found) == 8
    # activation and weight are quantized, the gradient is not: a byte and two more an element
    assert quantized_bytes(config, 100, precision, 2, found) == 3 * (100 * 64 + 64 * 256)
    arguments = (H100, torch.device("cpu"), CARD, 0)
    least, whole = (
        floors(config, 100, precision, *arguments, linears) for linears in (found, everywhere(config, precision))
    )
    few = least[MATMUL].why.split(" and ")[-1]
    assert few.startswith(f"{2 * 100 * 64 * 256 / 1e12:,.3g} TFLOP in fp8_e4m3")
    assert whole[QUANTIZATION].ms > least[QUANTIZATION].ms and whole[MATMUL].ms < least[MATMUL].ms


def test_ceilings_of_this_machine_are_measured_and_the_better_of_two_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbits.lab.ceilings._SIZES", {"cpu": (64,)})
    monkeypatch.setattr("fewbits.lab.ceilings._SLOW_SIZES", {"cpu": (64,)})
    monkeypatch.setattr("fewbits.lab.ceilings._COPY_BYTES", {"cpu": 1 << 16})
    device = torch.device("cpu")
    found = measure_ceilings(device, describe(device))
    assert found.copy > 0 and found.matmul["fp32"] > 0
    assert found.left_out["tf32"] and "fp8_e4m3" in found.left_out
    best = found.better(Ceilings(2 * found.copy, {"fp32": 1.0}, {}))
    assert best.copy == 2 * found.copy and best.matmul == found.matmul
    assert found.matmul_rate("fp8_e5m2") == found.matmul["fp32"]
