"""Cue localization's ground truth: class pairs and part regions, against slow readings of the protocol."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_pack
from hypothesis import example, given, settings, strategies as st
from PIL import Image

from calm.data.cues import (
    CUB_GROUPS,
    CuePair,
    PartPoints,
    class_pairs,
    group_mask,
    group_votes,
    part_regions,
    read_class_attributes,
    read_pairs,
    read_part_groups,
    read_part_points,
    read_segmentation,
)
from calm.errors import CalmError
from calm_birds import choose_species, write_birds

SAMPLES = os.environ.get("CALM_SAMPLE_DATA")
GROUPS = ("head", "back", "belly", "breast", "tail", "leg", "wing")


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cues") / "birds"
    write_birds(root, species=6, images_per_species=4, size=48, seed=3, workers=1)
    return root


def slow_regions(xy, visible, image_size, size):
    """The protocol's words, pixel by pixel: (height, width) of group numbers, -1 for no visible point."""
    height, width = size
    candidates = []
    for group, parts in (
        (0, [2, 5, 6, 7, 10, 11, 15]), (1, [1]), (2, [3]), (3, [4]), (4, [14]),
        (5, [8]), (5, [12]), (6, [9]), (6, [13]),
    ):  # fmt: skip
        seen = [xy[p - 1] for p in parts if visible[p - 1]]
        if seen:
            x = sum(point[0] * (width / image_size[0]) for point in seen) / len(seen)
            y = sum(point[1] * (height / image_size[1]) for point in seen) / len(seen)
            candidates.append((group, int(x), int(y)))
    result = np.full(size, -1)
    for row in range(height):
        for column in range(width):
            best = None
            for group, x, y in candidates:
                distance = (column - x) ** 2 + (row - y) ** 2
                if best is None or distance < best:
                    best, result[row, column] = distance, group
    return result


@settings(max_examples=25, deadline=None)
@example(seed=4005, images=3, size=(1, 3), shown=0.5)  # a mean that is whole but for its last bit
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 3),
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    shown=st.floats(0, 1),
)
def test_part_regions_equals_the_slow_reading(seed, images, size, shown):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, 60, (images, 2))
    # Whole and half pixels, so that ties between points are common.
    xy = np.floor(rng.uniform(0, 1, (images, 15, 2)) * sizes[:, None] * 2) / 2
    visible = rng.uniform(size=(images, 15)) < shown
    points = PartPoints(tuple(map(str, range(images))), torch.tensor(xy), torch.tensor(visible))
    got = part_regions(points, torch.tensor(sizes), size=size)
    assert got.dtype == torch.int8
    for index in range(images):
        expected = slow_regions(xy[index].tolist(), visible[index], sizes[index].tolist(), size)
        assert (got[index].numpy() == expected).all()


@pytest.mark.parametrize("far", [10.0, 3e3, 1e5, 1e7])
def test_part_regions_keeps_the_order_of_points_far_outside(far):
    xy, visible = torch.zeros(1, 15, 2, dtype=torch.float64), torch.zeros(1, 15, dtype=torch.bool)
    for part, x in ((9, -far), (1, -far - 1), (12, 4 + far)):  # wing nearer than back, on the left; leg on the right
        xy[0, part - 1, 0], visible[0, part - 1] = x, True
    regions = part_regions(PartPoints(("a",), xy, visible), torch.tensor([[5, 2]]), size=(2, 5))
    assert regions[0].tolist() == [[6, 6, 5, 5, 5]] * 2


