"""Procedural birds: a generated image data set with exact ground truth.

:func:`write_birds` draws birds whose species differ by known parts, and writes them in the layout of CUB_200_2011, so
that every reader and benchmark of that data set runs on them. :func:`draw_bird` draws a single picture. The package
knows nothing of classifiers.
"""

from calm_birds.layout import BirdsConfig, BirdsSummary, write_birds
from calm_birds.scene import Drawing, draw_bird
from calm_birds.species import Species, choose_species

__all__ = ["BirdsConfig", "BirdsSummary", "Drawing", "Species", "choose_species", "draw_bird", "write_birds"]
