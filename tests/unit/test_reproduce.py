"""Published numbers as data, windows, verdicts, causes and votes; what is published is checked as literals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypersd_bench import registry
from hypersd_bench.catalog.published import TABLES
from hypersd_bench.cli.main import main
from hypersd_bench.errors import InputError
from hypersd_bench.features import Reference, read_features, read_reference, write_reference
from hypersd_bench.store import RunStore, SetScoreRow
from metrics.comparison import summaries
from metrics.reproduce.causes import Evidence, likely_causes
from metrics.reproduce.preset import CONTRACTS, Preset, Study, catalogue_entries, load_preset, preset_ids
from metrics.reproduce.running import chosen_models, run_spec
from metrics.reproduce.table import Cell, Outcome, compare
from metrics.reproduce.votes import COLUMNS, compare_votes, read_votes
from metrics.reproduce.window import CROSS_STACK, Z, computed_window, published_window, votes_needed
from metrics.set_statistics import evaluate
from metrics.stats import wilson
from tests.synthetic_run import CLIP, FID, REFERENCE, make_run
from user_study import export

TABLE_IDS = [name for name in preset_ids() if isinstance(load_preset(name), Preset)]
STUDY_IDS = [name for name in preset_ids() if isinstance(load_preset(name), Study)]


def table(name: str) -> Preset:
    found = load_preset(name)
    assert isinstance(found, Preset)
    return found


def study(name: str) -> Study:
    found = load_preset(name)
    assert isinstance(found, Study)
    return found


# presets


def test_the_presets_that_there_are() -> None:
    assert {"hyper-sd-table2", "hyper-sd-table2-sd15", "lightning-table", "dmd2-table", "mlperf-sdxl"} <= set(TABLE_IDS)
    assert set(STUDY_IDS) == {"hyper-sd-user-study", "hyper-sd-user-study-sd15"}


@pytest.mark.parametrize("name", TABLE_IDS)
def test_a_tables_models_and_metrics_are_known(name: str) -> None:
    preset = table(name)
    for row in preset.rows:
        assert catalogue_entries(preset.spec.base, row.model, row.steps, row.forced), row.label
        assert row.forced == (not catalogue_entries(preset.spec.base, row.model, row.steps)), row.label
    assert set(preset.spec.metrics) <= set(registry.rows("metric"))
    assert preset.spec.timing is None


@pytest.mark.parametrize("name", STUDY_IDS)
def test_a_studys_models_are_known(name: str) -> None:
    preset = study(name)
    for row in preset.rows:
        assert catalogue_entries(preset.base, row.model_a, row.steps_a)
        known = bool(catalogue_entries(row.base_b or preset.base, row.model_b, row.steps_b))
        assert known != row.forced
        assert catalogue_entries(row.base_b or preset.base, row.model_b, row.steps_b, forced=True)


@pytest.mark.parametrize("name", TABLE_IDS)
def test_values_have_no_more_digits_than_are_printed(name: str) -> None:
    preset = table(name)
    for row in preset.rows:
        for column, value in row.values.items():
            assert float(f"{value:.{preset.columns[column].digits}f}") == value


@pytest.mark.parametrize("name", [name for name in TABLE_IDS if name != "mlperf-sdxl"])
def test_values_are_those_of_the_catalogue(name: str) -> None:
    preset = table(name)
    number = preset.source.arxiv.split()[0]
    known = {
        (base, family, steps): values
        for published in TABLES
        if number in published.source and ("Table 2" in published.source or "Hyper-SD" not in published.source)
        for base, family, steps, values in published.parsed()
    }
    shared = 0
    for row in preset.rows:
        values = {column.casefold(): v for column, v in known.get((preset.spec.base, row.model, row.steps), {}).items()}
        for column, value in row.values.items():
            if column.casefold() in values:
                assert value == values[column.casefold()], (row.label, column)
                shared += 1
    assert shared >= 3


def test_hyper_sds_table_as_printed() -> None:
    values = {row.label: dict(row.values) for row in table("hyper-sd-table2").rows}
    assert values["teacher@25"] == {"CLIP": 33.16, "Aes": 5.54, "IR": 0.87, "Pick": 0.229}
    assert values["lightning-lora@4"] == {"CLIP": 32.40, "Aes": 5.63, "IR": 0.72, "Pick": 0.229}
    # the abstract: +0.68 CLIP and +0.51 aesthetic over SDXL-Lightning in one step
    ours, theirs = values["hyper-sd@1"], values["lightning@1"]
    assert ours["CLIP"] - theirs["CLIP"] == pytest.approx(0.68)
    assert ours["Aes"] - theirs["Aes"] == pytest.approx(0.51)
    sd15 = {row.label: dict(row.values) for row in table("hyper-sd-table2-sd15").rows}
    assert sd15["lcm@4"] == {"CLIP": 30.36, "Aes": 5.66, "IR": -0.37, "Pick": 0.212}
    assert len(values) + len(sd15) == 13


def test_the_other_tables_as_printed() -> None:
    lightning = {row.label: dict(row.values) for row in table("lightning-table").rows}
    assert lightning["lightning@4"] == {"FID": 22.30, "patch FID": 33.52, "CLIP": 26.07}
    assert lightning["lcm-unet@1"] == {"FID": 80.01, "patch FID": 158.90, "CLIP": 23.65}
    assert len(lightning) == 13
    dmd2 = {row.label: dict(row.values) for row in table("dmd2-table").rows}
    assert [dmd2[label]["FID"] for label in ("dmd2@4", "dmd2-lora@4", "dmd2@1")] == [19.32, 19.68, 19.01]
    assert dmd2["lightning@4"]["CLIP"] == 0.323
    nitro = {row.label: dict(row.values) for row in table("nitrofusion-table1").rows}
    assert nitro["hyper-sd@1"] == {"CLIP": 0.317, "FID": 36.77, "Aes": 6.00, "IR": 1.169}


def test_the_user_study_as_printed() -> None:
    sdxl = {(r.model_a, r.steps_a, r.model_b): r.preferred for r in study("hyper-sd-user-study").rows}
    assert sdxl["hyper-sd", 4, "lightning-lora"] == 63.1
    assert sdxl["hyper-sd-unified", 1, "turbo"] == 61.2
    assert sdxl["hyper-sd", 1, "turbo"] == 90.6
    sd15 = {(r.model_a, r.steps_a, r.model_b): r.preferred for r in study("hyper-sd-user-study-sd15").rows}
    assert sd15["hyper-sd", 1, "tcd"] == 98.0
    assert sd15["hyper-sd", 1, "turbo"] == 52.9


def test_mlperfs_windows_are_as_it_says() -> None:
    """The rules: within 0.2 % of the reference's CLIP score and within 2 % of its FID."""
    (row,) = table("mlperf-sdxl").rows
    assert row.values == {"CLIP": 31.74981837, "FID": 23.48046692}
    for name, share in (("CLIP", 0.002), ("FID", 0.02)):
        low, high = row.windows[name]
        assert low == pytest.approx(row.values[name] * (1 - share), abs=1e-7)
        assert high == pytest.approx(row.values[name] * (1 + share), abs=1e-7)
    assert CROSS_STACK["clip-score"] == 0.002
    assert CROSS_STACK["fid"] == 0.02


