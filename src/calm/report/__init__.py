"""Reports: one HTML file that shows what models see, and how well.

A `Page` is a list of `Section`s; each section is made by a function of what was measured. To add one, write such a
function and put its result into the list.
"""

from calm.report.page import Figure, Html, Page, Section, join, render, tag, write

__all__ = ["Figure", "Html", "Page", "Section", "join", "render", "tag", "write"]
