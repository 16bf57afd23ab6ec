"""float24: the upper 24 bits of a float32, a format of rows that are written and read again.

A row of C values is 3·C bytes: first C little-endian words with the upper 16 bits of each value, then C bytes with the
8 bits below. That keeps float32's range and 16 of its 24 significant bits, 256 times as fine as bfloat16. The
residual stream moves through memory twice a block, where its fourth byte costs time and decides nothing.

There is no such torch.dtype: `FLOAT24`, torch.uint8, stands for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT24 = torch.uint8
# Rows of so many values, and their parts, start at multiples of 16 bytes.
GRANULE = 16


def columns_of(width: int, dtype: torch.dtype) -> int:
    """Elements of a tensor's row that holds `width` values of a dtype: three bytes a value for FLOAT24."""
    return 3 * width if dtype == FLOAT24 else width


def to_float24(x: Tensor) -> Tensor:
    """Rounds float32 values to the nearest float24, halves away from zero; Inf and NaN stay what they are.

    Args:
        x: (T, C), float32.

    Returns:
        (T, 3·C), uint8.

    Example:
        >>> from_float24(to_float24(torch.tensor([[1.0, 1.0 + 2.0**-15, 1.0 + 2.0**-17]]))).tolist()
        [[1.0, 1.000030517578125, 1.0]]
    """
    bits = x.contiguous().view(torch.int32)
    # A NaN whose bits are all ones would become zero.
    bits = torch.where(x.isnan(), bits, bits + 0x80)
    upper = (bits >> 16).to(torch.int16).view(torch.uint8)
    return torch.cat([upper, (bits >> 8).to(torch.uint8)], dim=1)


def from_float24(rows: Tensor) -> Tensor:
    """The float32 values of float24 rows, exactly: (T, 3·C) uint8 -> (T, C)."""
    width = rows.shape[1] // 3
    upper = rows[:, : 2 * width].clone(memory_format=torch.contiguous_format)
    upper = upper.view(torch.int16).to(torch.int32)
    bits = (upper << 16) | (rows[:, 2 * width :].to(torch.int32) << 8)
    return bits.view(torch.float32)
