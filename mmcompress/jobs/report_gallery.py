"""Drawings of what became of patches, held in the page itself."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from mmcompress.jobs.report_html import Markup, join, tag

if TYPE_CHECKING:
    from mmcompress.jobs.report import Run

GALLERY_NOTE = (
    "Patches that became one token have its mean colour and a line around them; dark ones are in no token any more."
)


def gallery(run: Run) -> Markup:
    """Every drawing that the run kept."""
    return join(
        tag(
            "img",
            src="data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
            alt=path.stem,
            class_="drawing",
        )
        for path in run.pictures
    )