def test_mlperfs_sampler_is_that_of_sdxl() -> None:
    """SDXL's own scheduler configuration, 20 steps: what diffusers gives for it."""
    from diffusers import EulerDiscreteScheduler

    from hypersd_bench.sampling import SamplerContract
    from hypersd_bench.yaml_file import read_yaml

    contract = SamplerContract.from_json(json.dumps(read_yaml(CONTRACTS / "mlperf-sdxl.yaml", "contract")))
    base = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    own = EulerDiscreteScheduler(**base, timestep_spacing="leading", steps_offset=1)
    own.set_timesteps(20)
    assert list(contract.timesteps[20]) == own.timesteps.tolist()
    built: Any = contract.make_scheduler(base)
    contract.set_timesteps(built, 20)
    assert built.sigmas.tolist() == own.sigmas.tolist()
    assert contract.guidance_scale == 8


@pytest.mark.parametrize("name", TABLE_IDS)
def test_a_presets_run_can_be_planned(name: str, tmp_path: Path) -> None:
    from hypersd_bench.runner.plan import make_plan

    (tmp_path / "prompts.txt").write_text("a fox\n")
    preset = table(name)
    spec = run_spec(preset, preset.labels, prompts=tmp_path / "prompts.txt")
    plan = make_plan(spec, Path(), "cpu")
    comparable = {row.label for row in preset.rows if any(preset.columns[column].metric for column in row.values)}
    assert {str(configuration) for configuration in plan.configurations} == comparable
    forced = {row.label for row in preset.rows if row.forced}
    assert {str(c) for c in plan.configurations if c.breaches} == forced


@pytest.mark.parametrize("change", [{"rows": []}, {"spec": {"base": "sdxl", "models": ["lcm@4"]}}, {"colums": {}}])
def test_a_preset_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    raw = table("mlperf-sdxl").model_dump() | change
    with pytest.raises(ValueError, match=r"rows|colums"):
        Preset.model_validate(raw)


# windows


