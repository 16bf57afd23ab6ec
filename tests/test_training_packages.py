"""The builder of the corpus of packages: a small archive in files, no network."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pytest

from jv5kernels.training.packages import (
    LANGUAGES,
    build,
    description_of,
    main,
    paragraphs,
    split_of,
)

LONG = " This program edits streams of text, and what it is told about them it does to every line."
PACKAGES = """Package: sed
Section: utils
Description-md5: 1

Package: sed-twin
Source: sed (4.9)
Section: utils
Description-md5: 2

Package: short
Section: utils
Description-md5: 3

Package: unknown
Section: utils
Description-md5: 4
"""
ENGLISH = f"""Package: sed
Description-md5: 1
Description-en: GNU stream editor
{LONG}
 .
 It can
  * print
  * delete

Package: sed-twin
Description-md5: 2
Description-en: twin of the editor
{LONG} It has a twin.

Package: short
Description-md5: 3
Description-en: short
 Too short to learn from.
"""
GERMAN = """Package: sed
Description-md5: 1
Description-de: GNU-Stream-Editor
 Der Editor: für Ströme.
"""


@pytest.fixture
def archive(tmp_path):
    """An archive whose indices are compressed in different ways, with English and German alone not empty."""
    main_folder = tmp_path / "dists/sid/main"
    (main_folder / "binary-amd64").mkdir(parents=True)
    (main_folder / "i18n").mkdir()
    (main_folder / "binary-amd64/Packages.gz").write_bytes(gzip.compress(PACKAGES.encode()))
    for language in LANGUAGES:
        text = {"en": ENGLISH, "de": GERMAN}.get(language, "")
        path = main_folder / f"i18n/Translation-{language}.bz2"
        path.write_bytes(bz2.compress(text.encode()))
    return tmp_path


def test_lines_join_packages_with_their_descriptions(archive, tmp_path, capsys):
    out = tmp_path / "corpus.jsonl.xz"
    assert main([str(out), "--mirror", archive.as_uri(), "--suite", "sid"]) == 0
    lines = [json.loads(line) for line in lzma.open(out, "rt", encoding="utf-8")]
    assert [line["package"] for line in lines] == ["sed", "sed-twin"]
    sed, twin = lines
    assert sed["source"] == twin["source"] == "sed" and sed["split"] == twin["split"]
    assert sed["synopsis"] == {"de": "GNU-Stream-Editor", "en": "GNU stream editor"}
    assert sed["description"]["en"] == f"{LONG.strip()}\nIt can * print * delete"
    assert sed["description"]["de"] == "Der Editor: für Ströme."
    assert "2 packages" in capsys.readouterr().out and not list(tmp_path.glob("*.part"))


def test_the_corpus_is_one_that_training_reads(archive, tmp_path):
    from jv5kernels.training.corpus import read_packages

    out = tmp_path / "corpus.jsonl.gz"
    main([str(out), "--mirror", archive.as_uri(), "--suite", "sid"])
    found = read_packages(out)
    assert sorted(package.name for package in found) == ["sed", "sed-twin"]


def test_equal_descriptions_are_taken_once():
    packages = [{"Package": name, "Description-md5": "1"} for name in ("b", "a")]
    english = [{"Description-md5": "1", "Description-en": f"one\n{LONG}"}]
    lines = build(packages, {"en": english})
    assert [line["package"] for line in lines] == ["a"]


def test_a_missing_index_is_an_error_that_names_it(archive, tmp_path, capsys):
    (archive / "dists/sid/main/i18n/Translation-ja.bz2").unlink()
    out = tmp_path / "corpus.jsonl"
    assert main([str(out), "--mirror", archive.as_uri(), "--suite", "sid"]) == 1
    assert "Translation-ja.bz2" in capsys.readouterr().err and not out.exists()
    with pytest.raises(ValueError, match="translations must hold 'en'"):
        build([], {"de": []})


def test_splits_are_by_source_and_hold_out_six_percent():
    names = [f"source-{i}" for i in range(5000)]
    held_out = [name for name in names if split_of(name) == "test"]
    assert 0.05 < len(held_out) / len(names) < 0.07
    assert [split_of(name) for name in held_out] == ["test"] * len(held_out)
    assert split_of("0ad") == "train" and split_of("zlib") == split_of("zlib")


def test_paragraphs_and_descriptions():
    assert list(paragraphs("\nA: b\n c\n\n\nD: e: f\n")) == [{"A": "b\n c"}, {"D": "e: f"}]
    assert description_of("one\n two\n three\n .\n .\n four") == ("one", "two three\nfour")
    assert description_of("alone") == ("alone", "")
