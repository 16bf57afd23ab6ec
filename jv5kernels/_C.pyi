"""C++ kernels for the CPU: addresses (tensor.data_ptr()) and sizes in, a status out.

Status 0: done; 1: ranges that leave the tokens; 2: out of memory. `ranges` is the address of int32
pairs (start, end) that lie `range_stride` elements apart: offsets with 1, spans (N, 2) with 2.
`pooling` is 0 for the last token, 1 for the mean, 2 for the first token.
"""

def dispatch_level() -> str:
    """The instruction set in use: "baseline", "avx2" or "avx512"."""

def dispatch_levels() -> list[str]:
    """The instruction sets that this processor supports."""

def set_dispatch_level(wanted: str) -> None:
    """Chooses an instruction set for the whole process; ValueError when it is not supported."""

def pool_float32(
    hidden: int,
    total_tokens: int,
    width: int,
    stride: int,
    ranges: int,
    rows: int,
    range_stride: int,
    pooling: int,
    out: int,
    num_threads: int,
    /,
) -> int: ...
def embed_output_float32(
    hidden: int,
    total_tokens: int,
    width: int,
    stride: int,
    ranges: int,
    rows: int,
    range_stride: int,
    pooling: int,
    weight: int,
    eps: float,
    dim: int,
    normalize: bool,
    stored: int,
    value_ranges: int,
    flip: int,
    out: int,
    flags: int,
    num_threads: int,
    /,
) -> int: ...
def quantize_int8_float32(
    x: int,
    ranges: int,
    out: int,
    rows: int,
    dim: int,
    stride: int,
    flip: int,
    num_threads: int,
    /,
) -> int: ...
def quantize_binary_float32(
    x: int, out: int, rows: int, dim: int, stride: int, flip: int, num_threads: int, /
) -> int: ...
