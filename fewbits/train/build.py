"""From a config to something that can take steps: the data, the model, the optimizer and the step, assembled once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from fewbits.data.batches import Batches
from fewbits.data.cache import Progress, cache_folder, silent
from fewbits.data.corpus import Corpus, open_corpus
from fewbits.data.tokenizer import Tokenizer, build_tokenizer
from fewbits.data.tokens import TokenStore
from fewbits.errors import FewbitsError
from fewbits.nn import remainder
from fewbits.nn.layers import Layers
from fewbits.nn.prepare import prepare
from fewbits.nn.transformer import Transformer
from fewbits.optim.adamw import Adam, AdamW
from fewbits.optim.base import Optimizer
from fewbits.optim.loss_scale import parse
from fewbits.optim.schedule import Schedule
from fewbits.optim.sgd import SGD
from fewbits.precision.precision import Precision
from fewbits.ranges import DATA, span
from fewbits.step import Step, StepResult
from fewbits.train.choices import Choices
from fewbits.train.config import Config, OptimConfig
from fewbits.train.memory import MemoryMeter


@dataclass(frozen=True)
class Data:
    """The text of a run as tokens."""

    corpus: Corpus
    tokenizer: Tokenizer
    store: TokenStore


@dataclass
class Training:
    """Everything that one training needs, ready for its next step."""

    config: Config
    """With the vocabulary resolved."""
    choices: Choices
    precision: Precision
    device: torch.device
    model: Transformer
    optimizer: Optimizer
    schedule: Schedule
    step: Step
    tokenizer: Tokenizer
    corpus: Corpus
    store: TokenStore
    batches: Batches

    def micro_batches(self, attempt: int) -> list[dict[str, Tensor]]:
        """The micro-batches of one attempt (from 0), on the device. A pure function of the config and the attempt."""
        return to_device(self.batches.micro_batches(attempt, self.config.train.micro_batches), self.device)

    def take_step(self) -> StepResult:
        """The next attempt, data and all; `step.attempts` tells which."""
        with span(DATA):
            micro_batches = self.micro_batches(self.step.attempts)
        result = self.step(micro_batches)
        self.forget_remainders()
        return result

    def forget_remainders(self) -> None:
        """Frees what `prepare` cut off the weights, once the optimizer has adopted it."""
        remainders: dict[str, Tensor] = getattr(self.model, "fewbits_remainders", {})
        remainders.clear()

    def memory_meter(self) -> MemoryMeter:
        """What measures the peak memory of its steps, a recorded graph's included."""
        parts = self.config.train.micro_batches
        return MemoryMeter(self.model, self.optimizer, self.device, parts, self.step.graph)

    @property
    def running_precision(self) -> Precision:
        """The precision whose speed counts: bf16-mixed where layers=auto left every layer in bf16."""
        layers = self.choices.layers
        return self.precision if not layers or layers.lowbit else Precision.parse("bf16-mixed")

    @property
    def tokens_per_step(self) -> int:
        """Target positions in one step."""
        return self.config.train.batch_size * self.config.model.context

    def lr_after(self, applied: int) -> float:
        """The learning rate of the step that is taken after `applied` applied ones."""
        return self.config.optim.lr * self.schedule.factor(applied)


