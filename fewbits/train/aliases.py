"""Names that people already type: nanoGPT's and Hugging Face's options, translated with their meaning.

Most names are renames. The others are conversions: what they say depends on other values (`min_lr` is absolute there, a
ratio here), and each conversion returns a note that the command line prints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from fewbits.errors import FewbitsError, nearest
from fewbits.train.config import Config, full_name, options, override, short_names
from fewbits.train.fields import FALSE, TRUE

RENAMES = {
    # nanoGPT
    "block_size": "model.context",
    "learning_rate": "optim.lr",
    "max_iters": "train.max_steps",
    "grad_clip": "optim.clip",
    "warmup_iters": "optim.warmup_steps",
    "eval_interval": "train.eval_every",
    "eval_iters": "train.eval_batches",
    "log_interval": "train.log_every",
    "dataset": "data.data",
    # Hugging Face, TrainingArguments and accelerate
    "max_grad_norm": "optim.clip",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "output_dir": "train.out_dir",
    "torch_compile": "train.compile",
    "full_determinism": "train.deterministic",
    "mixed_precision": "precision",
    "run_name": "name",
    "train_file": "data.data",
    # Hugging Face, GPT2Config and LlamaConfig
    "hidden_size": "model.n_embd",
    "num_hidden_layers": "model.n_layer",
    "num_attention_heads": "model.n_head",
    "num_key_value_heads": "model.n_kv_head",
    "intermediate_size": "model.n_ff",
    "n_inner": "model.n_ff",
    "max_position_embeddings": "model.context",
    "n_positions": "model.context",
    "rms_norm_eps": "model.norm_eps",
    "layer_norm_epsilon": "model.norm_eps",
    "tie_word_embeddings": "model.tied",
}

Given = Mapping[str, str]
"""Option names (dotted, or an alias that needs a conversion) and the texts that came with them."""


class Conversion(NamedTuple):
    """A name of another library whose value must be worked out."""

    meaning: str
    """One sentence for `--help`."""
    convert: Callable[[str, Given, Config], dict[str, str]]
    """(text, all given names, config with the plain options applied) -> dotted name: text. Raises FewbitsError."""
    switch: bool = False
    """True: it may stand without a value and then means true."""


def _value(alias: str, like: str, text: str) -> Any:
    """The value that `text` means for an alias whose values are those of the option `like`. Raises FewbitsError."""
    return replace(options()[like], name=alias).parse(text)


def _precision_if_true(name: str) -> Callable[[str, Given, Config], dict[str, str]]:
    def convert(text: str, given: Given, config: Config) -> dict[str, str]:
        return {"precision": name} if _truth(text) else {}

    return convert


def _dtype(text: str, given: Given, config: Config) -> dict[str, str]:
    names = {"float32": "fp32", "bfloat16": "bf16-mixed", "float16": "fp16-mixed", "float64": "fp64"}
    return {"precision": names.get(text.removeprefix("torch."), text)}


def _min_lr(text: str, given: Given, config: Config) -> dict[str, str]:
    least = _value("min_lr", "optim.lr", text)
    if config.optim.lr <= 0 or least > config.optim.lr:
        raise FewbitsError(f"min_lr is {text} and lr is {config.optim.lr}; the smallest cannot be above the peak.")
    return {"optim.min_lr_ratio": repr(least / config.optim.lr)}


def _lr_decay_iters(text: str, given: Given, config: Config) -> dict[str, str]:
    """The horizon of the schedule is max_steps here, so a longer horizon stops before its end."""
    horizon, steps = _value("lr_decay_iters", "train.max_steps", text), config.train.max_steps
    if horizon < steps:
        raise FewbitsError(
            f"lr_decay_iters={horizon} ends the schedule before the training does (max_steps={steps}). Here both end "
            "together: leave it out, or use --schedule wsd with --decay_steps."
        )
    return {} if horizon == steps else {"train.max_steps": str(horizon), "train.stop_at": str(steps)}


def _warmup_ratio(text: str, given: Given, config: Config) -> dict[str, str]:
    ratio = _value("warmup_ratio", "optim.min_lr_ratio", text)  # a number from 0 to 1 too
    return {"optim.warmup_steps": str(math.ceil(ratio * config.train.max_steps))}


def _lr_scheduler_type(text: str, given: Given, config: Config) -> dict[str, str]:
    names = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine", "linear": "linear"}
    names["warmup_stable_decay"] = "wsd"
    if text not in names:
        raise FewbitsError(f"lr_scheduler_type {text!r} is none of {', '.join(names)}.{nearest(text, names)}")
    found = {"optim.schedule": names[text]}
    if text in ("cosine", "linear") and not {"optim.min_lr_ratio", "min_lr"} & set(given):
        found["optim.min_lr_ratio"] = "0"  # there both end at zero
    return found


def _device_batch(text: str, given: Given, config: Config) -> dict[str, str]:
    if "gradient_accumulation_steps" in given:
        return {}  # the other name does the multiplication for both
    size = _value("per_device_train_batch_size", "train.batch_size", text)
    parts = config.train.micro_batches if "train.micro_batches" in given else 1
    return {"train.batch_size": str(size * parts), "train.micro_batches": str(parts)}


def _accumulation(text: str, given: Given, config: Config) -> dict[str, str]:
    """There a batch size is that of one micro-batch; ours is that of the whole step."""
    parts = _value("gradient_accumulation_steps", "train.micro_batches", text)
    size = given.get("per_device_train_batch_size", given.get("train.batch_size"))
    one = options()["train.batch_size"].parse(size) if size else config.train.batch_size // config.train.micro_batches
    return {"train.batch_size": str(one * parts), "train.micro_batches": str(parts)}


def _activation(text: str, given: Given, config: Config) -> dict[str, str]:
    names = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "silu": "swiglu", "swish": "swiglu"}
    if text not in names:
        raise FewbitsError(f"activation {text!r} is none of {', '.join(names)}.{nearest(text, names)}")
    return {"model.activation": names[text]}


def _optimizer(text: str, given: Given, config: Config) -> dict[str, str]:
    names = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw": "adamw", "sgd": "sgd"}
    if text not in names:
        raise FewbitsError(f"optim {text!r} is none of {', '.join(names)}.{nearest(text, names)}")
    return {"optim.optimizer": names[text]}


def _cpu(text: str, given: Given, config: Config) -> dict[str, str]:
    return {"train.device": "cpu"} if _truth(text) else {}


def _refuse(sentence: str) -> Callable[[str, Given, Config], dict[str, str]]:
    def convert(text: str, given: Given, config: Config) -> dict[str, str]:
        raise FewbitsError(sentence)

    return convert


CONVERSIONS = {
    "dtype": Conversion("precision: bfloat16 is bf16-mixed, float16 is fp16-mixed, float32 is fp32", _dtype),
    "bf16": Conversion("precision bf16-mixed", _precision_if_true("bf16-mixed"), switch=True),
    "fp16": Conversion("precision fp16-mixed", _precision_if_true("fp16-mixed"), switch=True),
    "tf32": Conversion("precision tf32", _precision_if_true("tf32"), switch=True),
    "min_lr": Conversion("min_lr_ratio times lr", _min_lr),
    "lr_decay_iters": Conversion("max_steps as the schedule's horizon, max_iters as stop_at", _lr_decay_iters),
    "warmup_ratio": Conversion("warmup_steps as a part of max_steps", _warmup_ratio),
    "lr_scheduler_type": Conversion("schedule; cosine and linear end at zero, as there", _lr_scheduler_type),
    "per_device_train_batch_size": Conversion("the part of batch_size in one micro-batch", _device_batch),
    "gradient_accumulation_steps": Conversion(
        "micro_batches, where a batch size given beside it is that of one micro-batch", _accumulation
    ),
    "hidden_act": Conversion("activation: gelu_new is gelu, silu is swiglu", _activation),
    "activation_function": Conversion("activation: gelu_new is gelu, silu is swiglu", _activation),
    "optim": Conversion("optimizer: adamw_torch is adamw", _optimizer),
    "use_cpu": Conversion("device cpu", _cpu, switch=True),
    "num_train_epochs": Conversion(
        "refused: max_steps says how long",
        _refuse("num_train_epochs is not known here: give --max_steps; each run states its epochs."),
    ),
    "resume_from_checkpoint": Conversion(
        "refused: --resume RUN does it",
        _refuse("resume_from_checkpoint is --resume RUN here, RUN being the run directory."),
    ),
}


def spellings(name: str) -> list[str]:
    """Every name of the option `name` (dotted), easiest first: its short name, then those of other libraries."""
    short = name.rpartition(".")[2]
    first = [short] if short_names().get(short) == name else [name]
    return [*first, *(alias for alias, dotted in RENAMES.items() if dotted == name)]


def known_names() -> list[str]:
    """Every name that may follow `--`: for the nearest-name hints."""
    return [*options(), *short_names(), *RENAMES, *CONVERSIONS]


def canonical(name: str) -> str:
    """The dotted name for any spelling, or the alias itself when it needs a conversion. Raises FewbitsError."""
    word = name.lstrip("-").replace("-", "_")
    if word in CONVERSIONS:
        return word
    if word in RENAMES:
        return RENAMES[word]
    try:
        return full_name(word)
    except FewbitsError:
        raise FewbitsError(f"There is no option {name!r}.{nearest(word, known_names())}") from None


def apply_options(config: Config, given: Mapping[str, str]) -> tuple[Config, list[str]]:
    """`config` with the options `given` (any spelling: text), and one note for each conversion. Raises FewbitsError.

    >>> given = {"per_device_train_batch_size": "4", "gradient_accumulation_steps": "8"}
    >>> config, notes = apply_options(Config(), given)
    >>> config.train.batch_size, config.train.micro_batches
    (32, 8)
    """
    texts: dict[str, str] = {}
    for name, text in given.items():
        key = canonical(name)
        if texts.setdefault(key, text) != text:
            raise FewbitsError(f"{key} is given twice, as {texts[key]!r} and as {text!r}. Keep one.")
    plain = {name: text for name, text in texts.items() if name not in CONVERSIONS}
    for name, text in plain.items():
        config = override(config, name, text)
    if "gradient_accumulation_steps" in texts:
        plain.pop("train.batch_size", None)  # it was the size of one micro-batch
    base, notes, origin = config, [], {name: name for name in plain}
    for alias in (name for name in texts if name in CONVERSIONS):
        found = CONVERSIONS[alias].convert(texts[alias], texts, base)
        for name, text in found.items():
            if name == "train.max_steps":
                plain.pop(name, None)  # lr_decay_iters has taken it into account
            if name in plain and options()[name].parse(plain[name]) != options()[name].parse(text):
                raise FewbitsError(f"--{alias} and --{origin[name]} both set {name}, and differ. Keep one.")
            plain[name], origin[name] = text, alias
            config = override(config, name, text)
        if found:
            result = ", ".join(f"{name}={text}" for name, text in found.items())
            notes.append(f"--{alias} {texts[alias]} is {result}")
    return config, notes


def _truth(text: str) -> bool:
    if text.strip().lower() in TRUE:
        return True
    if text.strip().lower() in FALSE:
        return False
    raise FewbitsError(f"{text!r} is neither true nor false.")
