"""`fewbits quantize`: a trained model made small, with what it cost."""

from __future__ import annotations

from pathlib import Path

import click

from fewbits.cli.console import find_model, make_console


@click.command(name="quantize")
@click.argument("run", metavar="RUN|CHECKPOINT|HF-FOLDER")
@click.option(
    "--format", "format", metavar="FORMAT", default="auto", show_default=True,
    help="auto: what a -qat run was trained for, else int8; fp16 and bf16 (a plain smaller checkpoint), int8, int4, fp8, "
    "fp4 or binary.",
)  # fmt: skip
@click.option(
    "--method", metavar="METHOD", default="nearest", show_default=True,
    help="nearest; mse (searches scales); gptq (error feedback) and awq (scales channels), which need a text.",
)  # fmt: skip
@click.option(
    "--granularity", metavar="WHAT", default="auto", show_default=True,
    help="What shares a scale: row or group:N. auto: row for 8 bits and binary, the widest fitting group for 4.",
)  # fmt: skip
@click.option("--calibrate", metavar="CORPUS", help="Text for gptq and awq. [the training part of the run's own]")
@click.option(
    "--activations", metavar="FORMAT", default="none", show_default=True,
    help="none, or with weights of the same format int8 (multiply in integers) or fp8: one scale a token.",
)  # fmt: skip
@click.option("--out", metavar="DIR", help="Where to write. [beside RUN, such as RUN-int4-gptq]")
@click.option(
    "--keep", metavar="PATTERNS", default="head", show_default=True,
    help="Linear layers that stay, by name, with commas: 'head,blocks.0.*'; none quantizes all. Embeddings, norms and "
    "biases always stay.",
)  # fmt: skip
@click.option(
    "--dtype", metavar="DTYPE", default="bf16", show_default=True,
    help="What stays is stored, and layers compute, in bf16, fp16 or fp32.",
)  # fmt: skip
@click.option(
    "--act_order/--no_act_order", default=True, show_default=True, help="gptq: columns with the largest inputs first."
)
@click.option("--data", metavar="TEXT", help="Text to measure on. [the held-out part of the run's own]")
@click.option(
    "--eval_batches",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Batches of 8 sequences to measure on.",
)
@click.option("--device", metavar="DEVICE", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def quantize(
    run: str, format: str, method: str, granularity: str, calibrate: str | None, activations: str, out: str | None,
    keep: str, dtype: str, act_order: bool, data: str | None, eval_batches: int, device: str,
) -> None:  # fmt: skip
    """Make a trained model small, measure what it cost, and write a checkpoint that fewbits and others open.

    The result is for use: `fewbits generate DIR`, `fewbits eval DIR`, fewbits.load(DIR). quantize.json and report.html in
    it say what each layer lost and what the whole model costs before and after.
    """
    folder = find_model(run)
    from fewbits.export.options import QuantizeOptions
    from fewbits.export.run import default_out, quantize_run
    from fewbits.export.trained import options_for
    from fewbits.report.html import quantized_page
    from fewbits.report.terminal import quantized_tables

    options = QuantizeOptions(
        format=format, method=method, granularity=granularity, activations=activations, dtype=dtype, act_order=act_order,
        keep=tuple(part.strip() for part in keep.split(",") if part.strip()),
    )  # fmt: skip
    options = options_for(folder, options)
    target = Path(out) if out else default_out(folder, options.check())
    console = make_console()
    small = quantize_run(
        folder,
        options,
        calibrate,
        data,
        target,
        device,
        eval_batches,
        say=lambda text: console.print(text, style="dim"),
    )
    small.save(target, quantized_page(small.document, target))
    for part in quantized_tables(small.document):
        console.print(part)
    console.print(f"wrote       {target}/  model.safetensors, config.json, quantize.json, report.html", soft_wrap=True)
    console.print(f"next        fewbits generate {target} --prompt ...   fewbits eval {target}", soft_wrap=True)
