"""One block, several families: shapes, masks, counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.nn.transformer import ModelConfig, Transformer

TINY = dict(vocab_size=61, context=32, n_layer=2, n_head=4, n_embd=32)
FAMILIES = {
    "gpt2": ModelConfig(**TINY),
    "llama": ModelConfig(
        **TINY, n_kv_head=2, n_ff=48, norm="rmsnorm", activation="swiglu", positions="rope", bias=False, tied=False
    ),
    "minimind": ModelConfig(
        **TINY, n_kv_head=2, n_ff=48, norm="rmsnorm", activation="swiglu", positions="rope", bias=False, qk_norm=True
    ),
}
PUBLISHED = {  # shapes of the recipes and their published sizes in parameters
    "gpt2-124m": (ModelConfig(vocab_size=50257), 124_439_808),
    "llama-1b": (
        ModelConfig(
            vocab_size=32000, context=2048, n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, n_ff=5632,
            norm="rmsnorm", activation="swiglu", positions="rope", bias=False, tied=False,
        ),
        1_100_048_384,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_count_is_what_the_model_has(family):
    config = FAMILIES[family]
    assert config.parameter_count() == sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_their_published_size(name):
    config, size = PUBLISHED[name]
    assert config.check().parameter_count() == size


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_formula_is_torchs_count_within_two_percent(family, monkeypatch):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = dataclasses.replace(FAMILIES[family], n_embd=64, vocab_size=512)
    model = Transformer(config)
    ids = torch.randint(512, (2, 32))
    # torch's plain attention shows its products to the counter, all T of them a token; half are behind the mask
    monkeypatch.setattr("fewbits.nn.attention.attention_by_kernel", lambda *_: None)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    behind_mask = 6 * config.n_layer * config.n_embd * 32
    assert config.flops_per_token(32) == pytest.approx(counter.get_total_flops() / 64 - behind_mask, rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_token_never_changes_earlier_logits(family):
    model = Transformer(FAMILIES[family]).eval()
    ids = torch.randint(61, (1, 16), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 9] = (other[0, 9] + 1) % 61
    assert torch.equal(model(ids)[0, :9], model(other)[0, :9])
    assert not torch.equal(model(ids)[0, 9:], model(other)[0, 9:])


@pytest.mark.parametrize("family", FAMILIES)
def test_perturbing_one_document_never_changes_the_logits_of_another(family):
    model = Transformer(FAMILIES[family]).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(61, (1, 24), generator=generator)
    documents = torch.tensor([[0] * 9 + [1] * 15], dtype=torch.int32)
    positions = torch.tensor([[*range(9), *range(15)]])
    other = ids.clone()
    other[0, :9] = torch.randint(61, (9,), generator=generator)
    kept, changed = model(ids, documents, positions), model(other, documents, positions)
    assert torch.equal(kept[0, 9:], changed[0, 9:])
    assert not torch.equal(kept[0, :9], changed[0, :9])
    # and a packed document has the logits that it has alone (another order of summation: a few fp32 ulps)
    torch.testing.assert_close(kept[0, 9:], model(ids[:, 9:])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_sum_is_the_cross_entropy_of_the_logits(family):
    model = Transformer(FAMILIES[family])
    ids = torch.randint(61, (3, 20))
    labels = torch.randint(61, (3, 20))
    labels[0, :5] = -100
    whole = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model.loss_sum({"input_ids": ids, "labels": labels}), whole, rtol=1e-5, atol=0)


def test_weights_start_the_same_from_the_same_seed_and_different_from_another():
    one, same, other = (Transformer(FAMILIES["llama"], seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embed.weight, other.embed.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_head": 5}, "does not divide the width"),
        ({"n_kv_head": 3}, "does not divide n_head"),
        ({"n_embd": -4}, "must lie between"),
        ({"n_layer": 10**9}, "must lie between"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"n_head": 32, "positions": "rope"}, "even head width.* is 1, which is odd. Choose"),
    ],
)
def test_impossible_shapes_are_refused_in_one_sentence(change, said):
    with pytest.raises(FewbitsError, match=said):
        dataclasses.replace(FAMILIES["gpt2"], **change).check()


def test_a_sequence_beyond_the_context_is_refused():
    with pytest.raises(FewbitsError, match="exceed the context"):
        Transformer(FAMILIES["gpt2"])(torch.zeros(1, 33, dtype=torch.int64))
