"""Quantized checkpoints: every layout there and back, loaded with the same logits, damaged or foreign ones refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_checkpoint import same
from torch import Tensor

from fewbits.checkpoint.hf import from_hf, load, to_hf
from fewbits.checkpoint.quantized import quantization_config, read_layer, read_scheme, store_layer
from fewbits.checkpoint.save import save_model
from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.nn.packed import PackedLinear, Scheme, packed_layers, replace_module
from fewbits.nn.transformer import ModelConfig, Transformer
from fewbits.numerics.ranges import largest_scale
from fewbits.numerics.rounding import cast

GPT2 = ModelConfig(vocab_size=61, context=16, n_layer=2, n_head=4, n_embd=32)
LLAMA = replace(GPT2, norm="rmsnorm", activation="swiglu", positions="rope", bias=False, tied=False, n_ff=48)
SHAPES = {
    "gpt2": GPT2,
    "gpt2 without biases, untied": replace(GPT2, bias=False, tied=False),
    "gpt2 with another eps": replace(GPT2, norm_eps=1e-3),
    "llama grouped": replace(LLAMA, n_kv_head=2),
    "qwen3": replace(LLAMA, qk_norm=True),
    "our own": replace(GPT2, norm="rmsnorm"),
}
SCHEMES = {
    str(scheme): scheme
    for scheme in (
        Scheme(Format.parse("int8"), "row"),
        Scheme(Format.parse("int8"), "row", "int8"),
        Scheme(Format.parse("int8"), "group:16"),
        Scheme(Format.parse("int4"), "group:16"),
        Scheme(Format.parse("fp8_e4m3"), "row"),
        Scheme(Format.parse("fp8_e5m2"), "group:8"),
        Scheme(Format.parse("fp4_e2m1"), "group:16"),
        Scheme(Format.parse("binary"), "row"),
    )
}
IDS = torch.arange(3 * 16).reshape(3, 16) % 61


def packed_model(config: ModelConfig, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model off its start whose linear layers, but one, are packed."""
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.to(dtype)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name not in ("head", "blocks.1.mlp.up"):
            width = layer.in_features if scheme.granularity == "row" else int(scheme.granularity[6:])
            groups = layer.weight.detach().float().reshape(layer.out_features, -1, width)
            scale = largest_scale(groups, scheme.format).to(dtype)
            values = cast(groups / scale.float(), scheme.format).flatten(1)
            bias = None if layer.bias is None else layer.bias.detach()
            replace_module(model, name, PackedLinear.from_values(values, scale[..., 0], bias, scheme))
    return model.requires_grad_(False)


