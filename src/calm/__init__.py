"""CALM: image classifiers that say where they saw the evidence, as a probability.

Every public name is listed here once and imported when first used, so that ``import calm`` is cheap.
"""

from typing import TYPE_CHECKING, Any

from calm.errors import lazy_names

if TYPE_CHECKING:
    from calm.backbones import list_backbones as list_backbones
    from calm.baselines import attribute as attribute, list_methods as list_methods
    from calm.cli.export import convert as convert
    from calm.config import ModelConfig as ModelConfig
    from calm.errors import CalmError as CalmError
    from calm.explain import overlay as overlay
    from calm.exporting import export as export
    from calm.heads import CalmHead as CalmHead
    from calm.heatmaps import normalize as normalize, resize_maps as resize_maps
    from calm.images import Preprocessing as Preprocessing
    from calm.interop import (
        CalmCam as CalmCam,
        ScoreModel as ScoreModel,
        em_loss as em_loss,
        quantus_explain as quantus_explain,
    )
    from calm.model import CalmModel as CalmModel, Prediction as Prediction, create_model as create_model, load as load
    from calm.output import MAP_KINDS as MAP_KINDS, CalmOutput as CalmOutput, CamOutput as CamOutput
    from calm.released import load_released as load_released

_MODULES = {
    "backbones": "list_backbones",
    "baselines": "attribute list_methods",
    "cli.export": "convert",
    "config": "ModelConfig",
    "errors": "CalmError",
    "explain": "overlay",
    "heads": "CalmHead",
    "exporting": "export",
    "heatmaps": "normalize resize_maps",
    "images": "Preprocessing",
    "interop": "CalmAttribution CalmCam CalmClassifier ScoreModel em_loss quantus_explain",
    "model": "CalmModel Prediction create_model load",
    "output": "MAP_KINDS CalmOutput CamOutput",
    "released": "load_released",
}
_load, _names, __all__ = lazy_names(__name__, _MODULES)


def __getattr__(name: str) -> Any:
    if name != "__version__":
        return _load(name)
    from importlib.metadata import version  # here, as its import takes longer than all the rest of this file

    return version("calm")


def __dir__() -> list[str]:
    return [*_names(), "__version__"]