def test_a_windows_three_parts() -> None:
    # 0.002 * 32.5; half of 0.01; SE 0.05 on 5,000 of both sides
    window = computed_window(32.5, 2, Z * 0.05, 5000, 5000, "clip-score/vit-b-32")
    half = 0.005 + 1.96 * 0.05 * math.sqrt(2) + 0.065
    assert window.low == pytest.approx(32.5 - half)
    assert window.high == pytest.approx(32.5 + half)
    # of a quarter of their prompts: their error is half of ours
    fewer = computed_window(32.5, 2, Z * 0.1, 1250, 5000, "clip-score/vit-b-32")
    assert fewer.parts["sampling"] == pytest.approx(1.96 * math.hypot(0.1, 0.05))
    # a cosine printed with three digits, in units of x100; no allowance for a family without a known one
    scaled = computed_window(0.229, 3, 0.0, 5000, None, "pick-score/v1", scale=100)
    assert (scaled.low, scaled.high) == pytest.approx((22.85, 22.95))
    unknown = computed_window(5.5, 2, Z * 0.01, 100, None, "aesthetic/laion-v2")
    assert unknown.parts == pytest.approx({"rounding": 0.005, "sampling": 1.96 * 0.01 * math.sqrt(2), "stack": 0.0})
    negative = computed_window(-20.0, 2, 0.0, 10, 10, "clip-score/vit-b-32")
    assert negative.low < -20 < negative.high


@pytest.mark.parametrize("wrong", [(math.nan, 10, 10), (-0.1, 10, 10), (0.1, 0, 10), (0.1, 10, 0)])
def test_no_window_without_an_interval(wrong: tuple[float, int, int]) -> None:
    with pytest.raises(ValueError, match="no interval"):
        computed_window(1.0, 2, *wrong, "image-reward/v1")


def test_a_windows_ends_are_inside() -> None:
    window = published_window((31.68631873, 31.81331801))
    assert window.holds(31.68631873)
    assert window.holds(31.81331801)
    assert not window.holds(31.81331802)


@pytest.mark.parametrize("rate", [0.5, 0.529, 0.714, 0.906, 0.98, 1.0])
def test_votes_needed_are_the_fewest(rate: float) -> None:
    def half(n: int) -> float:
        found = wilson(rate * n, n)
        return (found.high - found.low) / 2

    n = votes_needed(rate)
    assert half(n) <= 0.05 + 1e-5  # 1.96 for 1.95996
    assert half(n - 1) > 0.05 - 1e-5


def test_votes_needed_at_even_odds() -> None:
    assert votes_needed(0.5) == math.ceil(1.96**2 / (4 * 0.05**2) - 1.96**2) == 381


# verdicts, on a made-up run


def preset_of(rows: list[dict[str, Any]], count: int | None = 6, **columns: Any) -> Preset:
    labels: dict[str, list[int]] = {}
    for row in rows:
        labels.setdefault(row["model"], []).append(row["steps"])
    used = {column["metric"] for column in columns.values() if column["metric"]}
    return Preset.model_validate(
        {
            "id": "made-up",
            "title": "A table",
            "source": {"paper": "A paper", "arxiv": "", "table": "a table"},
            "protocol": {"prompts": "made-up", "prompts_listed": False, "count": count, "resolution": "64 px",
                         "pixels": 64, "sampler": "theirs", "guidance": "none", "unstated": []},
            "spec": {"base": "pocket", "metrics": sorted(used), "timing": False,
                     "models": [{"name": name, "steps": steps} for name, steps in labels.items()]},
            "columns": columns,
            "rows": rows,
        }
    )  # fmt: skip


CLIP_COLUMN = {"metric": CLIP.id, "digits": 2, "assumption": "no prefix"}
FID_COLUMN = {"metric": FID.id, "digits": 2}


def one(preset: Preset, outcome: Outcome) -> Cell:
    (cell,) = compare(preset, outcome, preset.labels)
    return cell


def test_a_number_inside_and_one_outside(tmp_path: Path) -> None:
    store = make_run(tmp_path, models=("hyper-sd",), steps=(4,), replicates=1)
    level = next(s for s in summaries(store) if s.metric == CLIP.id).estimate
    assert level
    near = round(level.value + 0.5 * (level.high - level.value), 2)
    row: dict[str, Any] = {"model": "hyper-sd", "steps": 4, "values": {"CLIP": near}}
    cell = one(preset_of([row], CLIP=CLIP_COLUMN), Outcome(store))
    assert cell.verdict == "inside"
    assert cell.ours == level
    assert cell.window
    half = level.high - level.value
    assert cell.window.high - near == pytest.approx(0.005 + math.sqrt(2) * half + 0.002 * near)
    assert cell.causes == ()

    far = row | {"values": {"CLIP": round(level.value / 100, 2)}}
    cell = one(preset_of([far], CLIP=CLIP_COLUMN), Outcome(store))
    assert cell.verdict == "outside"
    texts = {cause.text: cause.certain for cause in cell.causes}
    assert any("factor of 100" in text and certain for text, certain in texts.items())
    assert texts["assumed: no prefix"] is False
    scaled = one(preset_of([far], CLIP=CLIP_COLUMN | {"scale": 100.0}), Outcome(store))
    assert scaled.verdict == "inside"  # two printed digits are half a point to each side here


