"""Real text that is on every machine: docstrings and help topics of Python's standard library."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Document", "standard_library_texts"]

MODULES = (
    "abc argparse ast asyncio base64 bisect calendar cmd code codecs collections compileall concurrent configparser "
    "contextlib copy csv ctypes dataclasses datetime decimal difflib dis doctest email enum fileinput filecmp fnmatch "
    "fractions ftplib functools getopt gettext glob graphlib gzip hashlib heapq hmac html http imaplib inspect "
    "ipaddress json keyword linecache locale logging mailbox mimetypes multiprocessing numbers operator optparse os "
    "pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pydoc queue random re "
    "reprlib sched secrets selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl "
    "statistics string struct subprocess symtable sysconfig tarfile tempfile textwrap threading timeit tokenize trace "
    "traceback turtle types typing unittest urllib uuid warnings wave weakref webbrowser xml zipapp zipfile"
).split()
SHORTEST, LONGEST = 60, 8_000  # characters


@dataclass(frozen=True)
class Document:
    """One text and where it is from, for example "shutil.copytree"."""

    name: str
    text: str


def standard_library_texts(docstrings: int = 240, topics: int = 6) -> list[Document]:
    """Returns documents of mixed lengths, the same ones on every call with the same Python.

    Args:
        docstrings: how many docstrings of modules, classes and functions (mostly one sentence to a page).
        topics: how many chapters of the interactive help (one to several pages).
    """
    return _spread(_docstrings(), docstrings) + _spread(tuple(_topics()), topics)


def _spread(documents: tuple[Document, ...], count: int) -> list[Document]:
    """`count` documents, evenly spaced, without repeated or extreme texts."""
    texts = {d.text: d for d in documents if SHORTEST <= len(d.text) <= LONGEST}
    kept = sorted(texts.values(), key=lambda d: d.name)
    if len(kept) <= count:
        return kept
    return [kept[i * len(kept) // count] for i in range(count)]


@cache
def _docstrings() -> tuple[Document, ...]:
    """All docstrings of the modules; parsing these takes a second or two, so it is done once."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: list[Document] = []
    for module in MODULES:
        path = library / f"{module}.py"
        path = path if path.is_file() else library / module / "__init__.py"
        if path.is_file():
            found.extend(_in_body(ast.parse(path.read_bytes()), module))
    return tuple(found)


def _in_body(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> Iterator[Document]:
    """Docstrings of a module or class and of the public names in it."""
    if text := ast.get_docstring(node):
        yield Document(name, text)
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and not child.name.startswith("_"):
            yield from _in_body(child, f"{name}.{child.name}")


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(f"help({name!r})", text.strip())
