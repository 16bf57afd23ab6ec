"""How much memory a model needs, and how many tokens fit: bytes = weights + fixed + per_token · tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jv5kernels.backbone import MLP_CHUNK_TOKENS
from jv5kernels.model_spec import ModelSpec

# Room for library workspaces (cuBLAS takes 32 MiB on Hopper) and the token ids.
WORKSPACE_BYTES = 64 << 20
# Share of the free memory that a batch may plan with; the rest absorbs fragmentation.
USABLE_SHARE = 0.8
# Tokens of the largest batch. On CUDA one of small (0.44 billion weights in its projections) takes 55 ms, and larger
# ones gain nothing. Of models with fewer weights a batch has more tokens, or Python could not keep the device busy:
# nano gives 1.3 million tokens a second with batches of 32768, 2.0 million with 65536 or more.
MAX_TOKENS = {"cuda": (32768, 65536), "cpu": (4096, 4096)}
FULL_WEIGHTS = 400_000_000


@dataclass(frozen=True)
class MemoryModel:
    """An upper bound of a model's memory in bytes as a function of the tokens in a batch.

    Args:
        projections: elements of the projections' weights, which a token is multiplied with.
        weights: one task's weights, embedding table included.
        fixed: workspaces, the rotary table, and the MLP's intermediate at its chunk size.
        per_token: activations a token.
    """

    projections: int
    weights: int
    fixed: int
    per_token: int

    def peak(self, tokens: int) -> int:
        """Bytes for a batch of `tokens`."""
        return self.weights + self.fixed + self.per_token * tokens

    def tokens_in(self, free_bytes: int) -> int:
        """Tokens whose activations fit into `free_bytes` beside weights that are already loaded; may be 0."""
        return max(0, (free_bytes - self.fixed) // self.per_token)


def memory_model(spec: ModelSpec, dtype: torch.dtype) -> MemoryModel:
    """The memory model of an architecture in a compute dtype.

    The bound follows the layer loop: around attention the residual stream (at most fp32), the block's input and output
    (2·C), the fused projection and the attention output are alive; in the MLP the residual stream, what attention
    adds to it, input and output, and either F for all tokens (SwiGLU in the GEMM's epilogue) or 3·F + C for one chunk.

    Example:
        >>> memory_model(spec, torch.bfloat16).peak(32768)  # small: 1.9 GB
    """
    width = spec.hidden_size
    inner = max(spec.q_width + spec.qkv_width, spec.intermediate_size + width)
    intermediate = width + 3 * spec.intermediate_size
    linear = spec.num_layers * (
        width * (spec.qkv_width + spec.q_width) + 3 * width * spec.intermediate_size
    )
    norms = spec.num_layers * (2 * width + 2 * spec.head_dim * spec.qk_norm) + width
    rope = spec.max_position_embeddings * spec.head_dim * 4
    return MemoryModel(
        projections=linear,
        weights=(spec.vocab_size * width + linear + norms) * dtype.itemsize,
        fixed=WORKSPACE_BYTES
        + rope
        + max(0, intermediate - inner) * MLP_CHUNK_TOKENS * dtype.itemsize,
        per_token=4 * width + (2 * width + inner) * dtype.itemsize + 3 * 4,
    )


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still take on a CUDA device, what torch holds in reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + reserve


def most_tokens(model: MemoryModel, device_type: str) -> int:
    """Tokens of the largest batch that is worth while: more for models with fewer weights."""
    least, most = MAX_TOKENS.get(device_type, MAX_TOKENS["cpu"])
    return min(most, max(least, least * FULL_WEIGHTS // max(1, model.projections)))


def default_token_budget(model: MemoryModel, device: torch.device) -> int:
    """Tokens a batch when the caller names none: what fits into the free memory, at most `most_tokens`."""
    limit = most_tokens(model, device.type)
    if device.type != "cuda":
        return limit
    return max(1, min(limit, model.tokens_in(int(USABLE_SHARE * free_bytes(device)))))
