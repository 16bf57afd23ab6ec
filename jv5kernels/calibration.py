"""Calibration: the ranges of int8 and uint8 output, measured once over a corpus and kept with what they belong to.

A range per dimension is what turns a float into a byte, so a corpus and its queries must share it, and it means
nothing for another model, task, prompt or dimension. `Calibrator` measures in one streaming pass: memory is constant,
and the result does not depend on the order of the texts or on how they were batched. `Calibration` is the result, a
small JSON file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jv5kernels import __version__
from jv5kernels.calibrator import Calibrator, bounds, check_percentile
from jv5kernels.tasks import tasks_of

if TYPE_CHECKING:
    from jv5kernels.checkpoint import Checkpoint
    from jv5kernels.encoder import FastEncoder
    from jv5kernels.live.model import LiveModel

__all__ = ["Calibration", "Origin", "calibrate", "calibrated_ranges", "open_calibration"]

FORMAT, VERSION = "jv5kernels calibration", 1
# Texts encoded at once: their float32 embeddings are all that is kept of them.
BLOCK_TEXTS = {"cuda": 8192, "cpu": 512}
SAMPLES = 64


@dataclass(frozen=True)
class Origin:
    """What embeddings are embeddings of; ranges hold for one of these.

    Args:
        model, revision: hub id or folder, and the commit of its files when known.
        weights: digest of the architecture and of samples of the weights, the task's adapter included. It decides
            whether two models are the same; their names may differ (a hub id and a local copy of it).
        task: adapter, None where there is none.
        prompt: text put before every input.
        pooling, dim, normalize: as in `encode`.
    """

    model: str
    revision: str | None
    weights: str
    task: str | None
    prompt: str
    pooling: str
    dim: int
    normalize: bool


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranges measured over a corpus, with their origin.

    Args:
        origin: the embeddings that they were measured on.
        ranges: (2, dim) float32, minima and maxima of the dimensions.
        percentile: 99.9 for "from the 0.1th to the 99.9th percentile"; None for the exact minima and maxima.
        symmetric: one range for all dimensions, so that an int8 code is round(value / step) and distances between
            codes are those between vectors; stores that compare codes need it.
        count: embeddings that were measured.
        clip_rate: share of their values that saturate (0 without a percentile).
        dtype: compute dtype they were measured in.
        package: version of jv5kernels that measured.

    Example:
        >>> calibration = encoder.calibrate(corpus, truncate_dim=256)
        >>> calibration.save("corpus-256.json")
        >>> options = {"truncate_dim": 256, "precision": "int8", "calibration": "corpus-256.json"}
        >>> encoder.encode_document(corpus, **options), encoder.encode_query(queries, **options)
    """

    origin: Origin
    ranges: np.ndarray = field(repr=False)
    percentile: float | None
    symmetric: bool
    count: int
    clip_rate: float
    dtype: str
    package: str = __version__

    def save(self, path: str | Path) -> None:
        """Writes the file under a temporary name and renames it: it is never there in part."""
        path = Path(path)
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ranges"}
        named["origin"] = vars(self.origin)
        minima, maxima = ([float(value) for value in row] for row in self.ranges)
        content = {
            "format": FORMAT,
            "version": VERSION,
            **named,
            "minima": minima,
            "maxima": maxima,
        }
        fresh = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with open(fresh, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads a file that `save` wrote; float32 ranges come back bit for bit.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a calibration, is damaged, or is of a later version.
        """
        try:
            content = json.loads(Path(path).read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a calibration: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not a calibration: its format is not {FORMAT!r}")
        if content.get("version") != VERSION:
            raise ValueError(
                f"{path} is a calibration of version {content.get('version')}; this package reads version {VERSION}"
            )
        try:
            named = {f.name: content[f.name] for f in fields(cls) if f.name != "ranges"}
            named["origin"] = Origin(**content["origin"])
            ranges = np.array([content["minima"], content["maxima"]], dtype=np.float32)
            sound = ranges.shape == (2, named["origin"].dim) and bool(np.isfinite(ranges).all())
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged calibration: {error!r}") from error
        if not sound or (ranges[0] > ranges[1]).any():
            raise ValueError(
                f"{path} is a damaged calibration: its ranges do not fit its dimension"
            )
        return cls(ranges=ranges, **named)

    def check(self, origin: Origin, query_prompt: str | None = None) -> None:
        """Raises unless embeddings of `origin` may be coded with these ranges.

        A corpus and its queries share ranges: ranges of documents also serve the checkpoint's query prompt. The
        reverse is refused, since queries are few and short and their ranges clip documents.

        Raises:
            ValueError: model, revision, task, prompt, pooling, dimension or normalisation differ; says both sides.
        """
        mine = self.origin
        wrong = [
            name
            for name in ("weights", "revision", "task", "prompt", "pooling", "dim", "normalize")
            if getattr(mine, name) != getattr(origin, name)
        ]
        if mine.revision is None or origin.revision is None:
            wrong = [name for name in wrong if name != "revision"]
        if "prompt" in wrong and query_prompt is not None and origin.prompt == query_prompt:
            wrong.remove("prompt")
        if not wrong:
            return

        def shown(side: Origin) -> str:
            facts = {name: getattr(side, name) for name in wrong}
            if facts.pop("weights", None):
                facts = {"model": side.model, "weights": side.weights[:8], **facts}
            return ", ".join(f"{name}={value!r}" for name, value in facts.items())

        raise ValueError(
            f"the calibration does not fit: it was measured with {shown(mine)}, this call has {shown(origin)}. "
            "Codes of different ranges cannot be compared: calibrate anew (ranges=calibration.ranges skips this check)"
        )

    def clipped(self, embeddings: np.ndarray) -> float:
        """Returns the share of values (N, dim) that saturate: how well the ranges fit other embeddings."""
        lower, upper = bounds(self.ranges)
        outside = (embeddings < lower) | (embeddings > upper)
        return float(outside.mean()) if outside.size else 0.0


def open_calibration(given: Calibration | str | Path) -> Calibration:
    """The calibration itself, or the one in a file."""
    return given if isinstance(given, Calibration) else Calibration.load(given)


def fingerprint(checkpoint: Checkpoint | LiveModel, task: str | None) -> str:
    """Returns a digest of the architecture and of evenly spaced values of every weight, the task's adapter included.

    Values are rounded to bfloat16 first, so that a checkpoint and the same checkpoint loaded in float32 agree.
    """
    digest = hashlib.blake2b(repr(checkpoint.spec).encode(), digest_size=16)
    tensors = dict(checkpoint.weights())
    if task is not None:
        for name, pair in checkpoint.adapter(task).pairs.items():
            tensors[f"{name} a"], tensors[f"{name} b"] = pair.a, pair.b
    for name in sorted(tensors):
        flat = tensors[name].detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLES)].cpu().bfloat16().float()
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _origin(
    encoder: FastEncoder, task: str | None, prompt: str, dim: int, normalize: bool
) -> Origin:
    if task not in encoder._fingerprints:
        encoder._fingerprints[task] = fingerprint(encoder.checkpoint, task)
    weights = encoder._fingerprints[task]
    source, revision = str(encoder.checkpoint.source), encoder.checkpoint.revision
    return Origin(source, revision, weights, task, prompt, encoder.pooling, dim, normalize)


def calibrated_ranges(
    encoder: FastEncoder,
    calibration: Calibration | str | Path,
    *,
    tasks: Iterable[str | None],
    prompt: str,
    dim: int,
    normalize: bool,
) -> np.ndarray:
    """Returns the ranges of a calibration, or of the one in a file, that fits every task of a call.

    Raises:
        ValueError: it was measured on something else; see `Calibration.check`.
    """
    found = open_calibration(calibration)
    for task in dict.fromkeys(tasks):
        found.check(_origin(encoder, task, prompt, dim, normalize), encoder.prompts.get("query"))
    return found.ranges


def calibrate(
    encoder: FastEncoder,
    texts: Iterable[str],
    *,
    percentile: float | None = None,
    symmetric: bool = False,
    task: str | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
    truncate_dim: int | None = None,
    normalize_embeddings: bool = True,
    progress: Callable[[int], object] = lambda _: None,
) -> Calibration:
    """Encodes a corpus once and returns the ranges of its embeddings, for int8 and uint8 output.

    One pass in constant memory: `texts` may be a generator over any number of texts. Use documents, and use the
    result for documents and queries alike.

    Args:
        texts: the corpus, or a sample of it (some thousand texts).
        percentile: 99.9 clips what lies outside the 0.1th to the 99.9th percentile of each dimension, so that a few
            extreme values do not widen every step; None takes the exact minima and maxima.
        symmetric: one range around zero for all dimensions; for stores that compare codes (see `storage.PROFILES`).
        task, prompt_name, prompt, truncate_dim, normalize_embeddings: as in `encode`; the result is bound to them.
        progress: called with the number of texts of every finished block.

    Raises:
        ValueError: no texts, or a percentile out of range; and whatever `encode` raises.

    Example:
        >>> encoder.calibrate(open("corpus.txt"), percentile=99.9, truncate_dim=256).save("corpus-256.json")
    """
    if percentile is not None:
        check_percentile(percentile)
    call: dict[str, Any] = {
        "task": task,
        "prompt_name": prompt_name,
        "prompt": prompt,
        "truncate_dim": truncate_dim,
        "normalize_embeddings": normalize_embeddings,
        "precision": "float32",
        "profile": "sentence-transformers",
    }
    (adapter,) = tasks_of(task, encoder.task, encoder.tasks, 1)
    prefix = encoder._prefix(prompt_name, prompt)
    # Imported here, since the arguments of a call may name a calibration.
    from jv5kernels.call_arguments import dim_of

    dim = dim_of(encoder, truncate_dim)
    origin = _origin(encoder, adapter, prefix, dim, normalize_embeddings)
    calibrator = Calibrator(origin.dim, histogram=percentile is not None)
    remaining = iter(texts)
    while block := list(islice(remaining, BLOCK_TEXTS[encoder.device.type])):
        calibrator.add(encoder.encode(block, **call))
        progress(len(block))
    ranges = calibrator.ranges(percentile, symmetric=symmetric)
    return Calibration(
        origin=origin,
        ranges=ranges,
        percentile=percentile,
        symmetric=symmetric,
        count=calibrator.count,
        clip_rate=calibrator.clip_rate(ranges),
        dtype=str(encoder.dtype).removeprefix("torch."),
    )
