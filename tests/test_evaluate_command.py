"""``calm evaluate`` from the command line: tables, resuming, and mistakes that are found before work starts."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from rich.console import Console

import calm
from calm.baselines import BASELINES, Baseline
from calm.cli import main
from calm.cli.evaluate import main as evaluate
from calm.data.loading import fingerprint, load_split
from calm.errors import CalmError
from calm.evaluate import Result, registry, runner
from calm.evaluate.result import FIGURES, Curve, FigureSpec
from calm.evaluate.subject import own_code
from calm.evaluate.tables import format_estimate, markdown, paired_differences, print_tables, write_tables
from calm.metrics.bootstrap import Estimate
from calm.report.found import Group
from calm.report.gallery import scenes
from calm_birds import write_birds


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    write_birds(root / "birds", species=4, images_per_species=6, size=40, seed=2, workers=1)
    torch.manual_seed(0)
    for method in ("calm-em", "cam"):
        new_model(root, method).save_pretrained(root / method)
    return root


def new_model(root, method, *, names=None):
    size = calm.Preprocessing(size=(48, 48))
    names = names or load_split(root / "birds", "test").class_names
    return calm.create_model("tiny_resnet", len(names), method, class_names=names, preprocessing=size)


def words(place, *more, models=("calm-em", "cam")):
    paths = [str(place / name) for name in models]
    return ["--model", *paths, "--data", str(place / "birds"), "--replicates", "20", "--device", "cpu", *more]


def test_evaluate_puts_models_and_methods_in_one_table(place, tmp_path, capsys):
    flags = words(place, "--method", "joint", "cam", "--method", "gradcam", "--out", str(tmp_path))
    assert main(["evaluate", "cue-localization", *flags]) == 0
    shown = capsys.readouterr().out
    labels = ["CALM-EM joint", "CALM-EM gradcam", "CAM cam", "CAM gradcam"]
    assert all(label in shown for label in labels)
    assert "cue-localization on birds, test" in shown
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    apart = [f"{label} - CALM-EM joint" for label in labels[1:]]
    assert list(dict.fromkeys(row["label"] for row in rows)) == [*labels, *apart]
    table = json.loads((tmp_path / "table.json").read_text())
    stored = [Result.load(path) for path in (tmp_path / "cue-localization").glob("*.json")]
    assert {result.label for result in stored} == set(labels)
    for result in stored:
        row = next(r for r in table if r["label"] == result.label and r["figure"] == "mpxap")
        assert (row["value"], row["low"], row["high"]) == result.figures["mpxap"]
        assert result.provenance["subject"]["model"].startswith(str(place))
        assert result.provenance["data"]["images"] > 0
    assert {(row["data"], row["split"]) for row in rows} == {("birds", "test")}
    text = (tmp_path / "table.md").read_text()
    assert "## cue-localization on birds, test (8 images)\n" in text
    assert (
        "Cue-localization: normalization clipping, thresholds log for CALM-EM joint; normalization minmax,"
        " thresholds even for CALM-EM gradcam, CAM cam, CAM gradcam.\n" in text
    )
    assert "- mPxAP released: " in text
    assert all(f"| {label} |" in text for label in labels)


def test_evaluate_says_which_figures_lack_the_truth(place, tmp_path, capsys):
    data = Path(shutil.copytree(place / "birds", tmp_path / "birds"))
    test = load_split(data, "test").records[3]
    number = next(line.split()[0] for line in (data / "images.txt").read_text().splitlines() if line.endswith(test.id))
    boxes = (data / "bounding_boxes.txt").read_text().splitlines(keepends=True)
    (data / "bounding_boxes.txt").write_text("".join(b for b in boxes if b.split()[0] != number))
    flags = words(place, "--out", str(tmp_path / "out"), models=("cam",))
    flags[flags.index("--data") + 1] = str(data)
    (found,) = evaluate(["localization", *flags])
    assert "maxboxacc" not in "".join(found.figures)
    assert f"no figures by boxes: 1 of 8 images of split 'test' have none, first {test.id}" in " ".join(
        capsys.readouterr().out.split()
    )


def test_evaluate_computes_stored_results_once(place, tmp_path, monkeypatch):
    flags = ["cue-localization", *words(place, "--out", str(tmp_path), models=("cam",))]
    first = evaluate(flags)
    monkeypatch.setattr(registry.Benchmark, "load", lambda self: pytest.fail("computed again"))
    assert evaluate(flags)[0].figures["mpxap"] == first[0].figures["mpxap"]
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        evaluate([*flags, "--norm", "max"])


def test_a_result_is_computed_again_when_the_users_own_method_changed(place, tmp_path, monkeypatch):
    model, data = calm.load(place / "cam"), runner.Data.of(load_split(place / "birds", "test"), place / "birds")
    found = []
    for code in ("images.mean(1)", "images.mean(1)", "images.amax(1)"):
        file = tmp_path / "own_method.py"
        file.write_text(f"def explain(model, images, targets, options):\n    return {code}\n")
        scope = {"__name__": "own_method"}
        exec(compile(file.read_text(), file, "exec"), scope)
        monkeypatch.setitem(BASELINES, "own", Baseline(scope["explain"]))
        subject = calm.evaluate.model_subject(model, method="own")
        result = calm.evaluate.run("localization", subject, data, tmp_path / "out", replicates=20)
        found.append(result.figures["energy_inside"].value)
    assert found[0] == found[1] != found[2]
    assert len(list((tmp_path / "out/localization").glob("*.json"))) == 2
    assert own_code(BASELINES["gradcam"].explain) == {}
    given = [own_code(partial(new_model, width)) for width in (1, 2, 2)]
    assert given[0] != given[1] == given[2]


def test_result_path_depends_on_how_pixels_are_erased(place, tmp_path, monkeypatch):
    flags = ["remove-and-classify", *words(place, "--out", str(tmp_path), models=("cam",))]
    usual = evaluate(flags)[0]
    other = evaluate([*flags, "--fill", "mean", "--fractions", "0.05", "0.5", "--explain", "prediction"])[0]
    assert len(list((tmp_path / "remove-and-classify").glob("*.json"))) == 2
    assert list(other.figures) == ["r5", "r50", "r_area", "top1"]
    assert other.label == "CAM cam, fill mean, fractions 0.05 0.5, explain prediction"
    assert usual.label == "CAM cam"
    common = {"replicates": 20, "seed": 0}
    chosen = {"fill": "mean", "fractions": (0.05, 0.5), "draws": 3, "explain": "prediction"}
    assert other.provenance["options"] == {**common, **chosen}
    default = {"fill": "zero", "fractions": (0.1, 0.3, 0.5, 0.7, 0.9), "draws": 3, "explain": "label"}
    assert usual.provenance["options"] == {**common, **default}
    head = (tmp_path / "table.md").read_text().splitlines()[2]
    assert [cell.split()[0] for cell in head.strip("| ").split(" | ")] == ["method", "R_5", "R_50", "R", "top-1"]
    split = calm.data.load_split(place / "birds", "test")
    paths = [
        runner.result_path(
            "remove-and-classify",
            calm.evaluate.model_subject(calm.load(place / "cam")),
            runner.Data.of(split, place / "birds"),
            tmp_path,
            {"fractions": given},
        )
        for given in ([0.1, 0.3, 0.5, 0.7, 0.9], (0.1, 0.3, 0.5, 0.7, 0.9))
    ]
    assert paths[0] == paths[1]
    monkeypatch.setattr(Result, "save", lambda *_: pytest.fail("computed again"))
    said = evaluate([*flags, "--fill", "zero", "--fractions", "0.1", "0.3", "0.5", "0.7", "0.9"])[0]
    assert said.figures == usual.figures


def test_evaluate_repeats_that_a_models_maps_are_flat(place, tmp_path, capsys):
    model = calm.load(place / "calm-em")
    for spread, name in ((0.99, "flat"), (0.5, "sharp")):
        model.training_summary = {"posterior_entropy_relative": spread}
        model.save_pretrained(tmp_path / name)
    flags = ["--data", str(place / "birds"), "--out", str(tmp_path / "out"), "--replicates", "0", "--model"]
    for _ in range(2):  # computed, stored
        evaluate(["localization", *flags, str(tmp_path / "flat"), str(tmp_path / "sharp")])
        text = " ".join(capsys.readouterr().out.split())
        assert text.count("its maps are almost flat") == 1
        assert f"{tmp_path / 'flat'}: its maps are almost flat" in text
    evaluate(["classification", *flags, str(tmp_path / "flat")])
    assert "flat:" not in capsys.readouterr().out


def test_evaluate_in_bfloat16_is_a_row_of_its_own(place, tmp_path):
    flags = [
        "localization",
        *words(place, "--method", "joint", "gradient", "--out", str(tmp_path), models=("calm-em",)),
    ]
    own, gradient = evaluate(flags)
    own_half, gradient_half = evaluate([*flags, "--precision", "bf16-mixed"])
    assert (own.label, own_half.label) == ("CALM-EM joint", "CALM-EM joint, bf16")
    assert own_half.figures["pxap"].value == pytest.approx(own.figures["pxap"].value, abs=0.05)
    assert gradient_half.figures["pxap"] == gradient.figures["pxap"]  # maps in float32 in any case
    assert own_half.figures["pxap"] != own.figures["pxap"]


def test_evaluate_runs_costly_benchmarks_by_name(place, tmp_path, capsys):
    flags = words(place, "--out", str(tmp_path), "--method", "posterior", models=("calm-em",))
    (curves,) = evaluate(["insertion-deletion", *flags, "--points", "3"])
    assert curves.figures["insertion"].low <= curves.figures["insertion"].value
    assert len(curves.curves["deletion"].x) == 4
    (check,) = evaluate(["randomisation", *flags, "--images", "4", "--order", "all"])
    assert check.provenance["options"]["images"] == 4
    (row,) = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert [row[name] for name in ("benchmark", "figure")] == ["randomisation", "randomisation"]
    assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
    assert "| CALM-EM posterior, images 4, order all | " in (tmp_path / "table.md").read_text()
    assert "lower is better" in (tmp_path / "table.md").read_text()


def test_result_path_depends_on_annotation(place, tmp_path):
    import shutil

    shutil.copytree(place / "birds", tmp_path / "birds")
    split = calm.data.load_split(tmp_path / "birds", "test")
    data = runner.Data.of(split, tmp_path / "birds")
    subject = calm.evaluate.model_subject(calm.load(place / "cam"))

    def places(data):
        return {name: runner.result_path(name, subject, data, tmp_path, {}) for name in calm.evaluate.BENCHMARKS}

    def changed(one, two):
        return {name for name in one if one[name] != two[name]}

    before = places(data)
    file = tmp_path / "birds/parts/part_locs.txt"
    file.write_text(file.read_text().replace(" 1\n", " 0\n", 1))
    points = places(runner.Data.of(split, tmp_path / "birds"))
    assert changed(before, points) == {"cue-localization"}
    mask = split.records[0].masks[0]
    PIL.Image.fromarray(255 - np.asarray(PIL.Image.open(mask))).save(mask)
    masks = places(runner.Data.of(split, tmp_path / "birds"))
    assert changed(points, masks) == {"cue-localization", "localization"}
    narrow = replace(split, records=(replace(split.records[0], size=(1, 2)), *split.records[1:]))
    assert changed(masks, places(runner.Data.of(narrow, tmp_path / "birds"))) == set(calm.evaluate.BENCHMARKS)
    (tmp_path / "birds/attributes/attributes.txt").rename(tmp_path / "attributes.txt")  # as in CUB's archive
    moved = places(runner.Data.of(split, tmp_path / "birds"))
    (tmp_path / "attributes.txt").write_text((tmp_path / "attributes.txt").read_text().replace("wing", "tail"))
    assert changed(moved, places(runner.Data.of(split, tmp_path / "birds"))) == {"cue-localization"}


def test_result_path_does_not_depend_on_the_label(place, tmp_path):
    import shutil

    shutil.copytree(place / "cam", tmp_path / "cam")
    torch.manual_seed(1)
    new_model(place, "cam").save_pretrained(tmp_path / "other")
    alone = ["classification", *words(tmp_path, "--out", str(tmp_path / "out"), models=("cam",))]
    alone[alone.index(str(tmp_path / "birds"))] = str(place / "birds")
    (first,) = evaluate(alone)
    alone[alone.index("--model") + 1 : alone.index("--data")] = [str(tmp_path / "cam"), str(tmp_path / "other")]
    both = evaluate(alone)
    assert [result.label for result in both] == ["CAM (cam)", "CAM (other)"]
    assert both[0].figures == first.figures
    assert len(list((tmp_path / "out/classification").glob("*.json"))) == 2


def test_result_path_depends_on_the_model_configuration(place, tmp_path):
    split = calm.data.load_split(place / "birds", "test")
    data = runner.Data.of(split, place / "birds")
    model = calm.load(place / "cam")
    subject = calm.evaluate.model_subject(model)
    first = runner.result_path("classification", subject, data, tmp_path, {})
    config = model.config
    for change in ({"large_feature_map": False}, {"prior_activation": "relu"}):
        model.config = replace(config, **change)
        assert runner.result_path("classification", calm.evaluate.model_subject(model), data, tmp_path, {}) != first
    model.config = config
    assert runner.result_path("classification", calm.evaluate.model_subject(model), data, tmp_path, {}) == first
    model.preprocessing = replace(model.preprocessing, mean=(0.1, 0.2, 0.3))
    assert runner.result_path("classification", calm.evaluate.model_subject(model), data, tmp_path, {}) != first


def test_evaluate_all_leaves_out_what_has_no_annotation(place, tmp_path):
    images = tmp_path / "folder/test"
    images.parent.mkdir()
    (images.parent / "train").mkdir()
    for path in sorted((place / "birds/images").iterdir()):
        (images / path.name).mkdir(parents=True)
        (images.parent / "train" / path.name).mkdir()
        files = sorted(path.iterdir())
        for to, file in ((images, files[0]), (images.parent / "train", files[1])):
            (to / path.name / file.name).write_bytes(file.read_bytes())
    flags = ["all", *words(place, "--out", str(tmp_path / "out"), models=("cam",))]
    flags[flags.index(str(place / "birds"))] = str(images.parent)
    assert [result.benchmark for result in evaluate(flags)] == ["remove-and-classify", "classification"]


def test_run_split_carves_as_the_run_did(place, tmp_path, capsys):
    import shutil

    for folder in sorted((place / "birds/images").iterdir()):
        shutil.copytree(folder, tmp_path / "data" / folder.name)  # CLASS/*.jpg: no split at all
    for name, fraction in (("one", 0.34), ("two", 0.17), ("three", 0.34)):
        shutil.copytree(place / "cam", tmp_path / name / "best")
        text = f"data: {tmp_path / 'data'}\nreading:\n  val_fraction: {fraction}\n"
        (tmp_path / name / "config.yaml").write_text(text)
    flags = ["--data", str(tmp_path / "data"), "--replicates", "20", "--out", str(tmp_path / "out")]
    (found,) = evaluate(["classification", "--model", str(tmp_path / "one"), *flags])
    split = calm.data.load_split(tmp_path / "data", "test", val_fraction=0.34)
    said = " ".join(capsys.readouterr().out.split())
    assert "split test is 0.34 of train, by class, seed 0; the other images were not looked at" in said
    assert found.provenance["data"]["images"] == len(split.records) == 8
    both = ["--model", str(tmp_path / "one/best"), str(tmp_path / "three")]
    assert len(evaluate(["classification", *both, *flags])) == 2
    mixed = ["--model", str(place / "cam"), str(tmp_path / "one"), str(tmp_path / "two")]
    with pytest.raises(CalmError, match=r"one \(val_fraction 0\.34\) than for .*two \(val_fraction 0\.17\): evaluate"):
        evaluate(["classification", *mixed, *flags])
    ids = [record.id for record in split.records]
    group = Group(found.benchmark, (found,), found.provenance["data"])
    assert [scene.record.id for scene in scenes(group, ids)] == ids  # the report reads the same images
    for text, words in (("[]", "has no list 'reading'"), ("reading: {val_fraction: many}", "val_fraction is 'many'")):
        (tmp_path / "two/config.yaml").write_text(text)
        with pytest.raises(CalmError, match=rf"two/config\.yaml.*{words}"):
            evaluate(["classification", *mixed, *flags])
    (tmp_path / "two/config.yaml").write_text("reading: {val_fraction: 0.17}")
    train = ["--data", str(place / "birds"), *flags[2:]]  # has a test split of its own
    assert len(evaluate(["classification", "--model", str(tmp_path / "one"), str(tmp_path / "two"), *train])) == 2


def test_evaluate_takes_all_of_a_folder_without_splits(place, tmp_path, capsys):
    """But for what a model was trained on: there, the part that its training left out."""
    folders = sorted((place / "birds/images").iterdir())
    for folder in folders:
        shutil.copytree(folder, tmp_path / "photos" / folder.name)
    images = sum(1 for _ in (tmp_path / "photos").glob("*/*.jpg"))
    flags = ["--data", str(tmp_path / "photos"), "--replicates", "0", "--out", str(tmp_path / "out"), "--model"]

    def counted(*more):
        found = evaluate(["classification", *flags, *more])[0].provenance["data"]
        return found["split"], found["images"]

    assert counted(str(place / "cam")) == ("all", images)
    assert "classification on photos, all (24 images)" in capsys.readouterr().out
    assert counted(str(place / "cam"), "--split", "test") == ("test", 4)
    train = load_split(tmp_path / "photos", "train")
    trained = calm.load(place / "cam")
    trained.training_summary = {"fingerprint": fingerprint(train)}
    trained.save_pretrained(tmp_path / "trained")
    assert counted(str(tmp_path / "trained")) == counted(str(place / "cam"), str(tmp_path / "trained")) == ("test", 4)
    assert counted(str(tmp_path / "trained"), "--split", "all") == ("all", images)
    assert counted(str(place / "cam"), "--data", str(place / "birds")) == ("test", 8)


@pytest.mark.parametrize(
    ("benchmark", "more", "message"),
    [
        ("cue-localisation", [], "did you mean 'cue-localization'"),
        ("localization", ["--method", "gradcamm"], "did you mean 'gradcam'"),
        ("classification", ["--method", "gradcam"], "about models, not about their maps"),
        ("classification", ["--norm", "minmax"], "classification does not read --norm"),
        ("remove-and-classify", ["--thresholds", "log"], "remove-and-classify does not read --thresholds"),
        ("classification", ["--batch_size", "0"], "--batch_size 0: give at least 1"),
        ("classification", ["--steps", "5"], "classification does not read --steps"),
        ("localization", ["--steps", "5"], "no --method reads --steps"),
        ("localization", ["--method", "cam", "--prior_exponent", "0.5"], "CALM model reads --prior_exponent"),
        ("localization", ["--prior_exponent", "-1"], "prior_exponent is -1: give 0"),
        ("localization", ["--method", "cam", "evidence"], "and evidence only compares two: choose another --method"),
        ("classification", ["--split", "tset"], "unknown value 'tset' in --split: allowed are train, val, test"),
        ("classification", ["--device", "cuda:77"], "cannot be used"),
        ("classification", ["--models", "x"], "unknown flag --models; did you mean --model?"),
        ("classification", ["--fill", "blur"], "classification does not read --fill"),
        ("all", ["--points", "5"], "all does not read --points"),
        ("insertion-deletion", ["--points", "0"], "--points 0: give at least 1"),
        ("insertion-deletion", ["--fractions", "0.5"], "insertion-deletion does not read --fractions"),
        ("remove-and-classify", ["--fractions", "0.5", "0.1"], "give ascending shares"),
        ("remove-and-classify", ["--fill", "zeros"], "unknown value 'zeros' in --fill: allowed are zero"),
    ],
)
def test_evaluate_tells_a_mistake_in_one_line(place, tmp_path, capsys, benchmark, more, message):
    out = tmp_path / "out"
    assert main(["evaluate", benchmark, *words(place, *more, "--out", str(out))]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_evaluate_compares_evidence_of_both_families(place, tmp_path):
    more = ("--method", "evidence", "joint", "--prior_exponent", "0.5", "--region", "box", "--replicates", "5")
    results = evaluate(["cue-localization", *words(place, *more, "--out", str(tmp_path / "out"))])
    names = ("CALM-EM evidence prior^0.5", "CALM-EM joint prior^0.5", "CAM evidence")
    assert [result.label for result in results] == [f"{name}, region box" for name in names]
    for result, exponent in zip(results, (0.5, 0.5, None), strict=True):
        assert result.provenance["subject"]["options"] == ({"prior_exponent": exponent} if exponent else {})
        assert {"mpxap", "mpxap_raw", "mpxap_stretched"} <= result.figures.keys()
    plain = evaluate(
        ["cue-localization", *words(place, *more[:3], "--out", str(tmp_path / "out"), models=("calm-em",))]
    )
    assert plain[1].figures["mpxap_raw"] != results[1].figures["mpxap_raw"]


def test_evaluate_fits_boxes_to_minmax_maps_by_default(place, tmp_path):
    def figures(*more):
        flags = words(place, *more, "--out", str(tmp_path / "out"), models=("calm-em",))
        (found,) = evaluate(["localization", *flags])
        return {name: estimate.value for name, estimate in found.figures.items()}

    usual, stretched = figures(), figures("--norm", "minmax", "--thresholds", "even")
    clipped = figures("--norm", "clipping", "--thresholds", "log")
    of_boxes = {name for name in usual if name.startswith(("maxboxacc", "top"))}
    assert len(of_boxes) >= 5
    assert {name for name in usual if usual[name] != stretched[name]} == {"pxap", "pxap_released", "energy_inside"}
    assert {name for name in usual if usual[name] != clipped[name]} <= of_boxes
    assert usual["maxboxacc_v2"] != clipped["maxboxacc_v2"]


def test_evaluate_refuses_a_map_kind_that_no_model_has(place):
    with pytest.raises(CalmError, match="posterior needs a CALM model"):
        evaluate(["cue-localization", *words(place, "--method", "posterior", models=("cam",))])


def test_evaluate_refuses_a_model_of_other_classes(place, tmp_path):
    for names in (["x", "y", "z"], ["v", "x", "y", "z"]):
        new_model(place, "cam", names=names).save_pretrained(tmp_path / "other")
        with pytest.raises(
            CalmError, match=rf"(?s)/other knows {len(names)} classes, .*only in .*birds.*Finch.*x, y, z"
        ):
            evaluate(["classification", "--model", str(tmp_path / "other"), "--data", str(place / "birds")])
    assert not (tmp_path / "other/evaluation").exists()


def test_evaluate_matches_classes_by_name(place, tmp_path):
    """A model that numbers the classes of the data otherwise, and knows more, gives the same figures."""
    model = calm.load(place / "calm-em")
    order = [2, 0, 3, 1]
    other = new_model(place, "calm-em", names=["none", *(model.class_names[number] for number in order)])
    other.backbone.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        for own, given in zip(other.head.parameters(), model.head.parameters(), strict=True):
            own.copy_(torch.cat([given[:1] - 50, given[order]]) if len(own) == 5 else given)
    other.save_pretrained(tmp_path / "other")
    flags = words(place, "--out", str(tmp_path / "out"), "--replicates", "0", models=("calm-em", tmp_path / "other"))
    for name in ("all", "insertion-deletion"):
        results = evaluate([name, *flags])
        for one, two in zip(results[::2], results[1::2], strict=True):
            assert one.figures.keys() == two.figures.keys()
            assert one.scores == pytest.approx(two.scores, abs=1e-4)
            for figure, estimate in one.figures.items():
                assert two.figures[figure].value == pytest.approx(estimate.value, abs=1e-4, nan_ok=True), figure
            assert two.provenance["subject"]["classes"] == [2, 4, 1, 3]
            assert "classes" not in one.provenance["subject"]


def test_results_and_tables_hold_no_nan(tmp_path):
    undefined, curve = Estimate(math.nan, math.nan, math.nan), Curve([0.0, 0.1], [1.0, math.nan])
    given = {"curves": {"ratio": curve}, "scores": {"a": math.nan}, "details": {"pairs": [{"pxap": math.inf}]}}
    result = Result("remove-and-classify", "CAM", {"r10": undefined}, **given)
    result.save(tmp_path / "result.json")
    write_tables([result], tmp_path)
    for name in ("result.json", "table.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
    loaded = Result.load(tmp_path / "result.json")
    assert math.isnan(loaded.figures["r10"].value)
    assert math.isnan(loaded.curves["ratio"].y[1])
    assert "| CAM | - |" in (tmp_path / "table.md").read_text()
    assert "CAM,r10,,,,ratio" in (tmp_path / "table.csv").read_text()


def test_format_estimate_writes_figures_in_their_unit():
    half = Estimate(0.5, 0.4, 0.625)
    assert format_estimate(half, FigureSpec("x")) == "50.0 (40.0-62.5)"
    assert format_estimate(half, FigureSpec("x", "nats", "lower")) == "0.500 (0.400-0.625)"
    assert format_estimate(Estimate(0.25, math.nan, math.nan), FigureSpec("x")) == "25.0"
    assert format_estimate(Estimate(-0.1, -0.2, -0.05), FigureSpec("x", "ratio")) == "-0.100 (-0.200 to -0.050)"
    assert format_estimate(None, FigureSpec("x")) == "-"


def test_markdown_marks_the_best_of_a_column():
    def result(label, top1, nll):
        return Result("b", label, {"top1": Estimate(top1, 0, 1), "nll": Estimate(nll, 0, 1)})

    lines = markdown([result("one", 0.9, 0.5), result("two", 0.8, 0.25)]).splitlines()
    assert "| one | **90.0 (0.0-100.0)** | 0.500 (0.000-1.000) |" in lines
    assert "| two | 80.0 (0.0-100.0) | **0.250 (0.000-1.000)** |" in lines
    assert FIGURES["nll"].better == "lower"


@pytest.mark.parametrize("name", ["chance", "part_of_image", "part_of_object"])
def test_markdown_never_marks_a_chance_level(name):
    results = [Result("b", label, {name: Estimate(v, 0, 1)}) for label, v in (("one", 0.2), ("two", 0.1))]
    assert FIGURES[name].better == ""
    assert "**" not in markdown(results)
    console = Console(record=True, width=80, file=io.StringIO())
    print_tables(results, console)
    assert console.export_text(styles=True).count("\x1b[1m20.0") == 0


@pytest.mark.parametrize(
    ("width", "first"), [(200, ["method", "mPxAP"]), (80, ["figure", "a"]), (60, ["figure", "method"])]
)
def test_print_tables_prints_one_table_that_fits(width, first):
    figures = {f"mpxap{counting}": Estimate(0.5, 0.25, 0.75) for counting in ("", "_raw", "_stretched", "_published")}
    figures |= {f"r{k}": Estimate(0.5 + k / 100, 0.25, 0.75) for k in (10, 30, 50, 70)}
    results = [
        Result("b", label, figures | {"r10": Estimate(r, math.nan, math.nan)})
        for label, r in zip("abc", (0.375, 0.125, 0.25), strict=True)
    ]
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    print_tables(results, console)
    styled = console.export_text(styles=True, clear=False)
    assert styled.count("\x1b[1m0.125") == 1, "the lowest R_10 is bold"
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    heads = [line.strip("┃ ").split("┃") for line in text.splitlines() if line.startswith("┃")]
    assert len(heads) == 1
    assert [head.split()[0] for head in heads[0][:2]] == first
    assert text.count("50.0") == 12, "every figure once"
    assert text.count("R_k: ") == 1


def test_print_tables_marks_paired_differences_that_exclude_0():
    pairs = {"a": (0.1, 0.2, 0.3, 0.4), "b": (0.3, 0.45, 0.5, 0.61), "c": (0.9, 0.1, 0.2, 0.5)}
    rows = [
        Result(
            "cue-localization",
            label,
            {"chance": Estimate(0.1, 0.1, 0.1)},
            details={"pairs": [{"pxap": v} for v in values]},
        )
        for label, values in pairs.items()
    ]
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    print_tables([*rows, Result("classification", "a", {"top1": Estimate(0.5, 0.4, 0.6)})], console)
    text = console.export_text(styles=True)
    assert "\x1b[1m21.5" in text, "b - a"
    assert "\x1b[1m17.5" not in text, "c - a"
    assert "17.5" in text
    assert text.index("paired differences") < text.index("classification"), "behind cue localization"


def test_print_tables_escapes_labels():
    console = Console(record=True, width=80, file=io.StringIO())
    print_tables([Result("b", "[red]x", {"top1": Estimate(0.5, 0.4, 0.6)})], console)
    assert "[red]x" in console.export_text()


def test_evaluate_scores_a_folder_of_maps(place, tmp_path):
    import shutil

    import numpy as np

    split = calm.data.load_split(place / "birds", "test")
    for record in split.records:
        path = tmp_path / "maps" / f"{record.id}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(0).random((7, 7), dtype=np.float32)
        np.save(path, np.kron(coarse, np.ones((32, 32), dtype=np.float32)))
    flags = words(place, "--maps", str(tmp_path / "maps"), "--out", str(tmp_path / "out"), models=("cam",))
    results = evaluate(["localization", *flags])
    assert [result.label for result in results] == ["CAM cam", "maps"]
    with pytest.raises(CalmError, match="--maps can be scored by localization only"):
        evaluate(["classification", *flags])
    for flag in (["--norm", "max"], ["--method", "gradcam"]):
        with pytest.raises(CalmError, match=f"{flag[0]} is about models"):
            evaluate(["localization", *words(place, "--maps", str(tmp_path / "maps"), *flag, models=())[1:]])
    with pytest.raises(CalmError, match="nothing to evaluate"):
        evaluate(["localization", "--data", str(place / "birds")])
    for flag in (["--workers", "2"], ["--device", "cpu"]):
        with pytest.raises(CalmError, match="--workers, --device and --precision are about models"):
            evaluate(["localization", "--data", str(place / "birds"), "--maps", str(tmp_path / "maps"), *flag])
    (tmp_path / "maps").rename(tmp_path / "one")
    for name in ("a", "b"):
        shutil.copytree(tmp_path / "one", tmp_path / name / "maps")
    flags = ["--data", str(place / "birds"), "--out", str(tmp_path / "two"), "--replicates", "20"]
    both = evaluate(["localization", "--maps", str(tmp_path / "a/maps"), str(tmp_path / "b/maps"), *flags])
    assert [result.label for result in both] == ["maps (a)", "maps (b)"]


def test_paired_differences_are_means_over_the_pairs_that_both_rows_have():
    """By hand: 0.2 and 0.4 over two pairs; the third has no figure in one row."""
    rows = [
        Result("cue-localization", label, {}, details={"pairs": [{"pxap": v, "pxap_raw": v} for v in values]})
        for label, values in (("a", (0.1, 0.5, float("nan"))), ("b", (0.3, 0.9, 0.7)))
    ]
    (apart,) = paired_differences([*rows, Result("classification", "a", {})])
    assert apart.label == "b - a"
    assert set(apart.figures) == {"mpxap", "mpxap_raw"}
    assert apart.figures["mpxap"] == pytest.approx((0.3, 0.2, 0.4), abs=1e-6)
