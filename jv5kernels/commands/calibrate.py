"""Ranges for int8 output from files of texts: the work of ``jv5kernels calibrate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jv5kernels.commands.bulk import Meter, quiet_about_truncation
from jv5kernels.commands.files import Corpus

if TYPE_CHECKING:
    from jv5kernels.calibration import Calibration

__all__ = ["Job", "calibrate_corpus"]


@dataclass(frozen=True)
class Job:
    """What to calibrate on, and how.

    Args:
        corpus: the texts.
        out: the calibration's file.
        encoder: keyword arguments of FastEncoder, ``model`` among them.
        call: keyword arguments of FastEncoder.calibrate.
        overwrite: replace a file that is there.
        progress: show how far it is, on standard error.
    """

    corpus: Corpus
    out: Path
    encoder: dict[str, Any]
    call: dict[str, Any]
    overwrite: bool = False
    progress: bool = True


def calibrate_corpus(job: Job) -> str:
    """Calibrates, writes the file in one step, and returns a line that says what was found.

    Raises:
        FileExistsError, FileNotFoundError: the file is there, or its folder is not; before anything is encoded.
        ValueError: no texts; and whatever reading and FastEncoder raise.
    """
    from jv5kernels.encoder import FastEncoder

    if job.out.exists() and not job.overwrite:
        raise FileExistsError(f"{job.out} exists: replace it with --overwrite")
    if not job.out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {job.out.parent}")
    encoder = FastEncoder(**job.encoder)
    done = 0
    with quiet_about_truncation(), Meter(job.corpus, job.progress) as meter:

        def show(count: int) -> None:
            nonlocal done
            done += count
            meter.show(done, done, encoder.statistics.tokens)

        texts = (record.text for record in job.corpus)
        calibration = encoder.calibrate(texts, progress=show, **job.call)
    calibration.save(job.out)
    return summary(job.out, calibration)


def summary(path: Path, calibration: Calibration) -> str:
    """One line: what was measured, and how much of it saturates."""
    origin = calibration.origin
    how = "exact minima and maxima"
    if calibration.percentile is not None:
        how = (
            f"percentiles {100 - calibration.percentile:g} to {calibration.percentile:g}, "
            f"{calibration.clip_rate:.3%} of the values clipped"
        )
    kind = "one symmetric range" if calibration.symmetric else f"ranges of {origin.dim} dimensions"
    return f"{path}: {kind} over {calibration.count:,} texts; {how}"
