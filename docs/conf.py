"""Settings of Sphinx, which `make docs` runs on the Markdown pages and docstrings."""

import lion8bit

project = "lion8bit"
author = "the lion8bit authors"
release = version = lion8bit.__version__
html_title = f"lion8bit {release}"
html_theme = "furo"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
default_role = "literal"  # single backquotes in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings have dtypes and shapes, annotations do not
exclude_patterns = ["_build"]
