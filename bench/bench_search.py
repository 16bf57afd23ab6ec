"""Worked examples: binary search and rescoring with faiss and with usearch, and the recall that they reach.

Search stays with the stores. Each example keeps bits in the index, asks it for four times as many candidates as hits,
and puts these in order with the float32 query against what was kept beside the bits: int8 codes with faiss, float16
vectors with usearch. Recall is the share of the ten float32 neighbours that are found.

python bench/bench_search.py [--model M] [--dim N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from harness import record, write_records

from jv5kernels import FastEncoder
from jv5kernels.storage import dequantize

TOP, OVERSAMPLE = 10, 4


def search_faiss(
    encoder: FastEncoder, documents: list[str], queries: list[str], top: int = TOP
) -> np.ndarray:
    """Bits in an IndexBinaryFlat, int8 codes for the order; (queries, top) rows of documents."""
    import faiss

    calibration = encoder.calibrate(documents, prompt_name="document")
    bits = encoder.encode_document(documents, precision="binary", profile="faiss")
    codes = encoder.encode_document(
        documents, precision="int8", profile="faiss", calibration=calibration
    )
    index = faiss.IndexBinaryFlat(8 * bits.shape[1])
    index.add(bits)

    query_bits = encoder.encode_query(queries, precision="binary", profile="faiss")
    query_floats = encoder.encode_query(queries, precision="float32", profile="faiss")
    _, candidates = index.search(query_bits, OVERSAMPLE * top)
    found = []
    for query, rows in zip(query_floats, candidates, strict=True):
        scores = dequantize(codes[rows], calibration.ranges, profile="faiss") @ query
        found.append(rows[np.argsort(-scores)[:top]])
    return np.stack(found)


def search_usearch(
    encoder: FastEncoder, documents: list[str], queries: list[str], top: int = TOP
) -> np.ndarray:
    """Bits in a graph index, float16 vectors for the order; (queries, top) rows of documents."""
    from usearch.index import Index

    bits = encoder.encode_document(documents, precision="binary", profile="usearch")
    halves = encoder.encode_document(documents, precision="float16", profile="usearch")
    index = Index(ndim=8 * bits.shape[1], metric="hamming", dtype="b1")
    index.add(np.arange(len(bits)), bits)

    query_bits = encoder.encode_query(queries, precision="binary", profile="usearch")
    query_floats = encoder.encode_query(queries, precision="float32", profile="usearch")
    candidates = index.search(query_bits, OVERSAMPLE * top).keys.astype(np.int64)
    found = []
    for query, rows in zip(query_floats, candidates, strict=True):
        scores = halves[rows].astype(np.float32) @ query
        found.append(rows[np.argsort(-scores)[:top]])
    return np.stack(found)


@dataclass(frozen=True)
class Example:
    """A worked example and the bytes a vector that it keeps, as a function of the dimension."""

    name: str
    search: Callable[[FastEncoder, list[str], list[str]], np.ndarray]
    bytes: Callable[[int], int]


EXAMPLES = (
    Example("faiss, bits + int8", search_faiss, lambda dim: dim // 8 + dim),
    Example("usearch, bits + float16", search_usearch, lambda dim: dim // 8 + 2 * dim),
)


def exact_neighbours(
    encoder: FastEncoder, documents: list[str], queries: list[str], top: int = TOP
) -> np.ndarray:
    """(queries, top) rows of documents by float32 inner product."""
    scores = encoder.encode_query(queries) @ encoder.encode_document(documents).T
    return np.argsort(-scores, axis=1)[:, :top]


def by_bits_alone(
    encoder: FastEncoder, documents: list[str], queries: list[str], top: int = TOP
) -> np.ndarray:
    """(queries, top) rows of documents by Hamming distance."""
    stored = encoder.encode_document(documents, precision="ubinary")
    wanted = encoder.encode_query(queries, precision="ubinary")
    distances = [np.unpackbits(query ^ stored, axis=1).sum(1) for query in wanted]
    return np.argsort(np.stack(distances), axis=1, kind="stable")[:, :top]


def recall(exact: np.ndarray, found: np.ndarray) -> float:
    """Mean share of each row of `exact` that is in the same row of `found`."""
    return float((exact[:, :, None] == found[:, None, :]).any(2).mean())


def main() -> None:
    from jv5kernels.commands.demo import documents_for
    from jv5kernels.comparison.stdlib_texts import standard_library_texts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="jv5-tiny", help="default: jv5-tiny")
    parser.add_argument("--dim", type=int, help="dimensions; default: the model's")
    options = parser.parse_args()
    encoder = FastEncoder(options.model, truncate_dim=options.dim)
    if encoder.tasks:
        encoder.task = "retrieval"
    documents = [d.text for d in documents_for(encoder, standard_library_texts(1000, 20))]
    queries = documents[::4]
    exact = exact_neighbours(encoder, documents, queries)
    dim = encoder.get_sentence_embedding_dimension()
    name = options.model
    plain = recall(exact, by_bits_alone(encoder, documents, queries))
    records = []
    for example in EXAMPLES:
        start = time.perf_counter()
        found = example.search(encoder, documents, queries)
        records.append(
            record(
                f"{name}, {len(documents)} texts, {dim} dimensions",
                example.name,
                "recall_at_10",
                recall(exact, found),
                "share",
                device=encoder.device.type,
                peer="Hamming distance, not rescored",
                peer_value=plain,
                ratio=recall(exact, found) / plain,
                bytes_per_vector=example.bytes(dim),
                float32_bytes=4 * dim,
                oversample=OVERSAMPLE,
                seconds=time.perf_counter() - start,
            )
        )
    for r in records:
        print(
            f"{r['work']}, {r['impl']}: recall@10 {r['value']:.3f} in {r['bytes_per_vector']} bytes a vector "
            f"({r['peer']}: {r['peer_value']:.3f})"
        )
    suffix = "-cpu" if encoder.device.type == "cpu" else ""
    print(write_records(f"search{suffix}", records))


if __name__ == "__main__":
    main()
