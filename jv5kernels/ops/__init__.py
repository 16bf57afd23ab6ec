"""The operators: packed (ragged) tensors in, one call each, several implementations behind `impl=`."""

from jv5kernels.ops.embed_output import embed_output
from jv5kernels.ops.pool import pool
from jv5kernels.ops.quantize import quantize_binary, quantize_int8
from jv5kernels.ops.rms_norm import add_rms_norm, rms_norm

__all__ = [
    "add_rms_norm",
    "embed_output",
    "pool",
    "quantize_binary",
    "quantize_int8",
    "rms_norm",
]
