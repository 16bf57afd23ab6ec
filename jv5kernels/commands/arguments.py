"""The arguments of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jv5kernels import __version__

__all__ = ["STANDARD_OUTPUT", "parser"]

POOLINGS = ("lasttoken", "mean", "cls")
DTYPES = ("float32", "bfloat16", "float16")
STANDARD_OUTPUT = Path("-")
PROFILES = (
    "sentence-transformers",
    "faiss",
    "usearch",
    "qdrant",
    "milvus",
    "pgvector",
    "elasticsearch",
    "vespa",
    "sqlite-vec",
)
PRECISIONS = ("float32", "float16", "int8", "uint8", "binary", "ubinary")
ENCODE_EXAMPLES = """
examples:
  jv5kernels encode notes.txt -o notes.npy --model jinaai/jina-embeddings-v5-text-small --task retrieval
  jv5kernels encode a.jsonl.gz b.jsonl.gz --key body -o out.parquet --model ./model --truncate-dim 256
  zcat dump.txt.gz | jv5kernels encode - -o out.jsonl --model ./model --task clustering

A stopped run leaves OUT.part; the same command with --resume continues after its last complete block.
"""

CALIBRATE_EXAMPLES = """
examples:
  jv5kernels calibrate corpus.jsonl -o ranges.json --model ./model --task retrieval --truncate-dim 256
  jv5kernels encode corpus.jsonl -o corpus.npy --model ./model --task retrieval --truncate-dim 256 \\
    --precision int8 --calibration ranges.json
  jv5kernels encode queries.txt -o queries.npy --model ./model --task retrieval --truncate-dim 256 \\
    --prompt-name query --precision int8 --calibration ranges.json
"""

DEMO_EXAMPLES = """
examples:
  jv5kernels demo
  jv5kernels demo notes.txt --query "what was decided about the budget?"
  apt-cache search . | jv5kernels demo - --query "play music"
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; `name` in its result is the command."""
    result = argparse.ArgumentParser(
        prog="jv5kernels",
        description="Fast, exact embeddings with jina-embeddings-v5-text and other Qwen3 or EuroBERT encoders.",
    )
    result.add_argument("--version", action="version", version=f"jv5kernels {__version__}")
    commands = result.add_subparsers(dest="name", required=True, metavar="COMMAND")
    _add_encode(commands)
    _add_calibrate(commands)
    _add_verify(commands)
    _add_bench(commands)
    _add_info(commands)
    _add_demo(commands)
    _add_report(commands)
    _add_train(commands)
    return result


def _command(commands: Any, name: str, summary: str, **extra: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **extra,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_model(parser: argparse.ArgumentParser, *, required: bool, note: str = "") -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=required, help=f"jv5-tiny, hub id or folder{note}")
    _add_source(group)


def _add_source(group: Any) -> None:
    group.add_argument("--revision", help="commit, tag or branch of a hub id")
    group.add_argument("--cache-dir", type=Path, help="hub cache folder")
    group.add_argument("--local-files-only", action="store_true", help="never ask the hub")
    group.add_argument("--device", help="cuda, cuda:N or cpu; default: cuda where there is one")
    group.add_argument(
        "--dtype", choices=DTYPES, help="compute dtype; default: bfloat16 on CUDA, float32 on CPU"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("execution")
    group.add_argument(
        "--max-seq-length", type=_positive, metavar="N", help="tokens a text; longer texts are cut"
    )
    group.add_argument(
        "--batch-tokens",
        type=_positive,
        dest="token_budget",
        metavar="N",
        help="tokens a batch; default: by free memory",
    )
    group.add_argument("--attention", help="attention implementation; default: auto")
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="the same bits for a text whatever else is in its batch",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=STANDARD_OUTPUT,
        metavar="FILE",
        help="write JSON to FILE; without FILE, to standard output in place of the table",
    )


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="text (a text a line) or .jsonl, also .gz; - is standard input",
    )
    group = parser.add_argument_group("input")
    group.add_argument("--input-format", choices=("auto", "text", "jsonl"), default="auto")
    group.add_argument(
        "--key", default="text", help="key of the text in JSON lines (default: text)"
    )
    group.add_argument("--id-key", default="id", help="key of the id in JSON lines (default: id)")


def _add_texts(parser: argparse.ArgumentParser) -> None:
    """Inputs of a command that needs no file of the user's."""
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="texts to search, as for encode; default: docstrings and help topics of Python's library",
    )
    parser.add_argument("--input-format", choices=("auto", "text", "jsonl"), default="auto")
    parser.add_argument(
        "--key", default="text", help="key of the text in JSON lines (default: text)"
    )


def _add_embeddings(parser: argparse.ArgumentParser) -> Any:
    """What the embeddings are of, whatever their precision."""
    group = parser.add_argument_group("embeddings")
    group.add_argument(
        "--task", help="adapter: retrieval, text-matching, clustering or classification"
    )
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument("--prompt-name", help="query or document; default: the checkpoint's")
    prompts.add_argument("--prompt", help="the prompt itself; '' for none")
    group.add_argument("--pooling", choices=POOLINGS, help="default: the checkpoint's")
    group.add_argument("--truncate-dim", type=_positive, metavar="N", help="dimensions kept")
    return group