def test_a_window_of_the_source_is_for_its_own_number_of_images(tmp_path: Path) -> None:
    store = make_run(tmp_path, models=("hyper-sd",), steps=(4,), replicates=1)
    row = {"model": "hyper-sd", "steps": 4, "values": {"CLIP": 23.0}, "windows": {"CLIP": [0.0, 100.0]}}
    assert one(preset_of([row], CLIP=CLIP_COLUMN), Outcome(store)).verdict == "inside"
    narrow = row | {"windows": {"CLIP": [0.0, 0.1]}}
    assert one(preset_of([narrow], CLIP=CLIP_COLUMN), Outcome(store)).verdict == "outside"
    other = one(preset_of([row], count=5000, CLIP=CLIP_COLUMN), Outcome(store))
    assert other.verdict == "not comparable"
    assert "5,000 images, ours are 6" in other.reason


def score_fid(store: RunStore, reference_id: str = REFERENCE) -> float:
    """Score the made-up run of hyper-sd@4 by the features that it keeps, against its reference under a name."""
    features = np.stack(list(read_features(store.folder, FID.features, "hyper-sd", 4).values()))
    kept = read_reference(store.folder, FID.features, REFERENCE)
    assert kept
    value = evaluate("frechet", features, kept.values)
    write_reference(store.folder, FID.features, "", Reference(reference_id, kept.values))
    store.record_set_scores([SetScoreRow(FID.id, "hyper-sd", 4, value, len(features), reference_id)])
    return value


def test_a_distance_is_compared_at_equal_numbers_alone(tmp_path: Path) -> None:
    store = make_run(tmp_path, models=("hyper-sd",), steps=(4,), num_prompts=40, replicates=1)
    row = {"model": "hyper-sd", "steps": 4, "values": {"FID": round(score_fid(store), 2)}}
    assert one(preset_of([row], count=40, FID=FID_COLUMN), Outcome(store)).verdict == "inside"
    for count in (41, None):
        cell = one(preset_of([row], count=count, FID=FID_COLUMN), Outcome(store))
        assert cell.verdict == "not comparable"
        assert "1/N" in cell.reason


def test_what_was_not_measured_says_why(tmp_path: Path) -> None:
    store = make_run(tmp_path, models=("hyper-sd",), steps=(4,), replicates=1)
    rows = [{"model": m, "steps": 4, "values": {"CLIP": 1.0, "X": 2.0}} for m in ("hyper-sd", "lcm")]
    columns: dict[str, Any] = {
        "CLIP": CLIP_COLUMN,
        "X": {"metric": None, "digits": 0, "reason": "its backbone is unstated"},
    }
    preset = preset_of(rows, **columns)
    cells = compare(preset, Outcome(store, absent={"lcm@4": "no such repository"}), preset.labels)
    assert [(c.model, c.column, c.verdict) for c in cells] == [
        ("hyper-sd", "CLIP", "outside"), ("hyper-sd", "X", "not comparable"),
        ("lcm", "CLIP", "not measured"), ("lcm", "X", "not comparable"),
    ]  # fmt: skip
    assert cells[2].reason == "no such repository"
    assert cells[3].reason == "its backbone is unstated"
    assert compare(preset, Outcome(blocked="no prompts"), ["lcm"])[0].reason == "no prompts"
    unscored = Outcome(None, not_scored={CLIP.id: "its weights are not here"})
    assert compare(preset, unscored, ["hyper-sd"])[0].reason == "its weights are not here"


def test_a_run_of_another_base_is_refused(tmp_path: Path) -> None:
    store = make_run(tmp_path, models=("hyper-sd",), steps=(4,), replicates=1)
    with pytest.raises(InputError, match=r"base 'pocket'.*choose another --out"):
        compare(table("hyper-sd-table2"), Outcome(store), ["hyper-sd"])


