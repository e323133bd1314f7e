"""A table as a value, and its three renderers: terminal (rich), Markdown, HTML. Others decide what goes into it."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Literal

import rich.table
from rich import box
from rich.text import Text

Tone = Literal["", "better", "worse", "missing"]
_SHORT = 24  # characters of small print that a narrow column should not break
_WORD = 16  # characters of a word in the first column that a narrow terminal should not break
_STYLES: dict[Tone, str] = {"": "", "better": "green", "worse": "red", "missing": "dim"}


@dataclass(frozen=True)
class Cell:
    """What a cell says, what it adds in small print, and how a reader should take it (never by colour alone)."""

    value: str
    detail: str = ""
    tone: Tone = ""


NOT_MEASURED = Cell("not measured", tone="missing")


@dataclass(frozen=True)
class Table:
    """A titled grid of cells with notes below; every row has one cell for each column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def rich(self) -> rich.table.Table:
        """For a terminal. Cells are plain text: square brackets in them are not markup."""
        grid = rich.table.Table(
            title=Text(self.title),
            title_justify="left",
            caption=Text("\n".join(self.notes)) if self.notes else None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
        )
        for index, column in enumerate(self.columns):
            # A narrow terminal breaks the numbers' details, not the names of what they belong to.
            words = [word for row in self.rows if index == 0 for word in f"{row[0].value} {row[0].detail}".split()]
            least = min(max(map(len, words), default=1), _WORD)
            justify: Literal["left", "right"] = "right" if index else "left"
            grid.add_column(Text(column), justify=justify, overflow="fold", min_width=least)
        for row in self.rows:
            grid.add_row(*(_rich_cell(cell) for cell in row))
        return grid

    def markdown(self) -> str:
        """GitHub Markdown, the title in bold above and the notes in a list below."""
        lines = [f"**{escape_markdown(self.title)}**", ""]
        lines.append(_markdown_row([escape_markdown(column) for column in self.columns]))
        lines.append(_markdown_row(["---" if index == 0 else "---:" for index in range(len(self.columns))]))
        lines += [_markdown_row([_markdown_cell(cell) for cell in row]) for row in self.rows]
        lines += ["", *(f"- {escape_markdown(note)}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """A `<figure>`, everything in it escaped; the table scrolls in a box of its own where a screen is narrow."""
        head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in self.columns)
        body = "\n".join(
            f'<tr><th scope="row">{_html_cell(row[0])}</th>'
            + "".join(f"<td>{_html_cell(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in self.rows
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        notes = f'<ul class="notes">{notes}</ul>' if notes else ""
        return (
            f"<figure>\n<figcaption>{html.escape(self.title)}</figcaption>\n"
            f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
            f"</table></div>\n{notes}\n</figure>"
        )


def escape_markdown(text: str) -> str:
    """Text that GitHub Markdown shows as it stands, in a table cell as well: one line, no HTML, no links."""
    for plain, escaped in (
        ("\\", "\\\\"),
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("|", "\\|"),
        ("`", "\\`"),
        ("*", "\\*"),
        ("](", "]\\("),
    ):
        text = text.replace(plain, escaped)
    return " ".join(text.split())


def _rich_cell(cell: Cell) -> Text:
    text = Text(cell.value, style=_STYLES[cell.tone])
    return text.append(f"\n{cell.detail}", style="dim") if cell.detail else text


def _markdown_cell(cell: Cell) -> str:
    value = escape_markdown(cell.value)
    return f"{value} ({escape_markdown(cell.detail)})" if cell.detail else value


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _html_cell(cell: Cell) -> str:
    value = f'<span class="value {cell.tone}">{html.escape(cell.value)}</span>'
    short = ' class="short"' if len(cell.detail) <= _SHORT else ""
    return f"{value}<small{short}>{html.escape(cell.detail)}</small>" if cell.detail else value
