"""The output stage by its definition in float64, and the inputs that its tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F

MODES = ["lasttoken", "mean", "cls"]
LENGTHS = [1, 2, 63, 64, 65, 300]
WIDTH = 72
EPS = 1e-6
# ‖error‖ / ‖reference‖: fp32 arithmetic, then one rounding to the output's dtype (a truncation under
# Triton's interpreter).
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw(shape: tuple[int, ...], dtype=torch.float32, device="cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def reference(hidden, lengths, mode, weight=None, eps=EPS, dim=None, normalize=True):
    """The definition, one sequence at a time, in float64."""
    rows = []
    for tokens in hidden.double().split(lengths):
        if weight is not None:
            tokens = tokens / (tokens.square().mean(-1, keepdim=True) + eps).sqrt()
            tokens = tokens * weight.double()
        rows.append({"lasttoken": tokens[-1], "cls": tokens[0], "mean": tokens.mean(0)}[mode])
    out = torch.stack(rows)[:, :dim]
    return F.normalize(out, dim=-1) if normalize else out


def assert_near(out, expected, dtype=torch.float32):
    errors = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() <= TOLERANCE[dtype], f"relative errors {errors.tolist()}"
