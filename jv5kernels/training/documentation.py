"""Long texts to train on: the chapters of Debian's documentation packages, as JSON lines.

    python -m jv5kernels.training.documentation documentation.jsonl.xz

downloads the packages below with `apt-get download` (whichever this system's archive has), and takes the HTML pages out
of them; nothing is installed. With --from the packages, or folders that they were unpacked to, are there already. Only
packages of Debian's section main are read, whose contents are free; each line names the licences that its package's
copyright file does. A page, or a part of a long one, is a chapter:

    {"package": "debian-faq-de", "source": "debian-faq", "version": "11.1", "licence": "GPL-2+", "language": "de",
     "chapter": "software.html", "split": "train", "sections": [["title", "text"], ...]}

`chapter` is the same in all languages.
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jv5kernels.training.html_sections import Section, read_sections
from jv5kernels.training.json_lines import packed, write_whole
from jv5kernels.training.packages import LANGUAGES

__all__ = ["PACKAGES", "build", "chapters_of", "download", "main"]

PACKAGES = (
    *(f"debian-reference-{x}" for x in ("en", "de", "fr", "it", "es", "ja", "pt-br", "zh-cn")),
    *(f"debian-faq{x}" for x in ("", "-de", "-fr", "-it", "-ja", "-ru", "-zh-cn")),
    *(f"developers-reference{x}" for x in ("", "-de", "-fr", "-it", "-ja", "-ru")),
    *(f"maint-guide{x}" for x in ("", "-de", "-fr", "-it", "-es", "-ja", "-ru", "-zh-cn")),
    *(f"aptitude-doc-{x}" for x in ("en", "es", "fr", "it", "ja", "ru")),
    "apache2-doc apt-doc bash-doc borgbackup-doc cmake-doc debian-handbook debian-policy debmake-doc "
    "exim4-doc-html fish-common git-doc harden-doc installation-guide-amd64 libpam-doc live-manual-html mutt "
    "nodejs-doc postfix-doc postgresql-doc-15 python3.11-doc python-django-doc python-sqlalchemy-doc rust-doc "
    "sphinx-doc",
)
PACKAGES = tuple(name for names in PACKAGES for name in names.split())
# Held out as a whole, with their translations; all others are trained on.
HELD_OUT = frozenset(
    "bash cmake developers-reference fish git pam postfix python3.11 sphinx".split()
)
# Language tags as the corpus of packages has them.
TAGS = {tag.lower(): tag for tag in LANGUAGES}
# Where a page's path and a package's name say a language: a folder, an ending before .html, the name's end.
IN_PATH = re.compile(r"(?:/|\.)([a-z]{2}(?:[-_][A-Za-z]{2})?)(?=[/.])")
IN_NAME = re.compile(r"-([a-z]{2}(?:-[a-z]{2})?)$")
DECLARED = re.compile(rb"""<html[^>]*?\blang=["']?([\w-]+)""", re.IGNORECASE)
# Pages and copyright files.
WANTED = re.compile(r"(\.x?html?(\.gz)?|/copyright)$")
# Pages of source code, indices and lists of changes.
NO_TEXT = re.compile(
    r"/(_modules|_sources)/|index|search|/contents\.html|RelNotes|changelog|whatsnew"
)
# Characters: of the shortest chapter and the longest one, and of all of a package in English and another language.
SHORTEST, LONGEST, MOST, MOST_FOREIGN = 1_500, 40_000, 160_000, 60_000
# A section with more of its characters in links than this is a list of links.
LINKS = 0.6
LICENCE = re.compile(r"^License: *(\w[\w.+ -]{1,30})$", re.MULTILINE)
MOST_LICENCES = 4
# As the copyright files that have no fields call them.
NAMED = {
    "GFDL": r"Free Documentation License|GFDL",
    "GPL": r"General Public License|GPL",
    "IPL-1.0": r"IBM PUBLIC LICENSE",
    "Apache-2.0": r"Apache License",
    "MIT": r"Permission is hereby granted, free of charge",
    "BSD": r"Redistribution and use in source and binary forms",
    "PostgreSQL": r"PostgreSQL License",
    "PSF": r"PYTHON SOFTWARE FOUNDATION LICENSE",
    "CC-BY-SA": r"Attribution-Share ?Alike|CC-BY-SA",
}