def test_other_prompts_than_a_pinned_list_are_not_comparable(tmp_path: Path) -> None:
    store = make_run(tmp_path, models=("hyper-sd",), steps=(4,), replicates=1)
    preset = preset_of([{"model": "hyper-sd", "steps": 4, "values": {"CLIP": 23.0}}], CLIP=CLIP_COLUMN)
    for pinned, verdict in (("1" * 64, "not comparable"), (store.manifest["prompts"]["sha256"], "outside")):
        protocol = preset.protocol.model_copy(update={"prompts_sha256": pinned})
        changed = preset.model_copy(update={"protocol": protocol})
        far = changed.model_copy(
            update={"rows": (changed.rows[0].model_copy(update={"values": {"CLIP": 90.0}}),)}
        )  # fmt: skip
        assert one(far, Outcome(store)).verdict == verdict


HYPER_SD = {"model": "hyper-sd", "steps": 4, "values": {"CLIP": 23.0}}


def with_protocol(preset: Preset, **changes: Any) -> Preset:
    return preset.model_copy(update={"protocol": preset.protocol.model_copy(update=changes)})


@pytest.mark.parametrize(
    ("prompts", "spec", "pinned", "comparable"),
    [
        ({}, {}, "", True),
        ({"id": "emoji.txt"}, {"prompts": "emoji.txt"}, "", False),
        ({"id": "emoji.txt"}, {"prompts": "emoji.txt", "name": "reproduce-another"}, "", False),
        # --prompts declares it
        ({"id": "theirs.txt"}, {"prompts": "theirs.txt", "name": "reproduce-made-up"}, "", True),
        # images were made of another list before
        ({"id": "emoji.txt"}, {"prompts": "theirs.txt", "name": "reproduce-made-up"}, "", False),
        # a pinned list is known by its hash, whatever it is called; all prompts of another hash are none of it
        ({"id": "copy.txt"}, {"prompts": "copy.txt"}, "0" * 64, True),
        ({"id": "theirs.txt"}, {"prompts": "theirs.txt", "name": "reproduce-made-up"}, "1" * 64, False),
        # a part of it: declared, or the preset's set, and out of as many
        ({"id": "theirs.txt", "count": 3, "of": 6}, {"prompts": "theirs.txt", "name": "reproduce-made-up"}, "1" * 64,
         True),
        ({"count": 3, "of": 6}, {}, "1" * 64, True),
        ({"count": 3, "of": 12}, {}, "1" * 64, False),
        ({"id": "emoji.txt", "count": 3, "of": 6}, {"prompts": "emoji.txt"}, "1" * 64, False),
    ],
)  # fmt: skip
def test_whose_prompts_the_run_has(
    prompts: dict[str, Any], spec: dict[str, Any], pinned: str, comparable: bool, tmp_path: Path
) -> None:
    store = make_run(tmp_path, models=("hyper-sd",), steps=(4,), replicates=1)
    store.manifest["prompts"] |= prompts
    store.manifest["spec"] |= spec
    cell = one(with_protocol(preset_of([HYPER_SD], CLIP=CLIP_COLUMN), prompts_sha256=pinned), Outcome(store))
    assert (cell.verdict in ("inside", "outside")) == comparable
    assert comparable or f"the run's prompts are not these, but {store.manifest['prompts']['id']}" in cell.reason


def test_the_spec_of_a_list_given_with_prompts_declares_it(tmp_path: Path) -> None:
    preset = preset_of([HYPER_SD], CLIP=CLIP_COLUMN)
    store = make_run(tmp_path, models=("hyper-sd",), steps=(4,), replicates=1)
    spec = run_spec(preset, preset.labels, prompts=Path("theirs.txt"))
    store.manifest["spec"] = spec.model_dump(mode="json")
    store.manifest["prompts"]["id"] = "theirs.txt"
    assert one(preset, Outcome(store)).verdict in ("inside", "outside")


def test_images_of_another_size_are_not_comparable(tmp_path: Path) -> None:
    store = make_run(tmp_path, models=("hyper-sd",), steps=(4,), replicates=1)
    large = with_protocol(preset_of([HYPER_SD], CLIP=CLIP_COLUMN), pixels=1024)
    cell = one(large, Outcome(store))
    assert (cell.verdict, cell.reason) == ("not comparable", "our images are of 64x64 px, theirs of 1024 px")
    assert cell.ours
    assert cell.window is None
    own_size = large.model_copy(update={"rows": (large.rows[0].model_copy(update={"pixels": (512, 64)}),)})
    assert one(own_size, Outcome(store)).verdict in ("inside", "outside")

    first = store.folder / store.images()[0].file
    Image.new("RGB", (64, 48)).save(first)
    assert "64x48 px" in one(preset_of([HYPER_SD], CLIP=CLIP_COLUMN), Outcome(store)).reason
    first.write_bytes(b"")
    assert "can't be read" in one(preset_of([HYPER_SD], CLIP=CLIP_COLUMN), Outcome(store)).reason


