"""The step is a transaction: right order, right sums, all or nothing."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import fewbits
from fewbits import (
    SGD,
    AdamW,
    DynamicScale,
    FewbitsError,
    ModelConfig,
    NoScale,
    Schedule,
    StaticScale,
    Step,
    Transformer,
)
from fewbits.numerics.random import keyed_random

TINY = ModelConfig(vocab_size=61, context=32, n_layer=2, n_head=2, n_embd=32)
PRECISIONS = ["fp32", "tf32", "fp16-mixed", "bf16-mixed", "fp16-true", "bf16-true", "fp64"]


def batch(seed: int = 0, rows: int = 8, length: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(61, (rows, length + 1), generator=generator)
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].contiguous()}


def split(whole: dict[str, torch.Tensor], pieces: int) -> list[dict[str, torch.Tensor]]:
    chunks = {key: value.chunk(pieces) for key, value in whole.items()}
    return [{key: chunks[key][i] for key in chunks} for i in range(pieces)]


def trained(precision: str, steps: int = 4, pieces: int = 1, config: ModelConfig = TINY, make=AdamW, **options):
    model = fewbits.prepare(Transformer(config), precision)
    optimizer = make(model.named_parameters(), lr=1e-2)
    step = Step(model, optimizer, precision, **options)
    results = [step(split(batch(i), pieces)) for i in range(steps)]
    return model, optimizer, step, results


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_learns_a_batch(precision):
    model = fewbits.prepare(Transformer(TINY), precision)
    step = Step(model, AdamW(model.parameters(), lr=3e-3), precision)
    losses = [float(step([batch()]).loss) for _ in range(30)]
    assert losses[-1] < losses[0] - 1.0
    assert int(step.optimizer.applied_steps) == 30 - int(step.skipped)


def gradients_of(micro_batches, config=TINY):
    """Loss and gradients as the optimizer would see them, in fp64."""
    model = fewbits.prepare(Transformer(config), "fp64")
    seen = {}

    class Spy(SGD):
        def apply(self, **kwargs):
            names = {p: n for n, p in model.named_parameters()}
            seen.update({names[p]: g.clone() for p, g in kwargs["gradients"].items()})
            super().apply(**kwargs)

    step = Step(model, Spy(model.parameters(), lr=0.0), "fp64", clip=None)
    return step(micro_batches).loss, seen


def equal_to_1e10(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=1e-10, atol=0)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_loss_and_gradients_do_not_change_when_the_batch_is_split(pieces):
    whole = batch()
    whole["labels"][3, 5:] = -100  # uneven numbers of real targets
    equal_to_1e10(gradients_of([whole]), gradients_of(split(whole, pieces)))


def test_loss_and_gradients_do_not_change_when_padded_or_with_a_fully_masked_micro_batch():
    whole = batch()
    padded = {
        "input_ids": torch.nn.functional.pad(whole["input_ids"], (0, 5), value=7),
        "labels": torch.nn.functional.pad(whole["labels"], (0, 5), value=-100),
    }
    masked = {"input_ids": whole["input_ids"], "labels": torch.full_like(whole["labels"], -100)}
    expected = gradients_of([whole])
    no_positions = {n: g for n, g in expected[1].items() if n != "positions.weight"}
    for other in ([padded], [whole, masked], [masked, whole]):
        loss, seen = gradients_of(other)
        equal_to_1e10((expected[0], no_positions), (loss, {n: g for n, g in seen.items() if n in no_positions}))


def test_loss_and_gradients_do_not_change_when_documents_are_packed():
    long, short = batch(1, 1, 16), batch(2, 1, 12)
    apart = [long, short]
    packed = {key: torch.cat((long[key], short[key]), 1) for key in long}
    packed["documents"] = torch.tensor([[0] * 16 + [1] * 12], dtype=torch.int32)
    packed["positions"] = torch.tensor([[*range(16), *range(12)]])
    equal_to_1e10(gradients_of(apart), gradients_of([packed]))


def test_a_step_without_any_target_changes_nothing_but_decay():
    _model, _, step, _ = trained("fp32", 1)
    nothing = batch()
    nothing["labels"].fill_(-100)
    result = step([nothing])
    assert float(result.loss) == 0.0 and float(result.grad_norm) == 0.0


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp32", "fp64"])
@pytest.mark.parametrize("pieces", [1, 4])
def test_a_scaled_step_is_the_unscaled_one_while_values_stay_normal(precision, pieces):
    # Gradients of this model lie far inside the normal range of formats with 8 and more exponent bits.
    (a, _, _, ra), (b, _, _, rb) = (
        trained(precision, 3, pieces, loss_scale=s) for s in (NoScale(), StaticScale(2.0**6))
    )
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert [float(r.grad_norm) for r in ra] == [float(r.grad_norm) for r in rb]


@pytest.mark.parametrize("precision", ["fp16-mixed", "fp16-true"])
def test_a_scaled_step_is_the_unscaled_one_in_fp16_while_values_stay_normal(precision):
    # inputs in [0.5, 1], gradients of the output in [2^-7, 2^-6] / 32: products stay above fp16's 2^-14 and far below its max
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + 0.5 * torch.rand(32, 8, generator=generator)
    weight = 2.0**-6 * (0.5 + 0.5 * torch.rand(32, 8, generator=generator)) * 32

    def run(scale):
        torch.manual_seed(0)
        model = fewbits.prepare(torch.nn.Linear(8, 8), precision)
        step = Step(
            model, AdamW(model.parameters(), lr=1e-2), precision, loss_scale=scale,
            loss=lambda m, b: (m(b["x"]).float() * b["weight"]).sum(),
        )  # fmt: skip
        for _ in range(5):
            assert bool(step([{"x": x, "weight": weight, "labels": torch.zeros(32, dtype=torch.int64)}]).applied)
        return [step.optimizer.exact_weight(p) for p in model.parameters()]

    plain = run(NoScale())
    for scale in (StaticScale(2.0**5), DynamicScale(initial=2.0**3, interval=1)):
        assert all(torch.equal(a, b) for a, b in zip(plain, run(scale), strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp32"])
@pytest.mark.parametrize("seed", range(4))
def test_random_overflow_growth_clipping_and_accumulation_leave_the_unscaled_trajectory(precision, seed):
    """A dynamic scale that moves all the time, against steps without a scale that leave the overflowing attempts out."""
    generator = torch.Generator().manual_seed(seed)
    overflows = (torch.rand(14, generator=generator) < 0.25).tolist()
    pieces = [int(2 ** torch.randint(0, 3, (), generator=generator)) for _ in overflows]
    clip = [None, 0.05, 0.5, 5.0][seed]

    def run(scale, planted):
        model = fewbits.prepare(Transformer(TINY), precision)
        optimizer = AdamW(model.named_parameters(), lr=1e-2)
        schedule = Schedule("cosine", warmup_steps=2, total_steps=14)
        step = Step(model, optimizer, precision, loss_scale=scale, clip=clip, schedule=schedule)
        scales = []
        for attempt, (overflow, count) in enumerate(zip(overflows, pieces, strict=True)):
            if overflow and not planted:
                step.attempts += 1  # what the other run withholds
                continue
            poison = model.norm.weight.register_hook(lambda grad: grad * float("inf")) if overflow else None
            result = step(split(batch(attempt), count))
            scales.append(float(result.loss_scale))
            assert bool(result.applied) is not overflow
            if poison is not None:
                poison.remove()
        return [optimizer.exact_weight(p) for p in model.parameters()], int(optimizer.applied_steps), scales

    plain, applied, _ = run(NoScale(), planted=False)
    scaled, applied_too, scales = run(DynamicScale(initial=2.0**10, interval=2, ceiling=2.0**14), planted=True)
    assert applied == applied_too == overflows.count(False)
    assert len(set(scales)) > 2, "the scale has moved both ways"
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


def test_without_a_scale_small_gradients_vanish_in_fp16_and_with_one_they_do_not():
    def moved(scale):
        model = fewbits.prepare(torch.nn.Linear(4, 1, bias=False), "fp16-mixed")
        step = Step(
            model, SGD(model.parameters(), lr=1e6, momentum=0.0), "fp16-mixed", clip=None, loss_scale=scale,
            loss=lambda m, b: (m(b["x"]).float() * 1e-8).sum(),
        )  # fmt: skip
        before = step.optimizer.exact_weight(model.weight).clone()
        assert bool(step([{"x": torch.ones(1, 4), "labels": torch.zeros(1, dtype=torch.int64)}]).applied)
        return (step.optimizer.exact_weight(model.weight) - before).abs().max()

    assert float(moved(NoScale())) == 0.0
    assert float(moved(StaticScale(2.0**16))) == pytest.approx(1e-2, rel=2.0**-10)


def snapshot(model, optimizer):
    state = optimizer.state_dict()
    return copy.deepcopy(({k: v.clone() for k, v in model.state_dict().items()}, state))


def equal_trees(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_trees(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal_trees, a, b))
    return a == b


@pytest.mark.parametrize("precision", ["fp16-mixed", "bf16-mixed", "bf16-true", "fp32"])
def test_a_skipped_step_changes_no_weight_no_moment_and_not_the_count(precision):
    model, optimizer, step, _ = trained(precision, 2, loss_scale=DynamicScale(initial=2.0**8))
    before = snapshot(model, optimizer)
    poison = model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    result = step([batch()])
    poison.remove()
    assert not bool(result.applied) and int(step.skipped) == 1
    assert equal_trees(before, snapshot(model, optimizer))
    assert float(result.loss_scale) == 2.0**8 and float(step.scale.value) == 2.0**7
    assert bool(step([batch()]).applied)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda good: good, "write step"),
        (lambda good: [{"input_ids": good["input_ids"]}], "holds input_ids and no labels"),
        (lambda good: [{"labels": good["labels"]}], r"they are none and \[8, 16\]"),
        (lambda good: [{**good, "labels": good["labels"][:, 1:]}], r"they are \[8, 16\] and \[8, 15\]"),
        (lambda good: [{**good, "labels": good["labels"].float()}], "they came as torch.int64 and torch.float32"),
        (lambda good: [{**good, "input_ids": good["input_ids"] + 1000}], r"token id 1\d+ is outside the vocabulary"),
        (lambda good: [{**good, "input_ids": good["input_ids"] - 1000}], r"token id -\d+ is outside"),
    ],
)
def test_what_no_step_can_take_is_one_sentence_and_counts_as_no_attempt(spoil, says):
    model = fewbits.prepare(Transformer(TINY), "fp32")
    step = Step(model, AdamW(model.parameters(), lr=1e-3), precision="fp32")
    with pytest.raises(FewbitsError, match=says):
        step(spoil(batch()))
    assert step.attempts == 0


def test_a_skipped_step_does_not_advance_the_schedule():
    model = torch.nn.Linear(1, 1, bias=False)
    step = Step(
        model, SGD(model.parameters(), lr=1.0, momentum=0.0), "fp32", clip=None, loss_scale=DynamicScale(),
        loss=lambda m, b: m(b["x"]).sum(), schedule=Schedule("linear", total_steps=4),
    )  # fmt: skip
    moved = []
    for x in (1.0, float("inf"), 1.0, 1.0):  # with weights that are not 0, an infinite input makes no finite gradient
        before = model.weight.detach().clone()
        step.release()
        step([{"x": torch.tensor([[x]]), "labels": torch.zeros(1, dtype=torch.int64)}])
        moved.append(round(float((before - model.weight).detach()), 5))
    assert moved == [1.0, 0.0, 0.75, 0.5]  # the gradient is 1, so a step moves by its learning rate


def test_the_scale_moves_only_after_it_has_unscaled():
    # growth every step: each update must be that of the unscaled run
    growing = DynamicScale(initial=2.0**4, interval=1)
    (a, _, _, ra), (b, _, _, _) = (trained("bf16-mixed", 4, loss_scale=s) for s in (growing, NoScale()))
    assert [float(r.loss_scale) for r in ra] == [2.0**4, 2.0**5, 2.0**6, 2.0**7]
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_non_finite_loss_latches_until_the_host_has_looked():
    model, _optimizer, step, _ = trained("bf16-mixed", 2)
    sound = model.norm.weight.data.clone()
    model.norm.weight.data.fill_(float("nan"))
    assert not bool(step([batch()]).applied) and bool(step.latched)
    model.norm.weight.data.copy_(sound)
    assert not bool(step([batch()]).applied), "the latch holds although the loss is finite again"
    step.release()
    assert bool(step([batch()]).applied)


def test_a_loss_that_is_not_finite_withholds_its_step_although_the_gradients_are_finite():
    model = fewbits.prepare(torch.nn.Linear(2, 1), "bf16-mixed")
    step = Step(
        model, AdamW(model.parameters(), lr=0.1), "bf16-mixed", loss_scale=DynamicScale(initial=2.0**4),
        loss=lambda m, b: m(b["x"]).float().sum() + float("inf"),
    )  # fmt: skip
    before = model.weight.detach().clone()
    result = step([{"x": torch.ones(1, 2), "labels": torch.zeros(1, dtype=torch.int64)}])
    assert bool(torch.isfinite(result.grad_norm)) and not bool(result.applied) and bool(step.latched)
    assert torch.equal(model.weight, before) and float(step.scale.value) == 2.0**4


def test_latched_steps_neither_move_the_loss_scale_nor_count_towards_its_growth():
    model, _, step, _ = trained("bf16-mixed", 2, loss_scale=DynamicScale(initial=2.0**4, interval=4))
    before = step.scale.state_dict()
    sound = model.norm.weight.data.clone()
    model.norm.weight.data.fill_(float("nan"))
    for _ in range(5):  # the first closes the latch; five counted as clean would double the scale
        step([batch()])
    assert bool(step.latched) and step.scale.state_dict() == before
    model.norm.weight.data.copy_(sound)
    step([batch()])
    assert step.scale.state_dict() == before, "finite again, but the latch still holds"


def test_a_closed_latch_stays_closed_in_a_restored_step():
    def fresh():
        model = prepared()
        return model, Step(model, AdamW(model.parameters(), lr=1e-3), "bf16-mixed", loss_scale=DynamicScale(2.0**4))

    model, step = fresh()
    model.norm.weight.data.fill_(float("nan"))
    step([batch()])
    _, restored = fresh()
    restored.load_state_dict(step.state_dict())
    assert restored.state_dict() == step.state_dict() and bool(restored.latched)
    assert not bool(restored([batch()]).applied)


def test_gradients_that_no_scale_can_cure_latch():
    model, _, step, _ = trained("bf16-mixed", 1)
    model.norm.weight.register_hook(lambda grad: grad * float("nan"))
    assert not bool(step([batch()]).applied) and bool(step.latched)


def test_accumulation_keeps_what_16_bits_would_lose():
    # 256 + 1 = 256 in bf16: 4 micro-batches whose gradients are 256, 1, 1, 1
    model = fewbits.prepare(torch.nn.Linear(1, 1, bias=False), "bf16-mixed")
    step = Step(
        model, SGD(model.parameters(), lr=1.0, momentum=0.0), "bf16-mixed", clip=None,
        loss=lambda m, b: m(b["x"]).float().sum(),
    )  # fmt: skip
    micro = [{"x": torch.tensor([[v]]), "labels": torch.zeros(1, dtype=torch.int64)} for v in (256.0, 1.0, 1.0, 1.0)]
    assert float(step(micro).grad_norm) == pytest.approx(259 / 4, rel=1e-6)


class Branches(torch.nn.Module):
    """Two weights, of which a batch uses one or both: a mixture of experts at its smallest."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(1, 1, bias=False)
        self.b = torch.nn.Linear(1, 1, bias=False)

    def forward(self, x, use):
        return sum(getattr(self, name)(x) for name in use)


