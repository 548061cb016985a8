"""The step on a GPU: no waiting, exact resume, fp32 sums, eager and compiled."""

from __future__ import annotations

import dataclasses
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import fewbits
from fewbits import SGD, AdamW, DynamicScale, ModelConfig, NoScale, StaticScale, Step, Transformer
from fewbits.nn.embedding import Embedding
from fewbits.nn.linear import Linear
from fewbits.nn.norm import LayerNorm, RMSNorm
from fewbits.numerics.loss import linear_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

GPT = ModelConfig(vocab_size=512, context=64, n_layer=2, n_head=2, n_embd=128, dropout=0.1)
LLAMA = ModelConfig(
    vocab_size=512, context=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=128, n_ff=256, norm="rmsnorm", activation="swiglu",
    positions="rope", bias=False, tied=False, qk_norm=True,
)  # fmt: skip
PRECISIONS = ["fp32", "tf32", "fp16-mixed", "bf16-mixed", "fp16-true", "bf16-true", "fp64"]
MASTERS = {"bf16-mixed": ["fp32", "split"], "fp16-mixed": ["fp32"]}
COMBINATIONS = [(p, o, m) for p in PRECISIONS for o in (AdamW, SGD) for m in MASTERS.get(p, ["auto"])]


def batch(i: int, rows: int = 8) -> dict[str, torch.Tensor]:
    tokens = torch.randint(512, (rows, 65), generator=torch.Generator().manual_seed(i)).cuda()
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def build(precision, config=GPT, optimizer=AdamW, master="auto", compiled=False, **options):
    model = fewbits.prepare(Transformer(config), precision).cuda()
    if compiled:
        model.compile_blocks()
    return model, Step(model, optimizer(model.named_parameters(), lr=1e-2, master=master), precision, **options)


def run(step, first, last, pieces=2):
    for i in range(first, last):
        whole = {key: value.chunk(pieces) for key, value in batch(i).items()}
        step([{key: whole[key][j] for key in whole} for j in range(pieces)])


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("precision", "optimizer", "master"), COMBINATIONS)
def test_2n_steps_equal_n_save_load_n_bit_for_bit(deterministic, precision, optimizer, master):
    whole_model, whole = build(precision, optimizer=optimizer, master=master)
    run(whole, 0, 8)
    first_model, first = build(precision, optimizer=optimizer, master=master)
    run(first, 0, 4)
    names = list(first_model.named_parameters())
    saved = {name: first.optimizer.exact_weight(p).cpu() for name, p in names}
    state = {key: value.cpu() for key, value in first.optimizer.named_state(names).items()}
    counters = first.state_dict()
    second_model, second = build(precision, optimizer=optimizer, master=master)
    names = list(second_model.named_parameters())
    for name, p in names:
        second.optimizer.load_exact(p, saved[name].cuda())
    second.optimizer.load_named_state(names, {key: value.cuda() for key, value in state.items()})
    second.load_state_dict(counters)
    run(second, 4, 8)
    for (name, a), b in zip(whole_model.named_parameters(), second_model.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(whole.optimizer.exact_weight(a), second.optimizer.exact_weight(b)), name
    assert int(whole.optimizer.applied_steps) == int(second.optimizer.applied_steps) > 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_never_waits_for_the_device(precision, compiled):
    _, step = build(precision, LLAMA, compiled=compiled, loss_scale=DynamicScale(interval=2))
    batches = [[batch(i)] for i in range(8)]
    for i in range(3):
        step(batches[i])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(3, 8):
            step(batches[i])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(step.optimizer.applied_steps) + int(step.skipped) == 8


# Relative error of a whole gradient tensor between two orders of the same roundings: the unit of the format (fp32 and fp64
# sums over 512 rows stay far below theirs) times a dozen roundings on the way back.
BOUND = {
    "fp32": 1e-4,
    "tf32": 2e-2,
    "fp64": 1e-10,
    "fp16-mixed": 2e-2,
    "bf16-mixed": 1e-1,
    "fp16-true": 2e-2,
    "bf16-true": 1e-1,
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
def test_compiled_gradients_are_the_eager_ones(precision, config):
    config = dataclasses.replace(config, dropout=0.0)
    gradients = []
    for compiled in (False, True):
        model, _ = build(precision, config, compiled=compiled)
        (model.loss_sum(batch(0)) / 512).backward()
        gradients.append({name: p.grad.double() for name, p in model.named_parameters()})
    for name, eager in gradients[0].items():
        error = float((gradients[1][name] - eager).norm() / eager.norm())
        # the key bias has no gradient but rounding: softmax does not see a shift of all scores
        assert error < BOUND[precision] or (name.endswith("qkv.bias") and error < 3 * BOUND[precision]), (name, error)


@pytest.mark.parametrize("master", ["fp32", "split"])
def test_split_and_fp32_masters_agree_bit_for_bit(deterministic, master):
    reference, a = build("bf16-mixed", master="fp32")
    model, b = build("bf16-mixed", master=master)
    for step in (a, b):
        run(step, 0, 30, pieces=1)
    for p, q in zip(reference.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.optimizer.exact_weight(p), b.optimizer.exact_weight(q))


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp32", "tf32"])
def test_a_scaled_step_is_the_unscaled_one(deterministic, precision):
    models = []
    for scale in (NoScale(), StaticScale(2.0**6), DynamicScale(initial=4.0, interval=1)):
        model, step = build(precision, LLAMA, loss_scale=scale)
        run(step, 0, 4)
        models.append(model)
    for other in models[1:]:
        assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), other.parameters(), strict=True))


