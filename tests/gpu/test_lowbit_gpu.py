"""Few bits on a GPU: codes of the definition whoever makes them, products within bounds, steps that never wait."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import fewbits
from fewbits import AdamW, ModelConfig, Step, Transformer
from fewbits.formats import Format
from fewbits.kernels import dispatch, layouts
from fewbits.kernels import quantize as kernel
from fewbits.kernels.matmul import BLOCK, SQUARE, block_execution, native_kind, scaled_matmul
from fewbits.nn.lowbit import held_weights, hold
from fewbits.numerics import quantize as definition
from fewbits.numerics import scaling
from fewbits.numerics.quantize import Quantized
from fewbits.numerics.scaling import Granularity
from fewbits.precision.recipe import RECIPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

FORMATS = ("fp8_e4m3", "fp8_e5m2", "int8", "int4", "fp4_e2m1", "fp6_e2m3", "fp6_e3m2")
GRANULARITIES = (
    "tensor",
    "row",
    "block(1x128)",
    "block(128x128)",
    "block(1x32)",
    "block(1x16)",
    "block(16x16)",
    "block(3x5)",
)
SCALES = ("power-of-two", "exact", "two-level")
AWKWARD = ((1, 1), (1, 4096), (4097, 1), (3, 5), (16, 48), (129, 257), (300, 1000))
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs sm_90")


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Values over many binades, with zeros, so that subnormal codes, ties and saturation all come up."""
    x = torch.randn(shape, device="cuda") * torch.randn(shape, device="cuda").mul(4).exp()
    return torch.where(torch.rand(shape, device="cuda") < 0.05, 0.0, x).clamp(-6e4, 6e4).to(dtype)


def assert_same(ours: Quantized, theirs: Quantized) -> None:
    """Which NaN it is does not matter, the sign of a zero does."""
    assert ours.codes.dtype == theirs.codes.dtype
    for mine, other in ((ours.scale, theirs.scale), (ours.codes.float(), theirs.codes.float())):
        mine, other = mine.cpu(), other.cpu()
        assert torch.equal(mine.isnan(), other.isnan())
        assert torch.equal(*(values.nan_to_num(nan=0.0).contiguous().view(torch.int32) for values in (mine, other)))


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    """Each test compiles for itself: after eight compilations of one function the compiler leaves it eager."""
    torch._dynamo.reset()


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rounding", kernel.ROUNDINGS)
def test_the_kernel_gives_codes_and_scales_of_the_definition(format, granularity, rounding):
    """Shapes, dtypes and strides take turns over the cases: each new combination is a compilation of the kernel."""
    case = FORMATS.index(format) + GRANULARITIES.index(granularity)
    for index, scales in enumerate(SCALES):
        for turn, shape in enumerate((AWKWARD[(case + index) % len(AWKWARD)], (256, 512))):
            x = matrix(shape, (torch.bfloat16, torch.float16, torch.float32)[(index + turn) % 3])
            view = x.t() if (case + index + turn) % 2 else x
            arguments = (view, format, granularity, rounding, 11, scales)
            assert_same(kernel.quantize(*arguments), definition.quantize(*arguments))


@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_awkward_shapes_are_quantized_alike(shape):
    for granularity in GRANULARITIES:
        x = matrix(shape)
        for view in (x, x.t()):
            arguments = (view, "fp8_e4m3", granularity)
            assert_same(kernel.quantize(*arguments), definition.quantize(*arguments))
    empty = x[:0]
    assert kernel.why_not(empty, Format.parse("fp8_e4m3"))
    assert (
        dispatch.quantize(empty, Format.parse("fp8_e4m3"), Granularity(1, 0), "nearest-even", 0, "exact").codes.shape
        == empty.shape
    )


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2", "int8", "fp4_e2m1"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_large_matrix_and_its_transpose_come_from_one_reading(format, granularity):
    x = matrix((4096, 4096))
    expected = definition.quantize(x, format, granularity)
    one, other = kernel.quantize_both(x, format, granularity)
    assert_same(one, expected)
    assert torch.equal(one.codes.t().contiguous().view(torch.uint8), other.codes.view(torch.uint8))
    assert other.codes.is_contiguous()
    assert_same(kernel.quantize(x.t(), format, granularity), definition.quantize(x.t(), format, granularity))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("rounding", kernel.ROUNDINGS)
