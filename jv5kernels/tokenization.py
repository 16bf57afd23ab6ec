"""Texts to token ids: prompts, truncation and the special-token contract.

A prompt and its text are joined as strings before they are tokenised: the prompt's trailing space merges into the
text's first token. Special tokens are those that the tokenizer's post-processor adds, none else: jina's nano ends every
text with <|end_of_text|>, also a truncated one, while small adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from jv5kernels.text_prefix import TextPrefix

__all__ = ["LocatedTokens", "TokenizedTexts", "Tokenization", "check_texts", "resolve_prompt"]

# Tokenised once to learn what is added around a text, and to check that truncation keeps it.
PROBE = "a 7 b 8 c 9 d 10"


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of some texts, in order.

    Args:
        ids: one int32 array a text, at most max_length long, special tokens included; made when it is asked for.
        lengths: (N,) int64, tokens of each text before truncation; of a text that is far longer than max_length only
            a lower bound beyond it, since the rest was not tokenised.
        truncated: (N,) bool, where a text was longer than max_length.
    """

    ids: Sequence[np.ndarray]
    lengths: np.ndarray
    truncated: np.ndarray


class _Ids(Sequence[np.ndarray]):
    """Token ids of encodings, cut to a limit and converted when asked for.

    The conversion holds Python's lock: a thread that tokenises for another one leaves it to that one, which would
    otherwise wait for the lock at every call that it makes.
    """

    def __init__(self, encodings: Sequence[Encoding], limit: int, after: int) -> None:
        self._encodings = encodings
        self._limit = limit
        self._after = after

    def __len__(self) -> int:
        return len(self._encodings)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Ids(self._encodings[index], self._limit, self._after)
        ids = np.array(self._encodings[index].ids, dtype=np.int32)
        return _cut(ids, self._limit, self._after)


@dataclass(frozen=True)
class LocatedTokens:
    """Token ids of one text and where they lie in it.

    Args:
        ids: (kept,) int32, special tokens included, cut to max_length.
        first: row of the first token of the text in `ids`, after the special tokens before it.
        kept: tokens of the text that `ids` holds, from the first on.
        starts, ends: (tokens,) characters [start, end) of every token of the text, also of those cut off; both ascend,
            and every character belongs to at least one token (to several where a character takes several).
    """

    ids: np.ndarray
    first: int
    kept: int
    starts: np.ndarray
    ends: np.ndarray


