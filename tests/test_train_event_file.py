"""The event file holds what TensorBoard's own reader finds in it."""

from __future__ import annotations

import errno
import io
import resource
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from calm.train.journal import EventFile


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_curves_and_pictures_are_read_back(tmp_path):
    pixels = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8)
    file = EventFile(tmp_path / "new" / "folder", None)
    file.scalar("loss", 0.5, 3)
    file.scalar("loss", 0.25, 4)
    file.image("panel", pixels, 4)
    file.close()
    found = read(tmp_path / "new" / "folder")
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(3, 0.5), (4, 0.25)]
    (picture,) = found.Images("panel")
    with Image.open(io.BytesIO(picture.encoded_image_string)) as image:
        assert bytes(image.tobytes()) == pixels.numpy().tobytes()


def test_what_a_killed_run_wrote_after_its_checkpoint_is_hidden(tmp_path):
    for purge_step, steps in ((None, (0, 1, 2)), (2, (2, 3))):
        file = EventFile(tmp_path, purge_step)
        for step in steps:
            file.scalar("loss", step + len(steps), step)
        file.close()
    assert [(event.step, event.value) for event in read(tmp_path).Scalars("loss")] == [
        (0, 3),
        (1, 4),
        (2, 4),
        (3, 5),
    ]


def test_what_is_flushed_is_there_before_the_end(tmp_path):
    file = EventFile(tmp_path, None)
    file.scalar("loss", 1, 0)
    file.flush()
    assert len(read(tmp_path).Scalars("loss")) == 1
    file.close()


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = EventFile(tmp_path, None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        file.scalar("loss", 1, 0)
        file.scalar("loss", 1, 1)
        with pytest.raises(OSError, match="large") as caught:
            file.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.close()
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file.path))