def test_more_than_2_31_elements_are_quantized_alike(granularity, rounding):
    """The definition in fp32 would not fit beside them: pieces of it under the scales of the whole."""
    columns = (1 << 30) + 64
    x = torch.empty(2, columns, dtype=torch.bfloat16, device="cuda").normal_()
    x[1, -1] = 300.0
    ours = kernel.quantize(x, "fp8_e4m3", granularity, rounding, 7)
    amax = torch.stack([row.abs().max() for row in x]).float().view(2, 1)
    amax = amax if granularity == "row" else amax.max().view(1, 1)
    assert torch.equal(ours.scale, definition.scale_of(amax, ours.format))
    from fewbits.numerics.random import random_bits

    for row in range(2):
        scale = ours.scale[row if granularity == "row" else 0]
        for start in (0, (1 << 29) + 5, columns - 4096):
            piece = x[row : row + 1, start : start + 4096]
            found = ours.codes[row, start : start + 4096].float()
            if rounding == "nearest-even":
                wanted = definition.encode(piece, scale.view(1, 1), ours.format, Granularity())
                assert torch.equal(found, wanted[0].float())
            else:
                # a random fraction below one ulp is added to the magnitude, which is then cut: the definition in fp64
                bits = random_bits(7, (4096,), "cuda", start=row * columns + start).long() & 0xFFFFFFFF
                value = piece[0].double() / scale.double()
                ulp = ours.format.ulp(value)
                wanted64 = ((value.abs() / ulp + bits.double() * 2.0**-32).floor() * ulp).clamp(max=ours.format.max)
                assert torch.equal(found.double().abs(), wanted64)
    del x, ours
    torch.cuda.empty_cache()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("granularity", ["tensor", "row", "block(1x128)", "block(16x16)"])
