"""Which linear layers of a model a low-bit recipe takes, and why the others stay in the working format."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from fewbits.nn.linear import Linear
from fewbits.precision.recipe import Recipe

MULTIPLE = 16
"""Both sides of a weight must be divisible by it: fp8 matmul instructions take nothing else."""
SMALLEST = 4096
"""Weights with fewer elements stay: quantizing their operands costs more than their matmuls could gain."""
_HEADS = ("head", "lm_head", "embed_out", "output_projection", "classifier", "score")


def eligible(model: nn.Module, recipe: Recipe, kept: Collection[str]) -> dict[str, tuple[bool, str]]:
    """Module name -> (whether the recipe takes it, reason) for every linear layer of `model`; empty without a recipe.

    kept: names of modules that the user keeps out.
    """
    if not recipe:
        return {}
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            reason = "named by keep" if name in kept else _why_not(model, name, module, embedded, head)
            reason = reason or (_why_not_fake(module, recipe) if recipe.fake else _why_not_fast(module))
            found[name] = (not reason, reason)
    return found


def _why_not(model: nn.Module, name: str, module: nn.Linear, embedded: Collection[int], head: object) -> str:
    """Why a linear layer stays in the working format, or ""."""
    last = name.rpartition(".")[2]
    if type(module) not in (nn.Linear, Linear):
        return f"{type(module).__name__} is a class of its own, which may mean something else"
    if id(module.weight) in embedded:
        return "its weight is the embedding's"
    if module is head or last in _HEADS:
        return "a head: its outputs are the logits"
    if last == "router" or (last == "gate" and hasattr(model.get_submodule(name.rpartition(".")[0]), "experts")):
        return "a router: rounding would send tokens elsewhere"
    return ""


def _why_not_fake(module: nn.Linear, recipe: Recipe) -> str:
    """What is trained for a quantized checkpoint must fit into one: groups there are whole."""
    group = 0 if recipe.output is None else recipe.output.right.granularity.columns
    if group and module.in_features % group:
        return f"in_features={module.in_features} is not divisible by the group of {group}"
    return ""


def _why_not_fast(module: nn.Linear) -> str:
    for side, size in (("in_features", module.in_features), ("out_features", module.out_features)):
        if size % MULTIPLE:
            return f"{side}={size} is not divisible by {MULTIPLE}"
    if module.weight.numel() < SMALLEST:
        return f"too small to gain: {module.weight.numel()} weights"
    return ""