def test_part_regions_gives_a_tie_to_the_first_group():
    xy, visible = torch.zeros(1, 15, 2, dtype=torch.float64), torch.zeros(1, 15, dtype=torch.bool)
    for part, x in ((14, 0), (3, 4)):  # tail left, belly right: column 2 is as far from both
        xy[0, part - 1], visible[0, part - 1] = torch.tensor([x, 0]), True
    points = PartPoints(("a",), xy, visible)
    inside = torch.tensor([[[True, True, True, True, False]]])
    regions = part_regions(points, torch.tensor([[5, 1]]), size=(1, 5), inside=inside)
    assert regions.tolist() == [[[4, 4, 2, 2, -1]]]
    assert group_mask(regions, (2, 6)).tolist() == [[[False, False, True, True, False]]]
    assert points.visible_groups().tolist() == [[False, False, True, False, True, False, False]]


def test_group_votes_follow_the_words_in_a_name():
    names = ["has_throat_color::red", "has_size::small", "has_shape::long-legged-like", "has_upper_tail_color::red"]
    groups = [[GROUPS[i] for i in row.nonzero().flatten()] for row in group_votes(names)]
    assert groups == [["head"], [], ["leg"], ["tail"]]
    assert tuple(group.name for group in CUB_GROUPS) == GROUPS


def test_class_pairs_differ_in_the_given_number_of_groups():
    votes = torch.tensor([[True, False], [True, False], [False, True], [False, False]])
    present = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    pairs = {(pair.first, pair.second): pair.groups for pair in class_pairs(present, votes)}
    assert pairs == {(0, 1): (0,), (0, 2): (0, 1), (0, 3): (0, 1), (1, 2): (1,), (1, 3): (1,)}
    assert [(pair.first, pair.second) for pair in class_pairs(present, votes, {0})] == [(2, 3)]


@pytest.mark.skipif(not SAMPLES, reason="CALM_SAMPLE_DATA names no folder with the official CUB files")
def test_read_pairs_finds_31_64_and_96_pairs_in_the_official_files():
    pairs = read_pairs(Path(SAMPLES or "") / "cub-meta")
    assert Counter(len(pair.groups) for pair in pairs) == {1: 31, 2: 64, 3: 96}


@pytest.mark.skipif(not SAMPLES, reason="CALM_SAMPLE_DATA names no folder with the official CUB files")
def test_class_pairs_do_not_depend_on_the_vote_of_long_legged_birds():
    names, present = read_class_attributes(Path(SAMPLES or "") / "cub-meta")
    votes = group_votes(names)
    voted = class_pairs(present, votes)
    votes[names.index("has_shape::long-legged-like")] = False
    assert class_pairs(present, votes) == voted


def test_read_pairs_finds_the_groups_in_which_birds_were_made_to_differ(birds):
    species = choose_species(6)
    expected = {
        (i, j): species[i].differing_groups(species[j])
        for i in range(6) for j in range(i + 1, 6) if 1 <= len(species[i].differing_groups(species[j])) <= 3
    }  # fmt: skip
    found = {(p.first, p.second): tuple(GROUPS[g] for g in p.groups) for p in read_pairs(birds)}
    assert found == expected
    assert 1 in Counter(map(len, found.values()))


def test_part_regions_hold_their_own_visible_points_inside_the_bird(birds):
    points = read_part_points(birds)
    masks = torch.stack(
        [read_segmentation((birds / "segmentations" / name).with_suffix(".png"), (48, 48)) for name in points.ids]
    )
    regions = part_regions(points, torch.full((len(points.ids), 2), 48), size=(48, 48), inside=masks)
    assert ((regions >= 0) == masks).all()
    for group, part in ((1, 1), (2, 3), (3, 4), (4, 14)):
        for image in points.visible[:, part - 1].nonzero().flatten().tolist():
            x, y = points.xy[image, part - 1].long().tolist()
            assert regions[image, y, x] == group


def test_select_keeps_the_order_and_names_a_missing_image(birds):
    points = read_part_points(birds)
    some = points.select([points.ids[3], points.ids[0]])
    assert some.ids == (points.ids[3], points.ids[0])
    assert torch.equal(some.xy, points.xy[[3, 0]])
    with pytest.raises(CalmError, match=r"no part points.*'nowhere\.jpg'"):
        points.select(["nowhere.jpg"])


