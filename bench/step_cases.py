"""The works and the cases of bench/train_step.py: how each contestant builds the same training step.

A case is a function that returns `drive`: called with `after_step`, it takes steps for ever and calls `after_step(loss)`
after each, so that a trainer's own loop and a plain one are timed alike. Every step is forward, backward, clipping at
1.0 and AdamW (lr 1e-4, betas 0.9 and 0.95, eps 1e-8, decay 0.1) on one of four batches of random tokens on the device.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from turn import turn

ROOT = Path(__file__).resolve().parent.parent
LR, BETAS, EPS, DECAY = 1e-4, (0.9, 0.95), 1e-8, 0.1
OURS = "ours "  # what our cases begin with
BATCHES = 4
Drive = Callable[[Callable[[Any], None]], None]


class Skip(Exception):
    """This case cannot run here, and that is no error; the message says why."""


@dataclass(frozen=True)
class Work:
    """A recipe's model with the batch that everyone gets; `gib`: what a running step of the hungriest peer may take."""

    recipe: str
    batch: int
    context: int
    gib: float
    whole: bool = True
    """Whether plain models are compiled as one graph; the deep one is compiled block by block."""

    @property
    def tokens(self) -> int:
        return self.batch * self.context


WORKS = {
    "gpt2-124m": Work("gpt2-124m", 32, 1024, 23),
    "minimind-64m": Work("minimind-64m", 32, 1024, 17),
    "llama-1b": Work("llama-1b", 8, 2048, 48, whole=False),
    "llama-1b-8k": Work("llama-1b", 2, 8192, 50, whole=False),
}
# What a work is measured against, the most important first: a budget that ends cuts the end.
CASES = {
    "gpt2-124m": (
        "ours fp8-delayed, head=fp8", "compact bf16", "ours bf16-mixed", "compact bf16 tuned",
        "ours fp8-delayed, head=fp8 deterministic", "Trainer bf16", "transformers bf16 compiled", "Lightning bf16-mixed",
        "torchao fp8 tensorwise", "ours fp8-delayed",
    ),
    "minimind-64m": (
        "ours fp8-delayed, head=fp8", "compact bf16", "ours bf16-mixed", "compact bf16 tuned", "Trainer bf16",
        "Trainer bf16 liger", "transformers bf16 compiled", "torchao fp8 tensorwise",
    ),
    "llama-1b": (
        "ours fp8-delayed, head=fp8", "torchao fp8 tensorwise", "ours bf16-mixed", "compact bf16", "compact bf16 tuned",
        "torchao fp8 rowwise", "Trainer bf16 liger", "transformers bf16 compiled", "Trainer bf16",
    ),
    "llama-1b-8k": (
        "ours fp8-delayed, head=fp8", "torchao fp8 tensorwise", "ours bf16-mixed", "compact bf16", "compact bf16 tuned",
        "torchao fp8 rowwise", "Trainer bf16 liger", "transformers bf16 compiled",
    ),
}  # fmt: skip
TINY = {"n_layer": 2, "n_head": 4, "n_embd": 128, "vocab_size": 512}


@dataclass
class Place:
    """What every case gets: the work, our config of its model, the device, whether to compile, and the tokens."""

    work: Work
    config: Any
    device: Any
    compile: bool

    @property
    def shape(self) -> Any:
        return self.config.model

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """(ids, labels) [B, T] on the device, the same for every case, for ever."""
        import torch

        T, V = self.work.context, self.shape.vocab_size
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(V, (BATCHES, self.work.batch, T + 1), generator=generator).to(self.device)
        return itertools.cycle([(r[:, :-1].contiguous(), r[:, 1:].contiguous()) for r in rows])


def sized(work: Work, tiny: bool) -> Work:
    """The work as it is, or small enough to try the bench anywhere."""
    return replace(work, batch=2, context=64) if tiny else work


# A first guess of what a case takes of its work's `gib`; what it really takes is known after its first steps.
SHARE = {"ours": 0.85, "torchao": 0.8, "compact": 0.9, "Lightning": 0.9}


def guessed_bytes(work: str, case: str) -> int:
    """Memory to keep free for a case that has not run yet."""
    return int(WORKS[work].gib * SHARE.get(case.split()[0], 1.0) * 2**30)


