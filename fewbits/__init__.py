"""fewbits trains language models in few bits and shows that nothing was lost.

The public names are listed here and loaded when first used, so that the command line answers before torch is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Format": "fewbits.formats",
    "FewbitsError": "fewbits.errors",
    "Choice": "fewbits.choice",
    "cast": "fewbits.numerics.rounding",
    "fake_quantize": "fewbits.numerics.fake",
    "quantize": "fewbits.numerics.quantize",
    "Quantized": "fewbits.numerics.quantize",
    "Granularity": "fewbits.numerics.scaling",
    "Recipe": "fewbits.precision.recipe",
    "unprepare": "fewbits.nn.prepare",
    "Precision": "fewbits.precision.precision",
    "prepare": "fewbits.nn.prepare",
    "ModelConfig": "fewbits.nn.transformer",
    "Transformer": "fewbits.nn.transformer",
    "Adam": "fewbits.optim.adamw",
    "AdamW": "fewbits.optim.adamw",
    "SGD": "fewbits.optim.sgd",
    "NoScale": "fewbits.optim.loss_scale",
    "StaticScale": "fewbits.optim.loss_scale",
    "DynamicScale": "fewbits.optim.loss_scale",
    "Schedule": "fewbits.optim.schedule",
    "Step": "fewbits.step",
    "StepResult": "fewbits.step",
    "load": "fewbits.checkpoint.hf",
    "compare": "fewbits.lab.compare",
    "bench": "fewbits.lab.bench",
    "choose_layers": "fewbits.train.layers",
}
__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Choice",
    "DynamicScale",
    "FewbitsError",
    "Format",
    "Granularity",
    "ModelConfig",
    "NoScale",
    "Precision",
    "Quantized",
    "Recipe",
    "Schedule",
    "StaticScale",
    "Step",
    "StepResult",
    "Transformer",
    "__version__",
    "bench",
    "cast",
    "choose_layers",
    "compare",
    "fake_quantize",
    "load",
    "prepare",
    "quantize",
    "unprepare",
]

if TYPE_CHECKING:
    from fewbits.checkpoint.hf import load
    from fewbits.choice import Choice
    from fewbits.errors import FewbitsError
    from fewbits.formats import Format
    from fewbits.lab.bench import bench
    from fewbits.lab.compare import compare
    from fewbits.nn.prepare import prepare, unprepare
    from fewbits.nn.transformer import ModelConfig, Transformer
    from fewbits.numerics.fake import fake_quantize
    from fewbits.numerics.quantize import Quantized, quantize
    from fewbits.numerics.rounding import cast
    from fewbits.numerics.scaling import Granularity
    from fewbits.optim.adamw import Adam, AdamW
    from fewbits.optim.loss_scale import DynamicScale, NoScale, StaticScale
    from fewbits.optim.schedule import Schedule
    from fewbits.optim.sgd import SGD
    from fewbits.precision.precision import Precision
    from fewbits.precision.recipe import Recipe
    from fewbits.step import Step, StepResult
    from fewbits.train.layers import choose_layers


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fewbits' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