class Tokenization:
    """Tokenises texts; threads may share it, since nothing is changed after construction.

    Args:
        tokenizer: copied, so that its owner may go on changing it; its padding and truncation are left out.
        max_seq_length: tokens a text, special tokens included, unless a call asks for less.

    Raises:
        ValueError: max_seq_length leaves no room for the special tokens; or truncation by the tokenizer itself would
            not keep the tokens that it puts around a text.

    Example:
        >>> Tokenization(tokenizer, 8192).encode(["Query: a text"]).ids[0].dtype
        dtype('int32')
    """

    def __init__(self, tokenizer: Tokenizer, max_seq_length: int) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._before, self._after = self._special_tokens()
        self._prefix = TextPrefix(self._tokenizer)
        self.max_seq_length = self._check_length("max_seq_length", max_seq_length)

    def encode(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        positions: Sequence[int] | np.ndarray | None = None,
    ) -> TokenizedTexts:
        """Returns the token ids of texts that already carry their prompt, cut on the right to max_length.

        Args:
            max_length: tokens a text, special tokens included; default max_seq_length.
            positions: numbers by which errors name the texts; default their index.

        Raises:
            TypeError: a text is not a str; nothing is encoded.
            ValueError: a text holds a lone surrogate, or gives no tokens at all.
        """
        limit = self.max_seq_length
        if max_length is not None:
            limit = self._check_length("max_length", max_length)
        names: Sequence[int] | np.ndarray = range(len(texts)) if positions is None else positions
        for name, text in zip(names, texts, strict=True):
            if not isinstance(text, str):
                raise TypeError(f"texts[{name}] must be a str, not {type(text).__name__}")
        encodings = self._encode_up_to(limit, texts, names)
        lengths = np.fromiter(map(len, encodings), dtype=np.int64, count=len(encodings))
        if not lengths.all():
            raise ValueError(
                f"texts[{names[int(lengths.argmin())]}] gives no tokens: it is empty, without a prompt, and this "
                "tokenizer adds no special token; there is nothing to embed"
            )
        return TokenizedTexts(_Ids(encodings, limit, self._after), lengths, lengths > limit)

    def _encode_up_to(
        self, limit: int, texts: Sequence[str], names: Sequence[int] | np.ndarray
    ) -> list[Encoding]:
        """Encodings that are whole, or longer than limit and right up to there."""
        if not self._prefix.may_cut(max(map(len, texts), default=0), limit):
            return self._encode_all(texts, names)
        prefixes = [self._prefix.of(text, limit) for text in texts]
        encodings = self._encode_all(prefixes, names)
        for i, (prefix, text) in enumerate(zip(prefixes, texts, strict=True)):
            if len(prefix) < len(text) and len(encodings[i]) <= limit:
                encodings[i] = self._encode_all([text], [names[i]])[0]
        return encodings

    def locate(self, text: str, *, max_length: int | None = None) -> LocatedTokens:
        """Returns the token ids of one text, as `encode` gives them, and the characters of each token.

        Raises:
            TypeError, ValueError: as `encode`.
        """
        limit = self.max_seq_length
        if max_length is not None:
            limit = self._check_length("max_length", max_length)
        try:
            encoding = self._tokenizer.encode(text)
        except TypeError:
            self.encode([text])  # says what is wrong with the text
            raise
        if not len(encoding):
            self.encode([text])  # says that there is nothing to embed
        ids = _cut(np.array(encoding.ids, dtype=np.int32), limit, self._after)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        starts, ends = offsets[self._before : len(offsets) - self._after].T
        # A character that a normaliser merged into its neighbour, or that no token claims, goes with the token before.
        ends = np.maximum(ends, np.append(starts[1:], len(text))[: len(ends)])
        kept = min(len(starts), len(ids) - self._before - self._after)
        return LocatedTokens(ids, self._before, kept, starts, ends)

    def _encode_all(
        self, texts: Sequence[str], names: Sequence[int] | np.ndarray
    ) -> list[Encoding]:
        try:
            return self._tokenizer.encode_batch_fast(list(texts))
        except TypeError:
            for name, text in zip(names, texts, strict=True):
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise ValueError(f"texts[{name}] is not valid Unicode: {error}") from error
            raise

    def _check_length(self, name: str, length: int) -> int:
        least = max(1, self._before + self._after)
        if length < least:
            raise ValueError(f"{name}={length} is too small: this tokenizer needs at least {least}")
        return length

    def _special_tokens(self) -> tuple[int, int]:
        """How many tokens are put before and after every text.

        A tokenizer that appends by other means than its post-processor (a normaliser, say) would drop the token when
        it truncates, and last-token pooling would then read another one.
        """
        probe = self._tokenizer.encode(PROBE)
        is_text = np.flatnonzero(np.array(probe.special_tokens_mask) == 0)
        before, after = int(is_text[0]), len(probe) - 1 - int(is_text[-1])
        contrary = self._tokenizer.encode(PROBE[::-1]).ids
        constant_end = _common(probe.ids[::-1], contrary[::-1])
        # The copy is still private to this thread, so its settings may be changed for the probe.
        for limit in range(before + after + 1, len(probe)):
            self._tokenizer.enable_truncation(limit)
            native = self._tokenizer.encode(PROBE).ids
            kept = probe.ids[: limit - after] + probe.ids[len(probe) - after :]
            if (
                native != kept
                or native[len(native) - constant_end :] != probe.ids[len(probe) - constant_end :]
            ):
                raise ValueError(
                    f"the tokenizer ends texts with {probe.tokens[len(probe) - constant_end :]}, but truncated ones "
                    f"with {self._tokenizer.encode(PROBE).tokens[-max(1, constant_end) :]}: its special tokens must "
                    "come from a template post-processor, which truncation leaves room for"
                )
        self._tokenizer.no_truncation()
        return before, after


def _cut(ids: np.ndarray, limit: int, after: int) -> np.ndarray:
    """The first tokens, then the special ones that end every text."""
    if len(ids) <= limit:
        return ids
    return np.concatenate([ids[: limit - after], ids[len(ids) - after :]])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common start."""
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return same


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list; TypeError naming position and type of the first that is not a str."""
    if not isinstance(texts, Sequence) and not hasattr(texts, "__iter__"):
        raise TypeError(f"inputs must be a str or a sequence of str, not {type(texts).__name__}")
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"inputs[{position}] must be a str, not {type(text).__name__}")
    return texts


def resolve_prompt(
    prompts: Mapping[str, str],
    default_prompt_name: str | None,
    prompt_name: str | None = None,
    prompt: str | None = None,
) -> str:
    """Returns the text to put before every input.

    Args:
        prompts: name -> prompt.
        default_prompt_name: used when the call names none; None for no prompt.
        prompt_name: a name among the prompts.
        prompt: the prompt itself; wins over a name.

    Raises:
        ValueError: an unknown name; the valid ones are listed.
        TypeError: prompt is not a str.

    Example:
        >>> resolve_prompt({"query": "Query: ", "document": "Document: "}, "document")
        'Document: '
    """
    if prompt is not None:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a str, not {type(prompt).__name__}")
        return prompt
    name = default_prompt_name if prompt_name is None else prompt_name
    if name is None:
        return ""
    if name not in prompts:
        which = "default_prompt_name" if prompt_name is None else "prompt_name"
        raise ValueError(
            f"{which}={name!r} is unknown: choose one of {sorted(prompts)}, or give prompt= itself ('' for none)"
        )
    return prompts[name]
