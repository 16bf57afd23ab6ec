"""Storage profiles: byte layouts as documented, converters between all pairs, refusals that say what to do."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.util import quantize_embeddings

from jv5kernels.storage import (
    BITS,
    BYTES,
    FLOATS,
    PROFILES,
    bit_strings,
    convert,
    dequantize,
    faiss_trained,
    hex_strings,
    layout_of,
    unpack_bits,
)

# One vector of every kind that conventions disagree about: the bytes of [+, -, -, -, -, -, -, -].
ONE_BIT = {
    "sentence-transformers": ("binary", np.int8(0)),
    "faiss": ("binary", np.uint8(1)),
    "usearch": ("binary", np.uint8(128)),
    "milvus": ("binary", np.uint8(1)),
    "pgvector": ("binary", np.uint8(128)),
    "elasticsearch": ("binary", np.int8(-128)),
    "vespa": ("binary", np.int8(-128)),
    "sqlite-vec": ("binary", np.uint8(1)),
}
# The byte of code 3 of 0..255 (near the minimum).
CODE_3 = {
    "sentence-transformers": ("int8", np.int8(-125)),
    "faiss": ("int8", np.uint8(3)),
    "usearch": ("int8", np.int8(-125)),
    "qdrant": ("uint8", np.uint8(3)),
    "milvus": ("int8", np.int8(-125)),
    "elasticsearch": ("int8", np.int8(-125)),
    "vespa": ("int8", np.int8(-125)),
    "sqlite-vec": ("int8", np.int8(-125)),
}
WITH_BITS = sorted(ONE_BIT)
WITH_BYTES = sorted(CODE_3)


def stored(precision: str, canonical: np.ndarray, profile: str) -> np.ndarray:
    """Canonical codes in a profile's layout."""
    exact = "ubinary" if precision in BITS else "uint8"
    return convert(canonical, exact, source="sentence-transformers", target=profile)


@pytest.mark.parametrize("profile", WITH_BITS)
def test_one_bit_lies_where_the_store_documents_it(profile: str) -> None:
    precision, expected = ONE_BIT[profile]
    bits = quantize_embeddings(np.array([[0.5] + [-0.5] * 7], np.float32), "ubinary")
    if profile == "sentence-transformers":
        found = quantize_embeddings(np.array([[0.5] + [-0.5] * 7], np.float32), "binary")
    else:
        found = stored(precision, bits, profile)
    assert found.dtype == expected.dtype == layout_of(profile, precision).dtype
    assert found[0, 0] == expected


@pytest.mark.parametrize("profile", WITH_BYTES)
def test_a_code_has_the_sign_that_the_store_documents(profile: str) -> None:
    precision, expected = CODE_3[profile]
    if profile == "sentence-transformers":
        ranges = np.array([[0.0], [255.0]], np.float32)
        found = quantize_embeddings(np.array([[3.5]], np.float32), "int8", ranges=ranges)
    else:
        found = stored(precision, np.array([[3]], np.uint8), profile)
    assert found.dtype == expected.dtype == layout_of(profile, precision).dtype
    assert found[0, 0] == expected


@pytest.mark.parametrize(("source", "target"), list(product(WITH_BITS, WITH_BITS)))
def test_bits_survive_every_conversion(source: str, target: str) -> None:
    floats = np.random.default_rng(0).normal(size=(7, 40)).astype(np.float32)
    codes = stored("binary", np.packbits(floats > 0, axis=1), source)
    if source == "sentence-transformers":
        codes = quantize_embeddings(floats, "binary")
    before = codes.copy()
    there = convert(codes, "binary", source=source, target=target)
    assert np.array_equal(unpack_bits(there, 40, profile=target), floats > 0)
    back = convert(there, "binary", source=target, target=source)
    assert back.dtype == codes.dtype and np.array_equal(back, codes)
    back[...] = 0
    assert np.array_equal(codes, before), "the result is a view of the input"


