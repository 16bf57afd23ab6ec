"""Storage profiles against the stores themselves: what goes in comes out, and ranks as the embeddings do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stores import milvus, postgres, sqlite_vec, store

from jv5kernels import FastEncoder
from jv5kernels.storage import bit_strings, convert, dequantize, faiss_trained, hex_strings
from jv5kernels.synthetic.checkpoint import write_checkpoint

WORDS = "kernel vector store byte order sign index recall query corpus lake forest river".split()
TEXTS = [
    f"{WORDS[i % 13]} and {WORDS[(i * 5 + 2) % 13]} of {WORDS[(i // 13) % 13]} {i}"
    for i in range(150)
]
DIM, QUERIES, TOP = 64, 12, 10


class Corpus:
    """Embeddings of a corpus in every precision; the first texts are also the queries."""

    def __init__(self, encoder: FastEncoder) -> None:
        self.encoder = encoder
        self.floats = encoder.encode(TEXTS)
        self.bits = self.floats > 0
        self.per_dimension = encoder.calibrate(TEXTS)
        self.symmetric = encoder.calibrate(TEXTS, symmetric=True)

    def encode(self, precision: str, profile: str, **options) -> np.ndarray:
        options.setdefault("calibration", self.symmetric)
        return self.encoder.encode(TEXTS, precision=precision, profile=profile, **options)

    @property
    def hamming(self) -> np.ndarray:
        """(queries, texts) distances between bits."""
        return (self.bits[:QUERIES, None] != self.bits[None]).sum(2)

    @property
    def nearest(self) -> np.ndarray:
        """(queries, TOP) the float32 ranking."""
        return np.argsort(-(self.floats[:QUERIES] @ self.floats.T), axis=1)[:, :TOP]

    def recall(self, found: np.ndarray) -> float:
        """Share of the float32 neighbours among those found."""
        pairs = zip(self.nearest.tolist(), np.asarray(found).tolist(), strict=True)
        return float(np.mean([len({*a} & {*b[:TOP]}) / TOP for a, b in pairs]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("model") / "model"
    write_checkpoint(folder, family="nano", layout="merged", task="retrieval")
    return Corpus(FastEncoder(folder, device="cpu", truncate_dim=DIM, pooling="mean"))


# faiss.


def test_faiss_bits_are_those_that_faiss_packs(corpus: Corpus) -> None:
    faiss = store("faiss")
    codes = corpus.encode("binary", "faiss")
    packed = np.zeros_like(codes)
    pointers = faiss.swig_ptr(corpus.floats), faiss.swig_ptr(packed)
    faiss.fvecs2bitvecs(*pointers, DIM, len(codes))
    assert np.array_equal(codes, packed)
    index = faiss.IndexBinaryFlat(DIM)
    index.add(codes)
    distances, found = index.search(codes[:QUERIES], TOP)
    assert np.array_equal(distances, np.take_along_axis(corpus.hamming, found, 1))
    assert np.array_equal(distances, np.sort(corpus.hamming, axis=1)[:, :TOP])


def test_faiss_takes_calibrated_bytes_and_float_queries(corpus: Corpus) -> None:
    faiss = store("faiss")
    ranges = corpus.per_dimension.ranges
    index = faiss.IndexScalarQuantizer(
        DIM, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    faiss.copy_array_to_vector(faiss_trained(ranges), index.sq.trained)
    index.is_trained = True
    codes = corpus.encode("int8", "faiss", calibration=corpus.per_dimension)
    index.add_sa_codes(codes)
    decoded = index.reconstruct_n(0, len(codes))
    np.testing.assert_allclose(decoded, dequantize(codes, ranges, profile="faiss"), atol=1e-6)
    # faiss would have made the same codes, but for values that its arithmetic rounds across a step.
    theirs = index.sa_encode(corpus.floats).astype(int)
    assert (theirs != codes).mean() < 1e-3 and np.abs(theirs - codes).max() <= 1
    assert corpus.recall(index.search(corpus.floats[:QUERIES], TOP)[1]) > 0.95


@pytest.mark.parametrize(("kind", "zero"), [("QT_8bit_direct", 0), ("QT_8bit_direct_signed", 128)])
def test_faiss_direct_indexes_read_the_same_bytes(corpus: Corpus, kind: str, zero: int) -> None:
    faiss = store("faiss")
    codes = corpus.encode("int8", "faiss")
    index = faiss.IndexScalarQuantizer(DIM, getattr(faiss.ScalarQuantizer, kind), faiss.METRIC_L2)
    index.add_sa_codes(codes)
    assert np.array_equal(index.reconstruct_n(0, len(codes)), codes.astype(np.float32) - zero)
    found = index.search(codes[:QUERIES].astype(np.float32) - zero, TOP)[1]
    assert corpus.recall(found) > 0.95


# usearch.


def test_usearch_bits(corpus: Corpus) -> None:
    store("usearch")
    from usearch.index import Index

    codes = corpus.encode("binary", "usearch")
    assert np.array_equal(codes, np.packbits(corpus.bits, axis=1))
    index = Index(ndim=DIM, metric="hamming", dtype="b1")
    index.add(np.arange(len(codes)), codes)
    assert np.array_equal(np.asarray(index.get(7), np.uint8), codes[7])
    found = index.search(codes[:QUERIES], TOP, exact=True)
    assert np.array_equal(found.distances, np.sort(corpus.hamming, axis=1)[:, :TOP])


@pytest.mark.parametrize("metric", ["cos", "ip"])
def test_usearch_bytes(corpus: Corpus, metric: str) -> None:
    store("usearch")
    from usearch.index import Index

    codes = corpus.encode("int8", "usearch")
    index = Index(ndim=DIM, metric=metric, dtype="i8")
    index.add(np.arange(len(codes)), codes)
    assert np.array_equal(index.get(7, dtype="i8"), codes[7])
    found = index.search(codes[:QUERIES], TOP, exact=True).keys
    assert corpus.recall(found.astype(np.int64)) > 0.95


# Qdrant.


def test_qdrant_bytes(corpus: Corpus) -> None:
    models = store("qdrant_client").models
    from qdrant_client import QdrantClient

    codes = corpus.encode("int8", "qdrant")
    client = QdrantClient(":memory:")
    vectors = models.VectorParams(
        size=DIM, distance=models.Distance.EUCLID, datatype=models.Datatype.UINT8
    )
    client.create_collection("corpus", vectors_config=vectors)
    client.upsert(
        "corpus", [models.PointStruct(id=i, vector=row.tolist()) for i, row in enumerate(codes)]
    )
    stored = client.retrieve("corpus", [7], with_vectors=True)[0].vector
    assert np.array_equal(stored, codes[7])
    found = [
        [point.id for point in client.query_points("corpus", query=row, limit=TOP).points]
        for row in codes[:QUERIES].tolist()
    ]
    client.close()
    assert corpus.recall(found) > 0.95


# Milvus.


@pytest.mark.parametrize(
    ("precision", "field", "metric"),
    [
        ("binary", "BINARY_VECTOR", "HAMMING"),
        ("float16", "FLOAT16_VECTOR", "IP"),
        ("float32", "FLOAT_VECTOR", "IP"),
    ],
)
def test_milvus_fields(corpus: Corpus, tmp_path: Path, precision, field, metric) -> None:
    """Milvus Lite has no INT8_VECTOR; its bytes are checked against the documented range alone."""
    kind = store("pymilvus").DataType[field]
    vectors = corpus.encode(precision, "milvus")
    rows = list(vectors) if precision != "binary" else [row.tobytes() for row in vectors]
    with milvus(tmp_path / "milvus.db") as client:
        schema = client.create_schema()
        schema.add_field("id", store("pymilvus").DataType.INT64, is_primary=True)
        schema.add_field("vector", kind, dim=DIM)
        index = client.prepare_index_params()
        flat = "BIN_FLAT" if precision == "binary" else "FLAT"
        index.add_index("vector", index_type=flat, metric_type=metric)
        client.create_collection("corpus", schema=schema, index_params=index)
        client.insert("corpus", [{"id": i, "vector": row} for i, row in enumerate(rows)])
        (back,) = client.query("corpus", ids=[7], output_fields=["vector"])
        if precision != "float32":
            assert b"".join(back["vector"]) == vectors[7].tobytes()
        hits = client.search("corpus", data=rows[:QUERIES], limit=TOP)
    if precision == "binary":
        distances = [[hit["distance"] for hit in row] for row in hits]
        assert np.array_equal(distances, np.sort(corpus.hamming, axis=1)[:, :TOP])
    else:
        assert corpus.recall([[hit["id"] for hit in row] for row in hits]) > 0.9


def test_milvus_bits_are_packed_as_its_documentation_packs_them(corpus: Corpus) -> None:
    packed = np.zeros((len(TEXTS), DIM // 8), np.uint8)
    for dimension in range(DIM):
        packed[:, dimension // 8] |= corpus.bits[:, dimension].astype(np.uint8) << dimension % 8
    assert np.array_equal(corpus.encode("ubinary", "milvus"), packed)


# pgvector.


def test_pgvector_types(corpus: Corpus, tmp_path: Path) -> None:
    codes = corpus.encode("binary", "pgvector")
    halves = corpus.encode("float16", "pgvector")
    with postgres(tmp_path / "data") as connection:
        connection.execute(
            f"create table corpus (id int, v vector({DIM}), h halfvec({DIM}), b bit({DIM}))"
        )
        rows = zip(corpus.floats.tolist(), halves.tolist(), bit_strings(codes, DIM), strict=True)
        with connection.cursor() as cursor:
            cursor.executemany(
                f"insert into corpus values (%s, %s, %s, %s::bit({DIM}))",
                [(i, str(v), str(h), b) for i, (v, h, b) in enumerate(rows)],
            )
        different = connection.execute(
            f"select count(*) from corpus where b <> binary_quantize(v)::bit({DIM})"
        )
        assert different.fetchone() == (0,)
        # The binary form of bit(n) is its length and our bytes.
        (sent,) = connection.execute("select bit_send(b) from corpus where id = 7").fetchone()
        assert sent == DIM.to_bytes(4, "big") + codes[7].tobytes()
        nearest = "select id from corpus order by h <#> %s::halfvec limit %s"
        found = [
            [row[0] for row in connection.execute(nearest, (str(query), TOP)).fetchall()]
            for query in halves[:QUERIES].tolist()
        ]
        distances = "select b <~> (select b from corpus where id = %s) from corpus order by id"
        hamming = [
            [row[0] for row in connection.execute(distances, (query,)).fetchall()]
            for query in range(QUERIES)
        ]
    assert corpus.recall(found) > 0.9
    assert np.array_equal(hamming, corpus.hamming)


# sqlite-vec.


def test_sqlite_vec_types(corpus: Corpus) -> None:
    codes, values = corpus.encode("binary", "sqlite-vec"), corpus.encode("int8", "sqlite-vec")
    with sqlite_vec() as connection:
        for row, packed in zip(corpus.floats[:20], codes, strict=False):
            theirs = connection.execute("select vec_quantize_binary(?)", (row.tobytes(),))
            assert theirs.fetchone() == (packed.tobytes(),)
        connection.execute(
            f"create virtual table corpus using vec0(b bit[{DIM}], v int8[{DIM}] distance_metric=cosine)"
        )
        connection.executemany(
            "insert into corpus (rowid, b, v) values (?, vec_bit(?), vec_int8(?))",
            [
                (i, b.tobytes(), v.tobytes())
                for i, (b, v) in enumerate(zip(codes, values, strict=True))
            ],
        )
        by_bits = "select distance from corpus where b match vec_bit(?) and k = ? order by distance"
        distances = [
            [row[0] for row in connection.execute(by_bits, (code.tobytes(), TOP))]
            for code in codes[:QUERIES]
        ]
        by_bytes = "select rowid from corpus where v match vec_int8(?) and k = ? order by distance"
        found = [
            [row[0] for row in connection.execute(by_bytes, (value.tobytes(), TOP))]
            for value in values[:QUERIES]
        ]
    assert np.array_equal(distances, np.sort(corpus.hamming, axis=1)[:, :TOP])
    assert corpus.recall(found) > 0.95


# Elasticsearch and Vespa do not run here: their documented layouts, byte by byte.


def test_elasticsearch_bits_are_signed_bytes_with_the_first_dimension_on_top(
    corpus: Corpus,
) -> None:
    """ESVectorUtil.ipFloatBit adds query[8i + k] where (byte[i] >> (7 - k)) & 1; a Java byte is signed."""
    codes = corpus.encode("binary", "elasticsearch")
    query = corpus.floats[0]
    scores = np.zeros(len(codes))
    for k in range(8):
        scores += (codes.astype(int) >> (7 - k) & 1) @ query[k::8].astype(np.float64)
    np.testing.assert_allclose(scores, corpus.bits @ query.astype(np.float64), atol=1e-9)
    assert codes.dtype == np.int8 and codes.min() < 0 < codes.max()
    # The hexadecimal form is the same bytes.
    assert bytes.fromhex(hex_strings(codes)[5]) == np.packbits(corpus.bits[5]).tobytes()


def test_vespa_bits_are_what_its_documentation_computes(corpus: Corpus) -> None:
    """The documented Python is numpy.packbits(numpy.where(v > 0, 1, 0), axis=1).astype(numpy.int8)."""
    documented = np.packbits(np.where(corpus.floats > 0, 1, 0), axis=1).astype(np.int8)
    assert np.array_equal(corpus.encode("binary", "vespa"), documented)
    codes = corpus.encode("binary", "vespa")
    assert np.array_equal(convert(codes, "binary", source="vespa", target="elasticsearch"), codes)


@pytest.mark.parametrize("profile", ["elasticsearch", "milvus", "vespa"])
def test_signed_bytes_are_rounded_multiples_of_one_step(corpus: Corpus, profile: str) -> None:
    codes = corpus.encode("int8", profile)
    step = np.abs(corpus.floats).max() / 127
    assert codes.dtype == np.int8
    assert np.abs(codes - corpus.floats / step).max() <= 0.501
    lengths = np.linalg.norm(codes.astype(float), axis=1, keepdims=True)
    found = np.argsort(-((codes[:QUERIES] / lengths[:QUERIES]) @ (codes / lengths).T), axis=1)
    assert corpus.recall(found) > 0.95
