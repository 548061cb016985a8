"""Names of other libraries, both ways: what is stored opens in transformers, and what transformers stored opens here.

| shape of the model                                | stored as          |
|---------------------------------------------------|--------------------|
| layer norm, GELU, learned positions               | GPT2LMHeadModel    |
| RMS norm, SwiGLU, RoPE                            | LlamaForCausalLM   |
| the same with norms on queries and keys, no bias  | Qwen3ForCausalLM   |
| anything else                                     | our own names, model_type "fewbits" |

Tensors are renamed, split, joined and transposed, never rounded. GPT-2 without biases is stored with biases of zero.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewbits.checkpoint.load import check_shapes, load_checkpoint
from fewbits.checkpoint.manifest import MANIFEST, step_of
from fewbits.checkpoint.schema import check_version
from fewbits.data.tokenizer import Tokenizer
from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.nn.transformer import ModelConfig, Transformer

MODEL_VERSION = "fewbits.model/1"
_CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_GELU = ("gelu_new", "gelu_pytorch_tanh")  # both are the tanh approximation
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants that old folders store


def to_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors under the names of transformers; views where no bytes need to move.

    The configuration has no token ids: whoever knows the tokenizer adds `eos_token_id`."""
    kind = _kind(config)
    if kind == "fewbits":
        return _config_json(config, kind), dict(tensors)
    found: dict[str, Tensor] = {}
    for rule in _rules(config, kind):
        tensor = tensors.get(rule.ours)
        if tensor is None and rule.ours.endswith(".bias"):
            weight = tensors[rule.ours.removesuffix("bias") + "weight"]
            tensor = torch.zeros(weight.shape[0], dtype=weight.dtype)
        if tensor is None:
            raise FewbitsError(f"The model has no tensor '{rule.ours}', which its configuration asks for.")
        parts = torch.split(tensor, list(rule.rows)) if rule.rows else (tensor,)
        found.update(zip(rule.theirs, (part.t() if rule.transposed else part for part in parts), strict=True))
    return _config_json(config, kind), found