def build(work: str, case: str, tiny: bool, compile: str) -> tuple[Drive, dict[str, Any]]:
    """How to drive a case, and what to say about it. `ours PRECISION [eager] [deterministic]` takes any precision; words
    `@NAME=VALUE` set environment variables first, so that a lever can be measured alone. Raises Skip."""
    words = case.split(" @")
    for pair in words[1:]:
        name, _, value = pair.partition("=")
        os.environ[name] = value
    import torch

    if not case.startswith(OURS):  # our step sets its own switches
        torch.set_float32_matmul_precision("high")  # what peers leave in fp32 may use TF32
    sys.path.insert(0, str(ROOT))
    from fewbits.train.config import load_recipe

    found = sized(WORKS[work], tiny)
    config = load_recipe(found.recipe)
    change: dict[str, Any] = {"context": found.context}
    if tiny:
        kv, ff = (2 if config.model.n_kv_head else 0), (256 if config.model.n_ff else 0)
        change |= {**TINY, "n_kv_head": kv, "n_ff": ff}
    config = replace(config, model=replace(config.model, **change))
    cuda = torch.cuda.is_available()
    place = Place(
        found, config, torch.device("cuda" if cuda else "cpu"), cuda if compile == "auto" else compile == "true"
    )
    device = torch.cuda.get_device_name() if cuda else "cpu"
    return drive_of(words[0], place), {"device": device, "torch": torch.__version__, "compiled": place.compile}


def drive_of(case: str, place: Place) -> Drive:
    """The driver of a case by its name without variables. Raises Skip."""
    if reason := why_not(case):
        raise Skip(reason)
    return ours(case.removeprefix(OURS), place) if case.startswith(OURS) else PEERS[case](place)


def why_not(case: str) -> str:
    """What is wrong with the name of a case (its variables count as right), or ""."""
    from fewbits.errors import FewbitsError

    name = case.split(" @")[0]
    if not name.startswith(OURS):
        return "" if name in PEERS else f"there is no case {name!r}; there are ours PRECISION, {', '.join(PEERS)}"
    try:
        of_ours(name.removeprefix(OURS))
    except FewbitsError as error:
        return str(error)
    return ""


def of_ours(what: str) -> tuple[Any, set[str]]:
    """`PRECISION [eager] [deterministic]` -> (the precision, the words behind it). Raises FewbitsError."""
    from fewbits.precision.precision import Precision

    words = what.split(" ")
    flags = {word for word in words if word in ("eager", "deterministic")}
    return Precision.parse(" ".join(word for word in words if word not in flags)), flags


def forever(step: Callable[[], Any]) -> Drive:
    """A plain loop around `step`, which returns the loss."""

    def drive(after_step: Callable[[Any], None]) -> None:
        while True:
            after_step(step())

    return drive


def ours(what: str, place: Place) -> Drive:
    """What `fewbits train` runs, without its loop."""
    from fewbits.train.build import build_step
    from fewbits.train.execution import determinism

    precision, flags = of_ours(what)
    optim = replace(
        place.config.optim, lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY, clip=1.0,
        schedule="constant", warmup_steps=0,
    )  # fmt: skip
    train = replace(place.config.train, batch_size=place.work.batch, micro_batches=1)
    config = replace(place.config, optim=optim, train=train)
    model, _, step = build_step(config, precision, place.device, place.compile and "eager" not in flags)
    batches = place.batches()

    def take() -> Any:
        ids, labels = next(batches)
        loss = step([{"input_ids": ids, "labels": labels}]).loss
        getattr(model, "fewbits_remainders", {}).clear()  # as Training.take_step does
        return loss

    def drive(after_step: Callable[[Any], None]) -> None:
        with determinism("deterministic" in flags and place.device.type == "cuda"):
            forever(take)(after_step)

    # a replayed graph allocates nothing that shows: the peak is that of its recording
    drive.recorded = lambda: 0 if step.graph is None else step.graph.peak  # type: ignore[attr-defined]
    return drive


def plain_model(place: Place) -> Any:
    """bench/plain.py's model of this shape, initialized on the device."""
    import torch
    from plain import Plain

    return Plain(place.shape, torch.bfloat16).to(place.device).start().train()


def plain_drive(place: Place, model: Any, fold: bool = False) -> Drive:
    """The plain step around a plain model."""
    import torch
    from plain import adamw, compile_blocks, compile_whole, stepper

    optimizer = adamw(model, LR, BETAS, EPS, DECAY)
    run = (compile_whole if place.work.whole else compile_blocks)(model) if place.compile else model
    return forever(stepper(run, optimizer, place.batches(), torch.bfloat16, fold and place.device.type == "cuda"))


