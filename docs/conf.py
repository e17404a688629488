"""The documentation site (``make docs``; warnings are errors). Its reference is written from the code first."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

from reference_pages import write_reference

project = "hypersd-bench"
author = "the hypersd-bench authors"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = project
html_copy_source = False
html_show_copyright = False
highlight_language = "text"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
exclude_patterns = ["images"]


def setup(app: Sphinx) -> None:
    """Write the reference before pages are read."""
    app.connect("builder-inited", lambda site: write_reference(Path(site.srcdir) / "reference"))
