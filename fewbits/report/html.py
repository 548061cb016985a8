"""One self-contained HTML page a run, or a comparison: no network, no script, for somebody who was not there."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fewbits import __version__
from fewbits.errors import FewbitsError
from fewbits.precision.precision import Precision
from fewbits.report.bench import bench_view, read_bench
from fewbits.report.compared import comparison_view, read_comparison
from fewbits.report.quantized import quantized_view
from fewbits.report.record import RunRecord, read_run
from fewbits.report.runcharts import memory_chart, run_charts
from fewbits.report.words import count, duration, flat, of_bytes, settings, value_text

STATUS = {
    "finished": "The run reached its last step.",
    "stopped": "The run was stopped on request before its last step; it can be continued.",
    "diverged": "The loss or the gradients left the finite numbers and nothing could cure it; the run ended itself.",
    "crashed": "The run ended without writing its summary (killed, crashed, or still going); here is what it logged.",
}
QUIET_EVENTS = ("sample", "save", "skipped")  # drawn or listed elsewhere, or too many to list
MOST_EVENTS = 60


def write_report(run: Path) -> Path:
    """Write report.html into a run's folder (or a comparison's) and return its path.

    Works on a run that crashed too: a last line cut short and a missing summary are stated in the page.
    Raises FewbitsError when the folder is no run or cannot be written.
    """
    run = Path(run)
    if (run / "compare.json").is_file():
        return write_comparison(run / "compare.json")
    if (run / "bench.json").is_file():
        return write_bench(run / "bench.json")
    return _write(run / "report.html", "run.html", run_view(read_run(run)))


def write_comparison(compare_json: Path) -> Path:
    """Write report.html beside a compare.json, finished or not, and return its path. Raises FewbitsError."""
    path = Path(compare_json)
    return _write(path.parent / "report.html", "comparison.html", comparison_view(read_comparison(path), path.parent))


def write_bench(bench_json: Path) -> Path:
    """Write report.html beside a bench.json, finished or not, and return its path. Raises FewbitsError."""
    path = Path(bench_json)
    return _write(path.parent / "report.html", "bench.html", bench_view(read_bench(path), path.parent))


def quantized_page(document: Mapping[str, Any], out: Path) -> str:
    """The page about a model that was made small, as text: it is written together with the checkpoint in `out`."""
    return _render("quantized.html", quantized_view(document, out))


def _render(template: str, view: dict[str, Any]) -> str:
    pages = Environment(
        loader=PackageLoader("fewbits.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return pages.get_template(template).render(**view, version=__version__, written=written)


def _write(target: Path, template: str, view: dict[str, Any]) -> Path:
    page = _render(template, view)
    beside = target.with_name(f".{target.name}.tmp")
    try:
        beside.write_text(page, encoding="utf-8", errors="replace")
        beside.replace(target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise FewbitsError(f"{target} cannot be written: {error.strerror}. Free space or check permissions.") from error
    return target


def run_view(record: RunRecord) -> dict[str, Any]:
    """Everything that the page of a run shows."""
    summary, config = record.summary, record.config
    events = [e for e in record.events if e.get("event") not in QUIET_EVENTS]
    charts = run_charts(record)
    if summary.get("memory"):
        charts.append(memory_chart(summary["memory"]))
    return {
        "title": f"{config.get('name', 'run')} · {record.path.resolve().name}",
        "status": record.status,
        "status_sentence": STATUS.get(record.status, ""),
        "notes": [*record.notes, *_warnings(record)],
        "lead": _lead(record),
        "cards": _cards(record),
        "yardstick": _yardstick(summary),
        "facts": _facts(record),
        "precision_table": precision_table(summary, _start(record), config),
        "choices": [_choice(c) for c in summary.get("choices") or _start_choices(record)],
        "charts": charts,
        "samples": [_sample(e) for e in record.events if e.get("event") == "sample"][-12:],
        "events": [_event(e) for e in events[:MOST_EVENTS]],
        "events_left_out": max(0, len(events) - MOST_EVENTS),
        "environment": flat(summary.get("environment") or _start(record).get("environment") or {}),
        "commands": _commands(record),
        "config_text": record.config_text,
    }


def _start(record: RunRecord) -> dict[str, Any]:
    """The event that a run writes when it starts; a crashed run has told its choices there."""
    return next((e for e in record.events if e.get("event") == "start"), {})


def _start_choices(record: RunRecord) -> list[Any]:
    return list(_start(record).get("choices") or [])


def _choice(choice: Any) -> dict[str, str]:
    if isinstance(choice, dict):
        return {key: value_text(choice.get(key)) for key in ("what", "value", "reason")}
    return {"what": value_text(choice), "value": "", "reason": ""}


def _steps(record: RunRecord) -> tuple[int, int | None]:
    """(steps that were logged, steps that were planned)."""
    done = int(record.metrics[-1]["step"]) if record.metrics else 0
    return int(record.summary.get("steps") or done), (record.config.get("train") or {}).get("max_steps")


def _warnings(record: RunRecord) -> list[str]:
    result = []
    done, planned = _steps(record)
    if record.status == "crashed":
        of = f" of {planned:,}" if planned else ""
        result.append(f"There is no summary.json. The last logged step is {done:,}{of}.")
        errors = [e for e in record.events if e.get("event") == "error"]
        if errors:
            result.append(f"The run reported: {errors[-1].get('message') or errors[-1].get('error')}")
    bad = [m["step"] for m in record.metrics if m.get("loss") is not None and not _finite(m["loss"])]
    if bad:
        result.append(f"The loss was not a finite number at step {bad[0]:,} ({len(bad)} logged steps in all).")
    return result


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")


def _lead(record: RunRecord) -> str:
    summary, config = record.summary, record.config
    model, data = config.get("model") or {}, config.get("data") or {}
    done, planned = _steps(record)
    shape = f"{model.get('n_layer', '?')} layers, {model.get('n_embd', '?')} wide, {model.get('n_head', '?')} heads"
    parameters = f" with {count(summary['params'])} parameters" if summary.get("params") else ""
    tokens = summary.get("tokens") or (record.metrics[-1].get("tokens") if record.metrics else None)
    read = f" It read {count(tokens)} tokens" if tokens else " It read no logged token"
    distinct = f" of a corpus of {count(summary['distinct_tokens'])}" if summary.get("distinct_tokens") else ""
    steps = f" in {done:,} of {planned:,} steps" if planned else f" in {done:,} steps"
    precision = (
        summary.get("precision")
        or _start(record).get("precision")
        or config.get("precision", "an unrecorded precision")
    )
    return (
        f"A transformer language model ({shape}){parameters} learned to predict the next token of the corpus "
        f"“{data.get('data', '?')}” in {precision}.{read}{distinct}{steps}."
    )


def _cards(record: RunRecord) -> list[dict[str, str]]:
    s = record.summary
    last = record.metrics[-1] if record.metrics else {}
    last_eval = record.evaluations[-1] if record.evaluations else {}
    train_loss = s.get("final_loss", last.get("loss"))
    val_loss = s.get("val_loss", last_eval.get("val_loss"))
    bits = s.get("bits_per_byte", last_eval.get("bits_per_byte"))
    perplexity = s.get("perplexity", last_eval.get("perplexity"))
    speed = s.get("tok_per_s", last.get("tok_per_s"))
    mfu = s.get("mfu", last.get("mfu"))
    compiling = f"{duration(s['compile_s'])} of it" if s.get("compile_s") else "none of it"
    cards = [
        ("held-out bits per byte", value_text(bits), "lower is better"),
        ("held-out loss", value_text(val_loss), f"perplexity {value_text(perplexity, 2)}"),
        ("training loss of the last step", value_text(train_loss), ""),
        ("tokens a second", count(speed), f"all in; {value_text(s.get('ms_per_step', last.get('ms')), 1)} ms a step"),
        ("MFU", f"{100 * mfu:.1f} %" if mfu else "not known", "model FLOPs over the device's peak"),
        ("peak memory", of_bytes(s.get("peak_memory_bytes", last.get("memory_bytes"))), ""),
        ("skipped steps", count(s.get("skipped_steps", last.get("skipped", 0))), "withheld for non-finite gradients"),
        (
            "wall time",
            duration(s.get("wall_s")),
            f"{compiling} compiling; set-up of {duration(s.get('setup_s'))} before it",
        ),
    ]
    return [{"name": name, "value": value, "beside": beside} for name, value, beside in cards]


def _yardstick(summary: dict[str, Any]) -> str:
    ratios = {k: v for k, v in (summary.get("compression") or {}).items() if isinstance(v, int | float)}
    if not ratios:
        return ""
    shown = " and ".join(f"{name} needs {bits:.3f}" for name, bits in ratios.items() if name in ("gzip", "xz"))
    return f"As a yardstick: to store the same held-out text, {shown} bits per byte." if shown else ""


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    s, c = record.summary, record.config
    model, data, optim, train = (c.get(k) or {} for k in ("model", "data", "optim", "train"))
    facts = [
        ("corpus", f"{data.get('data', '-')} · tokenizer {data.get('tokenizer', '-')}"),
        ("distinct tokens", count(s["distinct_tokens"]) if s.get("distinct_tokens") else ""),
        ("epochs", f"{s['epochs']:.3g}" if s.get("epochs") else ""),
        ("parameters", count(s["params"]) if s.get("params") else ""),
        ("model", settings(model)),
        ("batch", f"{train.get('batch_size', '-')} sequences of {model.get('context', '-')} tokens a step, in "
         f"{train.get('micro_batches', 1)} micro-batch{'' if train.get('micro_batches', 1) == 1 else 'es'}"),
        ("optimizer", settings({k: v for k, v in optim.items() if k != "optimizer"})),
        ("seed", str(train.get("seed", "-"))),
    ]  # fmt: skip
    if optim.get("optimizer"):
        facts[6] = ("optimizer", f"{optim['optimizer']}: {facts[6][1]}")
    return [(name, value) for name, value in facts if value]


def precision_table(summary: dict[str, Any], start: dict[str, Any], config: dict[str, Any]) -> str:
    """The table of the precision that ran: the one the run saved, or the one its name stands for."""
    saved = summary.get("precision_table") or start.get("precision_table")
    if isinstance(saved, str) and saved.strip():
        return saved
    name = summary.get("precision") or config.get("precision")
    if not isinstance(name, str) or name == "auto":
        return ""
    try:
        return Precision.parse(name).table()
    except FewbitsError:
        return ""


def _sample(event: dict[str, Any]) -> dict[str, str]:
    prompt = event.get("prompt")
    return {
        "step": value_text(event.get("step")),
        "text": str(event.get("text", event.get("sample", ""))),
        "prompt": repr(prompt) if prompt else "",
    }


def _event(event: dict[str, Any]) -> dict[str, str]:
    rest = {k: v for k, v in event.items() if k not in ("event", "step", "environment", "choices", "precision_table")}
    details = ", ".join(f"{k}: {value_text(v)}" for k, v in rest.items())
    return {"step": value_text(event.get("step")), "event": str(event.get("event", "")), "details": details[:400]}


def _commands(record: RunRecord) -> list[str]:
    name = record.path.resolve().name
    lines = [f"fewbits train --config config.toml --out_dir runs/{name}-again"]
    if record.status in ("stopped", "crashed"):
        lines.append(f"fewbits train --resume {record.path}   # or go on where it ended, if it saved a checkpoint")
    lines += [f"fewbits eval {record.path}", f'fewbits generate {record.path} --prompt "def "']
    return lines
