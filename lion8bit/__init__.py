"""8-bit Lion for PyTorch: `Lion8bit`, `Lion4bit`, their fp32 reference `Lion`, and the quantized momentum format."""

from typing import TYPE_CHECKING, Any

from lion8bit.backends.select import SlowBackendWarning
from lion8bit.checkpoints import convert_state_dict, export_state_dict
from lion8bit.groups import keep_32bit
from lion8bit.lion import Lion
from lion8bit.optimizer import Lion4bit, Lion8bit
from lion8bit.quantization import dequantize, quantize
from lion8bit.release import fuse_into_backward

if TYPE_CHECKING:
    from lion8bit.planner import Plan, PlanError, estimate

Lion8 = Lion8bit  # for trainers that take every name ending in "8bit" for bitsandbytes'

__version__ = "0.1.0"
__all__ = [
    "Lion",
    "Lion4bit",
    "Lion8",
    "Lion8bit",
    "Plan",
    "PlanError",
    "SlowBackendWarning",
    "__version__",
    "convert_state_dict",
    "dequantize",
    "estimate",
    "export_state_dict",
    "fuse_into_backward",
    "keep_32bit",
    "quantize",
]


def __getattr__(name: str) -> Any:
    """Imports the planner when it is asked for."""
    if name in ("Plan", "PlanError", "estimate"):
        from lion8bit import planner

        return getattr(planner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
