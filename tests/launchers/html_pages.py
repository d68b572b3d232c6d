"""What a browser would see of a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from landiff.launchers.pages import html


class Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in html.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def assert_harmless(text: str) -> Page:
    """A page that loads nothing, runs nothing, and whose elements are closed in order."""
    page = Page(text)
    assert page.open == []
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "link", "a", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name in ("src", "href"):
                assert value.startswith("data:")
    assert re.search("https?:|url\\(|@import", text) is None
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    return page