@pytest.mark.parametrize(("source", "target"), list(product(WITH_BYTES, WITH_BYTES)))
def test_bytes_survive_every_conversion(source: str, target: str) -> None:
    everything = np.arange(256, dtype=np.uint8)[None]
    codes = everything if source == "sentence-transformers" else stored("int8", everything, source)
    if source == "sentence-transformers":
        codes = (everything ^ 0x80).view(np.int8)
    there = convert(codes, "int8", source=source, target=target)
    assert there.dtype == layout_of(target, "int8").dtype
    assert np.array_equal(convert(there, "int8", source=target, target=source), codes)
    ranges = np.stack([np.zeros(256), np.full(256, 255.0)]).astype(np.float32)
    expected = np.arange(256) + 0.5
    np.testing.assert_allclose(dequantize(there, ranges, profile=target)[0], expected)


@given(st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_any_dimension_keeps_its_bits(dim: int, seed: int) -> None:
    floats = np.random.default_rng(seed).normal(size=(3, dim))
    codes = np.packbits(floats > 0, axis=1)
    assert np.array_equal(unpack_bits(codes, dim, profile="pgvector"), floats > 0)
    texts = bit_strings(codes, dim)
    assert texts == ["".join("01"[bit] for bit in row) for row in (floats > 0).astype(int)]


def test_hamming_distance_is_the_same_in_every_layout() -> None:
    floats = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32)
    bits = np.packbits(floats > 0, axis=1)
    for profile in WITH_BITS:
        codes = stored("binary", bits, profile).view(np.uint8)
        assert np.unpackbits(codes[0] ^ codes[1]).sum() == np.unpackbits(bits[0] ^ bits[1]).sum()


def test_hexadecimal_texts_are_the_packed_bytes() -> None:
    codes = convert(np.array([[150, 1]], np.uint8), "binary", source="usearch", target="vespa")
    assert codes.tolist() == [[-106, 1]] and hex_strings(codes) == ["9601"]


def test_dequantised_values_are_within_half_a_step() -> None:
    floats = np.random.default_rng(2).normal(size=(500, 24)).astype(np.float32)
    floats[:, 5] = 0.25  # a constant dimension
    ranges = np.stack([floats.min(0), floats.max(0)])
    codes = quantize_embeddings(floats, "int8", ranges=ranges)
    half = (ranges[1] - ranges[0]) / 510
    error = np.abs(dequantize(codes, ranges, profile="sentence-transformers") - floats)
    assert (error <= half * 1.001 + 1e-7).all()
    assert faiss_trained(ranges).tolist() == [*ranges[0], *(ranges[1] - ranges[0])]


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_every_profile_says_where_its_layouts_are_documented(profile: str) -> None:
    found = PROFILES[profile]
    assert found.name == profile and len(found.source) > 20
    for precision, layout in found.layouts.items():
        same = {"float32", "float16", "bfloat16"} if precision in FLOATS else set()
        assert layout.native in (same or {*BITS, *BYTES})
        assert (layout.native in BITS) == (precision in BITS)


def test_what_a_store_does_not_take_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="profile='redis' is unknown: choose one of .*'faiss'"):
        layout_of("redis", "binary")
    with pytest.raises(ValueError, match="pgvector.*no precision 'int8'.*halfvec"):
        layout_of("pgvector", "int8")
    with pytest.raises(ValueError, match="Qdrant makes bits from floats itself"):
        layout_of("qdrant", "ubinary")
    with pytest.raises(ValueError, match="no precision 'bfloat16': it takes float32, float16"):
        layout_of("usearch", "bfloat16")
    with pytest.raises(ValueError, match="multiple of 8 dimensions, not 61"):
        layout_of("milvus", "binary", 61)
    with pytest.raises(TypeError, match="codes of profile 'vespa' are int8, not uint8"):
        convert(np.zeros((1, 2), np.uint8), "binary", source="vespa", target="faiss")
    with pytest.raises(ValueError, match="use astype"):
        convert(np.zeros((1, 2), np.float32), "float32", source="vespa", target="faiss")
    with pytest.raises(ValueError, match="9 dimensions are 2 bytes, not 1"):
        unpack_bits(np.zeros((1, 1), np.uint8), 9, profile="usearch")
    with pytest.raises(ValueError, match=r"ranges must have shape \(2, 3\)"):
        dequantize(np.zeros((1, 3), np.int8), np.zeros((2, 4)), profile="vespa")
