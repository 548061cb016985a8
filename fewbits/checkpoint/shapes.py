"""What config.json says of the shape of a model, in the words of transformers, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fewbits.checkpoint.schema import check_version
from fewbits.errors import FewbitsError
from fewbits.nn.transformer import ModelConfig

MODEL_VERSION = "fewbits.model/1"
_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "opt": "OPTForCausalLM",
}
OPT_EPS = 1e-5  # of its norms, which no setting changes
_GELU = ("gelu_new", "gelu_pytorch_tanh")  # both are the tanh approximation


def kind_of(config: ModelConfig, quantized: bool = False) -> str:
    """The model_type under which a shape is stored."""
    plain = config.kv_heads == config.n_head and not config.qk_norm
    shape = (config.norm, config.activation, config.positions)
    if shape == ("layernorm", "gelu", "learned") and plain:
        return "gpt2" if not quantized else "opt" if config.norm_eps == OPT_EPS else "fewbits"
    if shape == ("rmsnorm", "swiglu", "rope"):
        if not config.qk_norm:
            return "llama"
        if not config.bias:
            return "qwen3"
    return "fewbits"


def describe(config: ModelConfig, kind: str) -> dict[str, Any]:
    ours = {"fewbits": {"schema": MODEL_VERSION, "model": asdict(config)}}
    if kind == "fewbits":
        return {"model_type": kind, **ours}
    head = {"architectures": [_CLASSES[kind]], "model_type": kind, "bos_token_id": None, "eos_token_id": None}
    return head | _shape_json(config, kind) | ours


def _shape_json(config: ModelConfig, kind: str) -> dict[str, Any]:
    """What config.json says of the shape, in the words of transformers."""
    if kind == "opt":
        return {
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context,
            "hidden_size": config.n_embd,
            "word_embed_proj_dim": config.n_embd,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "ffn_dim": config.ff,
            "activation_function": "gelu_new",
            "do_layer_norm_before": True,
            "enable_bias": True,
            "dropout": config.dropout,
            "attention_dropout": config.dropout,
            "layerdrop": 0.0,
            "pad_token_id": None,
            "tie_word_embeddings": config.tied,
        }
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


def read_config(config_json: Mapping[str, Any]) -> tuple[str, ModelConfig]:
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
    if kind == "opt":
        return _from_opt(config_json).check()
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


def _from_opt(json: Mapping[str, Any]) -> ModelConfig:
    """The same for OPTConfig: the shape of GPT-2 under other names."""
    width = json.get("hidden_size", 768)
    _refuse(json, "activation_function", "relu", _GELU)
    _refuse(json, "do_layer_norm_before", True, (True,))
    _refuse(json, "enable_bias", True, (True,))
    _refuse(json, "_remove_final_layer_norm", False, (False,))
    _refuse(json, "word_embed_proj_dim", width, (width, None))
    return ModelConfig(
        vocab_size=json.get("vocab_size", 50272),
        context=json.get("max_position_embeddings", 2048),
        n_layer=json.get("num_hidden_layers", 12),
        n_head=json.get("num_attention_heads", 12),
        n_embd=width,
        n_ff=json.get("ffn_dim", 3072),
        tied=json.get("tie_word_embeddings", True),
        dropout=json.get("dropout", 0.1),
        norm_eps=OPT_EPS,
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