@pytest.mark.parametrize("rounding", kernel.ROUNDINGS)
def test_the_cpu_and_the_gpu_give_the_same_codes(format, granularity, rounding):
    for shape in ((48, 256), (33, 130)):
        x = matrix(shape)
        for scales in SCALES:
            options = (format, granularity, rounding)
            on_gpu = definition.quantize(x, *options, torch.tensor(5, device="cuda"), scales)
            assert_same(on_gpu, definition.quantize(x.cpu(), *options, 5, scales))


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2", "int8", "fp4_e2m1"])
@pytest.mark.parametrize("granularity", ["row", "block(1x16)"])
def test_eager_and_compiled_code_give_the_same_codes(format, granularity):
    rounding = "stochastic" if format in ("int8", "fp4_e2m1") else "nearest-even"
    scales = "two-level" if granularity == "block(1x16)" else definition.default_scales(Format.parse(format))
    fmt, shared = Format.parse(format), Granularity.parse(granularity)

    @torch.compile(dynamic=False, fullgraph=True)
    def compiled(x: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = definition.scale_of(definition.block_amax(x, shared), fmt, scales)
        return definition.encode(x, scale, fmt, shared, rounding, key, scales), scale

    x, key = matrix((129, 257)), torch.tensor(5, device="cuda")
    wanted = definition.quantize(x, format, granularity, rounding, key, scales)
    assert_same(Quantized(*compiled(x, key), fmt, shared), wanted)


def test_values_that_are_not_finite_are_not_hidden():
    for format in FORMATS:
        for value in (math.nan, math.inf, -math.inf):
            x = matrix((64, 256), torch.float32)
            x[1, 20] = value
            for granularity in ("tensor", "row", "block(1x128)", "block(1x16)"):
                assert_same(kernel.quantize(x, format, granularity), definition.quantize(x, format, granularity))


def test_eager_code_quantizes_by_the_kernel():
    choice = dispatch.quantize_execution(torch.device("cuda"))
    assert choice.value == ("kernel" if kernel.installed() else "definition")


# (tokens, contraction, outputs) of output, grad_input and grad_weight of layers of llama-1b and gpt2-124m
PRODUCTS = [
    (4096, 2048, 5632),
    (4096, 5632, 2048),
    (5632, 4096, 2048),
    (4096, 768, 2304),
    (768, 4096, 3072),
    (256, 640, 384),
]
FAST = ("fp8", "fp8-row", "fp8-block", "int8")
PAIRS = [("tensor", "tensor"), ("row", "row"), ("block(1x128)", "block(128x128)"), ("block(1x128)", "block(1x128)")]


def operands(M: int, K: int, N: int, format: str, pair: tuple[str, str]) -> tuple[Quantized, Quantized]:
    x, w = torch.randn(M, K, device="cuda"), 0.02 * torch.randn(N, K, device="cuda")
    x *= torch.linspace(-6, 6, M, device="cuda").exp2().view(-1, 1)  # rows whose scales differ
    w *= torch.linspace(-3, 3, K, device="cuda").exp2()  # and blocks along the contraction too
    left, right = (definition.quantize(t.bfloat16(), format, g) for t, g in zip((x, w), pair, strict=True))
    return left, right


def error(y: torch.Tensor, left: Quantized, right: Quantized) -> float:
    """Relative error of the worst row, against fp64. A row whose codes are all zero has none if its product is zero."""
    exact = left.dequantize(torch.float64) @ right.dequantize(torch.float64).t()
    off = (y.double() - exact).norm(dim=1)
    return float(torch.where(off == 0, 0.0, off / exact.norm(dim=1)).max())


@needs_hopper
@pytest.mark.parametrize(("M", "K", "N"), PRODUCTS)
@pytest.mark.parametrize("pair", PAIRS, ids=" x ".join)
@pytest.mark.parametrize("accumulator", ["fp32", "fast"])
def test_native_fp8_products_are_those_of_the_exact_values(M, K, N, pair, accumulator):
    """Half a unit of bf16 is 2^-9. Hopper cuts what 32 products add to 13 fractional bits of the largest of them: at most
    2^-13 of a partial sum each time, four times before a promotion to fp32, and K / 32 times without one."""
    left, right = operands(M, K, N, "fp8_e4m3", pair)
    assert native_kind(left, right, accumulator) == "fp8", dispatch.recorded()
    cuts = K / 32 if accumulator == "fast" and pair[0] in ("tensor", "row") else 4
    assert error(scaled_matmul(left, right, accumulator, torch.bfloat16), left, right) < 2.0**-9 + cuts * 2.0**-13


@needs_hopper
def test_e5m2_gradients_multiply_e4m3_weights_natively():
    left = definition.quantize(matrix((512, 256)), "fp8_e5m2")
    right = definition.quantize(matrix((128, 256)), "fp8_e4m3")
    assert native_kind(left, right, "fp32") == "fp8"
    assert error(scaled_matmul(left, right, "fp32", torch.bfloat16), left, right) < 2.0**-8
    assert native_kind(left, definition.quantize(matrix((128, 256)), "fp8_e5m2"), "fp32") == ""


@needs_hopper
def test_scales_of_blocks_run_natively_here():
    assert block_execution(torch.device("cuda")).value == "native", block_execution(torch.device("cuda")).reason


@pytest.mark.parametrize(("M", "K", "N"), PRODUCTS)
@pytest.mark.parametrize("pair", PAIRS[:2], ids=" x ".join)
def test_native_int8_products_are_exact_before_their_rounding(M, K, N, pair):
    left, right = operands(M, K, N, "int8", pair)
    assert native_kind(left, right, "fp32") == "int8"
    # half a unit of bf16 is 2^-8 of the least number that has it, and two roundings of fp32 for the two scales
    assert error(scaled_matmul(left, right, "fp32", torch.bfloat16), left, right) < 2.0**-8 + 2.0**-22


@pytest.mark.parametrize(
    ("M", "K", "N"), [(40, 24, 56), (17, 130, 7), (1, 128, 128), (256, 144, 48), (64, 640, 192), (6, 128, 128)]
)
@pytest.mark.parametrize("pair", PAIRS, ids=" x ".join)
@pytest.mark.parametrize("format", ["fp8_e4m3", "int8"])
def test_sides_that_no_instruction_takes_fall_back_to_the_exact_values(M, K, N, pair, format):
    left, right = operands(M, K, N, format, pair)
    # bf16 operands and results: half a unit for each value that is not exact in bf16 (scales of int8), and for the result
    assert error(scaled_matmul(left, right, "fp32", torch.bfloat16), left, right) < 2.0**-8


@pytest.mark.parametrize("name", RECIPES)
def test_compiled_layers_multiply_the_codes_of_eager_ones(name):
    """All three matmuls. The same codes; a different order of sums and one rounding to bf16 may differ."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = fewbits.prepare(torch.nn.Sequential(torch.nn.Linear(256, 384)), name).cuda()
        run = torch.compile(model, dynamic=False) if compiled else model
        x = torch.randn(512, 256).to("cuda", torch.bfloat16).requires_grad_()
        grad = torch.randn(512, 384).to("cuda", torch.bfloat16)
        with held_weights(model):
            y = run(x)
            y.backward(grad)
        results.append([y.detach(), x.grad, model[0].weight.grad, model[0].bias.grad])
    for eager, other in zip(*results, strict=True):
        assert float((eager.double() - other.double()).norm()) <= 2.0**-8 * float(eager.double().norm())


KEEPING = [name for name, recipe in RECIPES.items() if not recipe.fake]  # qat multiplies 16-bit activations backward


@pytest.mark.parametrize(("name", "compiled"), [*((n, False) for n in KEEPING), *((n, True) for n in FAST)])
def test_the_graph_keeps_codes_and_no_16_bit_copy_of_the_activation(name, compiled):
    model = fewbits.prepare(torch.nn.Sequential(torch.nn.Linear(128, 256, bias=False)), name).cuda()
    run = torch.compile(model, dynamic=False) if compiled else model
    saved: list[torch.Tensor] = []

    def note(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    x = torch.randn(1024, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    with held_weights(model), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = run(x)
    assert {t.element_size() for t in saved if t.numel() >= x.numel()} == {1}
    y.sum().backward()


LLAMA = ModelConfig(
    vocab_size=512, context=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=128, n_ff=256, norm="rmsnorm", activation="swiglu",
    positions="rope", bias=False, tied=False, qk_norm=True,
)  # fmt: skip


def batch(i: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(512, (8, 65), generator=torch.Generator().manual_seed(i)).cuda()
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def build(name: str, compiled: bool = False) -> tuple[Transformer, Step]:
    model = fewbits.prepare(Transformer(LLAMA), name).cuda()
    if compiled:
        model.compile_blocks()
    return model, Step(model, AdamW(model.named_parameters(), lr=1e-2), name)


@pytest.mark.parametrize(("name", "compiled"), [*((n, False) for n in RECIPES), *((n, True) for n in (*FAST, "nvfp4"))])
def test_a_step_never_waits_for_the_device(name, compiled):
    _, step = build(name, compiled)
    batches = [[batch(2 * i), batch(2 * i + 1)] for i in range(6)]
    for i in range(3):
        step(batches[i])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(3, 6):
            step(batches[i])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(step.optimizer.applied_steps) == 6


@pytest.mark.parametrize(("name", "compiled"), [("int8", False), ("nvfp4", False), ("int8", True)])
def test_2n_steps_equal_n_save_load_n_bit_for_bit(deterministic, name, compiled):
    def run(step: Step, first: int, last: int) -> None:
        for i in range(first, last):
            step([batch(2 * i), batch(2 * i + 1)])

    whole_model, whole = build(name, compiled)
    run(whole, 0, 6)
    first_model, first = build(name, compiled)
    run(first, 0, 3)
    names = list(first_model.named_parameters())
    weights = {n: first.optimizer.exact_weight(p).cpu() for n, p in names}
    state = {key: value.cpu() for key, value in first.optimizer.named_state(names).items()}
    counters = first.state_dict()
    second_model, second = build(name, compiled)
    names = list(second_model.named_parameters())
    for n, p in names:
        second.optimizer.load_exact(p, weights[n].cuda())
    second.optimizer.load_named_state(names, {key: value.cuda() for key, value in state.items()})
    second.load_state_dict(counters)
    run(second, 3, 6)
    for a, b in zip(whole_model.parameters(), second_model.parameters(), strict=True):
        assert torch.equal(whole.optimizer.exact_weight(a), second.optimizer.exact_weight(b))
    assert int(whole.optimizer.applied_steps) == 6


@pytest.mark.parametrize("name", ["fp8", "fp8-row", "fp8-block", "fp8-delayed", "int8"])
def test_a_weight_is_quantized_once_a_step_and_its_codes_are_never_older(name, monkeypatch):
    model, step = build(name)
    layers = [m for m in model.modules() if getattr(m, "recipe", "")]
    counted: list[int] = []

    def counting(weight, *rest):
        counted.append(id(weight))
        return hold(weight, *rest)

    def counting_all(weights, *rest):
        counted.extend(map(id, weights))
        return layouts.encode_all(weights, *rest)

    for place in ("fewbits.nn.linear.hold", "fewbits.nn.lowbit.hold"):
        monkeypatch.setattr(place, counting)
    monkeypatch.setattr("fewbits.nn.lowbit.encode_all", counting_all)
    for i in range(3):
        counted.clear()
        step([batch(2 * i), batch(2 * i + 1)])
        assert sorted(counted) == sorted(id(m.weight) for m in layers)
        if name == "fp8-delayed":  # scaled by earlier maxima, which `test_weights_together` looks at
            continue
        with held_weights(model):
            for module in layers:
                operand = fewbits.Precision.parse(name).recipe.output.right
                assert_same(
                    Quantized(module.held.output_codes, module.held.output_scale, operand.format, operand.granularity),
                    definition.quantize(module.weight, operand.format, operand.granularity, scales=operand.scaling),
                )


def test_granularities_of_the_block_recipe_are_the_native_ones():
    output = RECIPES["fp8-block"].output
    assert output is not None
    assert (output.left.granularity, output.right.granularity) == (BLOCK, SQUARE)


FP8 = ("fp8_e4m3", "fp8_e5m2")
NATIVE_CODES = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
needs_fp8_codes = pytest.mark.skipif(not NATIVE_CODES, reason="needs a GPU that converts to fp8 by itself")


def assert_both(ours: tuple[torch.Tensor, torch.Tensor], codes: torch.Tensor) -> None:
    """Codes [R, C] and [C, R], each row by row."""
    assert ours[0].is_contiguous() and ours[1].is_contiguous()
    one = torch.ones(1, 1, device="cuda")
    for mine, other in zip(ours, (codes, codes.t()), strict=True):
        how = (one, Format.parse("fp8_e4m3"), Granularity())
        assert_same(Quantized(mine, *how), Quantized(other, *how))


@needs_fp8_codes
@pytest.mark.parametrize("format", FP8)
@pytest.mark.parametrize("shape", [*AWKWARD, (4096, 768), (2048, 5632)], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_codes_in_both_layouts_are_those_of_the_definition(format, shape, compiled):
    fmt = Format.parse(format)
    torch._dynamo.reset()
    how = (fmt, Granularity(), "nearest-even", 0)

    def work(x, scale):
        q, t, sums = dispatch.quantize_both([x], *how, "power-of-two", True)
        under = dispatch.encode_both([x], scale, *how, "delayed", True)
        return q.codes, q.scale, t.codes, under.matrix.codes, under.transpose.codes, sums, under.sums

    if compiled:  # tensors, as inside a low-bit layer, and not dynamo, meet what decides
        torch.compiler.allow_in_graph(work)
    run = torch.compile(lambda x, scale: work(x, scale), dynamic=False) if compiled else work
    for value in (None, math.nan, math.inf):
        x = matrix(shape)
        if value is not None:
            x[-1, -1] = value
        wanted = definition.quantize(x, fmt)
        given = definition.quantize(x.nan_to_num(0.0, 1.0, 1.0), fmt).scale * 2.0**-5  # saturates, as a delayed one may
        given = given.clamp(min=2.0**-126)  # no scale is smaller
        codes, scale, codes_t, under, under_t, sums, under_sums = run(x, given)
        assert_both((codes, codes_t), wanted.codes)
        assert torch.equal(scale.isnan(), wanted.scale.isnan()) and (
            value is not None or torch.equal(scale, wanted.scale)
        )
        assert_both((under, under_t), definition.encode_both([x], given, fmt)[0])
        for found in (sums, under_sums):  # at most R roundings of a sum of magnitudes
            if found is not None and value is None:
                exact, bound = x.double().sum(0), 2.0**-24 * shape[0] * x.double().abs().sum(0)
                assert bool(((found.double() - exact).abs() <= bound).all())


@needs_fp8_codes
@pytest.mark.parametrize("format", FP8)
def test_weights_together_get_the_codes_that_each_gets_alone(format):
    fmt = Format.parse(format)
    for shapes in (AWKWARD, [(768, 2304), (2304, 768), (1, 16), (256, 128)]):
        matrices = [matrix(shape) for shape in shapes]
        matrices[2][0, 0] = math.nan
        earlier = torch.rand(len(matrices), 4, device="cuda")[:, 1] * 100
        earlier[0] = 0
        for known in (None, earlier):
            held, amax = layouts.encode_all(matrices, fmt, known)
            for i, (x, one) in enumerate(zip(matrices, held, strict=True)):
                own = x.abs().max().float()
                assert torch.equal(amax[i].nan_to_num(-1), own.nan_to_num(-1))
                used = own if known is None or known[i] == 0 or not own.isfinite() else known[i]
                scale = scaling.power_of_two_scale(used.view(1, 1), fmt.max)
                assert torch.equal(one.scale.nan_to_num(-1), scale.nan_to_num(-1))
                assert_both((one.codes, one.codes_t), definition.encode(x, scale, fmt, Granularity(), scales="delayed"))


@needs_hopper
@pytest.mark.parametrize("name", ["fp8", "fp8-delayed"])
def test_compiled_layers_write_both_layouts_and_keep_the_one_that_the_backward_wants(name):
    """Of activation and gradient. No copy kernel of one-byte codes runs in the backward: they lie as the matmuls want them."""
    model = fewbits.prepare(torch.nn.Sequential(torch.nn.Linear(256, 384)), name).cuda()
    run = torch.compile(model, dynamic=False)
    x = torch.randn(1024, 256).to("cuda", torch.bfloat16).requires_grad_()
    grad = torch.randn(1024, 384).to("cuda", torch.bfloat16)
    for _ in range(4):  # compiled in the first and third
        with held_weights(model), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run(x).backward(grad)
            torch.cuda.synchronize()
    events = profile.key_averages()
    assert sum(e.count for e in events if "encode_both" in e.key) == 2, [e.key for e in events]
    assert not any("clone" in event.key or "transpose" in event.key for event in events), [
        event.key for event in events
    ]


@needs_hopper
def test_delayed_scales_are_known_from_the_third_step_on_and_after_loading():
    model, step = build("fp8-delayed")
    histories = [m.history for m in model.modules() if getattr(m, "history", None) is not None]
    for i in range(4):
        step([batch(i)])
        assert {h.known for h in histories} == {i >= 2}
    resumed, other = build("fp8-delayed")
    other.load_state_dict(step.state_dict())
    other([batch(4)])
    assert all(m.history.known for m in resumed.modules() if getattr(m, "history", None) is not None)
