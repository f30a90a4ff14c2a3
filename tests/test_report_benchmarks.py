"""`calm report`: what was measured stands on the page, for all methods, with the truth drawn where it is."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import Texts, drawn_paths

import calm
from calm.cli import main
from calm.data.loading import load_split
from calm.errors import CalmError
from calm.evaluate.result import Curve, Result, figure_spec
from calm.evaluate.subject import weights_digest
from calm.images import Preprocessing
from calm.metrics.bootstrap import Estimate
from calm.model import create_model
from calm.render import draw_peak, overlay
from calm.report.benchmarks import benchmark_section, main_figure
from calm.report.charts import Line, dot_chart
from calm.report.found import PUBLISHED, Group, find_groups, styles
from calm.report.gallery import choose, gallery, maps_of, scenes
from calm.report.overview import report_page
from calm.report.page import Section, render
from calm.report.story import SIDE, Classifier, Study, _class_maps, _evidence_cards, _two_classes
from calm_birds import write_birds

HOSTILE = "<script>x</script> & co"


def made(benchmark="localization", label="CALM-EM joint", **changes):
    """A result as `calm evaluate` writes it."""
    x = np.linspace(0, 1, 400)
    fields = {
        "figures": {"maxboxacc": Estimate(0.61, 0.55, 0.66), "maxboxacc_v2": Estimate(0.5, 0.44, 0.57)},
        "curves": {
            "box-accuracy": Curve(
                x=x.tolist(),
                y=(x * (1 - x)).tolist(),
                x_name="threshold",
                y_name="accuracy",
                low=(x * (1 - x) - 0.02).tolist(),
                high=(x * (1 - x) + 0.02).tolist(),
            )
        },
        "provenance": {"data": {"images": 40, "classes": 4, "fingerprint": "f0"}, "subject": {}},
    }
    return Result(benchmark, label, **{**fields, **changes})


def cue_result(label="CALM-EM joint", shift=0.0, **changes):
    figures = {
        f"mpxap{kind}{number}": Estimate(0.3 + shift, 0.25 + shift, 0.35 + shift)
        for kind in ("", "_published")
        for number in ("", "_1", "_2")
    }
    pairs = [
        {"first": "001.Red_Bird", "second": "002.Blue_Bird", "groups": ["head"], "pxap": 0.25 + shift},
        {"first": "001.Red_Bird", "second": "003.Grey_Bird", "groups": ["head", "leg"], "pxap": 0.4 + shift},
        {"first": "002.Blue_Bird", "second": "003.Grey_Bird", "groups": ["tail"], "pxap": math.nan},
    ]
    fields = {"figures": figures, "curves": {}, "details": {"pairs": pairs}}
    return made("cue-localization", label, **{**fields, **changes})


def group(*results):
    return Group(results[0].benchmark, results, results[0].provenance["data"])


def drawn_gallery(*results):
    return Section("", "gallery", {"gallery": gallery(group(*results))}).body


def test_find_groups_sorts_results_by_benchmark_and_data_and_skips_other_json(tmp_path):
    made(label="CAM cam").save(tmp_path / "a" / "localization" / "cam-0123abcd.json")
    made().save(tmp_path / "b" / "deep" / "calm-0123abcd.json")
    cue_result().save(tmp_path / "b" / "cue.json")
    other = {"data": {"images": 9, "classes": 2, "fingerprint": "f1"}}
    made(provenance=other).save(tmp_path / "b" / "other.json")
    (tmp_path / "b" / "table.json").write_text("[1, 2]")
    (tmp_path / "b" / "broken.json").write_text("{")
    groups = find_groups([tmp_path / "a", tmp_path / "b", tmp_path])  # the last finds all of them again
    found = [(g.benchmark, [r.label for r in g.results], g.data["images"]) for g in groups]
    assert found == [
        ("cue-localization", ["CALM-EM joint"], 40),
        ("localization", ["CALM-EM joint", "CAM cam"], 40),
        ("localization", ["CALM-EM joint"], 9),
    ]
    assert len({g.heading for g in groups}) == 3


def test_find_groups_names_a_damaged_result_instead_of_leaving_it_out(tmp_path):
    made().save(tmp_path / "localization" / "calm.json")
    (tmp_path / "localization" / "cam.json").write_text('{"benchmark": "local')
    with pytest.raises(CalmError, match=r"localization/cam\.json"):
        find_groups([tmp_path])


def test_find_groups_names_the_protocols_of_one_model(tmp_path):
    for norm, cuts in (("minmax", "even"), ("max", "log"), ("max", "even")):
        said = {"normalization": norm, "thresholds": cuts, "subject": {"model": "runs/a"}}
        figures = {"mpxap": Estimate(0.5, 0.4, 0.6)}
        result = Result("cue-localization", "CAM cam", figures, provenance=said)
        result.save(tmp_path / f"{norm}-{cuts}.json")
    (group,) = find_groups([tmp_path])
    assert {result.label for result in group.results} == {
        "CAM cam (norm minmax, thresholds even)",
        "CAM cam (norm max, thresholds log)",
        "CAM cam (norm max, thresholds even)",
    }


def test_main_figure_names_all_that_share_the_best():
    def shown(*values):
        results = [
            Result("classification", name, {"top1": Estimate(value, value, value)})
            for name, value in zip("abcde", values, strict=False)
        ]
        *_, note = main_figure(Group("classification", tuple(results), {}))
        return note.replace("\u202f", " ")

    assert shown(0.5, 0.7, 0.6) == "b; next c, 60.0 %"
    assert shown(0.7, 0.70001, 0.6) == "b, a; next c, 60.0 %"
    assert shown(0.7, 0.7) == "a, b"
    assert shown(0.7, 0.7, 0.7, 0.7, 0.6) == "a, b, c and 1 more; next e, 60.0 %"


def test_main_figure_says_which_methods_it_does_not_tell_apart():
    def result(label, value, low, high):
        return made(
            "remove-and-classify", label, figures={"r10": Estimate(0.1, 0.0, 0.2), "r_area": Estimate(value, low, high)}
        )

    rows = result("a", 0.5, 0.4, 0.6), result("b", 0.7, 0.6, 0.8), result("c", 0.65, 0.55, 0.75)
    value, title, note = main_figure(group(*rows, result("d", 0.9, 0.85, 0.95)))
    assert (value, title) == ("0.500", "Remove and classify: R area")
    assert note == "a; not told apart from c, 0.650, and 1 more"
    assert main_figure(group(rows[0], result("d", 0.9, 0.85, 0.95)))[2] == "a; next d, 0.900"


def test_benchmark_section_bolds_paired_differences_that_exclude_0():
    """CAM is what the others are compared with, wherever it stands; all four pairs differ alike from it."""

    def result(label, values, method):
        subject = {"method": method, "model_config": {"method": "cam" if method == "cam" else "calm-em"}}
        pairs = [{"first": "a", "second": "b", "groups": ["head"], "pxap": v, "pxap_raw": v} for v in values]
        provenance = {"subject": subject, "data": {"root": "/data", "images": 4, "classes": 4, "fingerprint": "f"}}
        figures = {name: Estimate(0.5, 0.4, 0.6) for name in ("mpxap_1", "mpxap_raw_1", "mpxap_stretched_1")}
        return made("cue-localization", label, figures=figures, details={"pairs": pairs}, provenance=provenance)

    rows = [
        result("CALM-EM joint", (0.2, 0.3, 0.4, 0.5), "joint"),
        result("CALM-EM evidence", (0.1, 0.3, 0.0, 0.5), "evidence"),
        result("CAM cam", (0.1, 0.2, 0.3, 0.4), "cam"),
    ]
    body = benchmark_section(group(*rows), styles([group(*rows)])).body.replace("\u202f", " ")
    table = body.split("Minus CAM cam, over the same pairs")[1].split("</table>")[0]
    joint, evidence = (part.split("</tr>")[0] for part in table.split("<tr>")[2:])
    assert "CALM-EM joint<" in joint
    assert joint.count("<b>10.0 %</b>") == 2
    assert "CALM-EM evidence<" in evidence
    assert "<b>" not in evidence
    for reading in ("mPxAP", "mPxAP raw", "mPxAP stretched"):
        assert f"{reading} by differing parts" in body


def test_find_groups_names_missing_and_empty_folders(tmp_path, capsys):
    with pytest.raises(CalmError, match=r"gone: no such folder"):
        find_groups([tmp_path / "gone"])
    with pytest.raises(CalmError, match=r"make some with calm evaluate"):
        find_groups([tmp_path])
    assert main(["report", str(tmp_path)]) == 2
    assert "no result of a benchmark below" in capsys.readouterr().err
    run, page = tmp_path / "run", tmp_path / "report.html"
    run.mkdir()
    (run / "config.yaml").write_text("method: cam")
    assert main(["report", str(run), "--out", str(page)]) == 2
    assert f"calm train --resume {run} goes on" in capsys.readouterr().err
    (run / "result.json").write_text("cut o")
    assert main(["report", str(run), "--out", str(page)]) == 2
    assert "run is no finished run of calm train: it has no metrics.csv" in capsys.readouterr().err
    assert not page.exists(), "no page without a figure"


def test_find_groups_tells_equal_labels_apart_by_their_runs(tmp_path):
    for seed in (0, 1):
        provenance = {"data": {"fingerprint": "f"}, "subject": {"model": f"runs/calm-{seed}"}}
        made(provenance=provenance).save(tmp_path / f"{seed}.json")
    (found,) = find_groups([tmp_path])
    assert [r.label for r in found.results] == ["CALM-EM joint (calm-0)", "CALM-EM joint (calm-1)"]


def test_styles_of_a_model_without_maps_are_those_of_its_main_maps():
    def result(benchmark, label, model, method="joint"):
        return made(benchmark, label, provenance={"subject": {"model": model, "method": method}, "data": {}})

    rows = [
        result("localization", "CALM-EM evidence", "/a", "evidence"),
        result("localization", "CALM-EM joint", "/a"),
        result("localization", "CAM cam", "/b", "cam"),
        result("classification", "CALM-EM", "/a"),
        result("classification", "CAM", "/b", "cam"),
        result("classification", "CAM (other)", "/c", "cam"),
    ]
    looks = styles([group(*rows[:3]), group(*rows[3:])])
    assert looks["CALM-EM"] == looks["CALM-EM joint"] == ("calm", False)
    assert looks["CAM"] == looks["CAM cam"] == ("cam", False)
    assert len({*map(looks.get, ("CALM-EM joint", "CALM-EM evidence", "CAM cam", "CAM (other)"))}) == 4


def test_styles_differ_and_calm_and_cam_have_their_own():
    methods = {"CAM gradient": "gradient", "CALM-ML joint": "joint", "CAM cam": "cam"}
    labels = [*methods, *map(str, range(12))]
    subjects = [{"subject": {"method": methods.get(label)}} for label in labels]
    results = [made(label=n, provenance={"data": {}, **s}) for n, s in zip(labels, subjects, strict=True)]
    looks = styles([group(*results)])
    assert len(set(looks.values())) == len(labels)
    assert looks["CALM-ML joint"] == ("calm", False)
    assert looks["CAM cam"] == ("cam", False)


def test_benchmark_section_has_figures_with_intervals_and_dashes():
    nothing = Estimate(math.nan, math.nan, math.nan)
    one = made(label=HOSTILE, figures={"nll": Estimate(0.5, 0.4, 0.6), "top1": Estimate(0.61, 0.55, 0.66)})
    two = made(label="CAM cam", figures={"top1": Estimate(0.4, 0.3, 0.5), "nll": nothing})
    three = made(label="third", figures={"nll": Estimate(0.3, math.nan, math.nan)})
    section = benchmark_section(group(one, two, three), styles([group(one, two, three)]))
    texts = Texts(section.body)
    thin = "\N{NARROW NO-BREAK SPACE}%"
    assert texts.of("caption") == ["40 images; 95 percent intervals"]
    titles = [figure_spec(name).title for name in ("top1", "nll")]
    assert texts.of("th") == ["method", *titles, HOSTILE, "CAM cam", "third"]
    assert texts.of("b") == [f"61.0{thin}", "0.300"]  # the higher accuracy, the lower loss
    assert texts.of("td") == ["0.500", f"40.0{thin}", "–", "–"]  # noqa: RUF001
    assert texts.of("small") == [f"55.0–66.0{thin}", "0.400–0.600", f"30.0–50.0{thin}"]  # noqa: RUF001
    assert "<script" not in section.body


def test_benchmark_section_draws_the_curves_of_all_methods_in_one_chart():
    both = group(made(), made(label="CAM cam"))
    section = benchmark_section(both, styles([both]))
    assert section.body.count("<svg") == 1
    (curve,) = drawn_paths(section.body, "calm")
    assert 50 < len(curve) <= 400
    share = (curve[:, 0] - curve[0, 0]) / (curve[-1, 0] - curve[0, 0])
    x = np.linspace(0, 1, 400)
    drawn = np.interp(x, share, (curve[0, 1] - curve[:, 1]) / np.ptp(curve[:, 1]))
    assert abs(drawn - 4 * x * (1 - x)).max() < 0.01
    assert len(drawn_paths(section.body, "cam")) == 1


def test_benchmark_section_folds_minor_figures_and_never_bolds_chance():
    names = ("mpxap", "mpxap_1", "mpxap_released", "mpxap_released_1", "part_of_image", "chance")
    figures = {name: Estimate(0.3, 0.2, 0.4) for name in names}
    less = {name: Estimate(0.1, 0.0, 0.2) for name in names}
    both = group(made("cue-localization", figures=figures), made("cue-localization", "CAM cam", figures=less))
    body = benchmark_section(both, styles([both])).body
    before, fold = body.split("<summary>More figures</summary>")
    columns = [re.findall(r'<th scope="col">([^<]+)', part.split("<summary>")[0])[1:] for part in (before, fold)]
    assert columns == [["1 part", "mPxAP", "chance"], ["1 part released", "mPxAP released", "part of image"]]
    assert body.count("<b>") == 4  # of CALM-EM: not its chance levels
    notes = Texts(body).of("dt")
    assert notes == ["1 part, 2 parts, ...", "mPxAP", "mPxAP released", "part of image", "chance"]


def test_benchmark_section_draws_cues_by_parts_and_by_pair_but_not_pairs_without_images():
    both = group(cue_result(), cue_result("CAM cam", -0.1))
    body = benchmark_section(both, styles([both])).body
    assert body.count("<svg") == 3  # per pair counting, released counting, single pairs
    assert "Red Bird / Blue Bird (1)" in body
    assert "Red Bird / Grey Bird (2)" in body
    assert "Blue Bird / Grey Bird" not in body


def test_dot_chart_puts_dots_at_their_values_with_intervals():
    values, ends = [0.2, 0.6, math.nan], ([0.1, 0.5, math.nan], [0.3, 0.7, math.nan])
    html = dot_chart([Line(range(3), values, "a", "calm", band=ends)], "xyz", title="t", x_label="x")
    dots = [
        (float(x), float(y))
        for x, y in re.findall(r'<use xlink:href="#[^"]+" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--calm\)', html)
    ]
    bars = drawn_paths(html, "calm")
    bars = [bar for bar in bars if len(bar) == 2 and bar[0, 0] == bar[1, 0]]
    assert len(dots) == 2
    assert len(bars) == 2
    for (x, y), bar in zip(dots, bars, strict=True):
        assert abs(bar[0, 0] - x) < 1e-6
        assert abs(bar[:, 1].mean() - y) < 1e-4  # these intervals are symmetric


def test_published_figures_stand_beside_ours_on_the_same_data_only():
    cub = {
        "data": {"images": 5794, "classes": 200, "fingerprint": "f", "class_counts": {"001.Black_footed_Albatross": 30}}
    }
    ours = group(cue_result(provenance=cub))
    body = benchmark_section(ours, styles([ours])).body
    assert "paper: CALM-EM" in body
    assert all(f"{value}\N{NARROW NO-BREAK SPACE}%" in body for value in (30.4, 33.3, 36.3, 34.3, 29.6))
    birds = group(cue_result())
    assert "paper:" not in benchmark_section(birds, styles([birds])).body
    assert ("localization", "CUB-200-2011") not in PUBLISHED


def test_published_means_agree_with_their_columns_weighted_by_pairs():
    """31, 64 and 96 pairs: a slip of the pen in the table would show."""
    for figures in PUBLISHED["cue-localization", "CUB-200-2011"].rows.values():
        columns = [figures[f"mpxap_published_{n}"] for n in (1, 2, 3)]
        assert abs(np.dot(columns, [31, 64, 96]) / 191 - figures["mpxap_published"]) < 0.004


def test_choose_takes_images_by_mean_score_that_all_methods_have():
    scores = {f"{n:02d}": n / 20 for n in range(20)}
    one = made(scores={**scores, "only-here": 9.0})
    two = made(label="CAM cam", scores={**scores, "19": 0.0, "05": math.nan})
    chosen = choose(group(one, two))
    assert [name for why, name in chosen if why == "best"] == ["18", "17", "16"]
    assert [name for why, name in chosen if why == "worst"] == ["00", "01", "02"]
    names = [name for _, name in chosen]
    assert len(set(names)) == len(names) == 10
    assert not {"only-here", "05"} & set(names)
    assert choose(group(one, two)) == chosen
    assert choose(group(made(scores={"a": 1.0}))) == [("best", "a")]
    assert choose(group(made())) == []


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """Birds in CUB's layout and an untrained model, where a result says that they are."""
    folder = tmp_path_factory.mktemp("gallery")
    write_birds(folder / "birds", species=4, images_per_species=10, size=64, workers=1)
    split = load_split(folder / "birds", "test")
    torch.manual_seed(0)
    model = create_model(
        "tiny_resnet", split.num_classes, class_names=split.class_names, preprocessing=Preprocessing((64, 64))
    )
    model.save_pretrained(folder / "model")
    data = {
        "root": str(folder / "birds"),
        "split": "test",
        "images": len(split.records),
        "classes": split.num_classes,
        "fingerprint": "f",
    }
    scores = {record.id: place / len(split.records) for place, record in enumerate(split.records)}
    subject = {
        "model": str(folder / "model"),
        "method": "joint",
        "options": {},
        "weights": weights_digest(model),
        "normalization": "clipping",
    }
    return folder, split, model.eval(), {"data": data, "subject": subject}, scores


