"""What is stored opens in transformers with the same logits, and what transformers stored opens here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_checkpoint import same
from torch import Tensor

from fewbits.checkpoint.hf import from_hf, load, to_hf
from fewbits.checkpoint.save import save_checkpoint
from fewbits.errors import FewbitsError
from fewbits.nn.transformer import ModelConfig, Transformer

GPT2 = ModelConfig(vocab_size=61, context=16, n_layer=2, n_head=4, n_embd=32)
LLAMA = replace(GPT2, norm="rmsnorm", activation="swiglu", positions="rope", bias=False, tied=False, n_ff=48)
SHAPES = {
    "gpt2": GPT2,
    "gpt2 untied, other width and eps": replace(GPT2, tied=False, n_ff=40, norm_eps=1e-3, dropout=0.2),
    "gpt2 without biases": replace(GPT2, bias=False),
    "llama": LLAMA,
    "llama grouped, tied, other base": replace(LLAMA, n_kv_head=2, tied=True, rope_theta=500.0),
    "llama with biases": replace(LLAMA, bias=True, n_kv_head=1),
    "qwen3": replace(LLAMA, qk_norm=True, n_kv_head=2, norm_eps=1e-6),
}
OWN = {
    "our own": replace(GPT2, norm="rmsnorm"),
    "qwen3 with biases": replace(LLAMA, qk_norm=True, bias=True),
    "gpt2 with grouped heads": replace(GPT2, n_kv_head=2),
}
IDS = torch.arange(3 * 16).reshape(3, 16) % 61


def trained(config: ModelConfig) -> Transformer:
    """A model in which no tensor is at its start, so that a forgotten or swapped one shows in the logits."""
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def store(folder: Path, model: Transformer, save_dtype: str | None = None) -> Path:
    config_json, tensors = to_hf(model.config, model.state_dict())
    return save_checkpoint(folder, 1, tensors, {}, {}, {"config.json": json.dumps(config_json)}, 1, save_dtype)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, Tensor) else out.logits


# Logits reach 5; sums of 32 to 64 fp32 terms in another order differ by at most 5 * 64 * 2^-24 = 2e-5, typically by
# the root of the count, 5 * 8 * 2^-24 = 2.4e-6. The promise is 1e-5.
CLOSE = {"atol": 1e-5, "rtol": 0.0}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_a_checkpoint_opens_in_transformers_with_the_same_logits(tmp_path: Path, config: ModelConfig) -> None:
    transformers = pytest.importorskip("transformers")
    model = trained(config)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        store(tmp_path, model), attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(logits(theirs.eval()), logits(model), **CLOSE)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_a_folder_of_transformers_opens_here_with_the_same_logits(tmp_path: Path, config: ModelConfig) -> None:
    transformers = pytest.importorskip("transformers")
    config_json, tensors = to_hf(config, trained(config).state_dict())
    del config_json["fewbits"]  # only what transformers knows
    settings = transformers.AutoConfig.for_model(**config_json)
    theirs = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(tensors[name])
    theirs.save_pretrained(tmp_path)
    ours, tokenizer = load(tmp_path)
    assert tokenizer is None and not ours.training
    # without our own part of config.json, GPT-2's zero biases and llama's dropout are what transformers says
    assert replace(ours.config, bias=config.bias, n_ff=config.n_ff) == config
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)


def test_shards_are_read_and_names_without_prefix_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(store(tmp_path / "a", trained(GPT2))).eval()
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    assert torch.equal(logits(load(tmp_path / "sharded")[0]), logits(trained(GPT2)))
    theirs.transformer.save_pretrained(tmp_path / "bare")  # as the folder of GPT-2 itself names its tensors
    assert torch.equal(logits(load(tmp_path / "bare")[0]), logits(trained(GPT2)))


@pytest.mark.parametrize("config", [*SHAPES.values(), *OWN.values()], ids=[*SHAPES, *OWN])
def test_there_and_back_is_exact(tmp_path: Path, config: ModelConfig) -> None:
    model = trained(config)
    config_json, tensors = to_hf(config, model.state_dict())
    back, own = from_hf(json.loads(json.dumps(config_json)), tensors)
    assert back == config
    assert same(own, model.state_dict())
    loaded, _ = load(store(tmp_path, model))
    assert loaded.config == config and torch.equal(logits(loaded), logits(model))


def test_a_run_a_checkpoint_and_its_dtype_load(tmp_path: Path) -> None:
    folder = store(tmp_path / "run" / "checkpoints", trained(GPT2))
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", folder):
        assert same(load(path)[0].state_dict(), trained(GPT2).state_dict())
    assert {p.dtype for p in load(folder, dtype="bf16")[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(folder, dtype=torch.float64)[0].parameters()} == {torch.float64}
    folder = store(tmp_path / "small", trained(GPT2), save_dtype="bf16")
    assert {p.dtype for p in load(folder)[0].parameters()} == {torch.bfloat16}


def test_tied_weights_are_stored_once() -> None:
    config_json, tensors = to_hf(GPT2, trained(GPT2).state_dict())
    assert config_json["tie_word_embeddings"] and "lm_head.weight" not in tensors
    assert sum(t.numel() for t in tensors.values()) == GPT2.parameter_count()
    # a folder that stores it twice opens too
    assert same(from_hf(config_json, {**tensors, "lm_head.weight": torch.ones(1)})[1], trained(GPT2).state_dict())


def test_the_tokenizer_comes_along_and_opens_in_transformers(tmp_path: Path) -> None:
    from fewbits.data.tokenizer import build_tokenizer

    tokenizer = build_tokenizer("bytes", None, tmp_path / "cache")
    tokenizer.save(tmp_path / "tokenizer")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    config = replace(GPT2, vocab_size=tokenizer.vocab_size)
    config_json, tensors = to_hf(config, trained(config).state_dict())
    files["config.json"] = json.dumps(config_json).encode()
    folder = save_checkpoint(tmp_path / "checkpoints", 1, tensors, {}, {}, files, 1)
    loaded = load(folder)[1]
    assert loaded is not None
    ids = loaded.encode_batch(["naïve text"])[0]
    assert loaded.decode(ids) == "naïve text"
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(folder)("naïve text")["input_ids"] == list(ids)


def test_biases_that_somebody_trained_since_are_kept() -> None:
    config_json, tensors = to_hf(replace(GPT2, bias=False), trained(replace(GPT2, bias=False)).state_dict())
    tensors["transformer.h.1.mlp.c_fc.bias"] = torch.ones(128)
    config, own = from_hf(config_json, tensors)
    assert config.bias and own["blocks.1.mlp.up.bias"].sum() == 128


def test_a_config_that_was_edited_is_believed_over_our_own_part_of_it() -> None:
    config_json, tensors = to_hf(GPT2, trained(GPT2).state_dict())
    tensors["transformer.wte.weight"] = torch.zeros(70, 32)
    assert from_hf(config_json | {"vocab_size": 70}, tensors)[0].vocab_size == 70


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gpt2", {"model_type": "bert"}, "type 'bert' cannot be opened. Types that can: gpt2, llama, qwen3"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu', which fewbits does not build"),
        ("gpt2", {"n_head": 5}, "n_head=5 does not divide"),
        ("gpt2", {"n_layer": 3}, "has no tensor 'transformer.h.2.ln_1.weight'"),
        ("gpt2", {"n_layer": 1}, "has a tensor 'transformer.h.1.attn.c_attn.bias' that fewbits does not know"),
        ("gpt2", {"n_embd": "wide"}, "does not describe a model"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"head_dim": 16}, "head_dim=16, which fewbits does not build; it builds head_dim=8"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("own", {"fewbits": None}, "does not say which model it is"),
        ("own", {"fewbits": {"schema": "fewbits.model/9", "model": {}}}, "version 9 of fewbits.model"),
    ],
)
def test_a_model_that_is_not_built_here_is_refused_in_one_sentence(kind: str, change, message: str) -> None:
    config = {"gpt2": GPT2, "llama": LLAMA, "qwen3": SHAPES["qwen3"], "own": OWN["our own"]}[kind]
    config_json, tensors = to_hf(config, trained(config).state_dict())
    with pytest.raises(FewbitsError, match=message):
        from_hf(config_json | change, tensors)


def test_folders_without_safe_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf(GPT2, trained(GPT2).state_dict())[0]))
    with pytest.raises(FewbitsError, match=r"has a config.json but no .safetensors file"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(FewbitsError, match=r"pytorch_model.bin is a pickle, which can run code"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 9)
    with pytest.raises(FewbitsError, match=r"cannot be read as safetensors"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FewbitsError, match=r"cannot be read as JSON"):
        load(tmp_path)
    with pytest.raises(FewbitsError, match=r"does not exist"):
        load("gpt2-that-nobody-has")


def test_a_checkpoint_whose_config_is_of_another_shape_names_the_tensor(tmp_path: Path) -> None:
    config_json, _ = to_hf(replace(GPT2, vocab_size=62), trained(replace(GPT2, vocab_size=62)).state_dict())
    _, tensors = to_hf(GPT2, trained(GPT2).state_dict())
    save_checkpoint(tmp_path, 1, tensors, {}, {}, {"config.json": json.dumps(config_json)}, 1)
    with pytest.raises(FewbitsError, match=r"'embed.weight' is \[61, 32\] there and \[62, 32\] here"):
        load(tmp_path)
