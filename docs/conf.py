"""The documentation as a site, built by ``make docs`` without a network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "vlae-pipeline"
copyright = "the authors of vlae-pipeline"
extensions = ["myst_nb", "sphinx.ext.autodoc", "pages"]
exclude_patterns = ["search.md"]  # see pages.py
highlight_language = "text"
smartquotes = False  # quotes stay as they are typed

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4  # as GitHub makes them
nb_execution_mode = "force"
nb_execution_timeout = 1200
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # the default loads scripts from other hosts

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "vlae-pipeline"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_show_search_summary = False  # browsers do not let a page fetch other files for it
html_static_path = ["static"]
html_css_files = ["site.css"]