@pytest.mark.parametrize(
    ("reference", "spec", "protocol", "comparable"),
    [
        ("photos-64-1a2b3c4d", None, {}, True),
        ("coco-photos-64-1a2b3c4d", None, {"reference_count": 64}, True),
        ("photos-640-1a2b3c4d", None, {"reference_count": 64}, False),
        (REFERENCE, None, {"reference_count": 64}, False),
        ("val2014-statistics-1a2b3c4d", None, {"reference_features": FID.features}, True),
        ("val2014-64-1a2b3c4d", "there/val2014.npz=lite0/128", {"reference_features": FID.features}, True),
        ("photos-64-1a2b3c4d", "there/val2014.npz=lite0/128", {"reference_features": FID.features}, False),
        ("photos-64-1a2b3c4d", "photos", {"reference_features": FID.features}, False),
    ],
)
def test_what_a_distance_is_to(
    reference: str, spec: str | None, protocol: dict[str, Any], comparable: bool, tmp_path: Path
) -> None:
    store = make_run(tmp_path, models=("hyper-sd",), steps=(4,), num_prompts=40, replicates=1)
    row = {"model": "hyper-sd", "steps": 4, "values": {"FID": round(score_fid(store, reference), 2), "CLIP": 23.0}}
    store.manifest["spec"]["reference"] = spec
    preset = with_protocol(preset_of([row], count=40, FID=FID_COLUMN, CLIP=CLIP_COLUMN), **protocol)
    distance, score = compare(preset, Outcome(store), preset.labels)
    assert distance.verdict == ("inside" if comparable else "not comparable")
    assert comparable or reference in distance.reason
    assert score.verdict in ("inside", "outside")  # which has no reference


def test_a_miniatures_run_that_is_relabelled_gets_no_verdict(tmp_path: Path) -> None:
    store = make_run(tmp_path, models=("hyper-sd",), steps=(1, 4), num_prompts=12, replicates=1)
    store.manifest["spec"]["base"] = "sdxl"
    preset = table("hyper-sd-table2")
    column = preset.columns["CLIP"].model_copy(update={"metric": CLIP.id})
    cells = compare(preset.model_copy(update={"columns": {"CLIP": column}}), Outcome(store), ["hyper-sd"])
    assert {cell.verdict for cell in cells if cell.ours} == {"not comparable"}
    assert "pocket/held-out" in cells[0].reason
    store.manifest["prompts"]["id"] = preset.spec.prompts
    cells = compare(preset.model_copy(update={"columns": {"CLIP": column}}), Outcome(store), ["hyper-sd"])
    assert {cell.reason for cell in cells if cell.ours} == {"our images are of 64x64 px, theirs of 1024 px"}


def test_sizes_and_references_that_presets_state() -> None:
    assert {name: table(name).protocol.pixels for name in TABLE_IDS} == {
        name: 512 if name.endswith("sd15") else 1024 for name in TABLE_IDS
    }
    turbos = {name: {row.pixels for row in table(name).rows if row.model == "turbo"} for name in TABLE_IDS}
    assert turbos["hyper-sd-table2"] == {(512,)}
    assert turbos["lightning-table"] == turbos["nitrofusion-table1"] == {(512, 1024)}  # unstated
    assert {name for name in TABLE_IDS if table(name).protocol.reference_count} == {"dmd2-table"}
    assert {name for name in TABLE_IDS if table(name).protocol.reference_features} == {"mlperf-sdxl"}


def test_metrics_that_a_model_was_trained_on_are_marked() -> None:
    preset = table("hyper-sd-table2")
    marked = {(c.model, c.metric) for c in compare(preset, Outcome(), preset.labels) if c.trained_on}
    assert marked == {("hyper-sd", "aesthetic/laion-v2"), ("hyper-sd", "image-reward/v1")}


# causes

USUAL = Evidence(metric="clip-score/vit-b-32", published=32.0, ours=31.9, n=5000, n_published=5000)


def causes(**changes: Any) -> dict[str, bool]:
    return {cause.text: cause.certain for cause in likely_causes(replace(USUAL, **changes))}


def test_nothing_is_named_that_does_not_hold() -> None:
    assert causes() == {}


