"""How a precision prints: one row a role, each with where it lives and why."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from fewbits.precision.hardware import Hardware, describe, native, native_matmul
from fewbits.precision.recipe import MATMULS, Matmul

if TYPE_CHECKING:
    from fewbits.precision.precision import Precision

Row = tuple[str, str, str]
KEPT = "router, norms, linear layers whose sides are not divisible by 16 or that are too small to gain"
KEPT_FAKE = "router, norms, linear layers whose inputs the group does not divide"
HEAD = "e4m3 x e4m3, gradient of the logits e5m2, tensor scales (power-of-two), weight gradient summed in fp32"
AUTO = "each shape in the recipe, a part of it, or 16 bits: what a timing here shows to be at least 2 % faster than 16 bits"

_MASTER_WHERE = {
    "fp32": "optimizer, fp32 copy",
    "split": "optimizer, split 16+16",
    "none": "not kept",
}


def table(precision: Precision, report: object | None = None, device: object | None = None) -> str:
    """The table of a precision as plain text, lines up to about 120 characters.

    report: what `prepare` left as model.fewbits_report; adds how many parameters were rounded and what was kept.
    device: a torch device, its name, or a Hardware; adds the row that says what runs natively there.
    """
    lines: list[Row] = [("precision", str(precision), ""), ("role", "format", "where")]
    lines += [_working(precision, report), _master(precision)]
    lines += [("moments", precision.moments, "optimizer")]
    lines += [(name, "", _matmul(precision, name)) for name in MATMULS]
    lines += [("gradients", str(precision.gradient), "parameters' .grad; several micro-batches accumulate in "
               + str(precision.reduction))]  # fmt: skip
    lines += [("logits", precision.logits, _logits_reason(precision))]
    lines += [("head", "fp8", f"{HEAD}, {precision.working} in evaluation")] if precision.head_recipe else []
    lines += [_kept(precision, report)]
    lines += [("layers", "auto", AUTO)] if precision.layers == "auto" else []
    sums = "softmax, norm statistics, loss, weight-gradient sums, accumulation"
    lines += [("reductions", str(precision.reduction), sums)]
    lines += [("loss scale", precision.loss_scale, _loss_scale_reason(precision))]
    if device is not None:
        lines += [_runs(precision, device if isinstance(device, Hardware) else describe(str(device)))]
    return "\n".join(_line(row) for row in lines)


def _line(row: Row) -> str:
    role, format, where = row
    if not format:
        head = f"{role:<16}"
    else:
        head = f"{role:<16}{format:<11}" if len(format) < 11 else f"{role:<16}{format}  "
    indent = " " * (16 if not format else 27)
    return "\n".join(textwrap.wrap(where, 120, initial_indent=head, subsequent_indent=indent)) or head.rstrip()


def _working(precision: Precision, report: Any) -> Row:
    where = "model parameters"
    if precision.working.bits < 32:
        where += ", rounded by prepare(), ties away"
        if report is not None:
            where = f"prepare() rounded {report.rounded} of {report.parameters} parameters, ties away"
    return ("working weight", str(precision.working), where)


def _master(precision: Precision) -> Row:
    kind, reason = precision.resolved_master()
    return ("master weight", "none" if kind == "none" else "fp32", f"{_MASTER_WHERE[kind]} (why: {reason})")


def _matmul(precision: Precision, name: str) -> str:
    matmul: Matmul | None = getattr(precision.recipe, name)
    if matmul is not None:
        return _lowbit(matmul, precision)
    operand = precision.operand
    of = ", of the rounded values" if precision.recipe.fake else ""
    result = precision.working if operand.name == "tf32" else operand
    rounding = ", nearest-even" if result.bits < 32 else ""
    return f"{operand} x {operand} -> {result}{rounding}, {precision.reduction} accumulation{of}"


def _lowbit(matmul: Matmul, precision: Precision) -> str:
    """One low-bit matmul in words, what both operands share said once."""
    left, right = matmul.left, matmul.right
    fake = ["gradients pass straight through"] if precision.recipe.fake else []
    sums = {"fp32": "full", "fast": "fast"}.get(matmul.accumulator, f"modelled {matmul.accumulator}")
    shared = (
        f"{left.granularity} scales"
        if left.granularity == right.granularity
        else f"{left.granularity} x {right.granularity} scales"
    )
    scaling = left.scaling if left.scaling == right.scaling else f"{left.scaling} x {right.scaling}"
    rounding = left.rounding if left.rounding == right.rounding else f"{left.rounding} x {right.rounding}"
    if left.wide:
        shared, scaling, rounding = f"{right.granularity} scales", right.scaling, right.rounding
    parts = [f"{left.format} x {right.format} -> {precision.working}", f"{shared} ({scaling})", rounding]
    return ", ".join([*parts, *(["random Hadamard"] if left.hadamard else []), f"{sums} accumulation", *fake])


def _kept(precision: Precision, report: Any) -> Row:
    if precision.recipe and report is not None:
        return _outside(precision, report)
    kept = list(getattr(report, "kept", ()))
    if precision.recipe and report is None:
        kept_out = "embedding, " if precision.head_recipe else "embedding, head, "
        kept_out += KEPT_FAKE if precision.recipe.fake else KEPT
        return (
            "kept",
            "",
            f"in {precision.working}: {kept_out}; buffers, as they are (why: only parameters are rounded)",
        )
    if kept:
        names = ", ".join(row[0] for row in kept[:4]) + (f" and {len(kept) - 4} more" if len(kept) > 4 else "")
        return ("kept", "", f"{names} (why: {kept[0][3]}); buffers (why: only parameters are rounded)")
    if precision.working.bits < 32:
        return ("kept", "", "buffers, as they are (why: only parameters are rounded)")
    return ("kept", "", "every parameter, as it is (why: nothing is rounded)")


def _outside(precision: Precision, report: Any) -> Row:
    """How many layers the recipe took, and which modules it did not, those of a kind and reason counted together."""
    taken = sum(row[2] == str(precision) for row in report.rows)
    alike: dict[tuple[str, str], list[str]] = {}
    for name, kind, what, reason in report.rows:
        if what != str(precision):
            why = f" (why: {reason})" if what.startswith("kept") else ""
            alike.setdefault((kind, f"{what.removeprefix('kept in ')}{why}"), []).append(name)
    groups = (
        f"{names[0] if len(names) == 1 else f'{len(names)} {kind}'} in {why}" for (kind, why), names in alike.items()
    )
    return ("few bits", "", f"{taken} linear layers by the recipe; {'; '.join(groups)}; buffers as they are")


def _logits_reason(precision: Precision) -> str:
    wide, once = precision.reduction, "rounded once from fp32 sums"
    half = "half the bytes of fp32; beyond 65,504 the loss is not finite and the step withheld"
    if precision.logits == "auto" and precision.working.bits == 16:
        return f"fp16 on CUDA, {once} (why: {half}), {wide} elsewhere and in evaluation"
    return {
        "fp16": f"{once} (why: {half}); {wide} in evaluation",
        "bf16": f"{once} (asked for: 8 significant bits, a logit of 8 to 16 is off by up to 2^-5); {wide} in evaluation",
    }.get(precision.logits, f"{wide}, as their sums are")


def _loss_scale_reason(precision: Precision) -> str:
    kind = precision.loss_scale.partition(":")[0]
    if kind == "none":
        if precision.gradient.bits >= 32:
            return f"(why: {precision.gradient} gradients need none)"
        if precision.gradient.exponent_bits >= 8:
            return f"(why: {precision.gradient} gradients have the range of fp32)"
        return f"(asked for: {precision.gradient} gradients below {precision.gradient.smallest_subnormal:.1g} vanish)"
    why = f"{precision.gradient} gradients below {precision.gradient.smallest_subnormal:.1g} vanish"
    if precision.gradient.exponent_bits >= 8:
        why = "asked for"
    return f"(why: {why})"


def _runs(precision: Precision, hardware: Hardware) -> Row:
    if precision.recipe or precision.head_recipe:
        return ("runs", "", f"on {hardware}: {_runs_lowbit(precision, hardware)}")
    answer = native(precision.operand, hardware)
    how = "native" if answer.value else "emulated" if hardware.kind == "cpu" else "refused"
    detail = ": rounded to the format, multiplied in fp32" if how == "emulated" else ""
    return ("runs", how, f"on {hardware}{detail} (why: {answer.reason})")


def _runs_lowbit(precision: Precision, hardware: Hardware) -> str:
    """How each matmul of a recipe runs, those that run alike named together."""
    alike: dict[str, list[str]] = {}
    matmuls = dict(zip(MATMULS, precision.recipe.matmuls, strict=True))
    if precision.head_recipe:
        matmuls["head"] = precision.head_recipe.output
    for name, matmul in matmuls.items():
        value, reason = native(precision.operand, hardware) if matmul is None else native_matmul(matmul, hardware)
        alike.setdefault(f"{'native' if value else 'emulated'} (why: {reason})", []).append(name)
    return "; ".join(f"{', '.join(names)} {how}" for how, names in alike.items())
