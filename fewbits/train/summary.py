"""The two ends of a run in words and numbers: what is about to happen and why so, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from fewbits.nn.layers import is_layers
from fewbits.train.build import Training
from fewbits.train.events import Display, beside, size
from fewbits.train.memory import resident_bytes
from fewbits.train.record import environment
from fewbits.train.shapes import slow_shapes
from fewbits.train.throughput import FORMULA, mfu

if TYPE_CHECKING:
    from fewbits.train.trainer import Run


def introduce(
    display: Display, training: Training, compression: Mapping[str, Any], table: str, peak: float | None
) -> None:
    """Says what is trained on what, how it is executed and why."""
    config, facts = training.config, training.store.describe()
    train, val, model = facts["train"], facts["val"], config.model
    display.fact("corpus", f"{training.corpus.name}: {train['documents']:,} documents, {size(train['bytes'])} to learn")
    for note in training.corpus.notes:
        display.fact("", note)
    display.fact("held out", f"{val['documents']:,} documents, {size(val['bytes'])}{_yardstick(compression)}")
    distinct, total = training.batches.distinct_tokens, training.tokens_per_step * config.train.max_steps
    display.fact(
        "tokens",
        f"{distinct:,} distinct ({config.data.tokenizer}, vocabulary {training.tokenizer.vocab_size:,}); "
        f"{total:,} to train on = {training.batches.epochs(config.train.max_steps):.2f} epochs",
    )
    display.fact(
        "model",
        f"{model.parameter_count():,} parameters: n_layer {model.n_layer}, n_head {model.n_head}, "
        f"n_embd {model.n_embd}, context {model.context}",
    )
    batch = f"{training.tokens_per_step:,} tokens a step, {config.train.max_steps:,} steps"
    parts = f" in {config.train.micro_batches} micro-batches" if config.train.micro_batches > 1 else ""
    display.fact("batch", f"{config.train.batch_size} sequences{parts}, {batch}")
    for entry in training.choices.to_json():
        if entry["what"] != "threads" and not entry["what"].startswith("matmul") and not is_layers(entry):
            value = {True: "yes", False: "no"}.get(entry["value"], entry["value"])
            display.fact({"deterministic": "same bits"}.get(entry["what"], entry["what"]), str(value), entry["reason"])
    if training.device.type == "cuda":
        graph = training.step.graph_choice
        display.fact("graph", "yes" if graph.value else "no", graph.reason)
    if training.choices.layers:
        display.fact("layers", str(training.choices.layers))
    parallel = config.train.batch_size // config.train.micro_batches
    for number, sentence in enumerate(slow_shapes(model, parallel, training.device, training.precision)):
        display.fact("slow shapes" if number == 0 else "", sentence)
    known = (
        f"the peak is {peak / 1e12:,.0f} TFLOP/s"
        if peak
        else "the peak of this device is not known, so mfu stays empty"
    )
    if config.data.mask_documents:
        seen = f"T is {training.batches.visible_context:,.1f} of {model.context:,} on average"
        display.fact("documents", f"do not see each other where they share a window: {seen}")
    display.fact("mfu", f"{FORMULA}; {known}")
    display.table(table, indent=27)


def _yardstick(compression: Mapping[str, Any]) -> str:
    found = beside(compression).strip().strip("()")
    part = "" if compression.get("complete", True) else f" (its first {size(compression['bytes'])})"
    return f"; bits per byte under {found.replace(', ', ' and under ')}{part}" if found else ""


def summarize(run: Run, status: str, reason: str) -> dict[str, Any]:
    """What summary.json holds, but for its schema. `tok_per_s` is `tokens` over `wall_s`, everything included;
    `step_tok_per_s` is that of the timed steps, without evaluation, saving, profiling and compiling (`compile_s`), and `mfu`
    goes by it; `ms_per_step` is the median of the logged times, which a slow first step does not move."""
    training, config = run.training, run.config
    tokens, wall = run.done * training.tokens_per_step, run.wall()
    step_s = run.steps_before + run.step_s
    timed_tokens = (run.timed_before + run.timed_steps) * training.tokens_per_step
    rate = tokens / wall if wall > 0 and tokens else None
    ms = median(run.logged_ms) if run.logged_ms else None
    graph, compiling = training.step.graph_outcome, run.compile_s()
    step_rate = timed_tokens / step_s if step_s > 0 else None
    return {
        "status": status,
        "reason": reason,
        "name": config.name,
        "steps": run.done,
        "max_steps": config.train.max_steps,
        "tokens": tokens,
        "distinct_tokens": training.batches.distinct_tokens,
        "epochs": training.batches.epochs(run.done),
        "skipped_steps": run.last.get("skipped", 0),
        "final_loss": run.last.get("loss"),
        "val_loss": run.evaluation.get("val_loss"),
        "val_step": run.evaluation.get("step"),
        "perplexity": run.evaluation.get("perplexity"),
        "bits_per_byte": run.evaluation.get("bits_per_byte"),
        "compression": run.compression,
        "tok_per_s": rate,
        "step_tok_per_s": step_rate,
        "ms_per_step": ms,
        "mfu": mfu(run.flops, step_rate, run.peak),
        "mfu_formula": FORMULA,
        "mfu_context": training.batches.visible_context,
        "peak_flops": run.peak,
        "wall_s": wall,
        "setup_s": run.setup_s,
        "compile_s": compiling if compiling or training.choices.compile.value else None,
        "peak_memory_bytes": run.meter.peak(),
        "memory": run.meter.roles(),
        "resident_bytes": resident_bytes(),
        "params": config.model.parameter_count(),
        "precision": str(training.precision),
        "precision_table": run.table,
        "choices": training.choices.to_json(),
        "graph": [bool(graph.value), graph.reason],
        "data": {**training.store.describe(), "corpus": training.corpus.name, "notes": training.corpus.notes},
        "out_dir": str(run.folder),
        "checkpoint": None if run.saved is None else str(run.saved),
        "environment": environment(),
    }


def advise(display: Display, summary: Mapping[str, Any], folder: str) -> None:
    """What to do next, in a line or two."""
    if summary["status"] == "diverged":
        kept = summary["checkpoint"]
        display.fact("saved", f"the last checkpoint before it is {kept}" if kept else "no checkpoint before it")
        scale = "fp16" in summary["precision"] and "loss_scale" in summary["precision"]
        hint = "give fp16 its loss scale (--loss_scale dynamic), or " if scale else ""
        display.fact("next", f"{hint}lower --lr, lengthen --warmup_steps, or use bf16-mixed or fp32")
    elif summary["status"] == "stopped":
        display.fact("next", f"fewbits train --resume {folder}")
    else:
        display.fact("next", f"fewbits generate {folder} --prompt ...   fewbits eval {folder} --data ...")
