"""Storage profiles: the exact bytes that each vector store documents, and converters between them.

Stores disagree about three things: which bit of a byte is the first dimension, whether a byte is signed, and what
"signed" means (two's complement of the packed byte, or the packed byte minus 128). Hamming distance survives any of
these as long as both sides agree; a float query against stored bits does not, nor do bytes of two producers in one
index.

The encoder's operator gives one canonical form (a bit is 1 where a value is above zero, the first dimension is the most
significant bit; a byte is Sentence Transformers' code). A profile is at most a table look-up on the finished
bytes and another reading of the same 8 bits. This module needs numpy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

__all__ = [
    "PROFILES",
    "Layout",
    "Profile",
    "bit_strings",
    "convert",
    "dequantize",
    "faiss_trained",
    "hex_strings",
    "layout_of",
    "unpack_bits",
]

FLOATS = ("float32", "float16", "bfloat16")
BYTES = ("int8", "uint8")
BITS = ("binary", "ubinary")
SIGN_BIT = np.uint8(0x80)
# Byte b with its bits in reverse order.
REVERSED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)[:, ::-1])


@dataclass(frozen=True)
class Layout:
    """How one store keeps vectors of one precision.

    Args:
        native: the precision of `embed_output` whose bytes it is made of: "ubinary" and "uint8" are codes 0 to 255,
            "binary" and "int8" the same codes minus 128.
        dtype: numpy dtype of a stored value.
        field: what the store calls such a field.
        metric: the distance to search with.
        little: the first dimension is the least significant bit of its byte (default: the most significant).
        dim_multiple: dimensions must be a multiple of this.
        compares_codes: the store takes distances between the codes themselves, so every dimension must have the same
            steps around zero (`calibrate(..., symmetric=True)`).
    """

    native: str
    dtype: str
    field: str
    metric: str
    little: bool = False
    dim_multiple: int = 1
    compares_codes: bool = False


@dataclass(frozen=True)
class Profile:
    """What one store takes.

    Args:
        name: as given to `encode(profile=)`.
        source: where the layouts are documented.
        layouts: precision -> layout. Where a store has one form of a byte or of bits, both names of the precision
            ("int8" and "uint8", "binary" and "ubinary") lead to it.
        refused: precision -> why the store takes none, and what to do instead.
    """

    name: str
    source: str
    layouts: Mapping[str, Layout]
    refused: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layouts", MappingProxyType(dict(self.layouts)))
        object.__setattr__(self, "refused", MappingProxyType(dict(self.refused)))


def _floats(metric: str, **fields: str) -> dict[str, Layout]:
    """Layouts of the float precisions that a store takes, by the name of its field."""
    dtypes = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}
    return {name: Layout(name, dtypes[name], text, metric) for name, text in fields.items()}


def _both(names: tuple[str, str], layout: Layout) -> dict[str, Layout]:
    return dict.fromkeys(names, layout)


_PROFILES = (
    Profile(
        "sentence-transformers",
        "sentence_transformers.util.quantize_embeddings (6.x): floor, minus 128 for the signed forms",
        {
            **_floats("any", float32="float32", float16="float16", bfloat16="bfloat16"),
            "int8": Layout("int8", "int8", "int8", "dequantise first"),
            "uint8": Layout("uint8", "uint8", "uint8", "dequantise first"),
            "binary": Layout("binary", "int8", "binary", "Hamming"),
            "ubinary": Layout("ubinary", "uint8", "ubinary", "Hamming"),
        },
    ),
    Profile(
        "faiss",
        "faiss/utils/hamming.h (fvecs2bitvecs: bit i of byte j is dimension 8j + i) and "
        "faiss/impl/ScalarQuantizer.h (QT_8bit: a byte a dimension, trained = minima then widths)",
        {
            **_floats("METRIC_INNER_PRODUCT", float32="IndexFlat"),
            **_both(BYTES, Layout("uint8", "uint8", "IndexScalarQuantizer QT_8bit", "any")),
            **_both(
                BITS,
                Layout("ubinary", "uint8", "IndexBinary", "Hamming", little=True, dim_multiple=8),
            ),
        },
    ),
    Profile(
        "usearch",
        "usearch README, 'Quantization' and 'Binary': i8 holds values scaled to -127..127, b1 holds numpy.packbits",
        {
            **_floats("ip", float32="f32", float16="f16"),
            **_both(BYTES, Layout("int8", "int8", "i8", "cos or ip", compares_codes=True)),
            **_both(BITS, Layout("ubinary", "uint8", "b1", "hamming", dim_multiple=8)),
        },
    ),
    Profile(
        "qdrant",
        "Qdrant documentation, 'Vectors', datatypes: float32, float16, and uint8 for values 0 to 255",
        {
            **_floats("Dot", float32="float32", float16="float16"),
            **_both(BYTES, Layout("uint8", "uint8", "uint8", "Euclid", compares_codes=True)),
        },
        dict.fromkeys(
            BITS,
            "Qdrant makes bits from floats itself: store float32 or float16, and set a BinaryQuantization",
        ),
    ),
    Profile(
        "milvus",
        "Milvus documentation, 'Binary Vector' (convert_bool_list_to_bytes: bit i of byte j is dimension 8j + i) and "
        "'Dense Vector' (INT8_VECTOR: -128 to 127)",
        {
            **_floats(
                "IP", float32="FLOAT_VECTOR", float16="FLOAT16_VECTOR", bfloat16="BFLOAT16_VECTOR"
            ),
            **_both(BYTES, Layout("int8", "int8", "INT8_VECTOR", "COSINE", compares_codes=True)),
            **_both(
                BITS,
                Layout("ubinary", "uint8", "BINARY_VECTOR", "HAMMING", little=True, dim_multiple=8),
            ),
        },
    ),
    Profile(
        "pgvector",
        "pgvector README, 'Binary Quantization' (binary_quantize: 1 where above zero, the first bit first), and "
        "PostgreSQL's bit(n), whose binary form is the length and then bytes, most significant bit first",
        {
            **_floats("<#>", float32="vector", float16="halfvec"),
            **_both(BITS, Layout("ubinary", "uint8", "bit", "<~>")),
        },
        dict.fromkeys(
            BYTES, "pgvector has no type of one byte a dimension: store float16 (halfvec) or bits"
        ),
    ),
    Profile(
        "elasticsearch",
        "Elasticsearch reference, 'dense_vector', element_type: byte holds -128 to 127; bit holds signed bytes, whose "
        "most significant bit is the first dimension (ESVectorUtil.ipFloatBit)",
        {
            **_floats("dot_product", float32="float"),
            **_both(BYTES, Layout("int8", "int8", "byte", "cosine", compares_codes=True)),
            **_both(BITS, Layout("ubinary", "int8", "bit", "l2_norm", dim_multiple=8)),
        },
    ),
    Profile(
        "vespa",
        "Vespa documentation, 'Binarizing vectors': tensor<int8>, bits as pack_bits leaves them (most significant bit "
        "first, two's complement), read back by unpack_bits",
        {
            **_floats(
                "prenormalized-angular", float32="tensor<float>", bfloat16="tensor<bfloat16>"
            ),
            **_both(BYTES, Layout("int8", "int8", "tensor<int8>", "angular", compares_codes=True)),
            **_both(BITS, Layout("ubinary", "int8", "tensor<int8>", "hamming", dim_multiple=8)),
        },
    ),
    Profile(
        "sqlite-vec",
        "sqlite-vec API reference: vec_quantize_binary (bit i of byte j is dimension 8j + i), vec_int8",
        {
            **_floats("cosine", float32="float[n]"),
            **_both(BYTES, Layout("int8", "int8", "int8[n]", "cosine", compares_codes=True)),
            **_both(
                BITS, Layout("ubinary", "uint8", "bit[n]", "hamming", little=True, dim_multiple=8)
            ),
        },
    ),
)
PROFILES: Mapping[str, Profile] = MappingProxyType({p.name: p for p in _PROFILES})


def layout_of(profile: str, precision: str, dim: int | None = None) -> Layout:
    """Returns how a store keeps vectors of a precision.

    Args:
        profile: one of `PROFILES`.
        precision: as for `encode`.
        dim: dimensions of an embedding, checked when given.

    Raises:
        ValueError: an unknown profile; a precision that the store does not take, with the reason; a dimension that it
            cannot hold.

    Example:
        >>> layout_of("elasticsearch", "binary").dtype
        'int8'
    """
    if profile not in PROFILES:
        raise ValueError(f"profile={profile!r} is unknown: choose one of {list(PROFILES)}")
    found = PROFILES[profile]
    if precision not in found.layouts:
        reason = found.refused.get(precision, f"it takes {', '.join(found.layouts)}")
        raise ValueError(f"profile={profile!r} has no precision {precision!r}: {reason}")
    layout = found.layouts[precision]
    if dim is not None and dim % layout.dim_multiple:
        raise ValueError(
            f"profile={profile!r} keeps {precision} vectors of a multiple of {layout.dim_multiple} dimensions, "
            f"not {dim}: choose another truncate_dim"
        )
    return layout


def convert(codes: np.ndarray, precision: str, *, source: str, target: str) -> np.ndarray:
    """Returns quantised vectors of one store in the layout of another.

    Args:
        codes: (..., width), bytes or packed bits as `source` keeps them.
        precision: "int8" or "uint8" (a byte a dimension), "binary" or "ubinary" (a bit a dimension), as both profiles
            name it.
        source, target: names of profiles.

    Returns:
        (..., width) of the target's dtype, a new array.

    Raises:
        TypeError: codes that are not of the source's dtype.
        ValueError: an unknown profile, or a precision that one of them does not take or that holds no codes.

    Example:
        >>> convert(np.array([[150]], np.uint8), "ubinary", source="pgvector", target="faiss")
        array([[105]], dtype=uint8)
    """
    if precision in FLOATS:
        raise ValueError(f"precision={precision!r} is the same number in every store: use astype")
    return _from_canonical(
        _canonical(codes, layout_of(source, precision), source), layout_of(target, precision)
    )


def _canonical(codes: np.ndarray, layout: Layout, profile: str) -> np.ndarray:
    """Codes 0 to 255, or bits with the first dimension most significant, uint8."""
    codes = np.asarray(codes)
    if codes.dtype != layout.dtype:
        raise TypeError(f"codes of profile {profile!r} are {layout.dtype}, not {codes.dtype}")
    plain = codes.view(np.uint8)
    if layout.little:
        plain = _reversed_bits(plain)
    return plain ^ SIGN_BIT if layout.native in ("int8", "binary") else plain


def _from_canonical(codes: np.ndarray, layout: Layout) -> np.ndarray:
    if layout.native in ("int8", "binary"):
        codes = codes ^ SIGN_BIT
    codes = _reversed_bits(codes) if layout.little else codes.copy()
    return codes.view(layout.dtype)


def _reversed_bits(codes: np.ndarray) -> np.ndarray:
    # Indexing REVERSED would make eight bytes of every one; translating makes one.
    found = bytearray(codes.tobytes()).translate(REVERSED.tobytes())
    return np.frombuffer(found, np.uint8).reshape(codes.shape)


def unpack_bits(codes: np.ndarray, dim: int, *, profile: str) -> np.ndarray:
    """Returns the bits of packed vectors, (..., dim) uint8 of 0 and 1, in the order of the dimensions.

    For a float query q against stored bits, ``(2 · bits - 1) @ q`` ranks better than Hamming distance.

    Args:
        codes: (..., ⌈dim/8⌉) as the profile keeps them.

    Raises:
        TypeError, ValueError: as `convert`; a dimension that does not fit the width.
    """
    bits = _canonical(codes, layout_of(profile, "binary"), profile)
    if bits.shape[-1] != -(-dim // 8):
        raise ValueError(f"{dim} dimensions are {-(-dim // 8)} bytes, not {bits.shape[-1]}")
    return np.unpackbits(bits, axis=-1, count=dim)


def dequantize(codes: np.ndarray, ranges: np.ndarray, *, profile: str) -> np.ndarray:
    """Returns the middle of each code's step, (..., dim) float32: what to rescore with.

    Args:
        codes: (..., dim), one byte a dimension as the profile keeps them.
        ranges: (2, dim), the minima and maxima that they were made with (`Calibration.ranges`).

    Raises:
        TypeError, ValueError: as `convert`; ranges of another dimension.
    """
    precision = "uint8" if np.asarray(codes).dtype == np.uint8 else "int8"
    plain = _canonical(codes, layout_of(profile, precision), profile)
    ranges = np.asarray(ranges, dtype=np.float32)
    if ranges.shape != (2, plain.shape[-1]):
        raise ValueError(f"ranges must have shape (2, {plain.shape[-1]}), not {ranges.shape}")
    steps = (ranges[1] - ranges[0]) / np.float32(255)
    return ranges[0] + (plain + np.float32(0.5)) * steps


def faiss_trained(ranges: np.ndarray) -> np.ndarray:
    """Returns what `ScalarQuantizer.trained` of a QT_8bit index holds for these ranges: minima, then widths.

    With it, ``index.add_sa_codes(codes)`` takes the encoder's bytes as they are, and the index compares float queries
    with the values that the bytes stand for.

    Args:
        ranges: (2, dim) minima and maxima.

    Returns:
        (2·dim,) float32.

    Example:
        >>> index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        >>> faiss.copy_array_to_vector(faiss_trained(calibration.ranges), index.sq.trained)
        >>> index.is_trained = True
        >>> index.add_sa_codes(encoder.encode(texts, precision="int8", calibration=calibration, profile="faiss"))
    """
    ranges = np.asarray(ranges, dtype=np.float32)
    return np.concatenate([ranges[0], ranges[1] - ranges[0]])


def bit_strings(codes: np.ndarray, dim: int, *, profile: str = "pgvector") -> list[str]:
    """Returns packed vectors (N, ⌈dim/8⌉) as texts of 0 and 1, first dimension first: PostgreSQL's bit(n) literals."""
    characters = unpack_bits(codes, dim, profile=profile) + np.uint8(ord("0"))
    return [row.tobytes().decode("ascii") for row in characters]


def hex_strings(codes: np.ndarray) -> list[str]:
    """Returns packed vectors (N, bytes) as hexadecimal texts, which Elasticsearch and Vespa take as well."""
    return [row.tobytes().hex() for row in np.ascontiguousarray(codes)]
