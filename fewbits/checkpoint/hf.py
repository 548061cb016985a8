"""Names of other libraries, both ways: what is stored opens in transformers, and what transformers stored opens here.

| shape of the model                                | stored as          |
|---------------------------------------------------|--------------------|
| layer norm, GELU, learned positions               | GPT2LMHeadModel    |
| RMS norm, SwiGLU, RoPE                            | LlamaForCausalLM   |
| the same with norms on queries and keys, no bias  | Qwen3ForCausalLM   |
| anything else                                     | our own names, model_type "fewbits" |

Tensors are renamed, split, joined and transposed, never rounded. GPT-2 without biases is stored with biases of zero.
Quantized, the GPT-2 shape is stored as OPTForCausalLM: the same network on nn.Linear, which compressed-tensors reads;
GPT-2's own class is built on Conv1D, which it does not read. (OPT has no setting for the epsilon of its norms: a model
with another than 1e-5 keeps our own names.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewbits.checkpoint.load import check_shapes, load_checkpoint
from fewbits.checkpoint.manifest import MANIFEST, step_of
from fewbits.checkpoint.names import rules
from fewbits.checkpoint.quantized import SUFFIXES, quantization_config, read_layer, read_scheme, store_layer
from fewbits.checkpoint.shapes import describe, kind_of, read_config
from fewbits.data.tokenizer import Tokenizer
from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.nn.packed import Scheme, make_packed
from fewbits.nn.transformer import ModelConfig, Transformer

_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants that old folders store


def to_hf(
    config: ModelConfig, tensors: Mapping[str, Tensor], scheme: Scheme | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors under the names of transformers; views where no bytes need to move.

    scheme: of a quantized model, whose tensors hold `NAME.codes` and `NAME.scale` in place of some `NAME.weight`.
    The configuration has no token ids: whoever knows the tokenizer adds `eos_token_id`."""
    kind = kind_of(config, scheme is not None)
    found: dict[str, Tensor] = {}
    ignored: list[str] = []
    for rule in rules(config, kind, tensors):
        base = rule.ours.removesuffix(".weight")
        if scheme is not None and f"{base}.codes" in tensors:
            codes, scale = (rule.split(tensors[f"{base}.{part}"]) for part in ("codes", "scale"))
            for name, *layer in zip(rule.theirs, codes, scale, strict=True):
                stored = store_layer(layer[0], layer[1], scheme, _columns(config, base))
                found.update({f"{name.removesuffix('weight')}{suffix}": t for suffix, t in stored.items()})
            continue
        tensor = tensors.get(rule.ours)
        if tensor is None and rule.ours.endswith(".bias"):
            tensor = _zero_bias(tensors, rule.ours.removesuffix(".bias"))
        if tensor is None:
            raise FewbitsError(f"The model has no tensor '{rule.ours}', which its configuration asks for.")
        found.update(zip(rule.theirs, rule.split(tensor), strict=True))
        if tensor.ndim == 2 and base not in ("embed", "positions"):
            ignored += [name.removesuffix(".weight") for name in rule.theirs]
    config_json = describe(config, kind)
    if scheme is not None:
        config_json["quantization_config"] = quantization_config(scheme, [*ignored, *(["lm_head"] * config.tied)])
    return config_json, found


