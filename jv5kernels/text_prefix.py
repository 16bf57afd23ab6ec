"""How much of a long text must be tokenised: a prefix whose tokens are the first tokens of the whole.

A text may be cut wherever the pre-tokeniser splits it whatever follows, and its normaliser does not look across. For
the pre-tokenisers of Qwen and Llama 3, with NFC or no normaliser, that is

* before a space that follows a character other than white space: no alternative of the pattern matches such a pair,
  and none looks ahead past the end of a run of white space;
* before CJK punctuation that follows a CJK letter: every alternative that takes a letter ends with the run of letters.

Neither the space nor that punctuation composes with what stands before it, so NFC of the parts is NFC of the whole.
Other tokenizers are not cut: their texts are tokenised as they are.
"""

from __future__ import annotations

import json
import re

from tokenizers import Tokenizer, models, normalizers

__all__ = ["TextPrefix"]

# Characters that are taken for each token of the limit: texts seldom have more, and those are tokenised whole.
CHARACTERS_A_TOKEN = 6
# How far beyond that a place to cut is looked for.
SEARCH_CHARACTERS = 4096
# Shorter texts than this many times the prefix are not worth a cut.
WORTHWHILE = 1.25

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN_PATTERNS = frozenset(_PATTERN.format(digits=d) for d in (r"\p{N}", r"\p{N}{1,3}"))
# U+180E was white space in old Unicode tables.
_SPACE = "(?<=[^\\s\u180e]) "
_CJK_LETTER = "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_CJK_PUNCTUATION = "\u3001\u3002\uff01\uff0c\uff1f"
CUT = re.compile(f"{_SPACE}|(?<=[{_CJK_LETTER}])[{_CJK_PUNCTUATION}]")


class TextPrefix:
    """Cuts texts for one tokenizer.

    Args:
        tokenizer: without truncation.

    Example:
        >>> TextPrefix(tokenizer).of("word " * 1000, max_length=10)
        'word word word ...'    # 128 characters: 10 tokens are far fewer
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.can_cut = _splits_at_cuts(tokenizer)

    def may_cut(self, characters: int, max_length: int) -> bool:
        """Whether a text of so many characters may be longer than what `of` gives."""
        worthwhile = WORTHWHILE * CHARACTERS_A_TOKEN * max_length + SEARCH_CHARACTERS
        return self.can_cut and characters > worthwhile

    def of(self, text: str, max_length: int) -> str:
        """The text, or a prefix of it. The tokens of a prefix, special ones apart, begin those of the text.

        Args:
            max_length: tokens that are wanted; a prefix may turn out to have fewer.
        """
        if not self.may_cut(len(text), max_length):
            return text
        target = CHARACTERS_A_TOKEN * max_length
        found = CUT.search(text, target, target + SEARCH_CHARACTERS)
        return text if found is None else text[: found.start()]


def _splits_at_cuts(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer is one of those that the module's docstring argues for."""
    normalizer, model = tokenizer.normalizer, tokenizer.model
    if normalizer is not None and not isinstance(normalizer, normalizers.NFC):
        return False
    if not isinstance(model, models.BPE) or model.dropout:
        return False
    if tokenizer.pre_tokenizer is None or not _is_known_split(tokenizer.pre_tokenizer):
        return False
    # Added tokens are found before the text is split.
    added = tokenizer.get_added_tokens_decoder().values()
    return not any(CUT.search(token.content) for token in added)


def _is_known_split(pre_tokenizer: object) -> bool:
    state = json.loads(pre_tokenizer.__getstate__())  # type: ignore[attr-defined]
    steps = state.get("pretokenizers", [])
    if state.get("type") != "Sequence" or [s["type"] for s in steps] != ["Split", "ByteLevel"]:
        return False
    split, byte_level = steps
    return (
        split["pattern"].get("Regex") in KNOWN_PATTERNS
        and split["behavior"] == "Isolated"
        and not split["invert"]
        and not byte_level["add_prefix_space"]
        and not byte_level["use_regex"]
    )
