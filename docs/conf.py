"""How the site is built from these pages: ``make docs``, into ``site/``.

Every warning is an error: a link to a page, a heading or a file that is not there, a docstring that
does not parse, a name of this package that nothing documents.
"""

from __future__ import annotations

import configparser
import os
import re
from pathlib import Path

from sphinx.application import Sphinx

import kw
import kw.data
import kw.models
import kw.training

os.environ.setdefault("KW_NATIVE", "0")  # importing is enough; nothing is compiled

project = "kernelwarehouse"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "pydata_sphinx_theme"
html_title = "kernelwarehouse"
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["benchmarks/*.md"]

ROOT = Path(__file__).parents[1]
setup_cfg = configparser.ConfigParser()
setup_cfg.read(ROOT / "setup.cfg")
project_urls = setup_cfg["metadata"]["project_urls"].strip().splitlines()

# The whole contents stand beside every page: there are too few pages for a level more.
html_sidebars = {"**": ["sidebar-contents.html"]}
html_theme_options = {
    "navbar_center": [],
    "navbar_end": ["theme-switcher", "navbar-icon-links"],
    "icon_links": [
        {
            "name": name,
            "url": url,
            "icon": "fa-brands fa-github" if "github.com" in url else "fa-solid fa-file-lines",
        }
        for name, url in (line.split(" = ") for line in project_urls)
    ],
    "secondary_sidebar_items": ["page-toc"],
}
html_show_sourcelink = False
html_copy_source = False

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 4

autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "exclude-members": "extra_repr",
}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Names of this package must lead somewhere. Those of others would take a network to look up,
# and the schema's classes are the tables of the page on settings.
# What packages import when it is first used has to be there to be documented.
for package in (kw, kw.data, kw.models, kw.training):
    for name in package.__all__:
        getattr(package, name)

nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!kw\.).*"),
    (r"py:class", r"kw\.config\.(run_|data_)?schema\.\w+|kw\.warehouse\.partition\.\w+"),
    (r"py:.*", r"kw\.registry\.[TE]"),
]


def complete(app: Sphinx, page: str, source: list[str]) -> None:
    """Put tables in the place of their marks."""
    for mark, reference in REFERENCES.items():
        if mark in source[0]:
            source[0] = source[0].replace(mark, reference())


def classification() -> str:
    from kw.config import reference

    return in_groups(reference())


def detection() -> str:
    from kw.config import reference
    from kw.detection.schema import DetectionConfig

    return in_groups(reference(DetectionConfig))


def families() -> str:
    """The pages of configs/imagenet as sections, with links that fit their place here."""
    parts = []
    for readme in sorted((ROOT / "configs/imagenet").glob("*/README.md")):
        text = re.sub(r"^(#+) ", r"\1# ", readme.read_text(encoding="utf-8"), flags=re.M)
        folder = f"../configs/imagenet/{readme.parent.name}"
        text = re.sub(r"\[([^]]+)\]\((\w+)\)", r"\1 (`\2`)", text)  # a folder: nothing to open
        parts.append(re.sub(r"\]\((?!https?:|\.\./)", f"]({folder}/", text))
    return "\n".join(parts)


REFERENCES = {
    "<!-- settings of a classifier -->": classification,
    "<!-- settings of a detector -->": detection,
    "<!-- families of models -->": families,
}


def in_groups(table: str) -> str:
    """One table of settings as one table for every group, under a heading of its own."""
    header, rule, *rows = table.splitlines()
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row.split("`")[1].partition(".")[0], []).append(row)
    parts = []
    single = [rows[0] for rows in groups.values() if len(rows) == 1]
    for name, lines in [("The run", single), *groups.items()]:
        if name in groups and len(lines) == 1:
            continue
        title = name if name not in groups else f"`{name}`"
        parts += [f"### {title}", "", header, rule, *lines, ""]
    return "\n".join(parts)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", complete)
