"""Training: configuration, the loop on Lightning Fabric, the run folder. Names are loaded when first used."""

from typing import TYPE_CHECKING

from calm.errors import lazy_names

if TYPE_CHECKING:
    from calm.train.config import TrainConfig as TrainConfig
    from calm.train.run import train as train
    from calm.train.settings import load_config as load_config, preset as preset

__getattr__, __dir__, __all__ = lazy_names(
    __name__, {"config": "TrainConfig", "run": "train", "settings": "load_config preset"}
)