@pytest.mark.parametrize(
    ("changes", "words", "certain"),
    [
        ({"ours": 0.319}, "factor of 100", True),
        ({"published": 0.32}, "factor of 100", True),
        ({"ours": 79.0}, "factor of 2.5", True),
        ({"metric": "pick-score/v1", "published": 0.22, "ours": 22.0}, "factor of 100", True),
        ({"ours": 31.0}, "QuickGELU", False),
        ({"ours": 26.0}, "another CLIP backbone", False),
        ({"metric": "aesthetic/laion-v2", "published": 5.5, "ours": 24.0}, "ours: the CLIP embedding was not L2", True),
        ({"metric": "aesthetic/laion-v2", "published": 25.0, "ours": 5.4}, "theirs: the CLIP embedding was not", True),
        ({"metric": "aesthetic/laion-v2", "published": 5.5, "ours": 6.1}, "V1 in place of V2", False),
        ({"metric": "fid/clean", "published": 23.0, "ours": 29.0}, "resize filter", False),
        ({"metric": "fid/clean", "reference_suffixes": frozenset({".jpg", ".png"})}, "JPEG files: compression", True),
        ({"metric": "fid/clean"}, "whether the reference is JPEG", False),
        ({"metric": "fid/clean", "prompts_listed": False}, "other photos", False),
        ({"n": 500}, "500 of ours against 5,000", True),
        ({"prompts_listed": False}, "own list", True),
        ({"differs": ("a negative prompt",)}, "a negative prompt", True),
        ({"breaches": ("DDIMScheduler instead of LCMScheduler",)}, "DDIMScheduler instead of LCM", True),
        ({"unconfirmed": "guidance"}, "not confirmed in the catalogue: guidance", False),
        ({"precision": "float16, autoencoder float32"}, "precision: ours is float16", False),
        ({"defects": {"black": 3, "constant": 0}, "images": 50}, "3 black of 50 images", True),
        ({"truncated": 7}, "7 prompts are longer", False),
        ({"assumption": "V2"}, "assumed: V2", False),
    ],
)  # fmt: skip
def test_each_rule_where_it_applies(changes: dict[str, Any], words: str, certain: bool) -> None:
    found = causes(**changes)
    assert [flag for text, flag in found.items() if words in text] == [certain], found


def test_rules_keep_to_their_families_and_sizes() -> None:
    assert not any("resize" in text or "JPEG" in text for text in causes(ours=26.0))
    assert not any("GELU" in text for text in causes(metric="image-reward/v1", published=0.9, ours=1.9))
    assert not any("QuickGELU" in text for text in causes(ours=0.319))
    assert not any("backbone" in text for text in causes(ours=0.319))
    assert causes(metric="image-reward/v1", published=0.0, ours=0.5) == {}
    order = [cause.certain for cause in likely_causes(replace(USUAL, n=9, ours=31.0, assumption="x"))]
    assert order == sorted(order, reverse=True)


# votes


def vote(rater: str, preferred: str, **pair: Any) -> dict[str, Any]:
    of = {"model_a": "hyper-sd", "steps_a": 1, "model_b": "turbo", "steps_b": 1} | pair
    mine = {"rater": rater, "preferred": preferred, "kind": "main", "criterion": "overall"}
    return dict.fromkeys(export.COLUMNS, "") | of | mine


def test_the_columns_are_those_of_the_studys_export() -> None:
    assert set(COLUMNS) <= set(export.COLUMNS)


def test_votes_beside_the_published_rate(tmp_path: Path) -> None:
    preset = study("hyper-sd-user-study")
    turned = {"model_a": "turbo", "model_b": "hyper-sd"}
    # 10 raters of 10 votes: 8 and 1 tie and 1 lost; half of them saw the pair the other way round
    straight, other = {8: "tie", 9: "b"}, {8: "tie", 9: "a"}
    votes = [vote(f"r{r}", straight.get(i, "a")) for r in range(5) for i in range(10)]
    votes += [vote(f"r{r}", other.get(i, "b"), **turned) for r in range(5, 10) for i in range(10)]
    unread = [vote("r0", "b") | {"kind": "gold"}, vote("r0", "b") | {"criterion": "appeal"}]
    export.write_export(tmp_path / "votes.csv", [*votes, *unread, vote("r0", "a", model_b="pcm")], "csv")
    given = read_votes(tmp_path / "votes.csv")
    cells = {(c.row.model_a, c.row.steps_a, c.row.model_b): c for c in compare_votes(preset, given)}
    cell = cells["hyper-sd", 1, "turbo"]
    assert cell.ours
    assert (cell.ours.value, cell.ours.n, cell.ours.num_raters, cell.ties) == (0.85, 100, 10, 10)
    assert cell.verdict == "inside"  # 0.906 of 100 votes that all raters agree in
    others = [c for key, c in cells.items() if key != ("hyper-sd", 1, "turbo")]
    assert {(c.verdict, c.reason) for c in others} == {("not measured", "no votes on this pair")}

    split = [vote(f"r{r}", "b" if p == 0 else "a", prompt_id=f"p{p}") for r in range(10) for p in range(10)]
    export.write_export(tmp_path / "prompts.csv", split, "csv")
    (found,) = [c.ours for c in compare_votes(preset, read_votes(tmp_path / "prompts.csv")) if c.ours]
    assert (found.value, found.num_prompts, found.widest) == (0.9, 10, "prompts")  # raters agree: ten answers, not 100
    assert found.high - found.low > cell.ours.high - cell.ours.low

    export.write_export(tmp_path / "lost.csv", [vote(f"r{r}", "b") for r in range(10) for _ in range(10)], "csv")
    lost = compare_votes(preset, read_votes(tmp_path / "lost.csv"))
    assert [c.verdict for c in lost if c.ours] == ["outside"]


