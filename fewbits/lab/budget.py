"""How long a comparison will take, and how many steps fit a budget of minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.train.config import Config

STARTING = 1.5  # a run starts and ends more slowly than a block: it saves, and measures the compressors
EVALUATION = 0.45  # one held-out batch, forward only, as a part of a training step
SAFETY = 0.85  # part of the remaining budget that is planned: later runs on a warm machine are slower than the blocks
LEAST_STEPS = 20  # fewer say nothing about a precision
EVALUATIONS = 3  # held-out results along a shortened run; each costs as much as some steps


def run_seconds(config: Config, ms_per_step: float, ready: float) -> float:
    """Estimated wall seconds of one run: start-up, steps, evaluations."""
    train = config.train
    evaluations = 1 + (train.max_steps - 1) // train.eval_every if train.eval_every else 1
    steps = train.max_steps + EVALUATION * train.eval_batches * evaluations
    return STARTING * ready + steps * ms_per_step / 1000.0


def block_means(blocks: Sequence[Mapping[str, Any]], label: str) -> tuple[float, float] | None:
    """(ms a step, seconds until ready) of a variant: medians over its blocks, or None before one ended well."""
    own = [b for b in blocks if b["variant"] == label and b.get("status") == "ok"]
    if not own:
        return None
    return median(b["ms_per_step"] for b in own), median(b["ready_s"] for b in own)


def shorten(config: Config, costs: Sequence[tuple[float, float]], seeds: int, seconds: float) -> tuple[Config, Choice]:
    """The config with the longest horizon (at most its own) whose runs fit into `seconds`, and the reason.

    costs: (ms a step, seconds until ready) of each variant. The warm-up and the decay keep their part of the horizon.
    Raises FewbitsError when not even a few steps fit.
    """

    def cost(steps: int) -> float:
        shorter = config if steps == config.train.max_steps else horizon(config, steps)
        return seeds * sum(run_seconds(shorter, ms, ready) for ms, ready in costs)

    steps, least = config.train.max_steps, min(LEAST_STEPS, config.train.max_steps)
    if cost(steps) <= SAFETY * seconds:
        return config, Choice(steps, f"all runs take about {cost(steps) / 60:.0f} minutes")
    if cost(least) > SAFETY * seconds:
        raise FewbitsError(
            f"Not even {least} steps a run fit into the {max(0.0, seconds) / 60:.1f} minutes that are left; about "
            f"{cost(least) / SAFETY / 60:.1f} are needed. Give a longer --budget, fewer precisions or seeds, or a smaller "
            "model."
        )
    fits = least
    while steps - fits > 1:  # cost grows with the steps
        middle = (fits + steps) // 2
        fits, steps = (middle, steps) if cost(middle) <= SAFETY * seconds else (fits, middle)
    reason = f"{fits} of the recipe's {config.train.max_steps} steps let every run end within the budget"
    return horizon(config, fits), Choice(fits, reason)


def horizon(config: Config, steps: int) -> Config:
    """The config with another max_steps; warm-up and decay keep their part of it, logs and evaluations some density."""
    part = steps / config.train.max_steps
    optim = replace(
        config.optim,
        warmup_steps=round(config.optim.warmup_steps * part),
        decay_steps=round(config.optim.decay_steps * part),
    )
    train = replace(
        config.train,
        max_steps=steps,
        eval_every=-(-steps // EVALUATIONS) if config.train.eval_every else 0,
        log_every=max(1, min(config.train.log_every, steps // 20)),
        save_every=max(1, steps // 3) if config.train.save_every else 0,
    )
    return replace(config, optim=optim, train=train)
