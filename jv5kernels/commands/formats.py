"""The output formats of the command line, each in a form that can be continued after any block.

A format keeps a part file that only grows: `start` gives its first bytes, `block` the bytes of some
rows, `amend` corrects what depends on the number of rows, and `pack` makes the final file from it.
A ``.npy`` part file is a valid file after every block; JSON Lines need no packing; ``.npz`` and
``.parquet`` end in an index that cannot be appended to, so they are packed when all rows are there.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

__all__ = ["FORMATS", "Format"]

Run = Mapping[str, Any]
Ids = Sequence["str | int"]


class Format(Protocol):
    """How rows become bytes."""

    def start(self, width: int, dtype: np.dtype) -> bytes:
        """The first bytes of a part file for embeddings of `width` columns."""

    def block(self, ids: Ids, embeddings: np.ndarray) -> bytes:
        """The bytes to append for some rows."""

    def amend(self, file: BinaryIO, rows: int) -> None:
        """Corrects the start of a part file that holds `rows` rows; leaves the position at its end."""

    def pack(self, part: Path, run: Run) -> Path:
        """The complete file, made from a complete part file: the part itself, or a new file beside it."""


class Npy:
    """One array (rows, width). The header leaves room for any number of rows, so it is rewritten in place."""

    def start(self, width: int, dtype: np.dtype) -> bytes:
        self._width, self._dtype = width, dtype
        return self._header(0)

    def _header(self, rows: int) -> bytes:
        header = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(self._dtype)
        np.lib.format.write_array_header_1_0(
            header, {"descr": descr, "fortran_order": False, "shape": (rows, self._width)}
        )
        return header.getvalue()

    def block(self, ids: Ids, embeddings: np.ndarray) -> bytes:
        return np.ascontiguousarray(embeddings).tobytes()

    def amend(self, file: BinaryIO, rows: int) -> None:
        header = self._header(rows)
        assert len(header) == len(self._header(0)), "numpy's header has no room to grow"
        file.seek(0)
        file.write(header)
        file.seek(0, os.SEEK_END)

    def pack(self, part: Path, run: Run) -> Path:
        return part


class Npz(Npy):
    """A zip of two arrays: ``embeddings`` (rows, width) and ``run``, a JSON string of model and options."""

    def pack(self, part: Path, run: Run) -> Path:
        packed = part.with_name(part.name + ".packed")
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.write(part, "embeddings.npy")
            with archive.open("run.npy", "w") as member:
                np.save(member, np.array(json.dumps(run)))
        return packed


class JsonLines:
    """One object a line: ``{"id": …, "embedding": […]}``; float32 values keep all their bits."""

    def start(self, width: int, dtype: np.dtype) -> bytes:
        # Nine significant digits give back the same float32, five the same float16.
        digits = {"float32": "%.9g", "float16": "%.5g"}.get(dtype.name, "%d")
        self._number: Callable[[float], str] = digits.__mod__
        return b""

    def block(self, ids: Ids, embeddings: np.ndarray) -> bytes:
        lines = [
            f'{{"id": {json.dumps(identity)}, "embedding": [{", ".join(map(self._number, row))}]}}\n'
            for identity, row in zip(ids, embeddings.tolist(), strict=True)
        ]
        return "".join(lines).encode("utf-8")

    def amend(self, file: BinaryIO, rows: int) -> None:
        pass

    def pack(self, part: Path, run: Run) -> Path:
        return part


class Parquet:
    """Two columns: ``id`` (string) and ``embedding`` (fixed-size list); model and options as schema metadata.

    The part file is an Arrow stream, one record batch a block; each becomes a row group.
    """

    def start(self, width: int, dtype: np.dtype) -> bytes:
        import pyarrow as pa

        vector = pa.list_(pa.from_numpy_dtype(dtype), width)
        self._schema = pa.schema(
            [pa.field("id", pa.string(), False), pa.field("embedding", vector, False)]
        )
        return self._schema.serialize().to_pybytes()

    def block(self, ids: Ids, embeddings: np.ndarray) -> bytes:
        import pyarrow as pa

        flat = pa.array(np.ascontiguousarray(embeddings).reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])
        names = pa.array([str(identity) for identity in ids], pa.string())
        batch = pa.record_batch([names, vectors.cast(self._schema.field(1).type)], self._schema)
        return batch.serialize().to_pybytes()

    def amend(self, file: BinaryIO, rows: int) -> None:
        pass

    def pack(self, part: Path, run: Run) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        packed = part.with_name(part.name + ".packed")
        schema = self._schema.with_metadata({"jv5kernels": json.dumps(run)})
        with pa.OSFile(str(part)) as source, pq.ParquetWriter(packed, schema) as writer:
            for batch in pa.ipc.open_stream(source):
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        return packed


FORMATS: dict[str, Callable[[], Format]] = {
    ".npy": Npy,
    ".npz": Npz,
    ".jsonl": JsonLines,
    ".parquet": Parquet,
}
