"""The data of a released command: images below ``--data_root``, lists below ``--metadata_root``."""

from __future__ import annotations

from pathlib import Path

from calm.atomic import write_text
from calm.data.check import load_checked
from calm.data.records import Split
from calm.errors import CalmError
from calm.model import CalmModel
from calm.released_commands.flags import Flags

__all__ = ["FILES", "proxy_lists", "test_split"]

FILES = ("image_ids.txt", "class_labels.txt", "image_sizes.txt", "localization.txt")


def test_split(flags: Flags, model: CalmModel) -> Split:
    """The test images, checked.

    Raises:
        CalmError: wrong data, all of it in one report; or the model has other classes.
    """
    splits, _ = load_checked(flags.images, ("test",), layout="metadata", metadata_root=flags.lists)
    split = splits["test"]
    if split.num_classes != model.config.num_classes:
        raise CalmError(
            f"the checkpoint has {model.config.num_classes} classes, but {flags.lists} has {split.num_classes}"
        )
    return split


def proxy_lists(flags: Flags) -> Path:
    """Lists as in ``--metadata_root``, whose training images are those of ``image_ids_proxy.txt``.

    They are written into the experiment's folder.

    Raises:
        CalmError: there is no such file.
    """
    proxy = flags.lists / "train" / "image_ids_proxy.txt"
    if not proxy.is_file():
        raise CalmError(
            f"--proxy_training_set=True needs {proxy}, which the released code has for ILSVRC only: leave it out"
        )
    chosen = set(proxy.read_text(encoding="utf-8").split("\n"))
    out = flags.folder / "proxy" / flags.dataset_name
    if (flags.lists / "classes.txt").is_file():
        write_text(out / "classes.txt", (flags.lists / "classes.txt").read_text(encoding="utf-8"))
    for split in ("train", "val", "test"):
        for name in FILES:
            path = flags.lists / split / name
            if path.is_file():
                lines = path.read_text(encoding="utf-8").splitlines()
                if split == "train":
                    lines = [line for line in lines if line.split(",")[0] in chosen]
                write_text(out / split / name, "".join(f"{line}\n" for line in lines))
    return out