def compact(place: Place, tuned: bool = False) -> Drive:
    """The strongest plain PyTorch step; tuned: also attention by measurement, searched kernels, clipping in the update."""
    if tuned:
        import torch

        if place.compile:
            inductor: Any = __import__("torch._inductor.config", fromlist=["config"])
            inductor.coordinate_descent_tuning = True
        if place.device.type == "cuda":
            pick_attention(place)
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    return plain_drive(place, plain_model(place), fold=tuned)


def pick_attention(place: Place) -> None:
    """Leaves the faster of torch's flash and cuDNN attention switched on, forward and backward at the shape of this work."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape, hd = place.shape, place.shape.n_embd // place.shape.n_head
    kv = shape.n_kv_head or shape.n_head

    def seconds(backend: Any) -> float:
        size = (place.work.batch, place.work.context)
        q, k, v = (
            torch.randn(*size, heads, hd, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for heads in (shape.n_head, kv, kv)
        )
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        try:
            with sdpa_kernel(backend):
                for index in range(8):
                    if index == 3:
                        marks[0].record()
                    y = torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=kv != shape.n_head
                    )
                    torch.autograd.grad(y, (q, k, v), y)
                marks[1].record()
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{backend}: {error}", flush=True)
            return float("inf")
        return marks[0].elapsed_time(marks[1])

    with turn():
        cudnn, flash = seconds(SDPBackend.CUDNN_ATTENTION), seconds(SDPBackend.FLASH_ATTENTION)
    print(f"attention: cuDNN {cudnn:.2f} ms, flash {flash:.2f} ms", flush=True)
    if cudnn < flash:  # for the whole process: a switch around a compiled module is not honoured
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    else:
        torch.backends.cuda.enable_cudnn_sdp(False)


def torchao(place: Place, recipe: str) -> Drive:
    """torchtitan's manner on one device: fp32 weights, autocast, blocks compiled one by one, torchao's float8 in every linear
    layer of the blocks, the head in bf16."""
    carry("torchao")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except Exception as error:
        raise Skip(f"torchao does not import: {error}") from None
    model = plain_model(place)
    config = Float8LinearConfig.from_recipe_name(recipe)
    if place.device.type == "cpu":
        config = replace(config, emulate=True)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: "head" not in name)
    return plain_drive(replace(place, work=replace(place.work, whole=False)), model)


def hf_model(place: Place) -> Any:
    """transformers' model of this shape."""
    try:
        import transformers as hf
    except ImportError as error:
        raise Skip(f"transformers does not import: {error}") from None
    s, T = place.shape, place.work.context
    if s.positions == "learned":
        config: Any = hf.GPT2Config(
            vocab_size=s.vocab_size, n_positions=T, n_embd=s.n_embd, n_layer=s.n_layer, n_head=s.n_head, resid_pdrop=0,
            embd_pdrop=0, attn_pdrop=0, attn_implementation="sdpa", use_cache=False,
        )  # fmt: skip
        return hf.GPT2LMHeadModel(config)
    common = {
        "vocab_size": s.vocab_size, "hidden_size": s.n_embd, "intermediate_size": s.ff, "num_hidden_layers": s.n_layer,
        "num_attention_heads": s.n_head, "num_key_value_heads": s.kv_heads, "max_position_embeddings": T,
        "tie_word_embeddings": s.tied, "attn_implementation": "sdpa", "use_cache": False,
    }  # fmt: skip
    if s.qk_norm:  # Qwen3 is the Llama with query and key norms
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**common, head_dim=s.head_dim))
    return hf.LlamaForCausalLM(hf.LlamaConfig(**common))


def transformers(place: Place) -> Drive:
    """transformers' model in a plain loop, model and loss compiled together."""
    import torch
    from plain import adamw, stepper

    model = hf_model(place).to(place.device).train()

    def loss(ids: Any, labels: Any) -> Any:
        logits = model(input_ids=ids).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    run = torch.compile(loss, dynamic=False) if place.compile else loss
    optimizer = adamw(model, LR, BETAS, EPS, DECAY)
    return forever(stepper(run, optimizer, place.batches(), torch.bfloat16))


