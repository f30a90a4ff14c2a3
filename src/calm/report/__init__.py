"""Reports: one HTML file that shows what models see, and how well.

To add a section, write a template in ``templates/``, and in `calm.report.overview` a `Section` of what that reads.
"""

from __future__ import annotations

from pathlib import Path

from calm.errors import CalmError
from calm.files import check_writable


def write_report(sources: list[Path], *, out: Path = Path("report.html"), gallery: bool = True, seed: int = 0) -> Path:
    """Make one self-contained HTML page of what `calm evaluate` measured, or before that, of training runs.

    It has tables with intervals, curves, the paper's figures on the same data, and the same images for all methods with
    the truth drawn in; of a CALM model also its evidence and mistakes, classes that differ in one part, and training.

    Args:
        sources: run folders, or the folders that calm evaluate wrote. Of a run without results the page has figures,
            curves and the maps that were drawn while it was trained.
        out: the page.
        gallery: show images; it loads the models and reads the data that the results name.
        seed: of what is drawn at random.

    Returns:
        Where the page is.

    Raises:
        CalmError: a folder that is missing, neither a result nor a finished run in any, or ``out`` is a folder.
    """
    if out.is_dir():
        raise CalmError(f"out is the folder {out}: give the name of a file, such as {out / 'report.html'}")
    check_writable(out.parent)
    from calm.report.overview import report_page  # here, so that the help page need not wait for PyTorch
    from calm.report.page import write

    return write(report_page(sources, base=out.absolute().parent, gallery=gallery, seed=seed), out)
