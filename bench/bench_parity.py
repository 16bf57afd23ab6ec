"""Cosine to fp32 Transformers by text length, and the error of Transformers' own bf16 beside ours.

python bench/bench_parity.py        (CUDA: real geometry, all layers, bf16; CPU: few layers, fp32)
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from harness import record, write_records
from models import (
    batch_of,
    last_token_embeddings,
    memory_efficient_attention,
    our_backbone,
    random_weights,
    real_spec,
    token_ids,
    transformers_model,
)

from jv5kernels.output import OutputFormat

# length -> sequences of it
CUDA_LENGTHS = {16: 128, 512: 64, 4096: 16, 8192: 8, 32768: 3}
CPU_LENGTHS = {1: 4, 16: 4, 512: 2, 4096: 1}
CPU_LAYERS = 2
MUST = {torch.bfloat16: 0.9999, torch.float32: 0.999999}


def embed(backbone: Any, sequences: list[Any], device: str) -> torch.Tensor:
    """Our last-token embeddings (B, C) fp32."""
    batch = batch_of(sequences, device)
    hidden, cu_seqlens = backbone.forward_pooled(batch, "lasttoken")
    output = OutputFormat("lasttoken", backbone.spec.hidden_size)
    return output.apply(hidden, cu_seqlens, backbone.norm_weight, backbone.spec.rms_norm_eps)[0]


def by_rows(model: torch.nn.Module, sequences: list[Any], device: str) -> torch.Tensor:
    """Transformers' last-token embeddings, one text at a time."""
    rows = [torch.from_numpy(s).long().to(device)[None] for s in sequences]
    return torch.cat([last_token_embeddings(model, ids) for ids in rows])


def errors(embeddings: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Smallest cosine, and root mean square of the distance."""
    x, y = embeddings.double(), exact.double()
    cosine = torch.nn.functional.cosine_similarity(x, y).min().item()
    return cosine, (x - y).square().sum(1).mean().sqrt().item()


@torch.inference_mode()
def compare(family: str, device: str) -> list[dict[str, Any]]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    spec = real_spec(family, num_layers=None if device == "cuda" else CPU_LAYERS)
    # The weights are bf16 values in every run, as the published checkpoints are.
    weights = random_weights(spec, seed=1, dtype=torch.bfloat16, device=device)
    exact = transformers_model(spec, weights, torch.float32, attention=memory_efficient_attention())
    ours = our_backbone(spec, weights, dtype)
    peer = transformers_model(spec, weights, dtype) if device == "cuda" else None
    records = []
    for length, count in (CUDA_LENGTHS if device == "cuda" else CPU_LENGTHS).items():
        if length > spec.max_position_embeddings:
            continue
        sequences = token_ids(spec, [length] * count, seed=length)
        reference = by_rows(exact, sequences, device)
        cosine, error = errors(embed(ours, sequences, device), reference)
        assert cosine >= MUST[dtype], f"{family}, {length} tokens: cosine {cosine}"
        theirs: tuple[float, float] | None = None
        if peer is not None:
            theirs = errors(by_rows(peer, sequences, device), reference)
        line = f"{family:6} {length:6} tokens  cosine {cosine:.8f}  error {error:.3e}"
        print(line if theirs is None else f"{line}  theirs {theirs[0]:.8f} {theirs[1]:.3e}")
        assert cosine >= MUST[dtype], f"{family}, {length} tokens: cosine {cosine}"
        assert theirs is None or error <= theirs[1], f"{family}, {length}: {error} > {theirs[1]}"
        records.append(
            record(
                f"{family} {spec.num_layers} layers, {count} texts of {length} tokens, {str(dtype)[6:]}",
                "jv5kernels",
                "cosine_min",
                cosine,
                "1",
                device=device,
                peer="transformers sdpa, same dtype" if theirs else None,
                peer_value=theirs[0] if theirs else None,
                error_rms=error,
                peer_error_rms=theirs[1] if theirs else None,
                ratio=theirs[1] / error if theirs else None,
            )
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description="Parity with fp32 Transformers")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    device = parser.parse_args().device
    torch.backends.cuda.matmul.allow_tf32 = False
    records = []
    for family in ("small", "nano"):
        records += compare(family, device)
        print(write_records("parity" if device == "cuda" else "parity-cpu", records), flush=True)


if __name__ == "__main__":
    main()