class Endless:
    """A loader whose batches are there: transformers' Trainer asks for its length, Lightning does not mind."""

    def __init__(self, batches: Iterator[Any]):
        self.found = batches

    def __len__(self) -> int:
        return 10**7

    def __iter__(self) -> Iterator[Any]:
        return self.found


def trainer(place: Place, liger: bool = False) -> Drive:
    """transformers' Trainer with a fused optimizer and compilation; its data waits on the device. liger: Liger's kernels."""
    if liger:
        carry("liger-kernel")
        try:
            import liger_kernel.transformers as kernels
        except Exception as error:
            raise Skip(f"liger_kernel does not import: {error}") from None
        if place.shape.positions == "learned":
            raise Skip(
                "Liger has no kernels for GPT-2" if not hasattr(kernels, "apply_liger_kernel_to_gpt2") else "GPT-2"
            )
    model = hf_model(place)
    from transformers import Trainer, TrainerCallback, TrainingArguments

    losses: list[Any] = []

    class Ours(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return Endless({"input_ids": ids, "labels": ids} for ids, _ in place.batches())

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            losses[:] = [super().training_step(*args, **kwargs)]
            return losses[0]

    cuda = place.device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=place.work.batch, max_steps=10**6, bf16=True,
        torch_compile=place.compile, optim="adamw_torch_fused", learning_rate=LR, lr_scheduler_type="constant",
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS, weight_decay=DECAY, max_grad_norm=1.0, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=not cuda, use_liger_kernel=liger,
    )  # fmt: skip

    def drive(after_step: Callable[[Any], None]) -> None:
        class After(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                after_step(losses[0])

        data = [{"input_ids": [0]}]  # asked for, never read
        Ours(model=model, args=arguments, train_dataset=data, callbacks=[After()]).train()

    return drive


def lightning(place: Place) -> Drive:
    """Lightning around the plain model, compiled, with the same fused optimizer. Lightning refuses to clip for a fused
    optimizer under bf16-mixed (a check meant for loss scaling), so the module clips by its own hook."""
    try:
        import lightning as L
    except ImportError:
        try:
            import pytorch_lightning as L
        except ImportError as error:
            raise Skip(f"lightning does not import: {error}") from None
    import torch
    from plain import adamw, compile_blocks, compile_whole

    model = plain_model(place)
    run = (compile_whole if place.work.whole else compile_blocks)(model) if place.compile else model

    class Module(L.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> Any:
            return run(*batch)

        def configure_gradient_clipping(self, optimizer: Any, *limits: Any, **more: Any) -> None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

        def configure_optimizers(self) -> Any:
            return adamw(self.model, LR, BETAS, EPS, DECAY)

    def drive(after_step: Callable[[Any], None]) -> None:
        class After(L.Callback):  # type: ignore[misc, name-defined]
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
                after_step(outputs["loss"])

        cuda = place.device.type == "cuda"
        L.Trainer(
            max_steps=10**6, precision="bf16-mixed", accelerator="gpu" if cuda else "cpu", devices=1, gradient_clip_val=1.0,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tempfile.mkdtemp(), callbacks=[After()],
        ).fit(Module(), Endless(place.batches()))  # fmt: skip

    return drive


def carry(package: str) -> None:
    """Puts a wheel of `package`, where runs/wheels has one, on the path, behind what is installed."""
    for wheel in sorted((ROOT / "runs" / "wheels").glob("*.whl")):
        if wheel.name.split("-")[0].replace("_", "-") != package:
            continue
        place = Path(tempfile.gettempdir()) / f"fewbits-wheel-{wheel.stem}-{wheel.stat().st_size}"
        if not place.exists():
            beside = Path(tempfile.mkdtemp())
            zipfile.ZipFile(wheel).extractall(beside)
            try:
                beside.rename(place)
            except OSError:  # another worker was faster
                place = place if place.exists() else beside
        sys.path.append(str(place))


PEERS: dict[str, Callable[[Place], Drive]] = {
    "compact bf16": compact,
    "compact bf16 tuned": lambda p: compact(p, tuned=True),
    "transformers bf16 compiled": transformers,
    "Trainer bf16": trainer,
    "Trainer bf16 liger": lambda p: trainer(p, liger=True),
    "torchao fp8 tensorwise": lambda p: torchao(p, "tensorwise"),
    "torchao fp8 rowwise": lambda p: torchao(p, "rowwise"),
    "Lightning bf16-mixed": lightning,
}