def store(folder: Path, model: Transformer, scheme: Scheme) -> Path:
    config_json, tensors = to_hf(model.config, model.state_dict(), scheme)
    return save_model(folder, 5, tensors, {}, {"config.json": json.dumps(config_json)})


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_there_and_back_is_exact(tmp_path, config, scheme):
    model = packed_model(config, scheme)
    config_json, tensors = to_hf(config, model.state_dict(), scheme)
    back, own = from_hf(json.loads(json.dumps(config_json)), tensors)
    assert back == config and same(own, model.state_dict())
    assert read_scheme(config_json["quantization_config"]) == scheme
    loaded, _ = load(store(tmp_path / "small", model, scheme))
    assert packed_layers(loaded).keys() == packed_layers(model).keys()
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_every_linear_of_the_other_library_is_packed_or_ignored_by_name(config):
    scheme = SCHEMES["int4 group:16"]
    config_json, tensors = to_hf(config, packed_model(config, scheme).state_dict(), scheme)
    assert config_json["model_type"] == ("opt" if config is GPT2 else "llama")
    if config is GPT2:  # OPT reads position t at row t + 2
        positions = tensors["model.decoder.embed_positions.weight"]
        assert torch.equal(positions[2:], packed_model(config, scheme).positions.weight) and positions.shape == (18, 32)
    ignored = config_json["quantization_config"]["ignore"]
    kept = ["model.decoder.layers.1.fc1"] if config is GPT2 else ["model.layers.1.mlp.up_proj"]
    assert ignored == [*kept, "lm_head"]
    packed = {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}
    shapes = {n: tensors[f"{n}.weight_shape"].tolist() for n in packed}
    assert len(packed) == (11 if config is GPT2 else 13) and all(len(shape) == 2 for shape in shapes.values())
    for name, (rows, columns) in shapes.items():
        assert tensors[f"{name}.weight_packed"].shape == (rows, columns // 8)
        assert tensors[f"{name}.weight_scale"].shape == (rows, columns // 16)


@pytest.mark.parametrize(("columns", "bits"), [(5, 4), (16, 4), (6, 8), (7, 8), (8, 8)])
def test_words_hold_integers_above_their_lowest_and_are_filled_up(columns, bits):
    scheme = Scheme(Format.parse(f"int{bits}"), "row")
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns)).float()
    packed = PackedLinear.from_values(values, torch.ones(3, 1), None, scheme)
    stored = store_layer(packed.codes, packed.scale, scheme, columns)
    words, each = stored["weight_packed"], 32 // bits
    assert words.dtype == torch.int32 and words.shape == (3, -(-columns // each))
    assert stored["weight_shape"].tolist() == [3, columns]
    for row in range(3):
        for k in range(columns):
            code = (int(words[row, k // each]) >> (bits * (k % each))) & (2**bits - 1)
            assert code - 2 ** (bits - 1) == values[row, k]
    codes, scale = read_layer("layer", stored, scheme)
    assert torch.equal(codes, packed.codes) and torch.equal(scale, packed.scale)


def test_a_quantized_checkpoint_is_not_loaded_in_another_dtype(tmp_path):
    folder = store(tmp_path / "small", packed_model(GPT2, SCHEMES["int8 row"]), SCHEMES["int8 row"])
    with pytest.raises(FewbitsError, match=r"is quantized \(int8 row\); it loads as it is stored, not as bf16. Leave"):
        load(folder, dtype="bf16")


def test_a_flipped_bit_is_noticed(tmp_path):
    folder = store(tmp_path / "small", packed_model(GPT2, SCHEMES["int4 group:16"]), SCHEMES["int4 group:16"])
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-3] ^= 4
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(FewbitsError, match=r"small is damaged: model.safetensors was changed"):
        load(folder)


def test_a_folder_that_is_there_is_not_overwritten_and_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    scheme = SCHEMES["int8 row"]
    model = packed_model(GPT2, scheme)
    folder = store(tmp_path / "small", model, scheme)
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(FewbitsError, match="small is there already and will not be overwritten"):
        store(folder, model, scheme)
    assert (folder / "manifest.json").read_bytes() == before

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.rename", full)
    with pytest.raises(FewbitsError, match="the disk is full"):
        store(tmp_path / "other", model, scheme)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq'; fewbits reads compressed-tensors"),
        ({"config_groups": {}}, "has 0 groups of quantized layers"),
        ({"format": "marlin-24"}, "format 'marlin-24', which fewbits does not read"),
        ({"weights": {"symmetric": False}}, "asymmetric; fewbits reads symmetric int4"),
        ({"weights": {"num_bits": 3}}, "The weights are int3"),
        ({"weights": {"strategy": "tensor"}}, "int4, tensor, symmetric"),
        ({"input_activations": {"num_bits": 8, "type": "float", "dynamic": True}}, "activations are quantized"),
    ],
)
def test_what_this_version_does_not_read_is_refused_in_one_sentence(change, message):
    config = json.loads(json.dumps(quantization_config(SCHEMES["int4 group:16"], [])))
    group = config["config_groups"]["group_0"]
    group["weights"] |= change.pop("weights", {})
    group["input_activations"] = change.pop("input_activations", None)
    with pytest.raises(FewbitsError, match=message):
        read_scheme(config | change)


def test_tensors_that_miss_something_are_refused_by_name():
    scheme = SCHEMES["int4 group:16"]
    config_json, tensors = to_hf(LLAMA, packed_model(LLAMA, scheme).state_dict(), scheme)
    name = "model.layers.0.self_attn.k_proj"
    without = {key: t for key, t in tensors.items() if key != f"{name}.weight_scale"}
    with pytest.raises(FewbitsError, match=f"no tensor '{name}.weight_scale'"):
        from_hf(config_json, without)
    with pytest.raises(FewbitsError, match=f"'{name}' has zero points"):
        from_hf(config_json, tensors | {f"{name}.weight_zero_point": torch.ones(4, 1)})
    bare = {key: t for key, t in tensors.items() if key != f"{name}.weight_packed"}
    with pytest.raises(FewbitsError, match=f"'{name}' has a weight_scale but no codes of int4"):
        from_hf(config_json, bare)
    with pytest.raises(FewbitsError, match=r"has no tensor 'model.layers.0.self_attn.q_proj.weight'"):
        from_hf({key: v for key, v in config_json.items() if key != "quantization_config"}, tensors)