@dataclass(frozen=True)
class Origin:
    """A package that chapters come from."""

    package: str
    source: str
    version: str
    licence: str


def download(packages: Sequence[str], folder: Path, tell: Callable[[str], object]) -> list[Path]:
    """Downloads packages with `apt-get download` and returns their files; what the archive lacks is told, not fatal.

    Raises:
        FileNotFoundError: there is no apt-get.
    """
    for package in packages:
        done = subprocess.run(
            ["apt-get", "download", "-q", package], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            tell(f"{package} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    return sorted(folder.glob("*.deb"))


def origin_and_pages(path: Path) -> tuple[Origin, Iterator[tuple[str, bytes]]]:
    """Opens a .deb, by dpkg-deb, or a folder that one was unpacked to (`dpkg-deb --raw-extract`).

    Returns:
        the package, and (path within it, content) of its HTML pages in the order of their paths.

    Raises:
        ValueError: a package that is not of Debian's section main, or no package at all.
    """
    if path.is_dir():
        control = (path / "DEBIAN" / "control").read_text("utf-8")
        inside = {str(p.relative_to(path)): p for p in path.rglob("*") if p.is_file()}
        files = {name: p.read_bytes() for name, p in inside.items() if WANTED.search(name)}
    else:
        control = _output(["dpkg-deb", "--field", str(path)]).decode()
        files = _unpacked(path)
    names = sorted(files)
    fields: dict[str, str] = dict(re.findall(r"^(\w[\w-]*): *(.*)$", control, re.MULTILINE))
    if "Package" not in fields:
        raise ValueError(f"{path} is no Debian package: its control file names none")
    if "/" in fields.get("Section", ""):
        raise ValueError(f"{path} is of {fields['Section']}: only packages of main are read")
    notices = [name for name in names if name.endswith("/copyright")]
    origin = Origin(
        fields["Package"],
        fields.get("Source", fields["Package"]).split(" ")[0],
        fields.get("Version", ""),
        _licence(b"\n".join(files[name] for name in notices).decode("utf-8", "replace")),
    )
    pages = (
        (name, gzip.decompress(files[name]) if name.endswith(".gz") else files[name])
        for name in names
        if re.search(r"\.x?html?(\.gz)?$", name) and not NO_TEXT.search(name)
    )
    return origin, pages


def _output(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout


def _unpacked(path: Path) -> dict[str, bytes]:
    """Pages and copyright files of a .deb by their paths."""
    with tempfile.TemporaryFile() as file:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], check=True, stdout=file)
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            wanted = [member for member in archive if WANTED.search(member.name)]
            opened = {
                m.name.removeprefix("./"): archive.extractfile(m) for m in wanted if m.isfile()
            }
            return {name: content.read() for name, content in opened.items() if content}


def _licence(notice: str) -> str:
    """The first names that a copyright file gives, by its fields or else in its words."""
    words = " ".join(notice.split())
    found = [*dict.fromkeys(LICENCE.findall(notice))] or [
        name for name, pattern in NAMED.items() if re.search(pattern, words)
    ]
    return ", ".join(found[:MOST_LICENCES]) or "see its copyright file"


def language_of(path: str, package: str, declared: str) -> str | None:
    """Language of a page by its own word, its path or its package; None for one that the corpus does not have."""
    for codes in ([declared] if declared else [], IN_PATH.findall(path), IN_NAME.findall(package)):
        tags = [code.lower().replace("-", "_") for code in codes]
        if tags:
            # An English page may say en-US, a German one de-AT; Portuguese and Chinese are there in one form each.
            return next((TAGS.get(t) or TAGS.get(t.partition("_")[0]) for t in tags), None)
    return "en"


def chapter_key(path: str) -> str:
    """Path of a page without the folder of its package and without what names a language.

    Example:
        >>> chapter_key("usr/share/doc/debian/FAQ/de/software.de.html.gz")
        'debian/FAQ/software.html'
    """
    below = "/" + "/".join(PurePosixPath(path.removesuffix(".gz")).parts[3:])
    return IN_PATH.sub("", below).strip("/")


def chapters_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the chapters of a package; a section that an earlier page has had is left out."""
    origin, pages = origin_and_pages(path)
    seen: set[tuple[str, str]] = set()
    characters: dict[str, int] = {}
    for name, content in pages:
        declared = DECLARED.search(content[:5000])
        language = language_of(name, origin.package, declared[1].decode() if declared else "")
        if language is None:
            continue
        most = MOST if language == "en" else MOST_FOREIGN
        if characters.get(language, 0) + SHORTEST > most:
            continue  # before a page is read, which takes time
        kept = []
        for section in read_sections(content.decode("utf-8", "replace")):
            told = (language, re.sub(r"\W+", "", section.text)[:400])
            if section.links <= LINKS * len(section.text) and told not in seen:
                seen.add(told)
                kept.append(section)
        for number, part in enumerate(_chapters(kept)):
            size = sum(len(text) for _, text in part)
            if size < SHORTEST or characters.get(language, 0) + size > most:
                continue
            characters[language] = characters.get(language, 0) + size
            yield {
                **vars(origin),
                "language": language,
                "chapter": chapter_key(name) + (f"#{number}" if number else ""),
                "split": "test" if origin.source in HELD_OUT else "train",
                "sections": part,
            }


def _chapters(sections: Iterable[Section]) -> Iterator[list[list[str]]]:
    """Sections by title and text, as many together as are no longer than a chapter may be."""
    part: list[list[str]] = []
    size = 0
    for section in sections:
        text = section.text[:LONGEST]
        if part and size + len(text) > LONGEST:
            yield part
            part, size = [], 0
        part.append([section.title, text])
        size += len(text)
    if part:
        yield part


def build(
    paths: Iterable[Path], out: Path, *, most_bytes: int, tell: Callable[[str], object] = print
) -> int:
    """Writes the chapters of packages to a file, xz or gzip by its name, and returns how many.

    Args:
        most_bytes: of the file; the last chapters of every package are left out until it is no larger.

    Raises:
        ValueError: no package has a chapter, or a package is not of Debian's section main.
    """
    of_packages = []
    for path in paths:
        found = list(chapters_of(path))
        characters = sum(len(text) for row in found for _, text in row["sections"])
        tell(f"{path.name}: {len(found)} chapters, {characters:,} characters")
        of_packages.append(found)
    if not any(of_packages):
        raise ValueError("no package has a chapter: nothing is written")
    share = 1.0
    while True:
        rows = [row for found in of_packages for row in found[: round(share * len(found))]]
        data = packed(rows, out)
        if len(data) <= most_bytes or not rows:
            break
        share *= min(0.98, most_bytes / len(data))
    write_whole(out, data)
    tell(f"{out}: {len(rows)} chapters, {len(data):,} bytes")
    return len(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m jv5kernels.training.documentation",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="JSON lines, .xz or .gz")
    parser.add_argument("--packages", nargs="+", metavar="NAME", default=list(PACKAGES))
    parser.add_argument(
        "--from", dest="paths", type=Path, nargs="+", metavar="PATH", help=".deb files or folders"
    )
    parser.add_argument(
        "--most-bytes", type=int, metavar="N", default=2_000_000, help="default: %(default)s"
    )
    options = parser.parse_args(arguments)

    def tell(text: str) -> None:
        print(text, file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        paths = options.paths or download(options.packages, Path(folder), tell)
        build(paths, options.out, most_bytes=options.most_bytes, tell=tell)


if __name__ == "__main__":
    main()
