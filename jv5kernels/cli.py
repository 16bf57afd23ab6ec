"""The command line: ``jv5kernels encode | calibrate | verify | bench | info | demo | report``.

Exit codes: 0 done; 1 a check was missed, or the machine could not do it; 2 a mistake in the command
or in an input (one line on standard error, no traceback); 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jv5kernels.commands.arguments import STANDARD_OUTPUT, parser

if TYPE_CHECKING:
    from jv5kernels.commands.files import Corpus

__all__ = ["main"]

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = parser().parse_args(arguments)
    command = COMMANDS[options.name]
    with warnings.catch_warnings():
        _quiet_libraries()
        if options.debug:
            return command(options)
        return _run(command, options)


def _run(command: Command, options: argparse.Namespace) -> int:
    try:
        return command(options)
    except KeyboardInterrupt as interrupt:
        return _say("\ninterrupted", interrupt, 130)
    except (ValueError, OSError, ImportError) as error:
        return _say(f"jv5kernels {options.name}: error", error, 2)
    except (FloatingPointError, MemoryError, RuntimeError) as error:
        if not _is_about_the_machine(error):
            raise
        return _say(f"jv5kernels {options.name}", error, 1)


def _quiet_libraries() -> None:
    """Our warnings take one line; what other libraries deprecate is not for this command's user."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for library in ("torch", "transformers", "peft", "sentence_transformers"):
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=library)

    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"jv5kernels: warning: {message}", file=sys.stderr)


def _say(prefix: str, error: BaseException, code: int) -> int:
    """Prints one line about an error: its message, and what to do when an output is unfinished."""
    text = " ".join(str(error).split()) or ("" if code == 130 else type(error).__name__)
    notes = "; ".join([text, *getattr(error, "__notes__", ())]).strip("; ")
    print(f"{prefix}: {notes}" if notes else prefix, file=sys.stderr)
    return code


def _is_about_the_machine(error: BaseException) -> bool:
    import torch

    return isinstance(error, (FloatingPointError, MemoryError, torch.OutOfMemoryError))


# Commands.


def _encode(options: argparse.Namespace) -> int:
    from jv5kernels.commands.bulk import Job, encode_corpus
    from jv5kernels.commands.files import EmbeddingFile

    ranges = options.calibration or options.ranges
    if options.precision in ("int8", "uint8") and ranges is None:
        raise ValueError(
            f"--precision {options.precision} needs --calibration FILE, made once with jv5kernels calibrate for corpus "
            "and queries; or --ranges FILE.npy, minimum and maximum of every dimension, (2, dim)"
        )
    out = EmbeddingFile(options.output, resume=options.resume, overwrite=options.overwrite)
    corpus = _corpus(options)
    call = {
        **_embedding_options(options),
        "precision": options.precision,
        "ranges": options.ranges,
        "calibration": options.calibration,
        "profile": options.profile,
    }
    encoder = {"model": options.model, **_encoder_options(options)}
    job = Job(corpus, out, encoder, call, options.block, not options.no_progress)
    try:
        print(encode_corpus(job), file=sys.stderr)
    except (Exception, KeyboardInterrupt) as error:
        if out.started:
            note = f"{out.rows:,} rows are complete in {out.part}, --resume continues after them"
            # BaseException.add_note, which Python 3.10 does not have.
            vars(error).setdefault("__notes__", []).append(note)
        raise
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from jv5kernels.commands.calibrate import Job, calibrate_corpus

    call = {
        **_embedding_options(options),
        "percentile": options.percentile,
        "symmetric": options.symmetric,
    }
    job = Job(
        _corpus(options),
        options.output,
        {"model": options.model, **_encoder_options(options)},
        call,
        options.overwrite,
        not options.no_progress,
    )
    print(calibrate_corpus(job), file=sys.stderr)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from jv5kernels.commands.files import Corpus
    from jv5kernels.verify import Thresholds, verify

    texts = [record.text for record in Corpus([options.text_file])] if options.text_file else None
    with _status("comparing with Transformers in fp32"):
        report = verify(
            options.model,
            tasks=options.tasks,
            texts=texts,
            lengths=options.lengths,
            compare_dtype=options.compare_dtype,
            thresholds=Thresholds(cosine=options.min_cosine),
            **_encoder_options(options),
        )
    if options.json != STANDARD_OUTPUT:
        print(report)
    _write_json(options.json, report.to_dict())
    return 0 if report.passed else 1