def test_gallery_shows_the_models_maps_on_the_images_of_the_result(birds):
    _, split, model, provenance, scores = birds
    result = made(provenance=provenance, scores=scores)
    views = scenes(group(result), [record.id for record in split.records[:3]])
    maps = maps_of(result, views)
    for view, values, record in zip(views, maps, split.records, strict=False):
        assert view.boxes == record.boxes
        output = model(model.preprocess(record.path))
        expected = output.joint[0, record.label].detach()
        torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-4)
    html = drawn_gallery(result, made(label="CAM cam"))
    assert html.count("data:image/jpeg") == 10 * 2  # of the method without scores and model nothing can be drawn
    assert "The maps of CAM cam are not shown: its provenance names no model." in html
    assert Texts(html).of("h3") == ["Best", "Worst", "At random"]


def test_scenes_of_cues_ask_about_a_pair_and_outline_what_differs(birds):
    folder, split, model, provenance, scores = birds
    result = cue_result(provenance=provenance, scores=scores)
    (view,) = scenes(group(result), [split.records[0].id])
    assert split.records[0].label in view.classes
    assert len(view.classes) == 2
    segmentation = folder / "birds" / "segmentations" / Path(split.records[0].id).with_suffix(".png")
    bird = np.array(Image.open(segmentation).convert("L").resize((224, 224), Image.Resampling.BICUBIC)) > 0
    region = view.region.numpy() > 0
    assert region.any()
    assert not (region & ~bird).any()
    (values,) = maps_of(result, [view])
    output = model(model.preprocess(split.records[0].path))
    one, other = (output.joint[0, c].detach() for c in view.classes)
    torch.testing.assert_close(values, (one - other).abs(), atol=1e-6, rtol=1e-4)


