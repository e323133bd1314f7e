"""`report.html`: the report as one file, pictures inside, that needs no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import jinja2

from pyramidkv.report.content import Content
from pyramidkv.report.definitions import DEFINITIONS


@dataclass(frozen=True)
class Picture:
    """A PNG, the name it is also saved under, and what it shows."""

    name: str
    png: bytes
    caption: str

    @property
    def uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


def page(content: Content, pictures: Sequence[Picture]) -> str:
    """The page. Values of the records are escaped by the template, those in tables by the table's own renderer."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(files("pyramidkv.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(content=content, pictures=pictures, definitions=DEFINITIONS)
