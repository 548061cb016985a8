"""What a training run is told: five frozen dataclasses, their TOML form, and the recipes shipped with the package.

The sentence below each field is its `--help`. `Config.check()` checks it as a whole, before a device is touched.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fewbits.errors import FewbitsError, nearest
from fewbits.nn.transformer import LIMITS, ModelConfig
from fewbits.precision.precision import Precision
from fewbits.train.fields import Option, limits, options_of

SCHEMA = 1  # of config.toml; a file without it (a recipe written by hand) is read as the newest
_RENAMED = {"train.keep": "train.keep_checkpoints"}  # what config.toml of earlier runs says -> what it means
LARGEST_STEP = 2**31  # tokens in one step; beyond, a size is a slip of the finger
LARGEST_MODEL = 2 * 10**11  # parameters; one device holds none larger


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is learned, and in which tokens."""

    data: str = "python"
    """Text to learn: `python` (the standard library's source), `python-all` (every installed package's), a .txt or .jsonl file, or a folder of them."""  # noqa: E501
    tokenizer: str = "bpe:4096"
    """`bpe:N` trains a byte-level BPE of N tokens, `bytes` and `chars` are what they say, or the path of a tokenizer.json."""
    encoding: str | None = None
    """Encoding of the text files, such as gb18030; none recognizes UTF-8, UTF-16 with a mark, and GB18030."""
    mask_documents: bool = False
    """Whether attention stops at the borders of documents that share a window."""
    cache: str | None = None
    """Folder for tokenizers and token stores; none takes FEWBITS_CACHE, or ~/.cache/fewbits."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights move."""

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Update rule."""
    lr: float = field(default=6e-4, metadata=limits(0, 100))
    """Peak learning rate."""
    beta1: float = field(default=0.9, metadata=limits(0, 1, below=True))
    """Decay of the first moment (adamw, adam)."""
    beta2: float = field(default=0.95, metadata=limits(0, 1, below=True))
    """Decay of the second moment (adamw, adam)."""
    eps: float = field(default=1e-8, metadata=limits(0, 1, above=True))
    """Added to the root of the second moment (adamw, adam)."""
    weight_decay: float = field(default=0.1, metadata=limits(0, 100))
    """Weight decay, on matrices only (decoupled in adamw)."""
    momentum: float = field(default=0.9, metadata=limits(0, 1, below=True))
    """Momentum (sgd)."""
    master: Literal["auto", "fp32", "split", "none"] = "auto"
    """How the exact weights are kept: an fp32 copy, split 16+16 bits (bf16 weights), or not at all; auto follows the precision."""  # noqa: E501
    moments: Literal["fp32"] = "fp32"
    """Format of the optimizer's moments (fp64 under precision fp64)."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Learning-rate schedule after warm-up; wsd is warmup-stable-decay."""
    warmup_steps: int = 0
    """Applied steps over which the learning rate rises to its peak."""
    decay_steps: int = 0
    """Applied steps of the final decay (wsd)."""
    min_lr_ratio: float = field(default=0.1, metadata=limits(0, 1))
    """Where the schedule ends, as a part of the peak."""
    clip: float = field(default=1.0, metadata=limits(0, 1e30))
    """Gradients are clipped to this; 0 clips nothing."""
    clip_kind: Literal["norm", "inf", "value"] = "norm"
    """What is clipped: the global 2-norm, the largest element (the whole gradient rescaled), or each element by itself."""
    loss_scale: str = "auto"
    """`auto` follows the precision; or none, dynamic, static:1024, dynamic:initial=65536,interval=2000,floor=1."""

    @property
    def betas(self) -> tuple[float, float]:
        """(beta1, beta2)."""
        return self.beta1, self.beta2


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on what, and what is written down on the way."""

    out_dir: str = ""
    """The run directory itself; empty makes a new one, runs/NAME."""
    max_steps: int = field(default=1000, metadata=limits(1, 10_000_000))
    """Steps of the whole training: the horizon of the learning-rate schedule."""
    stop_at: int = 0
    """Save and stop after this step, the schedule unchanged; 0 runs to the end."""
    batch_size: int = field(default=8, metadata=limits(1))
    """Sequences in one step, over all micro-batches."""
    micro_batches: int = field(default=1, metadata=limits(1))
    """Equal parts in which a batch passes through the model, to save memory; the result is the same."""
    seed: int = field(default=0, metadata=limits(0, 2**63 - 1))
    """Seed of the weights, the order of the data and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    compile: Literal["auto", "true", "false"] = "auto"
    """Whether the model is compiled; auto times both."""
    graph: Literal["auto", "true", "false"] = "auto"
    """Whether whole steps are recorded as CUDA graphs and replayed, with the same bits; auto does where it can."""
    deterministic: bool = False
    """Same bits every time on CUDA too, at a price that is printed (a CPU always is)."""
    log_every: int = field(default=10, metadata=limits(1))
    """Steps between two logged lines; the last step is always logged."""
    eval_every: int = 250
    """Steps between two evaluations on held-out text; 0 evaluates at the end only."""
    eval_batches: int = field(default=20, metadata=limits(1))
    """Batches of held-out text in one evaluation."""
    sample_every: int = 250
    """Steps between two samples of generated text; 0 samples never."""
    sample_tokens: int = field(default=100, metadata=limits(1))
    """Tokens in a sample."""
    prompt: str = ""
    """Text that a sample continues; empty starts from the end-of-text token."""
    save_every: int = 250
    """Steps between two checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = field(default=2, metadata=limits(1))
    """Newest checkpoints that are kept."""
    save_dtype: Literal["", "bf16", "fp16"] = ""
    """Format of the saved weights; empty saves the exact ones."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run needs to be repeated."""

    name: str = "custom"
    """Name of the run in reports, and of its directory under runs/."""
    precision: str = "auto"
    """A name (bf16-mixed, fp8, int4-qat) with overrides (`bf16-mixed, master=fp32`), or a recipe (`output=e4m3/row`); fp8-auto
    keeps in bf16 what fp8 does not speed up; auto times fp32, tf32 and 16 bits."""
    keep: str = ""
    """Modules that stay out of the recipe (without one: in fp32), by name patterns between commas: `blocks.0.*,*.mlp.down`; `blocks.3=fp32` stores one in a format of its own."""  # noqa: E501
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=0))
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> Config:
        """Itself, if every value and every pair of values fits. Raises FewbitsError otherwise."""
        for option in options().values():
            option.check(_get(self, option.name))
        replace(self.model, vocab_size=self.model.vocab_size or 256).check()
        if not self.name.strip() or any(mark in self.name for mark in "/\\\0"):
            raise FewbitsError(
                f"name is {self.name!r}; it becomes a directory under runs/, so it must be a plain name. "
                "For another place give --out_dir."
            )
        if not self.data.data:
            raise FewbitsError("data.data is empty; give a file, a folder, python or python-all.")
        _check_precision(self)
        _check_batch(self)
        _check_schedule(self)
        _check_device(self.train.device)
        if self.model.parameter_count() > LARGEST_MODEL:
            raise FewbitsError(
                f"This shape has {self.model.parameter_count():.2e} parameters; at most {LARGEST_MODEL:.0e} fit. "
                "Make n_embd, n_layer or vocab_size smaller."
            )
        return self

    def resolve_precision(self, chosen: str = "") -> Precision:
        """The precision of this run: `chosen` stands in for `auto`; master and loss scale given as options win.

        Raises FewbitsError for a name that is none, or overrides that contradict each other.
        """
        precision = Precision.parse(chosen if self.precision == "auto" and chosen else self.precision)
        overrides = {"master": self.optim.master, "loss_scale": self.optim.loss_scale}
        return precision.replace(**{key: value for key, value in overrides.items() if value != "auto"})

    def keep_patterns(self) -> list[str]:
        """`keep` as `prepare` takes it."""
        return [pattern.strip() for pattern in self.keep.split(",") if pattern.strip()]

    def resolve_vocabulary(self, tokens: int) -> Config:
        """This config with the vocabulary's size known: `tokens` is what the tokenizer has. Raises FewbitsError."""
        size = self.model.vocab_size or tokens
        if size < tokens:
            raise FewbitsError(
                f"The tokenizer has {tokens} tokens and model.vocab_size is {size}. Give at least {tokens}, or 0 to "
                "take the tokenizer's."
            )
        return replace(self, model=replace(self.model, vocab_size=size))

    def to_toml(self) -> str:
        """The text that `from_toml` reads back to an equal config."""
        lines = [f"schema = {SCHEMA}"]
        section = ""
        for option in options().values():
            group, _, key = option.name.rpartition(".")
            if group != section:
                lines += ["", f"[{group}]"]
                section = group
            value = _get(self, option.name)
            if value is not None:  # TOML has no null: what is absent is none
                lines.append(f"{key} = {_toml(value)}")
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str, source: str = "config.toml") -> Config:
        """The config written in `text`; absent keys take their defaults. `source` names the file in errors.

        Raises FewbitsError for text that is not TOML, an unknown key (with the nearest names), a wrong type or range.
        """
        try:
            return from_mapping(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise FewbitsError(f"{source} is not TOML: {error}.") from None
        except FewbitsError as error:
            raise FewbitsError(f"{source}: {error}") from None


@cache
def options() -> dict[str, Option]:
    """Every option by dotted name, in the order of the dataclasses."""
    found = options_of(Config, "")
    sizes = {name: limits(*pair) for name, pair in LIMITS.items()}
    for part in fields(Config):
        group = getattr(Config(), part.name)
        if is_dataclass(group):
            found += options_of(type(group), part.name, sizes if isinstance(group, ModelConfig) else None)
    return {option.name: option for option in found}


@cache
def short_names() -> dict[str, str]:
    """Short name to dotted name, for the short names that belong to one option only: `lr` is `optim.lr`."""
    found: dict[str, list[str]] = {}
    for name in options():
        found.setdefault(name.rpartition(".")[2], []).append(name)
    return {short: names[0] for short, names in found.items() if len(names) == 1}


def full_name(name: str) -> str:
    """The dotted name for a dotted or short one, dash or underscore. Raises FewbitsError with the nearest names."""
    word = name.lstrip("-").replace("-", "_")
    if word in options():
        return word
    if word in short_names():
        return short_names()[word]
    raise FewbitsError(f"There is no option {name!r}.{nearest(word, [*options(), *short_names()])}")


def override(config: Config, name: str, text: str) -> Config:
    """`config` with the option `name` (dotted or short) set to what `text` says. Raises FewbitsError.

    >>> override(Config(), "optim.lr", "3e-4").optim.lr
    0.0003
    """
    option = options()[full_name(name)]
    return _set(config, option.name, option.parse(text))


def from_mapping(document: Mapping[str, Any]) -> Config:
    """The config that a parsed TOML document holds. Raises FewbitsError."""
    rest = dict(document)
    if rest.pop("schema", SCHEMA) != SCHEMA:
        raise FewbitsError(f"schema is {document['schema']!r}; this version of fewbits reads {SCHEMA}.")
    config = Config()
    for key, value in rest.items():
        if key == "precision" and isinstance(value, Mapping):
            config = replace(config, precision=_precision_table(value))
        elif isinstance(value, Mapping):
            for inner, leaf in value.items():
                config = _take(config, f"{key}.{inner}", leaf)
        else:
            config = _take(config, key, value)
    return config


def load_recipe(name_or_path: str | Path) -> Config:
    """The config of a shipped recipe (`nano`) or of a TOML file. Raises FewbitsError."""
    text = str(name_or_path)
    shipped = recipes()
    if text in shipped:
        path = shipped[text]
    elif text.endswith(".toml") or Path(text).parent != Path():
        path = Path(text)
    else:
        raise FewbitsError(
            f"There is no recipe {text!r}; there are {', '.join(shipped)}.{nearest(text, shipped)} "
            "A file of your own ends in .toml."
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise FewbitsError(
            f"Cannot read the recipe {text}: {reason}. Name a TOML file, such as a run's config.toml, or one of "
            f"{', '.join(shipped)}."
        ) from None
    config = Config.from_toml(content, source=text)
    return replace(config, name=path.stem) if config.name == Config.name else config


def recipes() -> dict[str, Path]:
    """Path of each shipped recipe by name: inside an installed package, else beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    folder = next((path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _precision_table(table: Mapping[str, Any]) -> str:
    """A `[precision]` table as the text it stands for: `name` first, then what it changes, such as output = "e4m3/row"."""
    parts = [str(table["name"])] if "name" in table else []
    return ", ".join(
        [*parts, *(key if value is True else f"{key}={value}" for key, value in table.items() if key != "name")]
    )


def _take(config: Config, name: str, value: Any) -> Config:
    """`config` with the dotted `name` set to a value of a TOML document."""
    name = _RENAMED.get(name, name)
    option = options().get(name)
    if option is None or isinstance(value, Mapping):
        known = [*options(), *short_names()]
        hint = f" Did you mean {short_names()[name]!r}?" if name in short_names() else nearest(name, known)
        raise FewbitsError(f"there is no option {name!r}.{hint}")
    return _set(config, name, option.check(value))


def _get(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _set(config: Config, name: str, value: Any) -> Config:
    group, _, key = name.rpartition(".")
    if not group:
        return replace(config, **{key: value})
    return replace(config, **{group: replace(getattr(config, group), **{key: value})})


def _toml(value: Any) -> str:
    """A TOML literal: JSON's strings, booleans and integers are TOML's too, but for the character DEL."""
    if isinstance(value, float):
        return repr(value)  # the shortest text that reads back to the same float
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _check_precision(config: Config) -> None:
    if config.precision != "auto":
        config.resolve_precision()
    elif config.optim.loss_scale != "auto":
        config.resolve_precision("fp32")  # a loss scale can be read whatever the precision


def _check_batch(config: Config) -> None:
    train, context = config.train, config.model.context
    if train.batch_size * context > LARGEST_STEP:
        raise FewbitsError(
            f"batch_size={train.batch_size} times context={context} is {train.batch_size * context:,} tokens a step; "
            f"at most {LARGEST_STEP:,} fit."
        )
    if train.batch_size % train.micro_batches:
        small = [n for n in range(1, math.isqrt(train.batch_size) + 1) if train.batch_size % n == 0]
        parts = {*small, *(train.batch_size // n for n in small)}
        close = sorted(sorted(parts, key=lambda n: abs(n - train.micro_batches))[:3])
        raise FewbitsError(
            f"batch_size={train.batch_size} does not divide into micro_batches={train.micro_batches} equal parts. "
            f"Choose a number of micro-batches such as {', '.join(map(str, close))}."
        )


def _check_schedule(config: Config) -> None:
    optim, train = config.optim, config.train
    if train.stop_at > train.max_steps:
        raise FewbitsError(
            f"stop_at={train.stop_at} lies beyond max_steps={train.max_steps}. Give at most {train.max_steps}."
        )
    if optim.schedule == "wsd" and optim.decay_steps == 0:
        raise FewbitsError(
            f"The schedule wsd needs decay_steps, for example --decay_steps {max(1, train.max_steps // 5)} "
            f"(a fifth of max_steps={train.max_steps})."
        )
    if optim.schedule == "wsd" and optim.warmup_steps + optim.decay_steps > train.max_steps:
        raise FewbitsError(
            f"warmup_steps={optim.warmup_steps} and decay_steps={optim.decay_steps} are more than "
            f"max_steps={train.max_steps}. Make them shorter."
        )


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    kinds = ["auto", "cpu", "cuda", "mps", "xpu"]  # the last two are refused by name, with what would work instead
    if kind not in kinds or (index and (kind != "cuda" or not index.isdecimal())) or device.endswith(":"):
        raise FewbitsError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N.{nearest(device, kinds[:3])}")
