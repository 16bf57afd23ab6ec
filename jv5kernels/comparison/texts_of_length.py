"""Texts of given lengths in tokens, from real prose, for `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from jv5kernels.comparison.stdlib_texts import standard_library_texts

if TYPE_CHECKING:
    from jv5kernels.encoder import FastEncoder

__all__ = ["Sample", "sample_texts"]

# Longest length -> how many texts of up to that length; a CPU gets a quarter of them.
COUNTS = {64: 64, 512: 32, 4096: 12, 1 << 62: 4}
# Characters that surely hold a token, or almost: a text is cut from that much prose a token.
CHARACTERS_A_TOKEN = 16


@dataclass(frozen=True)
class Sample:
    """Texts of one range of lengths.

    Args:
        length: tokens that no text exceeds.
        texts: with their prompt in front.
        tokens: their lengths.
    """

    length: int
    texts: tuple[str, ...]
    tokens: tuple[int, ...]


def sample_texts(
    encoder: FastEncoder, ends: Sequence[int], texts: Sequence[str] | None, device_type: str
) -> list[Sample]:
    """Returns one sample a length range, ascending; ranges without a text are left out.

    Args:
        encoder: gives prompts and tokenizer.
        ends: upper ends of the ranges, ascending.
        texts: what to sort into the ranges (longer ones are cut to the last); default prose, cut to lengths that are
            evenly spread over the upper half of every range. Prompts alternate.
    """
    prompts = list(dict.fromkeys(encoder.prompts.values())) or [""]
    if texts is not None:
        return _sorted_in(
            [prompts[i % len(prompts)] + t for i, t in enumerate(texts)], encoder, ends
        )
    tokenizer = encoder.checkpoint.tokenizer()
    prose = _all_prose()
    samples = []
    for end in ends:
        count = next(number for limit, number in COUNTS.items() if end <= limit)
        count = max(2, count // 4) if device_type == "cpu" else count
        wanted = np.linspace(end // 2 + 1, end, count).astype(int)
        starts = np.linspace(0, len(prose), count, endpoint=False).astype(int) + end
        cut = [
            _cut(
                tokenizer,
                prompts[i % len(prompts)],
                _prose(prose, int(start), int(length)),
                int(length),
            )
            for i, (start, length) in enumerate(zip(starts, wanted, strict=True))
        ]
        samples.append(_sample(cut, encoder, end))
    return samples


@lru_cache(maxsize=1)
def _all_prose() -> str:
    return "\n\n".join(document.text for document in standard_library_texts())


def _prose(prose: str, start: int, tokens: int) -> str:
    """Prose from a place on, from its beginning again after its end."""
    start %= len(prose)
    wanted = CHARACTERS_A_TOKEN * tokens
    repeats = -(-(start + wanted) // len(prose))
    return (prose * repeats)[start : start + wanted]


def _cut(tokenizer: Tokenizer, prompt: str, text: str, tokens: int) -> str:
    """Prompt and text, cut where the tokenizer's token number `tokens` ends, its special ones included."""
    encoding = tokenizer.encode(prompt + text)
    text_ends = [
        end
        for (_, end), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        if not special
    ]
    kept = tokens - (len(encoding.offsets) - len(text_ends))
    if kept >= len(text_ends):
        return prompt + text
    end = text_ends[kept - 1] if kept > 0 else 0
    return (prompt + text)[: max(end, len(prompt))]


def _sorted_in(texts: Sequence[str], encoder: FastEncoder, ends: Sequence[int]) -> list[Sample]:
    lengths = [len(ids) for ids in encoder.tokenize(texts)]
    places = np.minimum(np.searchsorted(ends, lengths), len(ends) - 1)
    return [
        _sample([text for text, p in zip(texts, places, strict=True) if p == place], encoder, end)
        for place, end in enumerate(ends)
        if place in places
    ]


def _sample(texts: Sequence[str], encoder: FastEncoder, end: int) -> Sample:
    lengths = (min(len(ids), end) for ids in encoder.tokenize(texts))
    return Sample(end, tuple(texts), tuple(lengths))