# One rounding to the format (half an ulp) plus an fp32 sum of 32k terms; a 16-bit sum would be off by 10 % and more.
HALF_ULP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm, Linear, Embedding], ids=lambda k: k.__name__)
def test_weight_gradients_over_32k_rows_equal_fp64_up_to_one_rounding(kind, dtype, compiled):
    torch.manual_seed(0)
    module = (kind(64, 64) if kind in (Linear, Embedding) else kind(64)).cuda().to(dtype)
    x = torch.randint(64, (32768,)).cuda() if kind is Embedding else (torch.randn(32768, 64) + 0.5).cuda().to(dtype)
    grad = (0.01 * torch.rand(32768, 64)).cuda().to(dtype)
    exact = (
        (torch.nn.Linear if kind is Linear else torch.nn.Embedding)(64, 64)
        if kind in (Linear, Embedding)
        else kind.__mro__[1](64)
    )
    exact = exact.cuda().double()
    exact.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
    if kind is RMSNorm:
        exact.eps = torch.finfo(torch.float32).eps
    (torch.compile(module) if compiled else module)(x).backward(grad)
    exact(x if kind is Embedding else x.double()).backward(grad.double())
    for (name, narrow), wide in zip(module.named_parameters(), exact.parameters(), strict=True):
        scale = wide.grad.abs().clamp(min=wide.grad.abs().mean())
        error = float(((narrow.grad.double() - wide.grad) / scale).abs().max())
        assert error < 2 * HALF_ULP[dtype] + 2.0**-11, (name, error)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_ULP], ids=str)
def test_the_head_in_pieces_equals_fp64(dtype, monkeypatch):
    from fewbits.numerics import loss

    monkeypatch.setitem(loss._PIECE_BYTES, "cuda", 1 << 20)
    torch.manual_seed(0)
    hidden, weight = torch.randn(8192, 64).cuda().to(dtype), (0.3 * torch.randn(512, 64)).cuda().to(dtype)
    labels = torch.randint(512, (8192,)).cuda()
    a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    c, d = hidden.double().requires_grad_(), weight.double().requires_grad_()
    found = linear_cross_entropy(a, b, labels)
    exact = torch.nn.functional.cross_entropy(c @ d.t(), labels, reduction="sum")
    found.backward()
    exact.backward()
    assert float(found) == pytest.approx(float(exact), rel=1e-5)
    for narrow, wide in ((a, c), (b, d)):
        error = float((narrow.grad.double() - wide.grad).abs().max() / wide.grad.abs().max())
        assert error < 4 * HALF_ULP.get(dtype, 2.0**-17)


def test_a_transformers_model_trains_unchanged():
    transformers = pytest.importorskip("transformers")
    shape = dict(
        vocab_size=512, n_positions=64, n_embd=64, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = fewbits.prepare(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)), "fp16-mixed").cuda()
    step = Step(model, AdamW(model.parameters(), lr=3e-3), "fp16-mixed")
    losses = [float(step([batch(0)]).loss) for _ in range(25)]
    assert losses[-1] < losses[0] - 0.5
