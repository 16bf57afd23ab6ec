"""Documentation as long texts: pages to sections, packages to chapters, chapters to passages, all without a network."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_corpus import letters_tokenizer

from jv5kernels.training.documentation import build, chapter_key, chapters_of, language_of, main
from jv5kernels.training.html_sections import Section, read_sections
from jv5kernels.training.long_texts import (
    PASSAGE,
    Chapter,
    build_passages,
    joined,
    passages_of,
    read_chapters,
    text_of,
)

PAGE = """<?xml version="1.0"?><!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml"{lang}><head><title>Never seen</title></head><body>
<div class="navheader"><div>Prev <a href="x">Next</a></div></div>
<div class="toc"><dl><dt><a href="#a">The first</a></dt></dl></div>
<h1>Streams<a class="headerlink" href="#s">&para;</a></h1>
<p>A   stream is {stream}, see <a href="y">there</a>.<br/>It &amp; others &#8217;flow&#8217;.</p>
<h2 class="title">Second  part</h2><pre>sed -e s/a/b/
  file</pre><ul><li>one<li>two</ul>
<h2>Links</h2><ul><li><a href="1">a list of links alone</a></li></ul>
<div class="navfooter">Up</div></body></html>"""


def page(stream: str, lang: str = "") -> str:
    return PAGE.replace("{stream}", stream).replace("{lang}", lang)


def package(folder: Path, name: str, pages: dict[str, str], section: str = "doc") -> Path:
    """Writes what `dpkg-deb --raw-extract` would: a control file, a copyright file and pages."""
    root = folder / name
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {name}\nSource: guide (1.0)\nVersion: 1.0\nSection: {section}\nArchitecture: all\n"
        "Maintainer: Nobody <nobody@example.org>\nDescription: a guide\n"
    )
    documentation = root / "usr" / "share" / "doc" / name
    documentation.mkdir(parents=True)
    (documentation / "copyright").write_text("Files: *\nLicense: GPL-2+\n\nLicense: Expat\n")
    for path, text in pages.items():
        file = documentation / path
        file.parent.mkdir(parents=True, exist_ok=True)
        data = text.encode()
        file.write_bytes(gzip.compress(data) if path.endswith(".gz") else data)
    return root


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    long = "what flows from one program to the next, " * 60
    return package(
        tmp_path,
        "guide-doc",
        {
            "html/a.en.html": page(long),
            "html/a.de.html.gz": page(long.replace("program", "Programm"), ' lang="de"'),
            "html/everything.en.html": page(long),
            "html/sv/a.html": page(long + "inte", ' lang="sv"'),
            "html/short.html": page("short"),
        },
    )


def test_sections_are_what_is_under_the_headings() -> None:
    first, second, links = read_sections(page("a row of lines"))
    assert first == Section(
        "Streams", "A stream is a row of lines, see there.\nIt & others ’flow’.", len("there")
    )
    assert second == Section("Second part", "sed -e s/a/b/ file\none\ntwo")
    assert links.links == len(links.text) > 0


def test_a_left_out_element_ends_where_it_ends() -> None:
    nested = "<nav><div><nav>a</nav>b</div>c</nav><p>kept</p><script>if (a<b) {}</script>"
    assert [section.text for section in read_sections(nested)] == ["kept"]
    assert read_sections("") == []


@pytest.mark.parametrize(
    ("path", "name", "declared", "language"),
    [
        ("usr/share/doc/debian/FAQ/de/software.de.html", "debian-faq-de", "", "de"),
        ("usr/share/doc/x/what-is-it.html", "x", "", "en"),
        ("usr/share/doc/x/html/pt-BR/a.html", "x", "", "pt_BR"),
        ("usr/share/doc/x/html/ar-MA/a.html", "x", "", None),
        ("usr/share/developers-reference/a.html", "developers-reference-fr", "", "fr"),
        ("usr/share/doc/x/a.html", "x", "en-US", "en"),
        ("usr/share/doc/x/a.html", "x", "sv", None),
        ("usr/share/doc/x/a.html", "x", "zh-TW", None),
    ],
)
def test_the_language_of_a_page(path: str, name: str, declared: str, language: str | None) -> None:
    assert language_of(path, name, declared) == language


def test_a_chapter_has_one_key_in_all_languages() -> None:
    keys = {
        chapter_key(f"usr/share/doc/debian/FAQ/{path}")
        for path in ("software.en.html", "de/software.de.html.gz", "pt-br/software.html")
    }
    assert keys == {"debian/FAQ/software.html"}


def test_chapters_of_a_folder(guide: Path) -> None:
    chapters = {(c["language"], c["chapter"]): c for c in chapters_of(guide)}
    # Neither what another page has had, nor other languages, nor what is too short.
    assert set(chapters) == {("de", "guide-doc/html/a.html"), ("en", "guide-doc/html/a.html")}
    english = chapters["en", "guide-doc/html/a.html"]
    assert english["licence"] == "GPL-2+, Expat"
    assert (english["source"], english["version"], english["split"]) == ("guide", "1.0", "train")
    assert [title for title, _ in english["sections"]] == ["Streams", "Second part"]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_deb_reads_like_its_folder(guide: Path, tmp_path: Path) -> None:
    deb = tmp_path / "guide.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", guide, deb], check=True, capture_output=True
    )
    assert list(chapters_of(deb)) == list(chapters_of(guide))


def test_the_command_writes_no_more_than_it_may(guide: Path, tmp_path: Path) -> None:
    out = tmp_path / "documentation.jsonl.xz"
    main([str(out), "--from", str(guide)])
    rows = [json.loads(line) for line in lzma.open(out, "rt", encoding="utf-8")]
    assert {row["language"] for row in rows} == {"de", "en"}
    assert read_chapters(out)[0].sections == tuple(map(tuple, rows[0]["sections"]))
    most = out.stat().st_size - 1
    assert build([guide], out, most_bytes=most, tell=lambda _: None) == 1
    assert out.stat().st_size <= most


def test_what_is_not_free_or_no_documentation_is_refused(tmp_path: Path) -> None:
    closed = package(tmp_path, "closed", {"a.html": page("x")}, section="non-free/doc")
    with pytest.raises(ValueError, match="non-free/doc: only packages of main"):
        list(chapters_of(closed))
    with pytest.raises(ValueError, match="no package has a chapter"):
        build(
            [package(tmp_path, "bare", {})], tmp_path / "x.xz", most_bytes=10, tell=lambda _: None
        )


def test_a_line_that_is_no_chapter_is_named(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"source": "s"}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl:1: no chapter"):
        read_chapters(file)


@given(st.lists(st.text(alphabet="ab .\n!。", max_size=3 * PASSAGE), max_size=3))
def test_passages_are_the_section_in_short_pieces(texts: list[str]) -> None:
    section = ("A title", "\n".join(texts))
    passages = passages_of(section)
    assert all(0 < len(passage) <= PASSAGE + 120 for passage in passages)

    def letters(text: str) -> str:
        return re.sub(r"\s", "", text)

    assert letters("".join(passages)) == letters("".join(section))


def test_translations_have_the_mean_of_the_english_section() -> None:
    sections = (("One", "abc " * 400), ("Two", "def"))
    chapters = [
        Chapter("s", "c", "de", "train", (("Eins", "ghi " * 300), ("Zwei", "jkl"))),
        Chapter("s", "c", "en", "train", sections),
        Chapter("s", "c", "fr", "train", (("Un", "mno"),)),
        Chapter("s", "other", "it", "train", sections),
    ]
    passages = build_passages(chapters, letters_tokenizer())
    english = [p for section in sections for p in passages_of(section)]
    assert passages.english_texts == english
    count = len(english)
    assert passages.targets[:count].tolist() == [[i, i + 1] for i in range(count)]
    german = passages.targets[count:].tolist()
    assert german == [[0, count - 1]] * (len(german) - 1) + [[count - 1, count]]
    assert passages.starts.tolist() == [0, count, count + len(german)]
    assert text_of(chapters[2]) == "Un\nmno"


def test_joined_texts_have_one_prompt_and_end_with_a_whole_text() -> None:
    ids = np.asarray([9, 1, 2, 9, 3, 9, 4, 5, 6], dtype=np.uint16)
    spans, newline = [(0, 3), (3, 5), (5, 9)], np.asarray([7], dtype=np.uint16)
    whole, used = joined(ids, spans, 1, newline, 100)
    assert (whole.tolist(), used) == ([9, 1, 2, 7, 3, 7, 4, 5, 6], 3)
    assert joined(ids, spans, 1, newline, 8)[1] == 2
    assert joined(ids, spans, 1, newline, 2)[0].tolist() == [9, 1]
