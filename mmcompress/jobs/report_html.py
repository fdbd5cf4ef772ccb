"""HTML as nested calls, in which every piece of text is escaped unless it is markup made here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

VOID = {"meta", "br", "hr", "wbr", "line", "rect", "circle", "path", "polyline", "img"}


class Markup(str):
    """Text that is markup already."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """Return an element; children that are not `Markup` are escaped, and so are attributes.

    Attribute names are written with `_` for `-`, and `class_` for `class`; None leaves one out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID and not children:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[Any]) -> Markup:
    """Return parts one after the other, escaped where they are not markup."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in parts))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1) -> Markup:
    """Return a table; the first `left` columns are words, the others numbers."""

    def cells(kind: str, row: Sequence[Any]) -> Markup:
        return join(
            tag(kind, cell, class_=None if index < left else "number", scope="col" if kind == "th" else None)
            for index, cell in enumerate(row)
        )

    head = tag("thead", tag("tr", cells("th", columns)))
    body = tag("tbody", join(tag("tr", cells("td", row)) for row in rows))
    return tag("div", tag("table", head, body), class_="scroll")


def breakable(name: str) -> Markup:
    """Return a long name such as "retrieval.image_to_text_r1" that may go on in the next line after each of its parts."""
    parts = name.replace(".", ".\0").replace("_", "_\0").split("\0")
    return join(part if index == 0 else join([tag("wbr"), part]) for index, part in enumerate(parts))


def section(title: str, *children: Any, note: str = "") -> Markup:
    """Return a section with a heading; nothing when it has no content."""
    content = [child for child in children if child]
    if not content:
        return Markup("")
    return tag("section", tag("h2", title), tag("p", note, class_="dim") if note else "", *content)


def page(title: str, *children: Any) -> str:
    """Return a whole document: styles inside, nothing fetched from anywhere."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # Even a mistake in here could not make a reader's browser ask anybody for anything.
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    body = tag("body", tag("main", *children))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


STYLE = """
:root { --ink: #1b1f24; --dim: #5c6670; --paper: #ffffff; --panel: #f5f6f8; --line: #d5d9de;
  --good: #1a7f37; --note: #8a5a00; --bad: #c62828;
  --one: #0b62c4; --two: #b3470b; --three: #6b3fa0; --four: #00756a; --random: #7d8790; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #9aa5b1; --paper: #14171b; --panel: #1d2228;
  --line: #39414a; --good: #4cc26b; --note: #e0a83a; --bad: #ff6b63;
  --one: #63a9ff; --two: #ff9c5c; --three: #b794f4; --four: #3fcfbf; --random: #8f9aa5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 8px; border-bottom: 1px solid var(--line); padding-bottom: 4px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
p { margin: 6px 0; }
.dim { color: var(--dim); }
.scroll { overflow-x: auto; }
.drawing { max-width: 100%; margin: .5rem 0; border: 1px solid var(--line); }
table { border-collapse: collapse; margin: 6px 0; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--dim); font-weight: 600; }
td { overflow-wrap: break-word; }
.number { text-align: right; } td.number { white-space: nowrap; }
ul.verdict { list-style: none; padding: 0; margin: 10px 0; }
ul.verdict li { padding: 6px 12px; margin: 4px 0; background: var(--panel); border-left: 5px solid var(--line);
  overflow-wrap: anywhere; }
ul.verdict b { display: inline-block; min-width: 3.2em; }
.good { border-left-color: var(--good) !important; } .good > b { color: var(--good); }
.note { border-left-color: var(--note) !important; } .note > b { color: var(--note); }
.bad { border-left-color: var(--bad) !important; } .bad > b { color: var(--bad); }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 14px 0; }
.card { background: var(--panel); padding: 10px 16px; min-width: 150px; }
.card b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.plots { display: flex; flex-wrap: wrap; gap: 18px; }
.plots figure { margin: 0; flex: 1 1 460px; max-width: 570px; }
.wide { margin: 10px 0; max-width: 860px; }
figcaption { font-weight: 600; margin-bottom: 2px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
svg text.dim { fill: var(--dim); }
svg text.label { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
svg .axis { stroke: var(--line); stroke-width: 1; }
svg .front { fill: none; stroke: var(--dim); stroke-width: 1; stroke-dasharray: 4 4; }
svg .leader { stroke: var(--dim); stroke-width: 0.75; }
svg .whisker { stroke-width: 1.5; }
svg .run0 { stroke: var(--one); fill: var(--one); } svg .run1 { stroke: var(--two); fill: var(--two); }
svg .run2 { stroke: var(--three); fill: var(--three); } svg .run3 { stroke: var(--four); fill: var(--four); }
svg .original { stroke: var(--ink); fill: var(--ink); }
svg .open { fill: var(--paper); stroke-width: 1.5; }
svg .random { stroke: var(--random); fill: var(--paper); }
svg .random.whisker { stroke-dasharray: 2 2; }
pre { background: var(--panel); padding: 10px 14px; overflow-x: auto; font-size: 13px; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 13px; overflow-wrap: anywhere; }
details summary { cursor: pointer; }
@media print { body { font-size: 12px; } section { break-inside: avoid; } }
"""
