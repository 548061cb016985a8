"""What a kernel or an operator is for, by its name and by the range of ours that it ran in: the parts of a training step.

The rules are read from top to bottom and the first that fits counts. Names are those of cuBLAS, CUTLASS, cuDNN, torch and
inductor as profilers record them; our own kernels say what they are for (softmax, attn, quant, update, matmul).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from fewbits.ranges import ATTENTION, LOSS_HEAD, QUANTIZE, UPDATE

MATMUL, ELEMENTWISE, QUANTIZATION, OPTIMIZER, COPIES = "matmuls", "elementwise", "quantization", "optimizer", "copies"
ATTENTION_PART, LOSS_PART, GAPS, UNKNOWN = "attention", "loss head", "gaps and host", "unknown"
PARTS = (MATMUL, ATTENTION_PART, LOSS_PART, ELEMENTWISE, QUANTIZATION, OPTIMIZER, COPIES, GAPS)
"""In the order in which they are shown. The matmuls of the head are matmuls; its softmax is the loss head."""

_RANGE_PART = {UPDATE: OPTIMIZER, QUANTIZE: QUANTIZATION, ATTENTION: ATTENTION_PART, LOSS_HEAD: LOSS_PART}

RULES: tuple[tuple[str, str], ...] = (
    # inductor writes the operators that it fused into the name: one pass over memory, whatever they are
    (r"^triton_tem_.*flex_attention", ATTENTION_PART),
    (r"^triton_(tem|mm)_", MATMUL),
    (r"^triton_(poi|red|per|for|spl|mix)_.*(log_softmax|nll_loss|cross_entropy)", LOSS_PART),
    (r"^triton_(poi|red|per|for|spl|mix)_", ELEMENTWISE),
    (r"flash|fmha|sdpa|attention|attn|compute_dq|compute_dot_do_o|convert_dq", ATTENTION_PART),
    (r"layer_?norm|rms_?norm|group_?norm|norm_backward|^totals|GammaBeta|RowwiseMoments", ELEMENTWISE),
    (r"gemm|nvjet|cutlass|xmma|matmul|gemv|splitk|scaled_mm|(^|_)mm(_|$)|cublas(?!.*memset)", MATMUL),
    (r"soft_?max|nll_?loss|cross_?entropy|(^|_)loss|less_targets", LOSS_PART),
    (r"quant|float8|fp8|hadamard|(^|_)(amax|encode|turn)_", QUANTIZATION),
    (r"adam|multi_tensor_apply|update|norm|foreach", OPTIMIZER),
    (r"memcpy|memset|copy|fill|CatArray|transpose|nccl", COPIES),
    (
        r"elementwise|activate|reduce|index|embedding|gelu|silu|swiglu|dropout|rope|rotary|scatter|gather|arange|distribution|"
        r"vectorized|sort|scan|where|triu|tril|residual|bias|partial|segment|histogram|sum|add|mul|grad_weight|"
        r"unique|select|cub::|thrust|at::native",
        ELEMENTWISE,
    ),
)
"""(what a kernel's name contains, its part)."""

_CPU_RULES: tuple[tuple[str, str], ...] = (
    (
        rf"^{QUANTIZE}$|^fewbits::.*(encode|quant|amax)",
        QUANTIZATION,
    ),  # the range's own time: C++ that torch does not see
    (r"^fewbits::|^(gelu|norm|norm_backward|column_sums)$", ELEMENTWISE),  # C++ of ours, each call in a range
    (
        r"^scaled_int8_matmul$|^aten::_?(mm|addmm_?|bmm|baddbmm_?|int_mm|scaled_mm)$|^(mkldnn|mkl|onednn|quantized)::.*linear",
        MATMUL,
    ),
    (r"attention", ATTENTION_PART),
    (r"soft_?max|nll_loss|cross_entropy", LOSS_PART),
    (r"^update$|_fused_adam|_fused_sgd|_foreach", OPTIMIZER),
    (r"^aten::(copy_|_to_copy|clone|cat|contiguous|fill_|zero_|pin_memory|.*_copy)$", COPIES),
    (
        r"^aten::(view|reshape|as_strided|empty|new_|resize_|t|transpose|expand|slice|select|narrow|detach|alias|"
        r"unsqueeze|squeeze|to|item|_local_scalar_dense|is_nonzero|resolve_|split|unbind|permute|_unsafe_view|lift|"
        r"_reshape_alias|chunk|flatten|linear|matmul)\w*$",
        GAPS,  # no arithmetic: the host's bookkeeping
    ),
    (r"^aten::", ELEMENTWISE),
    (r"CompiledFxGraph", ELEMENTWISE),  # what a compiled graph does outside of operators: its fused loops
)

_KERNEL_RULES = tuple((re.compile(pattern, re.IGNORECASE), part) for pattern, part in RULES)
_OPERATOR_RULES = tuple((re.compile(pattern, re.IGNORECASE), part) for pattern, part in _CPU_RULES)


class Multiplied(NamedTuple):
    """How a matmul kernel multiplies, as its name tells."""

    format: str
    """bf16, fp16, tf32, fp32, fp64, fp8, int8, or "?" where the name does not say."""
    tensor_cores: bool | None
    """None where the name does not say."""


def kernel_part(name: str, ranges: Collection[str] = ()) -> str:
    """The part of a step that a CUDA kernel belongs to; `ranges` are those of ours that launched it (names of
    `fewbits.ranges`, outermost first). UNKNOWN when no rule fits."""
    found = next((part for pattern, part in _KERNEL_RULES if pattern.search(name)), UNKNOWN)
    return _by_range(found, ranges)


def operator_part(name: str, ancestors: Collection[str] = ()) -> str:
    """The part that the own time of an operator on a CPU belongs to; `ancestors` are the names around it, ranges and
    autograd's nodes. What is no operator is the host's own time: GAPS."""
    found = next((part for pattern, part in _OPERATOR_RULES if pattern.search(name)), GAPS)
    if found != GAPS and any("Attention" in ancestor for ancestor in ancestors):
        return ATTENTION_PART
    return _by_range(found, ancestors) if found != GAPS else found


def _by_range(found: str, ranges: Iterable[str]) -> str:
    """Names first, but a range tells what names cannot: an addition in the update is the optimizer's."""
    inside = next((_RANGE_PART[name] for name in reversed(list(ranges)) if name in _RANGE_PART), None)
    if inside is None or found == inside:
        return found
    if inside == ATTENTION_PART:  # matmuls of an attention written out belong to it
        return inside
    return found if found in (MATMUL, ATTENTION_PART, QUANTIZATION, OPTIMIZER) else inside


# (what the name contains, format, tensor cores); nvjet's first letter is the type of its left operand
_FORMATS: tuple[tuple[str, str, bool | None], ...] = (
    (r"splitk_?reduce", "?", None),  # adds up the parts of a product: no product itself
    (r"nvjet_(sm\d+_)?[qore]", "fp8", True),
    (r"nvjet_(sm\d+_)?t", "bf16", True),
    (r"nvjet_(sm\d+_)?h", "fp16", True),
    (r"nvjet_(sm\d+_)?s", "tf32", True),  # nvjet has tensor-core kernels only
    (r"nvjet_(sm\d+_)?d", "fp64", True),
    (r"nvjet_(sm\d+_)?[bi]", "int8", True),
    (r"gemv.*bfloat16|bfloat16.*gemv|simt_bf16", "bf16", False),
    (r"gemv.*half|half.*gemv|simt_h", "fp16", False),
    (r"gemv.*double|simt_d", "fp64", False),
    (r"gemv|gemmSN|gemmk1|dot_kernel|simt|(?<![a-z0-9])sgemm|f32f32_f32f32", "fp32", False),
    (r"e4m3|e5m2|fp8|float8|float_e", "fp8", True),
    (r"i8816|i16832|imma|i8i32|int8|_s8_", "int8", True),
    (r"tf32", "tf32", True),
    (r"bf16|bfloat16", "bf16", True),
    (r"fp16|f16|half|884gemm_fp16|h884|h16816|h1688", "fp16", True),
    (r"d884|dmma|f64f64", "fp64", True),
    (r"dgemm", "fp64", False),
    (r"s1688gemm|s1688tf", "tf32", True),
    (r"s884", "fp16", True),
)
_FORMAT_RULES = tuple((re.compile(pattern, re.IGNORECASE), name, cores) for pattern, name, cores in _FORMATS)
_DTYPES = {
    "float": "fp32",
    "double": "fp64",
    "c10::BFloat16": "bf16",
    "c10::Half": "fp16",
    "signed char": "int8",
    "unsigned char": "int8",
    "c10::Float8_e4m3fn": "fp8",
    "c10::Float8_e5m2": "fp8",
}


def multiplied(kernel: str) -> Multiplied:
    """In which format a matmul kernel multiplies and whether on tensor cores, as far as its name tells.

    >>> multiplied("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn")
    Multiplied(format='bf16', tensor_cores=True)
    """
    return next((Multiplied(name, cores) for rule, name, cores in _FORMAT_RULES if rule.search(kernel)), _NOT_SAID)


def operand_format(dtypes: Iterable[str], name: str = "") -> str:
    """The format of a CPU matmul by the dtypes of its inputs as a profiler writes them, else by its name (C++ of ours, whose
    inputs no profiler sees); "?" where neither says."""
    found = [_DTYPES[name] for name in dtypes if name in _DTYPES]
    return found[-1] if found else multiplied(name).format  # the operands come last: addmm's first is what is added


_NOT_SAID = Multiplied("?", None)