def from_hf(config_json: Mapping[str, Any], hf_tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The inverse of `to_hf`, exact for what it wrote; also for folders that transformers wrote.

    Errors: FewbitsError for a model that this version does not build, and for missing or unexpected tensors."""
    kind, config = _read_config(config_json)
    if kind == "fewbits":
        return config, dict(hf_tensors)
    theirs = {_full_name(kind, name): t for name, t in hf_tensors.items() if not name.endswith(_BUFFERS)}
    if config.tied:
        theirs.pop("lm_head.weight", None)
    found: dict[str, Tensor] = {}
    for rule in _rules(config, kind):
        missing = next((name for name in rule.theirs if name not in theirs), None)
        if missing is not None:
            raise FewbitsError(
                f"The {kind} model has no tensor '{missing}', which its config.json asks for. The two belong to "
                "different models, or the file is incomplete."
            )
        parts = [theirs.pop(name) for name in rule.theirs]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        found[rule.ours] = whole.t().contiguous() if rule.transposed else whole
    if theirs:
        raise FewbitsError(
            f"The {kind} model has a tensor '{min(theirs)}' that fewbits does not know. Models of this version are "
            "plain GPT-2, Llama and Qwen3."
        )
    return _without_zero_biases(config, found)


def load(path: Path | str, dtype: torch.dtype | str | None = None) -> tuple[Transformer, Tokenizer | None]:
    """The model (on the CPU, in evaluation mode) and the tokenizer of a run, a checkpoint or a Hugging Face folder.

    dtype: of the parameters; None is the dtype that is stored, which for a run is fp32, the exact values. The
    tokenizer is None when the folder has no tokenizer.json.

    Errors: FewbitsError for a folder that is none of these, is damaged, or holds a model that is not built here."""
    path = Path(path)
    if (path / "config.json").is_file() and not (path / MANIFEST).is_file() and step_of(path) is None:
        folder, config_json, stored = path, _json_object(path / "config.json"), _read_safetensors(path)
    else:
        checkpoint = load_checkpoint(path)
        folder, stored = checkpoint.path, checkpoint.model
        if "config.json" not in checkpoint.files:
            raise FewbitsError(f"{folder} holds no config.json, so it does not say which model it is.")
        config_json = json.loads(checkpoint.files["config.json"])
    config, tensors = from_hf(config_json, stored)
    model = Transformer(config)
    check_shapes(model.state_dict(), tensors)
    model.load_state_dict(tensors, assign=True)
    if dtype is not None:
        model.to(Format.parse(dtype).dtype if isinstance(dtype, str) else dtype)
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    return model.eval(), tokenizer


class _Rule(NamedTuple):
    """One of our tensors and the tensor or tensors it is stored as."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    """GPT-2's Conv1D keeps its weight as [in, out]."""
    rows: tuple[int, ...] = ()
    """How many rows of ours go to each of theirs, when there are several."""


def _kind(config: ModelConfig) -> str:
    """The model_type under which a shape is stored."""
    plain = config.kv_heads == config.n_head and not config.qk_norm
    shape = (config.norm, config.activation, config.positions)
    if shape == ("layernorm", "gelu", "learned") and plain:
        return "gpt2"
    if shape == ("rmsnorm", "swiglu", "rope"):
        if not config.qk_norm:
            return "llama"
        if not config.bias:
            return "qwen3"
    return "fewbits"


def _config_json(config: ModelConfig, kind: str) -> dict[str, Any]:
    ours = {"fewbits": {"schema": MODEL_VERSION, "model": asdict(config)}}
    if kind == "fewbits":
        return {"model_type": kind, **ours}
    head = {"architectures": [_CLASSES[kind]], "model_type": kind, "bos_token_id": None, "eos_token_id": None}
    return head | _shape_json(config, kind) | ours


def _shape_json(config: ModelConfig, kind: str) -> dict[str, Any]:
    """What config.json says of the shape, in the words of transformers."""
    if kind == "gpt2":
        return {
            "vocab_size": config.vocab_size,
            "n_positions": config.context,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.ff,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "tie_word_embeddings": config.tied,
        }
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ff,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.dropout,
        "attention_bias": config.bias,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_theta,  # read by transformers 4; version 5 reads rope_parameters
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
    if kind == "llama":
        shape["mlp_bias"] = config.bias
    return shape


def _read_config(config_json: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    """model_type and shape. The part under "fewbits" holds as long as the rest of the file agrees with it."""
    kind = config_json.get("model_type")
    if kind not in (*_CLASSES, "fewbits"):
        raise FewbitsError(f"A model of type {kind!r} cannot be opened. Types that can: {', '.join(_CLASSES)}.")
    try:
        derived = None if kind == "fewbits" else _derive(config_json, kind)
    except (TypeError, AttributeError) as error:
        raise FewbitsError(f"config.json of type {kind!r} does not describe a model ({error}).") from None
    ours = config_json.get("fewbits")
    if isinstance(ours, Mapping) and isinstance(ours.get("model"), Mapping):
        check_version(ours.get("schema"), MODEL_VERSION, "config.json")
        config = ModelConfig.from_json(ours["model"]).check()
        shape = {} if kind == "fewbits" else _shape_json(config, kind)
        shape.pop("rope_theta", None)  # transformers 5 drops it when it saves; rope_parameters says the same
        if all(config_json.get(key) == value for key, value in shape.items()):
            return kind, config
    if derived is None:
        raise FewbitsError("config.json is of type 'fewbits' but does not say which model it is. Restore the file.")
    return kind, derived


def _derive(config_json: Mapping[str, Any], kind: str) -> ModelConfig:
    return (_from_gpt2(config_json) if kind == "gpt2" else _from_llama(config_json, kind)).check()


def _from_gpt2(json: Mapping[str, Any]) -> ModelConfig:
    """A shape from transformers' configuration; what the file leaves out has the default of GPT2Config."""
    _refuse(json, "activation_function", "gelu_new", _GELU)
    _refuse(json, "scale_attn_weights", True, (True,))
    _refuse(json, "scale_attn_by_inverse_layer_idx", False, (False,))
    _refuse(json, "add_cross_attention", False, (False,))
    return ModelConfig(
        vocab_size=json.get("vocab_size", 50257),
        context=json.get("n_positions", 1024),
        n_layer=json.get("n_layer", 12),
        n_head=json.get("n_head", 12),
        n_embd=json.get("n_embd", 768),
        n_ff=json.get("n_inner") or 0,
        tied=json.get("tie_word_embeddings", True),
        dropout=json.get("resid_pdrop", 0.1),
        norm_eps=json.get("layer_norm_epsilon", 1e-5),
    )


def _from_llama(json: Mapping[str, Any], kind: str) -> ModelConfig:
    """The same for LlamaConfig and Qwen3Config."""
    bias = json.get("attention_bias", False)
    rope = json.get("rope_parameters") or json.get("rope_scaling") or {}
    _refuse(json, "hidden_act", "silu", ("silu",))
    _refuse(rope, "rope_type", rope.get("type", "default"), ("default",))  # "type": before transformers 4.43
    if kind == "qwen3":
        _refuse(json, "use_sliding_window", False, (False,))
        _refuse(json, "attention_bias", False, (False,))
    else:
        _refuse(json, "mlp_bias", False, (bias,))
    heads, width = json.get("num_attention_heads", 32), json.get("hidden_size", 4096)
    if json.get("head_dim", 128 if kind == "qwen3" else None) is not None:
        _refuse(json, "head_dim", 128, (width // heads,))
    kv_heads = json.get("num_key_value_heads", 32 if kind == "qwen3" else None) or heads
    return ModelConfig(
        vocab_size=json.get("vocab_size", 32000 if kind == "llama" else 151936),
        context=json.get("max_position_embeddings", 2048 if kind == "llama" else 32768),
        n_layer=json.get("num_hidden_layers", 32),
        n_head=heads,
        n_kv_head=0 if kv_heads == heads else kv_heads,
        n_embd=width,
        n_ff=json.get("intermediate_size", 11008 if kind == "llama" else 22016),
        norm="rmsnorm",
        activation="swiglu",
        positions="rope",
        bias=bias,
        tied=json.get("tie_word_embeddings", False),
        qk_norm=kind == "qwen3",
        dropout=json.get("attention_dropout", 0.0),
        rope_theta=float(rope.get("rope_theta", json.get("rope_theta", 10000.0))),
        norm_eps=json.get("rms_norm_eps", 1e-6),
    )


def _refuse(json: Mapping[str, Any], key: str, default: object, fits: tuple[object, ...]) -> None:
    """Errors: FewbitsError when a setting asks for arithmetic that our block does not do."""
    value = json.get(key, default)
    if value not in fits:
        raise FewbitsError(
            f"config.json asks for {key}={value!r}, which fewbits does not build; it builds {key}="
            f"{' or '.join(repr(fit) for fit in fits)}."
        )


def _rules(config: ModelConfig, kind: str) -> Iterator[_Rule]:
    """Every tensor of the model, ours and theirs, in the order of our state dict."""
    return _gpt2_rules(config) if kind == "gpt2" else _llama_rules(config)


def _gpt2_rules(config: ModelConfig) -> Iterator[_Rule]:
    yield _Rule("embed.weight", ("transformer.wte.weight",))
    yield _Rule("positions.weight", ("transformer.wpe.weight",))
    parts = {
        "norm1": ("ln_1", False),
        "attention.qkv": ("attn.c_attn", True),
        "attention.output": ("attn.c_proj", True),
        "norm2": ("ln_2", False),
        "mlp.up": ("mlp.c_fc", True),
        "mlp.down": ("mlp.c_proj", True),
    }
    for i in range(config.n_layer):
        for ours, (theirs, matrix) in parts.items():
            yield _Rule(f"blocks.{i}.{ours}.weight", (f"transformer.h.{i}.{theirs}.weight",), transposed=matrix)
            yield _Rule(f"blocks.{i}.{ours}.bias", (f"transformer.h.{i}.{theirs}.bias",))
    yield _Rule("norm.weight", ("transformer.ln_f.weight",))
    yield _Rule("norm.bias", ("transformer.ln_f.bias",))
    if not config.tied:
        yield _Rule("head.weight", ("lm_head.weight",))


def _llama_rules(config: ModelConfig) -> Iterator[_Rule]:
    kinds = ("weight", "bias") if config.bias else ("weight",)
    rows = tuple(heads * config.head_dim for heads in (config.n_head, config.kv_heads, config.kv_heads))
    yield _Rule("embed.weight", ("model.embed_tokens.weight",))
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        yield _Rule(f"{ours}.norm1.weight", (f"{theirs}.input_layernorm.weight",))
        for kind in kinds:
            heads = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            yield _Rule(f"{ours}.attention.qkv.{kind}", heads, rows=rows)
            yield _Rule(f"{ours}.attention.output.{kind}", (f"{theirs}.self_attn.o_proj.{kind}",))
        if config.qk_norm:
            yield _Rule(f"{ours}.attention.query_norm.weight", (f"{theirs}.self_attn.q_norm.weight",))
            yield _Rule(f"{ours}.attention.key_norm.weight", (f"{theirs}.self_attn.k_norm.weight",))
        yield _Rule(f"{ours}.norm2.weight", (f"{theirs}.post_attention_layernorm.weight",))
        for part in ("up", "gate", "down"):
            for kind in kinds:
                yield _Rule(f"{ours}.mlp.{part}.{kind}", (f"{theirs}.mlp.{part}_proj.{kind}",))
    yield _Rule("norm.weight", ("model.norm.weight",))
    if not config.tied:
        yield _Rule("head.weight", ("lm_head.weight",))


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
