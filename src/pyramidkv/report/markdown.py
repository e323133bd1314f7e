"""`report.md`: the report as GitHub Markdown, beside its pictures."""

from __future__ import annotations

from collections.abc import Sequence

from pyramidkv.report.content import Content
from pyramidkv.report.definitions import DEFINITIONS
from pyramidkv.report.table import Table, escape_markdown


def markdown(content: Content, pictures: Sequence[tuple[str, str]]) -> str:
    """The report; `pictures` are (file name, what it shows), in the folder of the file."""
    parts = [f"# {escape_markdown(content.title)}", escape_markdown(content.headline)]
    parts += [table.markdown() for table in content.summary]
    parts += [f"![{escape_markdown(caption)}]({name})" for name, caption in pictures]
    if content.comparison:
        parts += ["## Methods and engines", *(table.markdown() for table in content.comparison)]
    if content.budgets:
        parts += ["## Budget of each layer", *(_folded(table) for table in content.budgets)]
    parts += ["## How it was measured"]
    parts += ["\n".join(f"- **{term}**: {escape_markdown(meaning)}" for term, meaning in DEFINITIONS)]
    parts += ["## The run", _indented(content.command), content.run.markdown()]
    parts += [content.corpora.markdown()] if content.corpora else []
    parts += ["## Every chunk", _folded(content.chunks)] if content.chunks else []
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _folded(table: Table) -> str:
    body = table.markdown().rstrip("\n")
    return f"<details><summary>{escape_markdown(table.title)}</summary>\n\n{body}\n\n</details>"


def _indented(command: str) -> str:
    """A code block that no text can end: a fence could be closed by the command itself."""
    return "\n".join(f"    {line}" for line in command.splitlines())
