"""Names that profilers recorded are put into the part of the step that they belong to, in their format."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fewbits
from fewbits.ranges import ATTENTION, LOSS_HEAD, QUANTIZE, UPDATE
from fewbits.train.attribution import (
    ATTENTION_PART,
    COPIES,
    ELEMENTWISE,
    GAPS,
    LOSS_PART,
    MATMUL,
    OPTIMIZER,
    QUANTIZATION,
    UNKNOWN,
    kernel_part,
    multiplied,
    operand_format,
    operator_part,
)

KERNELS = [
    ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTT", MATMUL, "bf16", True),
    ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_TNT", MATMUL, "bf16", True),
    ("nvjet_sm90_qrsss_128x128_128x6_1x2_h_bz_coopA_algo2_TNT", MATMUL, "fp8", True),
    ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*, void const*)", ATTENTION_PART, None, False),
    ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*)", ATTENTION_PART, None, False),
    ("nvjet_hsh_192x192_64x4_2x1_v_bz_coopB_NNT", MATMUL, "fp16", True),
    ("nvjet_qqtst_128x256_128x4_2x1_v_bz_TNT", MATMUL, "fp8", True),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", MATMUL, "bf16", True),
    ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x64x128_warpgroupsize1x1x1_bias_bf16_execute", MATMUL, "fp8", True),
    ("sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize128x128x16_stage4_warpsize2x2x1", MATMUL, "tf32", True),
    ("sm90_xmma_gemm_i8i32_i8i32_i32_tn_n_tilesize128x128x128_warpgroupsize1x1x1", MATMUL, "int8", True),
    ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", MATMUL, "bf16", True),
    ("ampere_fp16_s16816gemm_fp16_256x128_ldg8_f2f_stages_64x3_nn", MATMUL, "fp16", True),
    ("volta_fp16_s884gemm_fp16_256x128_ldg8_f2f_nn", MATMUL, "fp16", True),
    ("volta_h884gemm_128x64_ldg8_nn", MATMUL, "fp16", True),
    ("ampere_sgemm_128x64_tn", MATMUL, "fp32", False),
    ("volta_sgemm_128x128_nn", MATMUL, "fp32", False),
    ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x256_16x3_tn_align4>", MATMUL, "tf32", True),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>", MATMUL, "bf16", True),
    ("void cutlass::Kernel2<cutlass_80_simt_sgemm_256x128_8x4_nt_align1>", MATMUL, "fp32", False),
    ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::float_e4m3_t>>", MATMUL, "fp8", True),
    ("void gemv2T_kernel_val<int, int, __nv_bfloat16, float, 128, 16, 4, 4>", MATMUL, "bf16", False),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16>", MATMUL, "?", None),
    ("triton_tem_fused_addmm_gelu_12", MATMUL, "?", None),
    ("_matmul_fp8_rows_kernel", MATMUL, "fp8", True),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_31_64x128x64_4x1x1_kernel0_0", ATTENTION_PART, "", None),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64>>", ATTENTION_PART, "", None),
    ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel::Params)", ATTENTION_PART, "", None),
    ("_attn_forward_kernel", ATTENTION_PART, "", None),
    ("triton_red_fused__log_softmax_gather_neg_3", LOSS_PART, "", None),
    ("void at::native::(anonymous namespace)::cunn_SoftMaxForwardGmem<4, float, float, float>", LOSS_PART, "", None),
    ("_softmax_gradient_kernel", LOSS_PART, "", None),
    ("triton_poi_fused_gelu_view_5", ELEMENTWISE, "", None),
    ("triton_red_fused_add_native_layer_norm_native_layer_norm_backward_9", ELEMENTWISE, "", None),
    ("triton_per_fused_add_native_layer_norm_2", ELEMENTWISE, "", None),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int, float)", ELEMENTWISE, "", None),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>", ELEMENTWISE, "", None),
    ("void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long>", ELEMENTWISE, "", None),
    ("_quantize_rows_kernel", QUANTIZATION, "", None),
    ("_split_update_kernel", OPTIMIZER, "", None),
    ("_gradient_norm_kernel", OPTIMIZER, "", None),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", OPTIMIZER, "", None),
    ("Memcpy DtoD (Device -> Device)", COPIES, "", None),
    ("Memset (Device)", COPIES, "", None),
    ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(TensorIteratorBase&)>", COPIES, "", None),
    ("somebody_elses_thing", UNKNOWN, "", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "part", "format", "cores"), KERNELS, ids=[name[:40] for name, *_ in KERNELS])
def test_recorded_kernel_names_are_known(name: str, part: str, format: str, cores: bool | None) -> None:
    assert kernel_part(name) == part
    if part == MATMUL:
        assert multiplied(name) == (format, cores)


def test_every_kernel_of_ours_says_what_it_is_for() -> None:
    """A Triton kernel is named for the part of the step that it belongs to: under a CUDA graph there is no range."""
    sources = sorted((Path(fewbits.__file__).parent / "kernels").glob("*_triton.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    kernels = re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)
    assert len(kernels) >= 8
    found = {name: kernel_part(name) for name in kernels}
    assert set(found.values()) <= {QUANTIZATION, OPTIMIZER, LOSS_PART, ATTENTION_PART, MATMUL, ELEMENTWISE}, found
    assert found["softmax_gradient_kernel"] == LOSS_PART and found["update_kernel"] == OPTIMIZER
    assert found["encode_all_kernel"] == found["amax_kernel"] == QUANTIZATION
    assert found["norm_backward_kernel"] == found["totals_kernel"] == found["activate_backward_kernel"] == ELEMENTWISE
    assert found["encode_norm_kernel"] == QUANTIZATION and found["add_statistics_kernel"] == ELEMENTWISE
    assert found["hidden_less_targets_kernel"] == found["weight_less_targets_kernel"] == LOSS_PART


def test_a_range_tells_what_a_name_cannot() -> None:
    loop, product = "triton_poi_fused_mul_where_4", "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTT"
    assert kernel_part(loop, [UPDATE]) == OPTIMIZER
    assert kernel_part(loop, ["forward", LOSS_HEAD]) == LOSS_PART
    assert kernel_part(loop, [QUANTIZE]) == QUANTIZATION
    assert kernel_part(product, ["forward", LOSS_HEAD]) == MATMUL
    assert kernel_part(product, ["forward", "block 0", ATTENTION]) == ATTENTION_PART
    assert kernel_part("somebody_elses_thing", [UPDATE]) == OPTIMIZER


def test_operators_of_a_cpu_are_known_and_views_are_the_hosts_own_time() -> None:
    assert (
        operator_part("aten::addmm") == operator_part("aten::_int_mm") == operator_part("scaled_int8_matmul") == MATMUL
    )
    assert operator_part("mkldnn::_linear_pointwise") == MATMUL
    assert operator_part("aten::bmm", ["fewbits", "_ShortAttentionBackward"]) == ATTENTION_PART
    assert operator_part("aten::_scaled_dot_product_flash_attention_for_cpu") == ATTENTION_PART
    assert operator_part("aten::_softmax", [LOSS_HEAD]) == LOSS_PART
    assert operator_part("aten::mul", [UPDATE]) == operator_part("aten::_fused_adamw_") == OPTIMIZER
    assert operator_part("update", [UPDATE]) == OPTIMIZER  # the C++ of kernels/update_cpu.py
    assert operator_part("quantize", ["forward"]) == operator_part("fewbits::encode_both") == QUANTIZATION
    assert operator_part("norm_backward", ["backward", "_NormBackward"]) == operator_part("gelu") == ELEMENTWISE
    assert operator_part("attention_softmax") == ATTENTION_PART and operator_part("softmax_gradient") == LOSS_PART
    assert operator_part("aten::copy_") == COPIES and operator_part("aten::sigmoid") == ELEMENTWISE
    assert operator_part("aten::as_strided", [UPDATE]) == operator_part("forward") == GAPS


def test_the_format_of_a_cpu_matmul_is_that_of_its_operands() -> None:
    assert operand_format(["float", "c10::BFloat16", "c10::BFloat16", "Scalar"]) == "bf16"
    assert operand_format(["signed char", "signed char"]) == "int8" and operand_format(["Scalar"]) == "?"
    assert operand_format([], "scaled_int8_matmul") == "int8"
