"""The text of an HTML page by its headings, without what surrounds it on the page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

__all__ = ["Section", "read_sections"]

HEADINGS = ("h1", "h2", "h3")
BLOCKS = set(
    "address article aside blockquote br dd div dl dt figure footer form h1 h2 h3 h4 h5 h6 header hr li main nav ol p "
    "pre section table tbody td th thead tr ul".split()
)
VOID = set("area base br col embed hr img input link meta param source track wbr".split())
LEFT_OUT = set("script style nav head noscript template svg math footer header form button".split())
# Classes and ids of tables of contents and of what stands around a page, by DocBook, Sphinx, Texinfo and others.
AROUND = re.compile(
    r"(nav(header|footer|igation|panel)?|toc\w*|lot|sphinxsidebar\w*|related|footer|header|headerlink|breadcrumbs?"
    r"|contents|sidebar|menu|copyright|legalnotice|indexterm|shortcontents|footnotes?|top|bottom|nav-panel|docnav)"
)


@dataclass
class Section:
    """A heading and the text up to the next one; links is how many of its characters are links."""

    title: str
    text: str
    links: int = 0


def read_sections(html: str) -> list[Section]:
    """Returns the sections of a page: a paragraph a line, white space as one blank; a first one may have no title.

    Example:
        >>> read_sections("<h1>sed</h1><p>Edits  a <b>stream</b>.</p>")
        [Section(title='sed', text='Edits a stream.', links=0)]
    """
    reader = _Reader()
    reader.feed(html)
    reader.close()
    reader.close_section()
    return reader.sections


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.sections: list[Section] = []
        # Open elements that are left out, and how deep they are nested in elements of their own name.
        self.left_out: list[list[Any]] = []
        self.heading: str | None = None
        self.in_link = 0
        self.title: list[str] = []
        self.text: list[str] = []
        self.links = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if self.left_out:
            if tag == self.left_out[-1][0]:
                self.left_out[-1][1] += 1
            return
        names = f"{given.get('class', '')} {given.get('id', '')}".lower().split()
        around = any(AROUND.fullmatch(name) for name in names)
        if tag not in VOID and (
            tag in LEFT_OUT or given.get("role") == "navigation" or (around and tag != "body")
        ):
            self.left_out.append([tag, 1])
            return
        if tag in HEADINGS:
            self.close_section()
            self.heading = tag
        if tag == "a":
            self.in_link += "href" in given
        if tag in BLOCKS:
            self._write("\n")

    def handle_endtag(self, tag: str) -> None:
        if self.left_out:
            if tag == self.left_out[-1][0]:
                self.left_out[-1][1] -= 1
                if not self.left_out[-1][1]:
                    self.left_out.pop()
            return
        if tag == self.heading:
            self.heading = None
        if tag == "a":
            self.in_link = 0
        if tag in BLOCKS:
            self._write("\n")

    def handle_data(self, data: str) -> None:
        if self.left_out:
            return
        if self.in_link and self.heading is None:
            self.links += len(data.strip())
        self._write(data.replace("\n", " "))

    def _write(self, data: str) -> None:
        (self.text if self.heading is None else self.title).append(data)

    def close_section(self) -> None:
        """Keeps what was read since the last heading."""
        lines = (" ".join(line.split()) for line in "".join(self.text).split("\n"))
        # Texinfo and Sphinx end headings with a mark that links to them.
        title = " ".join("".join(self.title).split()).rstrip("¶# ")
        section = Section(title, "\n".join(line for line in lines if line), self.links)
        if section.title or section.text:
            self.sections.append(section)
        self.title, self.text, self.links = [], [], 0
