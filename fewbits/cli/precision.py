"""`fewbits precision NAME`: what a precision means, role by role, and what of it runs natively on a device."""

from __future__ import annotations

import click


@click.command()
@click.argument("name", metavar="NAME")
@click.option("--device", default="auto", help="Device to ask: auto, cpu, cuda, cuda:1. Default: the best one present.")
def precision(name: str, device: str) -> None:
    """Print the table of a precision: fp32, tf32, fp16-mixed, bf16-mixed, fp16-true, bf16-true, fp64, fp8, fp8-row,
    fp8-block, mxfp8, nvfp4, int8, int8-qat, int4-qat, binary-qat, fp8-qat, or a recipe of your own.

    \b
    Overrides follow the name:   fewbits precision "bf16-mixed, master=fp32"
    The loss head in fp8 too:    fewbits precision "fp8, head=fp8"
    Bf16 where it is as fast:    fewbits precision fp8-auto, the same as "fp8, layers=auto"
    A recipe can be written out: fewbits precision "output=e4m3/row, grad_input=e5m2/tensor, grad_weight=bf16"
    """
    import torch

    from fewbits.precision.hardware import check, describe
    from fewbits.precision.precision import Precision

    parsed = Precision.parse(name)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    hardware = describe(device)
    check(parsed, hardware)
    click.echo(parsed.table(device=hardware))
