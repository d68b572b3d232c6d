"""Writer of all HTML pages of this project: reports, galleries, pages about data. Torch-free.

A page is one file without scripts and without links to other files, so it opens offline, from a
disk or a mail. It follows the reader's choice of light or dark, and fits a phone.

Everything that is not `Markup` is text and is escaped, attributes too. Pages are built from the
functions of this module, never from HTML in strings:

    write_page(path, "A run", [section("Loss", table(["step", "loss"], [["1", "2.5"]]))])
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from landiff.configs.files import write_text

VOID = {"img", "meta", "source", "br"}
"""Elements without an end tag."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
"""Characters that HTML does not allow."""
MEDIA_TYPES = {"gif": "image/gif", "png": "image/png", "jpeg": "image/jpeg", "mp4": "video/mp4"}
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
"""What a browser may load. Scripts are not among it, whatever a page contains."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --dim: #5f6670; --line: #d8dce1;
  --panel: #f5f6f8; --good: #1a7f37; --bad: #c62828;
  --s0: #1f6feb; --s1: #d9480f; --s2: #2b8a3e; --s3: #9c36b5; --s4: #0b7285; --s5: #a61e4d;
  --s6: #7a5b00; --s7: #495057; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --text: #e6e8ea; --dim: #9aa2ab;
  --line: #343a41; --panel: #1d2126; --good: #57c173; --bad: #ff7b72;
  --s0: #6ea8fe; --s1: #ff922b; --s2: #69db7c; --s3: #da77f2; --s4: #3bc9db; --s5: #f783ac;
  --s6: #e0c060; --s7: #adb5bd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; } p { margin: .25rem 0; }
h1, h2, h3, p, th, td, pre, summary, figcaption, text { unicode-bidi: isolate; }
.dim { color: var(--dim); } .good { color: var(--good); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; } pre { overflow-x: auto; padding: .75rem; background: var(--panel);
  border-radius: .4rem; font-size: .85rem; white-space: pre-wrap; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); } th { font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; padding: .5rem; background: var(--panel); border-radius: .4rem; }
figcaption { font-size: .9rem; } img, video, svg { display: block; max-width: 100%; }
svg { width: 100%; height: auto; } img, video { height: auto; margin-bottom: .25rem; }
svg text { fill: var(--dim); font: 12px system-ui, sans-serif; }
details { margin: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .85rem; }
.legend svg { display: inline-block; width: 1.5rem; height: .6rem; margin-right: .3rem; }
"""


class Markup(str):
    """HTML, as opposed to text. Only this module makes it."""


def element(
    name: str, /, *children: str | Sequence[str], **attributes: str | float | bool | None
) -> Markup:
    """An element with text, elements, or lists of them.

    The keyword `class_` is the attribute class, and other underscores stand for hyphens. An
    attribute that is None or False is left out, and one that is True has no value.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = key.rstrip("_").replace("_", "-")
        if value is not True:
            word += f'="{escape(str(value))}"'
        words.append(word)
    start = f"<{' '.join(words)}>"
    if name in VOID:
        assert not children, name
        return Markup(start)
    return Markup(f"{start}{join(children)}</{name}>")


def join(children: Sequence[str | Sequence[str]]) -> Markup:
    """Text and elements, one after the other."""
    parts = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(str(child))
        elif isinstance(child, str):
            parts.append(escape(child))
        else:
            parts.append(str(join(child)))
    return Markup("".join(parts))


def escape(text: str) -> str:
    """Text for HTML and for attributes. Characters that HTML or UTF-8 does not allow are shown."""
    valid = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return html.escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", valid), quote=True)


# ---------------------------------------------------------------- parts of a page


def section(title: str, *children: str | Sequence[str]) -> Markup:
    """A part of the page below a title."""
    return element("section", element("h2", title), *children)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()
) -> Markup:
    """A table that scrolls if it is too wide. `numbers`: columns that are aligned to the right."""

    def cells(name: str, values: Sequence[str]) -> Markup:
        found = []
        for column, value in enumerate(values):
            kind = "number" if column in numbers else None
            found.append(element(name, value, class_=kind))
        return element("tr", found)

    body = [cells("td", row) for row in rows]
    head = element("thead", cells("th", header)) if any(header) else Markup("")
    return element("div", element("table", head, element("tbody", body)), class_="scroll")


def details(title: str, *children: str | Sequence[str], is_open: bool = False) -> Markup:
    """A part that the reader folds out."""
    return element("details", element("summary", title), *children, open=is_open)


def grid(figures: Sequence[str]) -> Markup:
    """Figures side by side, or below each other on a phone."""
    return element("div", figures, class_="grid")


def figure(content: str, caption: str, note: str = "") -> Markup:
    """A picture, video or chart with its caption."""
    words: list[str] = [caption]
    if note:
        words.append(element("div", note, class_="dim"))
    return element("figure", content, element("figcaption", words))


def media(data: bytes, kind: str, description: str) -> Markup:
    """A picture (`gif`, `png`, `jpeg`) or video (`mp4`) inside the page.

    Raises KeyError for another kind.
    """
    address = f"data:{MEDIA_TYPES[kind]};base64,{base64.b64encode(data).decode('ascii')}"
    if kind == "mp4":
        return element(
            "video", src=address, aria_label=description, controls=True, loop=True, muted=True
        )
    return element("img", src=address, alt=description)


def preformatted(text: str) -> Markup:
    """Text with its line breaks, such as a config."""
    return element("pre", text)


def page(title: str, *children: str | Sequence[str]) -> str:
    """A whole page."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    body = element("body", element("h1", title), *children)
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def write_page(path: Path, title: str, *children: str | Sequence[str]) -> None:
    """Write a page. Raises OSError."""
    write_text(path, page(title, *children))