def test_gallery_of_a_model_with_another_order_of_classes(birds):
    _, split, model, provenance, scores = birds
    other = {**provenance, "subject": {**provenance["subject"], "classes": [2, 0, 3, 1]}}
    result = made(provenance=other, scores=scores)
    (values,) = maps_of(result, scenes(group(result), [split.records[0].id]))
    output = model(model.preprocess(split.records[0].path))
    expected = output.joint[0, [2, 0, 3, 1][split.records[0].label]].detach()
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-4)
    other_names = replace(split, class_names=split.class_names[::-1])
    few = replace(split, records=split.records[:3])
    own, turned = (Classifier.predicting("CALM", model, s) for s in (few, replace(other_names, records=few.records)))
    torch.testing.assert_close(turned.probs, own.probs.flip(1))
    study = Study(split.root, few, 3, turned, None, None)
    maps = _class_maps(study, turned, 0, 0, 2)
    torch.testing.assert_close(maps, output.joint[0, [3, 1]].detach(), atol=1e-6, rtol=1e-4)
    more = create_model("small_resnet", 5, class_names=[*model.class_names, "dodo"])
    with pytest.raises(CalmError, match="the CALM model has 5 classes, of which the data have 4"):
        Classifier.predicting("CALM", more, few)


def test_evidence_of_a_flat_map_looks_flat(birds):
    """Colours end at four times uniform at least: stretched to its own range a flat map would look like a finding."""
    _, split, model, _, _ = birds
    study = Study(split.root, split, 3, Classifier.predicting("CALM", model, split), None, None)
    (card,) = _evidence_cards(study, [0])
    first = _two_classes(study, 0, 0, 1)[1]
    output = model(model.preprocess(split.records[0].path))
    prior, joint = output.prior[0].detach(), output.joint[0].detach()
    assert prior.max() < 4 / prior.numel(), "the model is untrained: its prior is nearly flat"
    shots = {shot.label: shot.picture for shot in card["shots"]}
    picture = study.picture(0)
    for shown, values, top in (
        (shots["CALM: prior"], prior, 4 / prior.numel()),
        (first.picture, joint[0], 4 * float(joint[:2].sum((1, 2)).max()) / prior.numel()),
    ):
        expected = draw_peak(overlay(picture, values, top=top, size=(SIDE, SIDE)), values)
        np.testing.assert_allclose(shown.astype(int), expected.astype(int), atol=1)


