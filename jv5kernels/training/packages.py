"""The corpus to train on: synopses and descriptions of Debian's packages in eleven languages, as JSON lines.

    python -m jv5kernels.training.packages debian_packages.jsonl.xz

downloads the package index of a suite and its translations from Debian's archive (30 MB). A line is a package:

    {"package": "sed", "source": "sed", "section": "utils", "synopsis": {"en": "...", "de": "..."},
     "description": {"en": "...", "de": "..."}, "split": "train"}

Packages of one source are all in one split, so that near-duplicates never cross. Of packages with the same English
description the first by name is taken, and none whose description is shorter than SHORTEST.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import lzma
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jv5kernels.training.json_lines import packed, write_whole

__all__ = ["LANGUAGES", "build", "main", "paragraphs", "split_of"]

MIRROR, SUITE = "http://deb.debian.org/debian", "bookworm"
LANGUAGES = ("en", "de", "es", "fr", "it", "ja", "ko", "pl", "pt_BR", "ru", "zh_CN")
# What the archive may have an index as, the smallest first.
ENDINGS: dict[str, Callable[[bytes], bytes]] = {
    ".xz": lzma.decompress,
    ".bz2": bz2.decompress,
    ".gz": gzip.decompress,
}
# Characters of the shortest English description.
SHORTEST = 81
# Of a thousand sources, those that are held out.
HELD_OUT = range(60, 120)

Paragraph = dict[str, str]


def split_of(source: str) -> str:
    """Whether a source package's are trained on ("train") or held out ("test"), by its name alone."""
    number = int.from_bytes(hashlib.sha256(source.encode()).digest(), "big") % 1000
    return "test" if number in HELD_OUT else "train"


def paragraphs(index: str) -> Iterator[Paragraph]:
    """The paragraphs of an index of Debian's archive (deb822): field -> value, further lines with their newlines.

    Example:
        >>> list(paragraphs("Package: a\\nDescription-en: one\\n two\\n"))
        [{'Package': 'a', 'Description-en': 'one\\n two'}]
    """
    for block in index.split("\n\n"):
        fields: Paragraph = {}
        name = ""
        for line in block.splitlines():
            if line[:1].isspace():
                fields[name] += "\n" + line
            elif ":" in line:
                name, value = line.split(":", 1)
                fields[name] = value.strip()
        if fields:
            yield fields


def description_of(value: str) -> tuple[str, str]:
    """Synopsis, and the long description with a line a paragraph; a lone dot parts paragraphs in the archive."""
    synopsis, *lines = value.split("\n")
    parts: list[list[str]] = [[]]
    for line in map(str.strip, lines):
        if line == ".":
            parts.append([])
        else:
            parts[-1].append(line)
    return synopsis.strip(), "\n".join(" ".join(part) for part in parts if part)


def download(mirror: str, path: str) -> str:
    """An index of the archive, from whichever compressed form there is.

    Raises:
        ValueError: there is none; with what the archive answered.
    """
    answers = []
    for ending, decompress in ENDINGS.items():
        url = f"{mirror}/{path}{ending}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return decompress(answer.read()).decode()
        except urllib.error.URLError as error:
            answers.append(f"{url}: {error}")
    raise ValueError("no such index in the archive: " + "; ".join(answers))


def build(
    packages: Iterable[Paragraph], translations: Mapping[str, Iterable[Paragraph]]
) -> list[dict[str, Any]]:
    """The corpus' lines, by package name.

    Args:
        packages: paragraphs of the index of binary packages.
        translations: language -> paragraphs of its index of descriptions, "en" among them.

    Raises:
        ValueError: no English descriptions were given.
    """
    if "en" not in translations:
        raise ValueError("translations must hold 'en': without it nothing has a description")
    texts: dict[str, dict[str, tuple[str, str]]] = {}
    for language, found in translations.items():
        for fields in found:
            value = fields.get(f"Description-{language}")
            if value is not None:
                # A translation belongs to the English text with this sum, whatever packages have that.
                sums = texts.setdefault(fields["Description-md5"], {})
                sums[language] = description_of(value)
    lines = []
    taken = set()
    for fields in sorted(packages, key=lambda fields: fields["Package"]):
        of = texts.get(fields.get("Description-md5", ""), {})
        synopsis, description = of.get("en", ("", ""))
        if not synopsis or len(description) < SHORTEST or description in taken:
            continue
        taken.add(description)
        # "Source: name (version)" where the version differs from the package's.
        source = fields.get("Source", fields["Package"]).split()[0]
        line = {
            "package": fields["Package"],
            "source": source,
            "section": fields.get("Section", ""),
            "synopsis": {language: s for language, (s, _) in sorted(of.items()) if s},
            "description": {language: d for language, (_, d) in sorted(of.items()) if d},
            "split": split_of(source),
        }
        lines.append(line)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jv5kernels.training.packages",
        description="The corpus to train on: descriptions of Debian's packages, as JSON lines.",
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="JSON lines, .xz or .gz")
    parser.add_argument("--mirror", default=MIRROR, help=f"default: {MIRROR}")
    parser.add_argument("--suite", default=SUITE, help=f"default: {SUITE}")
    options = parser.parse_args(arguments)
    root = f"dists/{options.suite}/main"
    paths = {language: f"{root}/i18n/Translation-{language}" for language in LANGUAGES}
    try:
        packages = download(options.mirror, f"{root}/binary-amd64/Packages")
        translations = {
            language: list(paragraphs(download(options.mirror, path)))
            for language, path in tqdm(paths.items(), desc="translations", unit="index")
        }
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    lines = build(paragraphs(packages), translations)
    write_whole(options.output, packed(lines, options.output))
    held_out = sum(line["split"] == "test" for line in lines)
    print(f"{options.output}: {len(lines)} packages, {held_out} of them held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
