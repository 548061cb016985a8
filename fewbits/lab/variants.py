"""What a comparison varies: one option, several values, the same seeds for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fewbits.errors import FewbitsError
from fewbits.precision.precision import Precision
from fewbits.train.aliases import canonical
from fewbits.train.config import Config, full_name, override

NOT_COMPARABLE = {
    "train.out_dir": "each run has its own directory anyway",
    "train.seed": "seeds are what differences are paired by; give --seeds",
    "train.stop_at": "a run that stops early has no final loss; vary train.max_steps",
    "train.device": "a comparison runs on one device; compare compare.json of two machines instead",
    "data.data": "losses on two texts cannot be compared",
    "name": "it changes nothing",
}


@dataclass(frozen=True)
class Variants:
    """One option and the values it takes; the first is the reference. Values are texts, as on the command line."""

    key: str
    values: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """What people read: the value, numbered where it comes twice (a variant compared with itself)."""
        seen: dict[str, int] = {}
        result = []
        for value in self.values:
            seen[value] = seen.get(value, 0) + 1
            result.append(value if seen[value] == 1 else f"{value} ({seen[value]})")
        return tuple(result)

    @property
    def folders(self) -> tuple[str, ...]:
        """A directory name for each variant, unique, the same in every session of one comparison."""
        result: list[str] = []
        for label in self.labels:
            slug = re.sub(r"[^A-Za-z0-9._=-]+", "-", label).strip("-.") or "empty"
            while slug in result:
                slug += "+"
            result.append(slug)
        return tuple(result)


def split_values(text: str) -> list[str]:
    """The values in `a,b,c`; a part such as `interval=500` belongs to the value before it. Or in `a;b;c`.

    >>> split_values("fp32,bf16-mixed,master=fp32,fp16-mixed")
    ['fp32', 'bf16-mixed,master=fp32', 'fp16-mixed']
    >>> split_values("none,dynamic:initial=1024,interval=500")
    ['none', 'dynamic:initial=1024,interval=500']
    """
    if ";" in text:
        return [part.strip() for part in text.split(";") if part.strip()]
    values: list[str] = []
    for part in (piece.strip() for piece in text.split(",")):
        if values and re.fullmatch(r"[A-Za-z_]+=.*", part):
            values[-1] += f",{part}"
        elif part:
            values.append(part)
    return values


def named(option: str, text: str | None) -> list[str] | None:
    """The values that `text` names for `option`, or None where it was not given. FewbitsError when it names nothing."""
    values = None if text is None else split_values(text)
    if values == []:
        raise FewbitsError(f"{option} {text!r} names nothing. Write A,B such as fp32,bf16-mixed, or leave it out.")
    return values


def make_variants(config: Config, precisions: Sequence[str] | None, vary: tuple[str, Sequence[str]] | None) -> Variants:
    """The variants asked for, each checked against the config as a whole. Raises FewbitsError."""
    if precisions and vary:
        raise FewbitsError("Give either precisions or one option to vary, so that a difference has one cause.")
    if not precisions and not vary:
        raise FewbitsError("There is nothing to compare. Give precisions such as fp32,bf16-mixed, or --vary KEY=a,b.")
    key, given = ("precision", precisions or ()) if vary is None else (full_name(canonical(vary[0])), vary[1])
    if key in NOT_COMPARABLE:
        raise FewbitsError(f"{key} cannot be varied: {NOT_COMPARABLE[key]}.")
    values = tuple(str(value).strip() for value in given)
    if len(values) < 2:
        raise FewbitsError(f"A comparison needs at least two values of {key}, got {', '.join(values) or 'none'}.")
    if key == "precision":
        values = tuple(str(Precision.parse(value)) for value in values)
    variants = Variants(key, values)
    for value in values:
        variant_config(config, variants, value, config.train.seed).check()
    return variants


def variant_config(config: Config, variants: Variants, value: str, seed: int) -> Config:
    """The config of one run: the shared one with the varied option and the seed set. Raises FewbitsError."""
    held_out = config.train.eval_batches * config.train.batch_size
    changed = override(config, variants.key, value)
    changed = replace(changed, train=replace(changed.train, seed=seed))
    if variants.key == "train.batch_size":  # the same held-out sequences for every batch size, or losses do not pair
        batches = max(1, round(held_out / changed.train.batch_size))
        changed = replace(changed, train=replace(changed.train, eval_batches=batches))
    return changed


def measure_of(key: str) -> str:
    """Which held-out result is compared: nats a token, or bits a byte when the tokens themselves differ."""
    return "bits_per_byte" if key in ("data.tokenizer", "model.vocab_size") else "val_loss"