def branches_step(precision="bf16-mixed"):
    model = fewbits.prepare(Branches(), precision)
    step = Step(
        model, AdamW(model.parameters(), lr=0.1), precision, clip=None,
        loss=lambda m, b: m(b["x"], b["use"]).float().sum(),
    )  # fmt: skip
    return model, step


def branch(use, value=1.0):
    return {"x": torch.tensor([[value]]), "use": use, "labels": torch.zeros(1, dtype=torch.int64)}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_gradient_of_an_earlier_step_is_never_used_again(micro_batches):
    model, step = branches_step()
    step([branch("ab"), branch("ab")])  # both get accumulators
    before = step.optimizer.exact_weight(model.b.weight).clone()
    step([branch("a")] * micro_batches)
    assert torch.equal(step.optimizer.exact_weight(model.b.weight), before), "b took no part: not even decay moves it"


def test_a_step_that_was_broken_off_leaves_no_trace_in_the_next_one():
    def weights(broken):
        torch.manual_seed(0)
        model, step = branches_step()
        if broken:
            with pytest.raises(AttributeError):
                step([branch("ab", 100.0), branch("a?")])  # the second micro-batch fails after the first backward
        step([branch("ab"), branch("ab")])
        return [step.optimizer.exact_weight(p) for p in model.parameters()]

    assert all(torch.equal(x, y) for x, y in zip(weights(False), weights(True), strict=True))