def _add_encode(commands: Any) -> None:
    parser = _command(
        commands,
        "encode",
        "Encode text files into one file of embeddings.",
        epilog=ENCODE_EXAMPLES,
    )
    _add_inputs(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="a name ending in .npy, .npz, .jsonl or .parquet",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="continue a stopped run, if there is one"
    )
    again.add_argument(
        "--overwrite", action="store_true", help="replace OUT and discard a stopped run"
    )
    _add_model(parser, required=True)
    group = _add_embeddings(parser)
    group.add_argument("--precision", choices=PRECISIONS, default="float32")
    ranges = group.add_mutually_exclusive_group()
    ranges.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="of jv5kernels calibrate, for int8 and uint8",
    )
    ranges.add_argument(
        "--ranges",
        type=Path,
        metavar="FILE.npy",
        help="(2, dim) minima and maxima for int8 and uint8, unchecked",
    )
    group.add_argument(
        "--profile", choices=PROFILES, help="the vector store whose byte layout is written"
    )
    _add_limits(parser)
    parser.add_argument(
        "--block",
        type=_positive,
        metavar="N",
        help="texts between two safe points; default: 512 on a CPU, 8192 on a GPU",
    )
    parser.add_argument("--no-progress", action="store_true", help="print the summary only")


def _add_calibrate(commands: Any) -> None:
    parser = _command(
        commands,
        "calibrate",
        "Measure the ranges of int8 and uint8 output over a corpus, once, for corpus and queries.",
        epilog=CALIBRATE_EXAMPLES,
    )
    _add_inputs(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="the calibration's file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    _add_model(parser, required=True)
    _add_embeddings(parser)
    group = parser.add_argument_group("ranges")
    group.add_argument(
        "--percentile",
        type=float,
        metavar="P",
        help="99.9: from the 0.1th to the 99.9th percentile; default: exact minima and maxima",
    )
    group.add_argument(
        "--symmetric",
        action="store_true",
        help="one range around zero, for stores that compare codes (usearch, qdrant, milvus, ...)",
    )
    _add_limits(parser)
    parser.add_argument("--no-progress", action="store_true", help="print the summary only")


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands,
        "verify",
        "Compare embeddings with an untouched fp32 Transformers run; exit 1 on a missed threshold.",
    )
    parser.add_argument("model", metavar="MODEL", help="jv5-tiny, hub id or folder")
    parser.add_argument(
        "--task",
        action="append",
        dest="tasks",
        help="adapter to check, may be repeated; default: all",
    )
    parser.add_argument(
        "--lengths", type=_positive, nargs="+", metavar="N", help="lengths in tokens"
    )
    parser.add_argument("--text-file", metavar="FILE", help="texts to compare, as for encode")
    parser.add_argument(
        "--min-cosine",
        type=float,
        metavar="X",
        help="threshold; default: 0.999999 in float32, 0.9999 in half precision",
    )
    parser.add_argument(
        "--compare-dtype",
        action="store_true",
        help="also run Transformers in our dtype, whose error ours may not exceed",
    )
    parser.add_argument("--pooling", choices=POOLINGS, help="default: the checkpoint's")
    parser.add_argument("--batch-invariant", action="store_true", help="check this mode")
    _add_source(parser)
    _add_json(parser)


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        "Compare speed with Transformers and Sentence Transformers on this machine.",
    )
    _add_model(parser, required=False, note="; default: jv5-tiny")
    parser.add_argument("--task", help="adapter; default: retrieval")
    parser.add_argument(
        "--batch-sizes",
        type=_positive,
        nargs="+",
        default=[8, 32],
        metavar="N",
        help="the others run with the best of these (default: 8 32)",
    )
    parser.add_argument(
        "--repeats", type=_positive, default=3, help="timed runs of each (default: 3)"
    )
    _add_limits(parser)
    _add_json(parser)


def _add_info(commands: Any) -> None:
    parser = _command(
        commands,
        "info",
        "Show versions, device, which implementation every operator takes, and why.",
    )
    _add_model(parser, required=False, note="; adds its memory formula")
    _add_json(parser)


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "Encode real text and search it; compare with Transformers; show what smaller vectors keep.",
        epilog=DEMO_EXAMPLES,
    )
    _add_texts(parser)
    parser.add_argument(
        "--query", action="append", help="text whose neighbours are shown, may be repeated"
    )
    _add_model(parser, required=False, note="; default: jv5-tiny")


def _add_report(commands: Any) -> None:
    parser = _command(
        commands,
        "report",
        "Draw what truncation and quantisation keep of the fp32 ranking, by bytes per vector.",
    )
    _add_texts(parser)
    parser.add_argument(
        "--queries", metavar="FILE", help="texts to search with; default: the corpus"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("retention.png"),
        metavar="OUT.png",
        help="the picture (default: retention.png)",
    )
    _add_model(parser, required=False, note="; default: jv5-tiny")
    parser.add_argument("--task", help="adapter; default: retrieval")
    parser.add_argument(
        "--dims",
        type=_positive,
        nargs="+",
        metavar="N",
        help="default: halves of the model's, to 32",
    )
    parser.add_argument(
        "--oversample",
        type=_positive,
        default=4,
        metavar="N",
        help="candidates a hit before rescoring (default: 4)",
    )
    _add_limits(parser)
    _add_json(parser)


def _add_train(commands: Any) -> None:
    from jv5kernels.training.arguments import EXAMPLES, add_arguments

    summary = "Train a small model of the same layout by the paper's regimen."
    add_arguments(_command(commands, "train", summary, epilog=EXAMPLES), _positive)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
