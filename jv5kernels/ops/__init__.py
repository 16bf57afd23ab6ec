"""The operators: packed (ragged) tensors in, one call each, several implementations behind `impl=`."""

from jv5kernels.ops.attention import attention_varlen
from jv5kernels.ops.attention_pooled import attention_pooled
from jv5kernels.ops.embed_output import embed_output
from jv5kernels.ops.linear import linear
from jv5kernels.ops.linear_qk_norm_rope import linear_qk_norm_rope
from jv5kernels.ops.linear_swiglu import linear_swiglu
from jv5kernels.ops.pool import pool
from jv5kernels.ops.qk_norm_rope import qk_norm_rope, rope_table
from jv5kernels.ops.quantize import quantize_binary, quantize_int8
from jv5kernels.ops.rms_norm import add_rms_norm, rms_norm
from jv5kernels.ops.short_layer import short_attention, short_linear, short_norm
from jv5kernels.ops.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "attention_pooled",
    "attention_varlen",
    "embed_output",
    "linear",
    "linear_qk_norm_rope",
    "linear_swiglu",
    "pool",
    "qk_norm_rope",
    "quantize_binary",
    "quantize_int8",
    "rms_norm",
    "rope_table",
    "short_attention",
    "short_linear",
    "short_norm",
    "swiglu",
]