@pytest.mark.parametrize(
    ("kind", "expected"), [("inf", [1.0, 0.1]), ("value", [1.0, 1.0]), ("norm", [10 / 101**0.5, 1 / 101**0.5])]
)
def test_clipping_by_norm_by_largest_element_and_by_value(kind, expected):
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    step = Step(
        model, SGD(model.parameters(), lr=1.0, momentum=0.0), "fp32", clip=1.0, clip_kind=kind,
        loss=lambda m, b: m(b["x"]).sum(),
    )  # fmt: skip
    step([{"x": torch.tensor([[10.0, 1.0]]), "labels": torch.zeros(1, dtype=torch.int64)}])
    torch.testing.assert_close((before - model.weight).detach()[0], torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_dropout_repeats_from_seed_and_attempt_alone(precision):
    config = ModelConfig(vocab_size=61, context=32, n_layer=1, n_head=2, n_embd=32, dropout=0.3)

    def run(disturb):
        model = fewbits.prepare(Transformer(config), precision)
        step = Step(model, AdamW(model.parameters(), lr=1e-3), precision, seed=5)
        losses = []
        for i in range(3):
            if disturb:
                torch.rand(17)
            losses.append(float(step(split(batch(i), 2)).loss))
        return losses

    assert run(False) == run(True)


def test_every_seed_attempt_and_micro_batch_draws_its_own_numbers():
    def drawn(seed):
        model, seen = torch.nn.Linear(1, 1), []

        def loss(model, micro_batch):
            seen.append(float(torch.rand(())))
            return model(micro_batch["x"]).sum()

        step = Step(model, SGD(model.parameters(), lr=0.0), "fp32", loss=loss, seed=seed)
        for _ in range(2):
            step([{"x": torch.ones(1, 1), "labels": torch.zeros(1, dtype=torch.int64)}] * 2)
        return seen

    assert len({*drawn(0), *drawn(1)}) == 2 * 2 * 2


def test_the_step_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with keyed_random(torch.device("cpu"), 1, 2, 3):
        torch.rand(100)
    assert torch.equal(torch.rand(4), expected)


def test_neighbouring_keys_draw_different_numbers():
    def draw(*key):
        with keyed_random(torch.device("cpu"), *key):
            return float(torch.rand(()))

    keys = list(itertools.product(range(4), range(4), range(4)))
    assert len({draw(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_a_transformers_model_trains_unchanged(precision):
    transformers = pytest.importorskip("transformers")
    shape = dict(
        vocab_size=61, n_positions=32, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    model = fewbits.prepare(model, precision)
    step = Step(model, AdamW(model.parameters(), lr=3e-3), precision)
    losses = [float(step([batch()]).loss) for _ in range(15)]
    assert losses[-1] < losses[0] - 0.5


def prepared(precision="bf16-mixed"):
    return fewbits.prepare(Transformer(TINY), precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_no_switch_of_torch_makes_a_step_less_exact_than_its_precision(precision):
    model, seen = fewbits.prepare(torch.nn.Linear(1, 1), precision), []

    def loss(model, micro_batch):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return model(micro_batch["x"]).float().sum()

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # as a library imported before may have done
        step = Step(model, AdamW(model.parameters(), lr=0.1), precision, loss=loss)
        step([{"x": torch.ones(1, 1), "labels": torch.zeros(1, dtype=torch.int64)}])
        assert seen == [("highest", False)] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_contradictions_are_one_sentence_each():
    model = prepared()
    cases = [
        (lambda: Step(model, torch.optim.AdamW(model.parameters()), "bf16-mixed"), "fewbits.AdamW"),
        (lambda: Step(model, AdamW(model.parameters(), lr=1e-3), "fp16-mixed"), "prepared as bf16-mixed"),
        (lambda: Step(Transformer(TINY), AdamW(Transformer(TINY).parameters(), lr=1e-3), "bf16-mixed"), "not prepared"),
        (lambda: Step(model, AdamW([model.embed.weight], lr=1e-3), "bf16-mixed"), "does not hold"),
        (lambda: Step(model, AdamW(model.parameters(), lr=1e-3, master="none"), "bf16-mixed"), "master"),
        (lambda: Step(model, AdamW(model.parameters(), lr=1e-3), "bf16-mixed", clip_kind="l7"), "clip"),
        (lambda: Step(model, AdamW(model.parameters(), lr=1e-3), "bf16-mixed", clip=float("nan")), "clip"),
        (lambda: fewbits.prepare(model, "fp32"), "prepared as bf16-mixed already"),
    ]
    for make, said in cases:
        with pytest.raises(FewbitsError, match=said):
            make()
