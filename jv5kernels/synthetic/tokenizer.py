"""Byte-level BPE tokenizers trained on the spot, with the special tokens of each family.

They split text as the real ones do (Qwen's and Llama 3's pre-tokenisers); only their vocabulary is small.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

__all__ = ["DEFAULT_CORPUS", "SPECIAL_TOKENS", "train_tokenizer"]

VOCAB_SIZE = 2048
# Digits one by one (Qwen), or up to three together (Llama 3); the rest of the pattern is the same.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = {"small": r"\p{N}", "qwen3-embedding": r"\p{N}", "nano": r"\p{N}{1,3}"}
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPECIAL_TOKENS = {
    "small": QWEN_SPECIAL,
    "qwen3-embedding": QWEN_SPECIAL,
    "nano": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|mask|>",
        "<|parallel_sep|>",
        "<|pad|>",
    ),
}
# The token that the post-processor puts after every text; small has none.
APPENDED = {"small": None, "qwen3-embedding": "<|endoftext|>", "nano": "<|end_of_text|>"}

DEFAULT_CORPUS = (
    "Query: What is a kernel, and how fast does light travel in a vacuum?",
    "Query: Which planet is known as the Red Planet?",
    "Query: How do I read the lines of a text file one by one?",
    "Document: In a vacuum, light travels 299,792,458 metres every second - a universal constant of nature.",
    "Document: Mars, known for its reddish appearance, is often referred to as the Red Planet.",
    "Document: Venus is often called Earth's twin because of its similar size and proximity.",
    "Document: Jupiter, the largest planet in our solar system, has a prominent red spot.",
    "Document: Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
    "The quick brown fox jumps over the lazy dog, and then it runs away from the other dogs.",
    "An embedding maps a text to a vector, so that texts of similar meaning have similar vectors.",
    "Attention computes a weighted sum of the values, where the weights come from queries and keys.",
    "The committee decided on Tuesday that the decision of the previous committee should be kept.",
    "There is nothing in the world that is so difficult that it cannot be learned with some patience.",
    "Il n'y a pas de fumée sans feu, et les petits ruisseaux font les grandes rivières.",
    "La tour Eiffel est une tour de fer puddlé de trois cent trente mètres de hauteur située à Paris.",
    "Der schnelle braune Fuchs springt über den faulen Hund, und die Sonne scheint über den Bergen.",
    "Die Würde des Menschen ist unantastbar; sie zu achten und zu schützen ist Verpflichtung.",
    "El rápido zorro marrón salta sobre el perro perezoso mientras la gente mira desde la ventana.",
    "A rápida raposa castanha salta por cima do cão preguiçoso em todas as manhãs de domingo.",
    "La volpe veloce e marrone salta sopra il cane pigro, che dorme sotto la finestra della casa.",
    "Быстрая коричневая лиса прыгает через ленивую собаку, и никто не знает почему.",
    "Эмбеддинги остаются хорошими после усечения размерности.",
    "Szybki brązowy lis przeskakuje nad leniwym psem, a dzieci patrzą przez okno.",
    "Hızlı kahverengi tilki tembel köpeğin üzerinden atlar ve ormana doğru koşar.",
    "快速的棕色狐狸跳过了懒狗。向量表示文本的含义,相似的文本有相似的向量。",
    "長い文章は多くのトークンになります。速い茶色の狐がのろまな犬を飛び越える。",
    "빠른 갈색 여우가 게으른 개를 뛰어넘는다. 문장은 벡터로 표현됩니다.",
    "الثعلب البني السريع يقفز فوق الكلب الكسول، والشمس تشرق كل صباح.",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर से कूदती है और जंगल में चली जाती है।",
    "def read_lines(path):\n    with open(path, encoding='utf-8') as file:\n        return [line for line in file]",
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }  // returns the dot product of the vectors",
    '{"id": 1024, "text": "a JSON object", "score": 0.875, "tags": ["first", "second", "third"]}',
)


def train_tokenizer(
    family: str, corpus: Iterable[str] | None = None, *, vocab_size: int = VOCAB_SIZE
) -> Tokenizer:
    """Returns a tokenizer of a family's layout, the same one for the same corpus.

    Args:
        family: "small" (nothing appended), "nano" (<|end_of_text|> appended) or "qwen3-embedding" (<|endoftext|>).
        corpus: texts to learn merges from; default a few sentences in fifteen languages.
        vocab_size: bytes and merges; special tokens come on top.
    """
    texts = DEFAULT_CORPUS if corpus is None else tuple(corpus)
    return Tokenizer.from_str(_trained(family, texts, vocab_size))


@lru_cache(maxsize=16)
def _trained(family: str, corpus: tuple[str, ...], vocab_size: int) -> str:
    tokenizer = Tokenizer(BPE(ignore_merges=True))
    if family != "nano":
        tokenizer.normalizer = normalizers.NFC()
    pattern = Regex(PATTERN.format(digits=DIGITS[family]))
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(pattern, behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    # After training, so that their ids follow the vocabulary as in the real files.
    specials = [
        AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS[family]
    ]
    tokenizer.add_special_tokens(specials)
    appended = APPENDED[family]
    if appended is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=f"$A {appended}",
            pair=f"$A {appended} $B {appended}",
            special_tokens=[(appended, tokenizer.token_to_id(appended))],
        )
    return tokenizer.to_str()
