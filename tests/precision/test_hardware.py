"""What runs natively, asked of faked hardware: Volta to Blackwell, CPUs with and without 16-bit instructions."""

from __future__ import annotations

import re

import pytest
import torch
import torch.utils.flop_counter

from fewbits.errors import FewbitsError
from fewbits.precision import hardware
from fewbits.precision.hardware import Hardware, check, describe, native, peak_flops
from fewbits.precision.precision import PRECISIONS, Precision


def gpu(sm: int, name: str = "NVIDIA GPU") -> Hardware:
    return Hardware("cuda", name, (sm // 10, sm % 10))


def cpu(*features: str, isa: str = "", **gflops: float) -> Hardware:
    return Hardware("cpu", "a CPU", None, frozenset(features), isa, tuple(gflops.items()))


WIDE = {"fp64", "fp32"}
TURING = WIDE | {"fp16", "int8"}
AMPERE = TURING | {"bf16", "tf32"}
ADA = AMPERE | {"fp8_e4m3", "fp8_e5m2"}
BLACKWELL = ADA | {"fp4_e2m1", "e8m0"}
NATIVE = {70: WIDE | {"fp16"}, 75: TURING, 80: AMPERE, 86: AMPERE, 89: ADA, 90: ADA, 100: BLACKWELL, 120: BLACKWELL}
ASKED = [
    "fp64",
    "fp32",
    "tf32",
    "bf16",
    "fp16",
    "fp8_e4m3",
    "fp8_e5m2",
    "e8m0",
    "fp6_e2m3",
    "fp4_e2m1",
    "int8",
    "int4",
    "binary",
]


@pytest.mark.parametrize("sm", NATIVE)
def test_each_generation_multiplies_what_it_has_tensor_cores_for(sm):
    answers = {name: native(name, gpu(sm)) for name in ASKED}
    assert {name for name, answer in answers.items() if answer.value} == NATIVE[sm]
    assert all(f"sm_{sm}" in answer.reason or "torch has no" in answer.reason for answer in answers.values())


@pytest.mark.parametrize(
    ("sm", "runs"),
    [
        (60, {"fp64", "fp32"}),
        (70, {"fp64", "fp32", "fp16-mixed", "fp16-true"}),
        (75, {"fp64", "fp32", "fp16-mixed", "fp16-true"}),
        *((sm, set(PRECISIONS)) for sm in (80, 86, 89, 90, 100, 120)),
    ],
)
def test_a_gpu_runs_a_precision_or_says_what_would_work(sm, runs):
    for name, precision in PRECISIONS.items():
        if name in runs:
            check(precision, gpu(sm))
            continue
        with pytest.raises(FewbitsError) as caught:
            check(precision, gpu(sm))
        advice = "Use fp16-mixed" if precision.operand.name == "bf16" and sm >= 70 else "Use fp32"
        assert advice in str(caught.value)
        assert f"sm_{sm}" in str(caught.value)


def test_a_cpu_runs_every_precision():
    for precision in PRECISIONS.values():
        check(precision, cpu())


@pytest.mark.parametrize("kind", ["mps", "rocm", "xpu", "privateuseone"])
def test_other_devices_are_refused_in_one_sentence(kind):
    with pytest.raises(FewbitsError, match=r"not supported.*--device cpu"):
        check(Precision.parse("fp32"), Hardware(kind, "something"))
    assert not native("fp32", Hardware(kind, "something")).value


@pytest.mark.parametrize(
    ("machine", "format", "expected", "said"),
    [
        (cpu(fp32=60, bf16=2.5), "bf16", False, "no instructions that multiply bf16.*24 times slower than fp32 at 60"),
        (cpu("avx512_bf16", fp32=200, bf16=775), "bf16", True, "avx512_bf16.*3.9 times as fast"),
        (cpu("amx_bf16", fp32=200, bf16=2000), "bf16", True, "amx_bf16"),
        (cpu("avx512_bf16", fp32=200, bf16=230), "bf16", False, "does not pay"),  # below 1.2 times fp32
        (cpu("avx512_bf16", fp32=200, bf16=8), "bf16", False, "does not pay.*25 times slower"),
        (cpu("avx512_bf16"), "bf16", True, "not timed"),
        (cpu(fp32=60, fp16=0.5), "fp16", False, "120 times slower"),
        (cpu("avx512_fp16"), "fp16", False, "not timed"),  # never on the word of a flag
        (cpu("amx_fp16", fp32=200, fp16=900), "fp16", True, "4.5 times as fast"),
        (cpu(isa="AVX2", fp32=60, bf16=2.5), "bf16", False, "ONEDNN_MAX_CPU_ISA=AVX2 leaves no"),
        (cpu("avx512_vnni"), "int8", True, "avx512_vnni"),
        (cpu(), "int8", False, "VNNI"),
        (cpu(), "tf32", False, "no CPU multiplies tf32"),
        (cpu(), "fp8_e4m3", False, "no CPU multiplies fp8_e4m3"),
        (cpu(), "fp32", True, "every CPU"),
    ],
)
def test_a_cpu_multiplies_natively_what_has_instructions_and_pays(machine, format, expected, said):
    answer = native(format, machine)
    assert answer.value is expected
    assert re.search(said, answer.reason), answer.reason


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        ("", {"avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "amx_fp16"}),
        ("DEFAULT", {"avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "amx_fp16"}),
        ("AVX512_CORE_AMX", {"avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"}),
        ("AVX512_CORE_BF16", {"avx512_vnni", "avx512_bf16"}),
        ("AVX10_1_512", {"avx512_vnni", "avx512_bf16", "avx512_fp16"}),
        ("avx2", set()),
        ("SSE41", set()),
    ],
)
def test_onednn_max_cpu_isa_takes_instructions_away(limit, left):
    everything = frozenset({"avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "amx_fp16"})
    assert hardware._allowed(everything, limit) == left


def test_the_variable_is_named_when_it_decides(monkeypatch):
    hardware._describe_cpu.cache_clear()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(hardware, "cpu_features", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(hardware, "time_cpu", lambda names: (("fp32", 200.0), ("bf16", 8.0)))
    try:
        answer = native("bf16", describe("cpu"))
        assert answer == (False, answer.reason)
        assert "ONEDNN_MAX_CPU_ISA=AVX2" in answer.reason
        assert "25 times slower" in answer.reason
    finally:
        hardware._describe_cpu.cache_clear()


def test_this_cpu_is_described_once_with_measured_figures():
    here = describe("cpu")
    assert here is describe(torch.device("cpu"))
    assert {name for name, _ in here.measured} == {"fp32", "bf16", "fp16"}
    assert all(rate > 0 for _, rate in here.measured)
    if not here.cpu_features & {"avx512_bf16", "amx_bf16", "arm_bf16"}:
        answer = native("bf16", here)
        assert not answer.value
        assert "GFLOP/s" in answer.reason


def test_timing_changes_nothing_around_it_and_nothing_around_changes_it():
    before = torch.get_rng_state(), torch.get_num_threads()
    with torch.device("meta"), torch.autocast("cpu"), torch.utils.flop_counter.FlopCounterMode(display=False) as flops:
        rates = dict(hardware.time_cpu.__wrapped__(("bf16",)))
    assert rates["fp32"] > 0
    assert flops.get_total_flops() == 0
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]


@pytest.mark.parametrize(
    ("name", "sm", "format", "tflops"),
    [
        ("Tesla V100-SXM2-16GB", 70, "fp16", 125),
        ("Tesla V100-SXM2-16GB", 70, "bf16", None),
        ("Tesla T4", 75, "fp16", 65),
        ("NVIDIA A100-SXM4-80GB", 80, "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", 80, "tf32", 156),
        ("NVIDIA A10G", 86, "bf16", 70),
        ("NVIDIA A10", 86, "bf16", 125),
        ("NVIDIA GeForce RTX 3090", 86, "bf16", 71),
        ("NVIDIA GeForce RTX 4090", 89, "fp16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 89, "fp16", None),
        ("NVIDIA L4", 89, "fp8_e4m3", 242),
        ("NVIDIA L40S", 89, "bf16", 362),
        ("NVIDIA H100 80GB HBM3", 90, "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", 90, "fp32", 66.9),
        ("NVIDIA H100 PCIe", 90, "fp16", 756),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 90, "bf16", None),
        ("NVIDIA H200", 90, "fp8_e5m2", 1978.9),
        ("NVIDIA B200", 100, "bf16", 2250),
        ("NVIDIA B200", 100, "fp4", 9000),
        ("Some GPU", 90, "bf16", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name, sm, format, tflops):
    assert peak_flops(gpu(sm, name), format) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_no_peak_is_claimed_for_a_cpu():
    assert peak_flops(cpu(), "fp32") is None


def test_a_device_that_is_not_there_is_one_sentence():
    with pytest.raises(FewbitsError, match="no device 'gpu'"):
        describe("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(FewbitsError, match="torch sees no GPU"):
            describe("cuda")
    assert describe("mps").kind == "mps"