def test_without_votes_nothing_is_measured() -> None:
    cells = compare_votes(study("hyper-sd-user-study"), None)
    assert {cell.verdict for cell in cells} == {"not measured"}
    assert max(cell.votes_needed for cell in cells) < 381


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rater,preferred\nr,a\n", "no column model_a, steps_a, model_b, steps_b"),
        (
            "rater,model_a,steps_a,model_b,steps_b,preferred\nr,a,1,b,1,left\n",
            "line 2: preferred must be a, b, tie or both-bad",
        ),
        ("rater,model_a,steps_a,model_b,steps_b,preferred\nr,a,x,b,1,a\n", "line 2: steps 'x' and '1' must be whole"),
        ("rater,model_a,steps_a,model_b,steps_b,preferred\nr,a,1\n", "line 2: steps '1' and None"),
        ("rater,model_a,steps_a,model_b,steps_b,preferred\n,a,1,b,1,a\n", "line 2: no rater"),
        ("rater,model_a,steps_a,model_b,steps_b,preferred\n", "no votes"),
        ("", "no column rater"),
    ],
)
def test_votes_that_are_none(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "votes.csv").write_text(text)
    assert main(["reproduce", "hyper-sd-user-study", "--votes", str(tmp_path / "votes.csv")]) == 2
    assert words in capsys.readouterr().err


# the verb


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a preset"),
        (["hyper-sd-tabel2"], "unknown preset 'hyper-sd-tabel2'; did you mean 'hyper-sd-table2'?"),
        (["hyper-sd-table2", "--models", "lightnin"], "unknown model 'lightnin' in preset hyper-sd-table2; did"),
        (["hyper-sd-table2", "--votes", "v.csv"], "--votes is of a user study"),
        (["hyper-sd-user-study", "--models", "lcm"], "--models is of a table of scores"),
        (["hyper-sd-user-study", "--votes", "none.csv"], "can't read votes none.csv"),
        (["hyper-sd-table2", "--num-prompts", "0"], "--num-prompts"),
        (["nitrofusion-table1", "--models", "sdxl-flsh"], "unknown model 'sdxl-flsh'"),
    ],
)  # fmt: skip
def test_wrong_words_get_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", preset_ids())
def test_a_preset_is_shown_without_a_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = [] if name in STUDY_IDS else ["--only-show", "--out", str(tmp_path / "none")]
    assert main(["reproduce", name, *folder]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 140
    assert load_preset(name).title in said
    assert "not measured" in said
    assert main(["reproduce", name, *folder, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {number["verdict"] for number in shown["numbers"]} <= {"not measured", "not comparable"}
    assert not (tmp_path / "none").exists()


def test_a_window_of_the_source_is_shown_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "mlperf-sdxl", "--only-show", "--out", str(tmp_path / "none")]) == 0
    said = capsys.readouterr().out
    assert "31.68631873 to 31.81331801" in said
    assert "23.01085758 to 23.95007626" in said
    assert "computed" not in said


def test_unconfirmed_numbers_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "dmd2-table", "--only-show", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "0.323?" in said
    assert "19.32?" not in said
    assert "?: this published number is not confirmed in a primary source." in said


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in preset_ids())
    assert main(["reproduce", "--list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == preset_ids()


def test_models_are_chosen_in_the_tables_order() -> None:
    assert chosen_models(table("hyper-sd-table2"), ["turbo", "lcm"]) == ["lcm", "turbo"]
    assert chosen_models(table("hyper-sd-table2"), None)[0] == "teacher"


def test_statistics_of_a_reference_are_told_what_they_are_of() -> None:
    preset = table("mlperf-sdxl")
    spec = run_spec(preset, preset.labels, reference=Path("val2014.npz"))
    assert str(spec.reference) == "val2014.npz=inception/pytorch-fid"
    assert run_spec(preset, preset.labels, reference=Path("photos")).reference == Path("photos")
