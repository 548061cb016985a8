"""Whole training steps of a GPT-2 shape beside transformers' Trainer and Lightning: what cpu_peers.py alternates.

Every case runs forward, backward, clipping at 1.0 and AdamW on random tokens. `--case ours PRECISION`,
`--case trainer DTYPE` and `--case lightning DTYPE` print one JSON line; options follow as key=value.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from typing import Any

import torch
from blocks import timed


def options(pairs: list[str]) -> dict[str, int]:
    """key=value arguments as integers."""
    return {key: int(value) for key, value in (pair.split("=") for pair in pairs)}


def ours(precision: str, o: dict[str, int]) -> dict[str, Any]:
    """The step of this library."""
    import fewbits

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = fewbits.ModelConfig(vocab_size=o["V"], context=o["T"], n_layer=o["L"], n_head=o["H"], n_embd=o["D"])
    model = fewbits.prepare(fewbits.Transformer(config), precision).to(device)
    if o.get("compile"):
        model.compile_blocks()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    step = fewbits.Step(model, fewbits.AdamW(groups, lr=1e-4), precision)
    tokens = torch.randint(o["V"], (4, o["B"], o["T"] + 1), device=device)
    batches = itertools.cycle([{"input_ids": t[:, :-1].contiguous(), "labels": t[:, 1:].contiguous()} for t in tokens])
    results = []
    times = timed(lambda: results.append(step([next(batches)])), o["warmup"], o["steps"])
    return {"ms": times, "loss": float(results[-1].loss), "peak_bytes": peak(), "tokens": o["B"] * o["T"]}


def trainer(dtype: str, o: dict[str, int]) -> dict[str, Any]:
    """The same shape as GPT2LMHeadModel under transformers.Trainer, its optimizer fused, its data ready in memory."""
    import time

    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    if o.get("heap"):  # what our Step asks of the C library, for a comparison without it
        from fewbits.kernels.heap import keep_freed_memory

        keep_freed_memory()
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=o["V"],
            n_positions=o["T"],
            n_embd=o["D"],
            n_layer=o["L"],
            n_head=o["H"],
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    cuda = torch.cuda.is_available()
    rows = torch.randint(o["V"], (o["B"] * (o["warmup"] + o["steps"] + 2), o["T"]))
    data = [{"input_ids": row, "labels": row} for row in rows]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            if cuda and len(ends) == o["warmup"]:
                torch.cuda.reset_peak_memory_stats()

    arguments = TrainingArguments(
        output_dir=os.path.join("/tmp", "peer"), per_device_train_batch_size=o["B"], max_steps=o["warmup"] + o["steps"],
        bf16=dtype == "bf16", fp16=dtype == "fp16", tf32=(cuda and dtype != "fp32") or None,
        torch_compile=bool(o.get("compile")),
        optim="adamw_torch_fused", max_grad_norm=1.0, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, use_cpu=not cuda,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    times = [(b - a) * 1e3 for a, b in itertools.pairwise(ends[o["warmup"] - 1 :])]
    return {"ms": times, "peak_bytes": peak(), "tokens": o["B"] * o["T"]}


def lightning(dtype: str, o: dict[str, int]) -> dict[str, Any]:
    """The same shape as GPT2LMHeadModel under Lightning's Trainer, with torch's AdamW, its data ready in memory."""
    import time

    from lightning.pytorch import LightningModule, Trainer
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=o["V"], n_positions=o["T"], n_embd=o["D"], n_layer=o["L"], n_head=o["H"], resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, attn_implementation="sdpa", use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    cuda = torch.cuda.is_available()
    ends: list[float] = []

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT2LMHeadModel(shape)

        def training_step(self, rows: torch.Tensor, index: int) -> torch.Tensor:
            return self.model(input_ids=rows, labels=rows).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            # Lightning refuses to clip beside a fused optimizer in mixed precision
            return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=dtype == "fp32")

        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    rows = torch.randint(o["V"], (o["B"] * (o["warmup"] + o["steps"] + 2), o["T"]))
    trainer = Trainer(
        accelerator="gpu" if cuda else "cpu", devices=1, precision={"fp32": "32-true"}.get(dtype, f"{dtype}-mixed"),
        max_steps=o["warmup"] + o["steps"], gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=os.path.join("/tmp", "peer"),
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(rows, batch_size=o["B"]))
    times = [(b - a) * 1e3 for a, b in itertools.pairwise(ends[o["warmup"] - 1 :])]
    return {"ms": times, "peak_bytes": peak(), "tokens": o["B"] * o["T"]}


def peak() -> int | None:
    """Peak of the allocator on CUDA."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def case() -> None:
    """Runs the one case that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", nargs="+", required=True)
    who, what, *rest = parser.parse_args().case
    print(json.dumps({"ours": ours, "trainer": trainer, "lightning": lightning}[who](what, options(rest))))


def table(results: dict[str, Any], tokens: int, first: str) -> None:
    """Prints tokens/s of every case and its ratio to the first: of the middle block, and of the least disturbed one."""
    base, fastest = results[first].get("ms"), min(results[first].get("blocks", [0.0]))
    for name, row in results.items():
        if "ms" in row:
            rate = tokens / row["ms"] * 1e3
            print(
                f"{name:34s} {row['ms']:9.2f} ms  {rate:12,.0f} tokens/s  "
                f"x{(base or row['ms']) / row['ms']:.3f}  spread {row['spread']:.1%}  "
                f"fastest block {min(row['blocks']):9.2f} ms  x{fastest / min(row['blocks']):.3f}"
            )
        else:
            print(f"{name:34s} {row['error'].strip().splitlines()[-1] if row['error'].strip() else 'failed'}")


if __name__ == "__main__":
    if "--case" in sys.argv:
        case()
