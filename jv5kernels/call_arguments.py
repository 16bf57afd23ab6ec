"""The arguments of one call, completed from the encoder's own and checked against its model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from jv5kernels.calibration import Calibration, calibrated_ranges
from jv5kernels.graphs import MAX_TOKENS
from jv5kernels.memory import default_token_budget
from jv5kernels.output import (
    OutputFormat,
    check_dim,
    check_precision,
    output_format,
    warn_about_dim,
)
from jv5kernels.pipeline import INLINE_CHARACTERS, Limits

if TYPE_CHECKING:
    from jv5kernels.encoder import FastEncoder

__all__ = ["check_length", "dim_of", "limits_of", "output_of", "with_prompt"]


def check_length(encoder: FastEncoder, name: str, length: int | None) -> int:
    """A number of tokens a text, by default the checkpoint's; ValueError when the model has fewer positions."""
    positions = encoder.spec.max_position_embeddings
    if length is None:
        return min(encoder.checkpoint.max_seq_length, positions)
    if not 1 <= length <= positions:
        raise ValueError(f"{name}={length} is out of range: this model has {positions} positions")
    return length


def limits_of(
    encoder: FastEncoder, batch_size: int | None, max_length: int | None, characters: int
) -> Limits:
    """What the batches and texts of a call may hold.

    Args:
        characters: of all its texts.
    """
    if encoder.batch_invariant and encoder.device.type == "cpu":
        batch_size = 1
    budget = encoder.token_budget
    if budget is None and encoder._short is not None and characters <= INLINE_CHARACTERS:
        # Batches that have graphs; asking the device for its free memory would take longer than the run.
        budget = MAX_TOKENS
    elif budget is None:
        budget = default_token_budget(encoder.memory_model(), encoder.device)
    if max_length is None:
        max_length = encoder.max_seq_length
    length = check_length(encoder, "max_length", max_length)
    return Limits(length, budget, batch_size, encoder.on_overlong)


def output_of(
    encoder: FastEncoder,
    *,
    tasks: Iterable[str | None],
    prompt: str,
    precision: str | None,
    ranges: np.ndarray | Tensor | str | None,
    calibration: Calibration | str | Path | None,
    profile: str | None,
    normalize: bool,
    truncate_dim: int | None,
) -> OutputFormat:
    """What a call gives, as `encode` documents its arguments.

    Args:
        tasks: adapters of its texts.
        prompt: text put before each of them.
    """
    precision = encoder.precision if precision is None else check_precision(precision)
    dim = dim_of(encoder, truncate_dim)
    calibration = encoder.calibration if calibration is None else calibration
    if precision in ("int8", "uint8") and ranges is None and calibration is not None:
        ranges = calibrated_ranges(
            encoder, calibration, tasks=tasks, prompt=prompt, dim=dim, normalize=normalize
        )
    return output_format(
        pooling=encoder.pooling,
        dim=dim,
        normalize=normalize,
        precision=precision,
        ranges=ranges,
        profile=encoder.profile if profile is None else profile,
        device=encoder.device,
    )


def dim_of(encoder: FastEncoder, truncate_dim: int | None) -> int:
    """Dimensions of an embedding of a call; warns of one that the model was not trained for."""
    width = encoder.spec.hidden_size
    dim = check_dim(encoder.truncate_dim if truncate_dim is None else truncate_dim, width)
    warn_about_dim(dim, width, encoder.checkpoint.matryoshka_dims)
    return dim


def with_prompt(
    prompts: Mapping[str, str], names: Sequence[str], options: dict[str, Any]
) -> dict[str, Any]:
    """The options of a call with the first prompt among `names` that there is, unless they ask for another."""
    name = next((name for name in names if name in prompts), None)
    if name is None or options.get("prompt_name") or options.get("prompt") is not None:
        return options
    return {**options, "prompt_name": name}
