"""The benchmarks of two models, for those who have read the story: what each asks, its figures, curves and images."""

# ruff: noqa: RUF001 -- typographic signs in prose
from __future__ import annotations

from collections.abc import Mapping

from calm.report.benchmarks import benchmark_section
from calm.report.found import Group, Style, styles
from calm.report.gallery import gallery_section
from calm.report.html import join, tag
from calm.report.page import Section
from calm.report.study import Study

__all__ = ["benchmark_sections"]

ASKED = {
    "cue-localization": (
        "The paper’s question to a map: of two species, does the difference of their maps lie on the parts that tell"
        " them apart? Above only pairs that differ in one part were asked, and only where the peak is. Here are all"
        " that differ in one, two or three parts, and every pixel counts: mPxAP is the area under the precision-recall"
        " curve of the pixels, and high only if the map covers the parts whole. A map that is a single spot in the"
        " right place is precise and covers little."
    ),
    "remove-and-classify": (
        "If a map is right about what the model looks at, the model is lost without it. The highest-scored pixels of"
        " its species’ map are erased, more and more of them, and as many random ones for comparison. R_k is how often"
        " the model is right without the highest k percent, over how often without k random percent; a low R_k is"
        " good. Once the model is right only by chance even without the random pixels, the ratio says nothing more:"
        " compare the curves of accuracy."
    ),
    "localization": (
        "How well does the map of its species cover the whole bird? Boxes ask for its outline, masks for its pixels."
        " It is not what a CALM is trained for: its map says where the cue is, and a cue can be smaller than the bird."
        " “Energy inside” asks the converse, how much of the map is on the bird."
    ),
    "classification": (
        "The same test images without maps: how often each model is right, and how far its stated probabilities can"
        " be trusted."
    ),
}
"""By benchmark: what it asks, in a reader's words."""

PICTURED = ("cue-localization", "localization")
"""Benchmarks that show images."""


def benchmark_sections(study: Study, *, seed: int = 0) -> list[Section]:
    """A section for each benchmark.

    Args:
        study: what was measured.
        seed: of the images that are drawn at random.
    """
    groups = [Group(name, results, study.data) for name, results in study.benchmarks.items()]
    style = styles(groups)
    return [_section(group, style, seed) for group in groups]


def _section(group: Group, style: Mapping[str, Style], seed: int) -> Section:
    images = None
    if group.benchmark in PICTURED:
        images = tag(
            "details",
            tag("summary", "Images: the best, the worst, and some at random"),
            gallery_section(group, seed=seed).body,
            class_="gallery",
        )
    body = join(tag("p", ASKED[group.benchmark]), benchmark_section(group, style).body, images)
    return Section(f"Benchmark: {group.title.lower()}", body, group.title)