def test_gallery_says_what_it_cannot_show(birds, tmp_path):
    _, _, _, provenance, scores = birds
    lost = {**provenance, "subject": {**provenance["subject"], "model": str(tmp_path / "gone")}}
    html = drawn_gallery(made(provenance=lost, scores=scores))
    assert "its model is no longer at" in html
    assert html.count("data:image/jpeg") == 10  # the images themselves are there
    for changes, words in (
        ({"model": "owner/name"}, "its model owner/name is no folder"),
        ({"weights": "0" * 64}, "has other weights now"),
        ({"maps": str(tmp_path)}, f"cannot read map {tmp_path}"),
    ):
        for name in scores:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / f"{name}.npy").write_bytes(b"damaged")
        other = {**provenance, "subject": {**provenance["subject"], **changes}}
        assert words in drawn_gallery(made(provenance=other, scores=scores))
    moved = {**provenance, "data": {**provenance["data"], "root": str(tmp_path / "moved")}}
    html = drawn_gallery(made(provenance=moved, scores=scores))
    assert "the data cannot be read any more" in html
    assert "<img" not in html


def test_report_writes_one_page_that_needs_no_other_file(birds, tmp_path, capsys):
    _, _, _, provenance, scores = birds
    made(provenance=provenance, scores=scores).save(tmp_path / "e" / "localization" / "a.json")
    cue_result(provenance=provenance, scores=scores).save(tmp_path / "e" / "cue" / "a.json")
    out = tmp_path / "pages" / "report.html"
    assert main(["report", str(tmp_path / "e"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    html = out.read_text(encoding="utf-8")
    Texts(html)
    headings = Texts(html).of("h2")
    assert headings == ["Cue localization on birds", "Localization on birds", "How it was made"]
    assert html.count('<details class="gallery" open>') == 2
    assert not re.search(r"url\((?!#)|@import|<link|<script|src=\"(?!data:)|href=\"(?!#)", html)
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_report_refuses_a_folder_as_its_page(tmp_path, capsys):
    made().save(tmp_path / "a.json")
    assert main(["report", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "give the name of a file" in capsys.readouterr().err


def of_calm(provenance, **data):
    """A provenance that says that the model was trained as a CALM."""
    subject = {**provenance["subject"], "model_config": {"method": "calm-em"}}
    return {"data": {**provenance["data"], **data}, "subject": subject}


def test_report_tells_the_story_of_a_calm_model_without_cam(birds, tmp_path):
    _, _, _, provenance, scores = birds
    top1 = {"top1": Estimate(0.25, 0.2, 0.3)}
    made("classification", figures=top1, provenance=of_calm(provenance), scores=scores).save(tmp_path / "a.json")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 0
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    texts = Texts(html)
    assert texts.of("h2") == ["The birds", "Where is the evidence?", "And when it is wrong?", "Classification on birds",
                              "How it was made"]  # fmt: skip
    assert texts.of("h1") == ["A classifier that says where it saw the evidence"]
    assert texts.of("dd")[:2] == ["25.0\N{NARROW NO-BREAK SPACE}%", "4"]
    assert "CAM" not in " ".join(texts.of("figcaption") + texts.of("h3"))
    assert "test accuracy (20.0\N{EN DASH}30.0\N{NARROW NO-BREAK SPACE}%)" in texts.of("dt")
    assert "calm data birds birds --species 4" in html
    assert str(birds[0]) not in html


def test_report_shows_classes_of_any_data_set_and_two_of_them_apart(birds, tmp_path):
    folder, split, _, provenance, _ = birds
    names = [HOSTILE.replace("/", ""), "1", "2", "3"]
    for number, record in enumerate(split.records):
        for part in ("train", "test"):
            place = tmp_path / "photos" / part / names[record.label]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.jpg").write_bytes(record.path.read_bytes())
    model = calm.load(folder / "model")
    model.class_names = load_split(tmp_path / "photos", "test").class_names
    model.save_pretrained(tmp_path / "model")
    for root, saved in ((folder / "birds", folder / "model"), (tmp_path / "photos", tmp_path / "model")):
        provenance = {**provenance, "subject": {**provenance["subject"], "model": str(saved)}}
        said = of_calm(provenance, root=str(root), fingerprint=root.name)
        figures = {"top1": Estimate(0.25, 0.2, 0.3)}
        made("classification", figures=figures, provenance=said).save(tmp_path / "e" / f"{root.name}.json")
    page = report_page([tmp_path / "e"], base=tmp_path)
    assert page.sections[-1].values["problems"] == []
    html = render(page)
    titles = [section.title for section in page.sections]
    assert titles[:3] == ["The birds (birds)", "Where is the evidence? (birds)", "And when it is wrong? (birds)"]
    assert "The classes (photos)" in titles
    assert len({section.anchor for section in page.sections}) == len(titles)
    assert "<script>x" not in html
    assert "&lt;script" in html


def test_report_says_why_single_images_are_left_out(birds, tmp_path):
    _, _, _, provenance, _ = birds
    moved = of_calm(provenance, root=str(tmp_path / "gone"))
    made("classification", figures={"top1": Estimate(0.25, 0.2, 0.3)}, provenance=moved).save(tmp_path / "a.json")
    html = render(report_page([tmp_path], base=tmp_path))
    assert "The sections on single images are left out: there is no folder gone." in html
