"""The ``calm report`` command: one page from the results of benchmarks."""

from __future__ import annotations

from pathlib import Path

from calm.errors import CalmError

__all__ = ["report"]


def report(
    sources: list[Path], *, out: Path = Path("report.html"), gallery: bool = True, seed: int = 0
) -> Path:
    """Make one self-contained HTML page of the results of `calm evaluate`.

    The page has the table of every benchmark with intervals, its curves, the paper's figures where the data set
    is the same, and the same images for all methods with what is true drawn in.

    Args:
        sources: run folders, or the folders that calm evaluate wrote.
        out: the page.
        gallery: show images; it loads the models and reads the data that the results name.
        seed: of the images that are drawn at random.

    Returns:
        Where the page is.

    Raises:
        CalmError: a folder that is missing, no result in any, or ``out`` is a folder.
    """
    if out.is_dir():
        raise CalmError(f"out is the folder {out}: give the name of a file, such as {out / 'report.html'}")
    from calm.report.benchmarks import report_page
    from calm.report.found import find_groups  # here, so that the help page need not wait for PyTorch
    from calm.report.page import write

    return write(report_page(find_groups(sources), gallery=gallery, seed=seed), out)
