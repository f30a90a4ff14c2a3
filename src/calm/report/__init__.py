"""Reports: one HTML file that shows what models see, and how well.

A page (`calm.report.page.Page`) is a list of sections, each of which names a template of ``templates/`` and what this
reads. To add one, write a template and a function that returns its `Section`, and put it into `calm.report.overview`.
"""

from __future__ import annotations

from pathlib import Path

from calm.errors import CalmError


def write_report(sources: list[Path], *, out: Path = Path("report.html"), gallery: bool = True, seed: int = 0) -> Path:
    """Make one self-contained HTML page of the results of `calm evaluate`.

    The page has the table of every benchmark with intervals, its curves, the paper's figures where the data set is the
    same, and the same images for all methods with what is true drawn in. Where the results name a CALM model, it also
    shows its evidence, its mistakes, what it says about classes that differ in one part, and how it was trained.

    Args:
        sources: run folders, or the folders that calm evaluate wrote.
        out: the page.
        gallery: show images; it loads the models and reads the data that the results name.
        seed: of what is drawn at random.

    Returns:
        Where the page is.

    Raises:
        CalmError: a folder that is missing, no result in any, or ``out`` is a folder.
    """
    if out.is_dir():
        raise CalmError(f"out is the folder {out}: give the name of a file, such as {out / 'report.html'}")
    from calm.report.overview import report_page  # here, so that the help page need not wait for PyTorch
    from calm.report.page import write

    return write(report_page(sources, base=out.absolute().parent, gallery=gallery, seed=seed), out)
