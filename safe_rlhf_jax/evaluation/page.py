"""A small report: `report.html` with a verdict, tables and figures, as one self-contained file."""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from safe_rlhf_jax import storage
from safe_rlhf_jax.evaluation.tables import Table

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("safe_rlhf_jax.evaluation"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page: an explanation below a table or a figure."""

    heading: str
    note: str
    table: Table | None = None
    figure: Any = None  # of matplotlib

    @property
    def image(self) -> str:
        """The figure as a PNG in base64, "" without one."""
        if self.figure is None:
            return ""
        from safe_rlhf_jax.evaluation.plots import png  # not before a figure is drawn: matplotlib takes half a second

        return base64.b64encode(png(self.figure)).decode("ascii")


@dataclasses.dataclass(frozen=True)
class Page:
    """A report of few parts.

    Attributes:
        title: Heading of the page.
        verdict: What it says, in sentences.
        sections: Its parts.
        warnings: Known problems.
        provenance: {item: value}: data, models, code.
    """

    title: str
    verdict: Sequence[str]
    sections: Sequence[Section]
    warnings: Sequence[str] = ()
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def write(self, folder: storage.Path) -> storage.Path:
        """Writes `report.html` into a folder, and returns its path."""
        path = folder / "report.html"
        storage.write(path, TEMPLATES.get_template("page.html").render(page=self) + "\n")
        return path