def _bench(options: argparse.Namespace) -> int:
    from jv5kernels.commands.demo import TASK, documents_for
    from jv5kernels.commands.quickbench import compare, render, shown
    from jv5kernels.comparison.stdlib_texts import standard_library_texts
    from jv5kernels.encoder import FastEncoder
    from jv5kernels.packaged import packaged_folder

    with _status("opening the model") as tell:
        encoder = FastEncoder(options.model or packaged_folder(), **_encoder_options(options))
        task = options.task or (TASK if TASK in encoder.tasks else None)
        documents = documents_for(encoder, standard_library_texts())
        prompt = encoder.prompts.get("document", "")
        tell(f"encoding {len(documents)} texts, {options.repeats} times with each")
        comparison = compare(
            encoder,
            [prompt + document.text for document in documents],
            task=task,
            batch_sizes=options.batch_sizes,
            repeats=options.repeats,
        )
    if options.json != STANDARD_OUTPUT:
        _print(
            f"{encoder.checkpoint.source}: {comparison.texts} texts, {comparison.tokens:,} tokens, "
            f"{comparison.dtype} on {comparison.device}",
            render(comparison) if comparison.agrees else "",
        )
    _write_json(options.json, {"model": encoder.checkpoint.source, **comparison.to_dict()})
    if not comparison.agrees:
        worst = min(result.cosine_min for result in comparison.results)
        return _say(
            "jv5kernels bench",
            ValueError(f"embeddings disagree: cosine {shown(worst)}, no speed given"),
            1,
        )
    return 0


def _info(options: argparse.Namespace) -> int:
    from jv5kernels.commands.info import collect, render

    facts = collect(options.model, _encoder_options(options))
    if options.json != STANDARD_OUTPUT:
        _print(render(facts))
    _write_json(options.json, facts)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from jv5kernels.commands.demo import render, run

    with _status("starting") as tell:
        demo = run(
            options.model,
            inputs=options.inputs,
            reading={"input_format": options.input_format, "key": options.key},
            queries=options.query or (),
            encoder_options=_encoder_options(options),
            tell=tell,
        )
    _print(render(demo))
    return 0 if demo.agrees else 1


def _report(options: argparse.Namespace) -> int:
    from jv5kernels.commands.report import render, run

    with _status("starting") as tell:
        report = run(
            options.model,
            inputs=options.inputs,
            queries=options.queries,
            reading={"input_format": options.input_format, "key": options.key},
            task=options.task,
            dims=options.dims,
            oversample=options.oversample,
            picture=options.output,
            encoder_options=_encoder_options(options),
            tell=tell,
        )
    if options.json != STANDARD_OUTPUT:
        _print(render(report), f"{options.output}: the picture")
    _write_json(options.json, report.to_dict())
    return 0


def _train(options: argparse.Namespace) -> int:
    from jv5kernels.training.command import train

    print(train(options, tell=lambda text: print(text, file=sys.stderr)))
    return 0


# What several commands share.


def _corpus(options: argparse.Namespace) -> Corpus:
    from jv5kernels.commands.files import Corpus

    return Corpus(
        options.inputs,
        input_format=options.input_format,
        key=options.key,
        id_key=options.id_key,
    )


def _embedding_options(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of encode and calibrate that say what the embeddings are of."""
    names = ("task", "prompt_name", "prompt", "truncate_dim")
    return {name: getattr(options, name) for name in names}


def _encoder_options(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of FastEncoder, only those that were given."""
    values = vars(options)
    names = ("revision", "cache_dir", "device", "attention", "max_seq_length", "pooling")
    given = {name: values.get(name) for name in (*names, "token_budget")}
    flags = {name: True for name in ("local_files_only", "batch_invariant") if values.get(name)}
    dtype = _dtype(values.get("dtype"))
    return {k: v for k, v in {**given, "dtype": dtype}.items() if v is not None} | flags


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    return getattr(torch, name)


def _print(*parts: Any) -> None:
    """Prints with colours and the terminal's width; to a file or pipe plainly and without breaking lines early."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    for part in parts:
        console.print(part)


@contextmanager
def _status(message: str) -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what is going on; nothing where that is no terminal."""
    from rich.console import Console

    with Console(stderr=True).status(message) as status:
        yield status.update


def _write_json(path: Path | None, value: Any) -> None:
    """Writes to a file, to standard output for "-", or not at all for None."""
    if path is None:
        return
    text = json.dumps(value, indent=1) + "\n"
    if path == STANDARD_OUTPUT:
        sys.stdout.write(text)
    else:
        path.write_text(text, "utf-8")


COMMANDS: dict[str, Command] = {
    "encode": _encode,
    "calibrate": _calibrate,
    "verify": _verify,
    "bench": _bench,
    "info": _info,
    "demo": _demo,
    "report": _report,
    "train": _train,
}