def from_hf(config_json: Mapping[str, Any], hf_tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The inverse of `to_hf`, exact for what it wrote; also for folders that transformers wrote.

    Errors: FewbitsError for a model that this version does not build, and for missing or unexpected tensors."""
    kind, config = read_config(config_json)
    scheme = stored_scheme(config_json)
    if kind == "fewbits" and scheme is None:
        return config, dict(hf_tensors)
    theirs = {_full_name(kind, name): t for name, t in hf_tensors.items() if not name.endswith(_BUFFERS)}
    if config.tied:
        theirs.pop("lm_head.weight", None)
    found: dict[str, Tensor] = {}
    for rule in rules(config, kind, _our_names(hf_tensors)):
        base = rule.ours.removesuffix(".weight")
        if scheme is not None and rule.theirs[0].removesuffix("weight") + "weight_scale" in theirs:
            layers = [_take_layer(theirs, name.removesuffix("weight"), scheme) for name in rule.theirs]
            for part, tensors in zip(("codes", "scale"), zip(*layers, strict=True), strict=True):
                found[f"{base}.{part}"] = rule.join(list(tensors))
            continue
        missing = next((name for name in rule.theirs if name not in theirs), None)
        if missing is not None:
            raise FewbitsError(
                f"The {kind} model has no tensor '{missing}', which its config.json asks for. The two belong to "
                "different models, or the file is incomplete."
            )
        found[rule.ours] = rule.join([theirs.pop(name) for name in rule.theirs])
    if theirs:
        raise FewbitsError(
            f"The {kind} model has a tensor '{min(theirs)}' that fewbits does not know. Models of this version are "
            "plain GPT-2, Llama and Qwen3."
        )
    return _without_zero_biases(config, found)


def load(path: Path | str, dtype: torch.dtype | str | None = None) -> tuple[Transformer, Tokenizer | None]:
    """The model (on the CPU, in evaluation mode) and the tokenizer of a run, a checkpoint or a Hugging Face folder.

    dtype: of the parameters; None is the dtype that is stored, which for a run is fp32, the exact values. The
    tokenizer is None when the folder has no tokenizer.json. The linear layers of a quantized model are `PackedLinear`.

    Errors: FewbitsError for a folder that is none of these, is damaged, or holds a model that is not built here; for a
    quantized one that is asked for in another dtype."""
    stored = read_stored(Path(path))
    model = build_model(stored)
    if dtype is not None and (scheme := stored_scheme(stored.config_json)) is not None:
        raise FewbitsError(
            f"{path} is quantized ({scheme}); it loads as it is stored, not as {Format.parse(dtype)}. Leave the dtype "
            "out, or load the checkpoint that it was made from."
        )
    if dtype is not None:
        model.to(Format.parse(dtype).dtype if isinstance(dtype, str) else dtype)
    folder = stored.folder
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    return model, tokenizer


def build_model(stored: Stored) -> Transformer:
    """The model of what was read, on the CPU, in evaluation mode. Errors: FewbitsError, as `load`."""
    config, tensors = from_hf(stored.config_json, stored.tensors)
    model = Transformer(config)
    if (scheme := stored_scheme(stored.config_json)) is not None:
        make_packed(model, tensors, scheme)
        model.requires_grad_(False)
    check_shapes(model.state_dict(), tensors)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


class Stored(NamedTuple):
    """What a folder holds of a model, verified where fewbits wrote it."""

    folder: Path
    config_json: dict[str, Any]
    tensors: dict[str, Tensor]
    """By the names under which they are stored."""
    step: int
    """Of the training that made it; 0 for a folder of another library."""


def read_stored(path: Path) -> Stored:
    """What a run, a checkpoint or a Hugging Face folder holds. Errors: FewbitsError, as `load`."""
    if (path / "config.json").is_file() and not (path / MANIFEST).is_file() and step_of(path) is None:
        return Stored(path, _json_object(path / "config.json"), _read_safetensors(path), 0)
    checkpoint = load_checkpoint(path)
    if "config.json" not in checkpoint.files:
        raise FewbitsError(f"{checkpoint.path} holds no config.json, so it does not say which model it is.")
    config_json = json.loads(checkpoint.files["config.json"])
    return Stored(checkpoint.path, config_json, checkpoint.model, checkpoint.step)


def stored_scheme(config_json: Mapping[str, Any]) -> Scheme | None:
    """How the weights are quantized, or None. Errors: FewbitsError for a way that this version does not read."""
    config = config_json.get("quantization_config")
    return read_scheme(config) if isinstance(config, Mapping) else None


def _take_layer(theirs: dict[str, Tensor], prefix: str, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes and scale of one stored layer, taken out of `theirs`."""
    stored = {suffix: theirs.pop(prefix + suffix) for suffix in SUFFIXES if prefix + suffix in theirs}
    if "weight_scale" not in stored:
        raise FewbitsError(f"The model has no tensor '{prefix}weight_scale', so its codes mean nothing.")
    return read_layer(prefix.removesuffix("."), stored, scheme)


def _columns(config: ModelConfig, name: str) -> int:
    """The inputs of a linear layer of ours."""
    return config.ff if name.endswith("mlp.down") else config.n_embd


def _zero_bias(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The bias of zero of a layer or norm that has none."""
    weight = tensors[f"{name}.weight"] if f"{name}.weight" in tensors else tensors[f"{name}.scale"]
    return torch.zeros(weight.shape[0], dtype=weight.dtype)


def _our_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of ours, one a weight, for tensors that are stored under them."""
    ends = (".weight_shape", ".weight_zero_point", ".weight_scale")
    names = [name for name in tensors if not name.endswith(ends)]
    return [name.replace(".weight_packed", ".weight") for name in names]


def _full_name(kind: str, name: str) -> str:
    """GPT-2's own folder leaves out the prefix."""
    bare = kind == "gpt2" and not name.startswith(("transformer.", "lm_head."))
    return f"transformer.{name}" if bare else name


def _without_zero_biases(config: ModelConfig, tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Undoes the zeros that stand for "no bias", unless somebody trained them since."""
    if config.bias:
        return config, tensors
    biases = [name for name in tensors if name.endswith(".bias")]
    if any(bool(tensors[name].any()) for name in biases):
        return replace(config, bias=True), tensors
    return config, {name: tensor for name, tensor in tensors.items() if name not in biases}


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FewbitsError(f"{path} cannot be read as JSON ({error}). Restore the file.") from None
    if not isinstance(value, dict):
        raise FewbitsError(f"{path} does not hold an object. Restore the file.")
    return value


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, in one file or in shards. Pickled weights are never opened."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = sorted(path.name for path in folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weights = _json_object(index).get("weight_map")
        names = sorted(set(map(str, weights.values()))) if isinstance(weights, dict) else []
        if any(Path(name).name != name for name in names):
            raise FewbitsError(f"{index} names files outside its folder. It is not a file that transformers wrote.")
    elif "model.safetensors" in names:
        names = ["model.safetensors"]
    if not names:
        pickled = next((path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth")), None)
        hint = f" {pickled} is a pickle, which can run code; save it as safetensors first." if pickled else ""
        raise FewbitsError(f"{folder} has a config.json but no .safetensors file.{hint}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors.update(load_file(folder / name))
        except (OSError, SafetensorError) as error:
            raise FewbitsError(f"{folder / name} cannot be read as safetensors ({error}). Restore the file.") from None
    return tensors