def to_device(micro_batches: Sequence[dict[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
    """The same on `device`; to a GPU from pinned memory, so that the host does not wait."""
    if device.type == "cpu":
        return list(micro_batches)
    return [
        {key: value.pin_memory().to(device, non_blocking=True) for key, value in micro_batch.items()}
        for micro_batch in micro_batches
    ]


def open_data(config: Config, progress: Progress = silent) -> Data:
    """Corpus, tokenizer and token store of a config, from the cache where they are there. Raises FewbitsError."""
    data = config.data
    cache = cache_folder(data.cache)
    corpus = open_corpus(data.data, data.encoding)
    tokenizer = build_tokenizer(data.tokenizer, corpus, cache, progress)
    if config.train.sample_every:
        tokenizer.encode(config.train.prompt)  # one that cannot be written is refused here, not at the first sample
    store = TokenStore.open_or_build(corpus, tokenizer, cache, progress)
    if len(store.val) < 2:
        raise FewbitsError(
            f"Nothing of {corpus.name!r} can be held out for evaluation: it is one document, or nearly empty. Name more "
            "text, or put it into a .txt file, whose last lines are held out."
        )
    return Data(corpus, tokenizer, store)


def build_training(config: Config, choices: Choices, data: Data | None = None) -> Training:
    """Model, optimizer and step of `config` as `choices` say, with fresh weights from the seed.

    Raises FewbitsError for whatever does not fit together.
    """
    data = data or open_data(config)
    config = config.resolve_vocabulary(data.tokenizer.vocab_size)
    precision = config.resolve_precision(choices.precision.value)
    choices.replay()
    device = choices.torch_device()
    batches = Batches(
        data.store.train,
        data.store.train_documents,
        config.train.batch_size,
        config.model.context,
        config.train.seed,
        config.data.mask_documents,
    )
    layers = choices.layers or None
    model, optimizer, step = build_step(config, precision, device, choices.compile.value, layers)
    schedule = schedule_of(config)
    return Training(
        config, choices, precision, device, model, optimizer, schedule, step,
        data.tokenizer, data.corpus, data.store, batches,
    )  # fmt: skip


def build_step(
    config: Config, precision: Precision, device: torch.device, compile: bool, layers: Layers | None = None
) -> tuple[Transformer, Optimizer, Step]:
    """Model (prepared, on `device`, in training mode), optimizer and step; config.model.vocab_size is known.

    layers: what each linear layer multiplies in, under layers=auto."""
    model = Transformer(config.model, seed=config.train.seed)
    model = cast(Transformer, prepare(model, precision, config.keep_patterns(), layers))
    move(model, device)
    model.train()
    if compile:
        model.compile_blocks()
    optimizer = build_optimizer(model, config.optim, compile)
    step = Step(
        model,
        optimizer,
        precision,
        clip=config.optim.clip,
        clip_kind=config.optim.clip_kind,
        loss_scale=parse(precision.loss_scale),
        schedule=schedule_of(config),
        seed=config.train.seed,
        graph=config.train.graph,
    )
    return model, optimizer, step


def move(model: nn.Module, device: torch.device) -> None:
    """`model` to `device`, with the exact remainders that `prepare` left on its parameters."""
    model.to(device)
    remainders: dict[str, Tensor] = getattr(model, "fewbits_remainders", {})
    for name, parameter in model.named_parameters():
        if name in remainders:
            remainders[name] = remainders[name].to(device)
            remainder.leave(parameter, remainders[name])


def build_optimizer(model: nn.Module, optim: OptimConfig, compile: bool) -> Optimizer:
    """The optimizer of a config: weight decay on matrices (embeddings too), none on norms and biases."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # On CUDA the update has a kernel of its own, whether the model is compiled or not
    how: bool | str = "auto" if trained[0].device.type == "cuda" else compile
    if optim.optimizer == "sgd":
        return SGD(groups, lr=optim.lr, momentum=optim.momentum, master=optim.master, compile=how)
    kind = AdamW if optim.optimizer == "adamw" else Adam
    return kind(
        groups,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        master=optim.master,
        moments=optim.moments,
        compile=how,
    )


def schedule_of(config: Config) -> Schedule:
    """The learning-rate schedule; its horizon is max_steps, wherever the run stops. A longer warm-up is cut."""
    optim, total = config.optim, config.train.max_steps
    decay = optim.decay_steps if optim.schedule == "wsd" else 0
    return Schedule(optim.schedule, min(optim.warmup_steps, total - decay), total, decay, optim.min_lr_ratio)


def with_vocabulary(config: Config, size: int) -> Config:
    """`config` with a known vocabulary, for timing before the tokenizer is there."""
    return replace(config, model=replace(config.model, vocab_size=config.model.vocab_size or size))
