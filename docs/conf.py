"""Sphinx configuration. Build with `sphinx-build -W -b html docs docs/_build/html`."""

import flashinfer_ops  # noqa: F401  (autodoc imports it: fail here, with its own message)

project = "flashinfer_ops"
author = "The flashinfer_ops authors"
copyright = "The flashinfer_ops authors"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "generated/.gitkeep"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = "flashinfer_ops"
pygments_style = "friendly"
pygments_dark_style = "monokai"

autosummary_generate = True
autodoc_typehints = "signature"  # with "none" the overloads would not be shown
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
default_role = "code"