def test_read_segmentation_resizes_by_bicubic_and_counts_above_zero(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2, (9, 7)).astype(np.uint8) * 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = np.array(Image.fromarray(pixels).resize((30, 20), Image.Resampling.BICUBIC)) > 0
    assert (read_segmentation(tmp_path / "a.png", (20, 30)).numpy() == expected).all()
    with pytest.raises(CalmError, match=r"cannot read segmentation .*b\.png"):
        read_segmentation(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("attributes/attributes.txt", "2 has_eye\n", r"attributes\.txt:1: '2 has_eye' is not '1 NAME'"),
        ("attributes/class_attribute_labels_continuous.txt", "50 60\n", r"not 1 percentages .*found 2 values"),
        ("attributes/class_attribute_labels_continuous.txt", "101\n", r"from 0 to 100"),
        ("attributes/class_attribute_labels_continuous.txt", "x\n", r"not 1 percentages"),
        ("parts/part_locs.txt", "1 1 3.0 4.0\n", r"part_locs\.txt:1: .* is not 'image-number"),
        ("parts/part_locs.txt", "1 1 3.0 4.0 2\n", r"is not 'image-number"),
        ("parts/part_locs.txt", "9 1 3.0 4.0 1\n", r"no image 9"),
        ("parts/part_locs.txt", "1 2 3.0 4.0 1\n", r"no part 2"),
    ],
)  # fmt: skip
def test_readers_of_cues_name_a_wrong_line(tmp_path, file, text, message):
    sound = {
        "attributes/attributes.txt": "1 has_eye\n",
        "attributes/class_attribute_labels_continuous.txt": "50.0\n49.9\n",
        "images.txt": "1 a/b.jpg\n",
        "parts/parts.txt": "1 eye\n",
        "parts/part_locs.txt": "1 1 3.0 4.0 1\n",
    }
    for name, content in (sound | {file: text}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(CalmError, match=message):
        (read_class_attributes if file.startswith("attributes") else read_part_points)(tmp_path)


def test_read_class_attributes_cuts_at_fifty_percent_and_finds_names_beside_the_folder(tmp_path):
    (tmp_path / "attributes.txt").write_text("1 has_eye\n2 has_leg\n")
    folder = tmp_path / "CUB" / "attributes"
    folder.mkdir(parents=True)
    (folder / "class_attribute_labels_continuous.txt").write_text("50.0 49.99\n0 100\n")
    names, present = read_class_attributes(tmp_path / "CUB")
    assert names == ("has_eye", "has_leg")
    assert present.tolist() == [[True, False], [False, True]]


def test_readers_of_cues_read_the_example_of_the_documentation(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "cue-data.md").read_text()
    blocks = [
        "\n".join(line[4:] for line in block.splitlines()) + "\n"
        for block in text.split("\n\n")
        if block.startswith("    ")
    ]
    attributes, percentages, points, groups = blocks[:4]
    files = {
        "attributes/attributes.txt": attributes,
        "attributes/class_attribute_labels_continuous.txt": percentages,
        "parts/parts.txt": "1 front_wheel\n2 back_wheel\n3 roof\n",
        "parts/part_locs.txt": points,
        "parts/groups.yaml": groups,
        "images.txt": "1 a/1.jpg\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    names, present = read_class_attributes(tmp_path)
    wheels, roof = read_part_groups(tmp_path)
    assert class_pairs(present, group_votes(names, (wheels, roof))) == [CuePair(0, 1, (0,))]
    seen = read_part_points(tmp_path)
    assert seen.visible_groups((wheels, roof)).tolist() == [[True, False]]


def test_read_cues_of_other_data_names_the_page_about_them(tmp_path):
    write_pack(tmp_path)
    for read in (read_class_attributes, read_pairs, read_part_points):
        with pytest.raises(CalmError, match=r"there is no .*: cue localization needs .*docs/cue-data\.md"):
            read(tmp_path)
