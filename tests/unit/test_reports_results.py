"""The page of results: its statistics, its marks, what a person wrote on it, and specs with contrasts."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from safetensors.numpy import save_file
from scipy.stats import permutation_test, ttest_1samp

from hypersd_bench.cli.main import main
from hypersd_bench.errors import InputError
from hypersd_bench.runner import benchmark
from hypersd_bench.runner.manifest import manifest
from hypersd_bench.runner.plan import Plan, make_plan
from hypersd_bench.runner.spec import RunSpec, load_spec
from hypersd_bench.sampling import METADATA_KEY, SamplerContract
from hypersd_bench.store import RunStore, ScoreRow, write_json
from reports.results import CLOSE, OPEN, read_sections, write_results
from reports.tables import DAGGER
from tests.synthetic_run import AESTHETIC, CLIP, FID, make_run

SPECS = Path(__file__).resolve().parents[2] / "specs"
CONTRASTS = [
    {"name": "first", "model": "hyper-sd", "against": "tcd", "steps": [1, 4]},
    {"name": "second", "model": "lcm", "against": "lightning", "steps": [4]},
]
CARD: dict[str, Any] = {
    "method": "hyper-sd", "stage": "one-step", "rank": 8, "seed": 0, "images_seen": 4096, "seconds": 61.4,
    "base_unet_sha256": "b" * 64, "command": "hypersd-bench distill hyper-sd --base pocket --seed 0",
}  # fmt: skip


def make(folder: Path, cards: dict[str, dict[str, Any]] | None = None, **changes: Any) -> RunStore:
    """A made-up run at 1 and 4 steps with contrasts, a card for each model named in ``cards``, and other changes."""
    run = make_run(folder, steps=(1, 4), num_prompts=16)
    spec = RunSpec(name=folder.name, models=("hyper-sd", "lightning", "lcm", "tcd"), steps=(1, 4), num_prompts=16,
                   replicates=2)  # fmt: skip
    run.manifest |= {"spec": spec.model_dump(mode="json", exclude={"out"}), "contrasts": CONTRASTS, **changes}
    for entry in run.manifest["models"]:
        if cards and entry["name"] in cards:
            file = {"file": f"{entry['name']}.safetensors", "sha256": entry["name"].ljust(64, "0")}
            entry["checkpoints"] = {steps: {**file, "card": cards[entry["name"]]} for steps in ("1", "4")}
    write_json(folder / "run.json", run.manifest)
    return run


def write(tmp_path: Path, **changes: Any) -> str:
    """The page about one made-up run."""
    make(tmp_path / "runs" / "toy", **changes)
    write_results([tmp_path / "runs" / "toy"], tmp_path / "page.md")
    return (tmp_path / "page.md").read_text()


def parsed(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page)


def shown(token: Token) -> str:
    """What a reader sees of an inline token."""
    return "".join(child.content for child in token.children or () if child.type in ("text", "code_inline"))


def rows_of(page: str) -> list[list[list[str]]]:
    """All tables as a Markdown reader sees them: rows of cells."""
    tables: list[list[list[str]]] = []
    tokens = parsed(page)
    for token, following in pairwise(tokens):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("th_open", "td_open"):
            tables[-1][-1].append(shown(following))
    return tables


def headings(page: str) -> list[str]:
    tokens = parsed(page)
    return [shown(after) for token, after in pairwise(tokens) if token.type == "heading_open"]


# what it says


def test_contrasts_are_paired_by_prompt_and_corrected_over_the_whole_page(tmp_path: Path) -> None:
    """Differences of prompt means, p against scipy's sign flips; Holm's smallest p is p times all comparisons."""
    runs = [make(tmp_path / name) for name in ("one", "two")]
    found = [d for s in read_sections([run.folder for run in runs]) for c in s.contrasts for d in c.differences]
    assert len(found) == 2 * 3 * 3, "runs x pairs x metrics"
    for difference in found[:9]:
        if difference.metric == FID.id:
            continue
        means = {}
        for model in (difference.model, difference.baseline):
            rows = [row for row in runs[0].images() if (row.model, row.steps) == (model, difference.steps)]
            scores = runs[0].scores(difference.metric)
            means[model] = np.reshape([scores[row.id or 0].value for row in rows], (16, 2)).mean(1)
        d = means[difference.model] - means[difference.baseline]
        expected = permutation_test((d,), np.mean, permutation_type="samples", n_resamples=2**16, axis=0)
        assert difference.value == pytest.approx(np.mean(d))
        assert difference.p_value == pytest.approx(expected.pvalue, abs=0.02)  # 10,000 of the 65,536 flips
        t = ttest_1samp(d, 0).confidence_interval()
        assert difference.low is not None
        assert difference.high is not None
        assert difference.high - difference.low == pytest.approx(t.high - t.low, rel=0.4)  # by bootstrap
    smallest = min(found, key=lambda d: d.p_value)
    assert smallest.p_holm == pytest.approx(smallest.p_value * len(found))


def test_bold_is_what_holds(tmp_path: Path) -> None:
    page = write(tmp_path)
    (section,) = read_sections([tmp_path / "runs" / "toy"])
    of_contrast = page.partition("#### first")[2].partition("####")[0]
    first = section.contrasts[0]
    held = [d for d in first.differences if d.p_holm < 0.05]
    assert {d.metric for d in held} >= {CLIP.id}, "three points apart"
    assert of_contrast.count("**") == 2 * len(held) < 2 * len(first.differences)
    assert "At 1 step, hyper-sd is better in CLIP score" in of_contrast
    assert "hyper-sd minus tcd" in of_contrast
    assert "over the 9 comparisons of all contrasts of this page" in of_contrast
    (table,) = rows_of(of_contrast)
    assert [row[:2] for row in table] == [["Steps", "Model"], ["1", "hyper-sd"], ["4", "hyper-sd"]]
    assert [row[-1] for row in table] == ["n", "32", "32"]


def test_what_is_not_scored_is_said_not_shown(tmp_path: Path) -> None:
    run = make(tmp_path / "toy")
    lost = [row.id or 0 for row in run.images() if row.model == "lcm"]
    run.record_scores([ScoreRow(metric, id, None, "lost") for metric in (CLIP.id, AESTHETIC.id) for id in lost])
    for path in (tmp_path / "toy" / "features").rglob("lcm@*.npz"):
        path.unlink()
    write_results([tmp_path / "toy"], tmp_path / "page.md")
    assert "Not comparable yet: lcm and lightning at 4 steps have no scores." in (tmp_path / "page.md").read_text()


def test_metrics_trained_on_are_marked(tmp_path: Path) -> None:
    run = make(tmp_path / "toy")
    run.manifest["models"][3]["trained_on"] = ["aesthetic"]  # tcd: what the first contrast is against
    write_json(run.folder / "run.json", run.manifest)
    write_results([tmp_path / "toy"], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    first, second = (page.partition(f"#### {name}")[2].partition("###")[0] for name in ("first", "second"))
    assert first.count(DAGGER) == 2 + 1
    assert f"{DAGGER}: the model or tcd was trained on this metric." in first
    assert DAGGER not in second
    assert "tcd was trained on Aesthetic" in page


def test_how_models_were_made_comes_from_their_cards(tmp_path: Path) -> None:
    odd = {**CARD, "command": "hypersd-bench distill hyper-sd --data 'a|b`c' --seed 0", "stage": "x|y"}
    page = write(tmp_path, cards={"hyper-sd": CARD, "lightning": CARD, "lcm": odd, "tcd": {}})
    table = next(table for table in rows_of(page) if table[0][1] == "File")
    assert table[1] == ["hyper-sd", "hyper-sd.safetensors", "1, 4", "hyper-sd, one-step", "8", "0", "4,096", "61",
                        "hyper-sd0000"]  # fmt: skip
    assert table[3][3] == "hyper-sd, x|y"
    assert table[4][3:8] == ["\u2013"] * 5
    commands = [shown(token) for token in parsed(page) if token.type == "inline"]
    assert f"hyper-sd and lightning: {CARD['command']}" in commands
    assert f"lcm: {odd['command']}" in commands
    assert "tcd: the file does not say by which command" in commands


def test_limits_are_derived(tmp_path: Path) -> None:
    other_seed = {**CARD, "command": CARD["command"].replace("--seed 0", "--seed 1"), "seed": 1}
    small = {**CARD, "command": "hypersd-bench distill lcm --seed 0", "images_seen": 64}
    cards = {"hyper-sd": CARD, "lightning": other_seed, "lcm": small, "tcd": {**CARD, "base_unet_sha256": "c" * 64}}
    page = write(tmp_path, cards=cards)
    limits = page.partition("can't say")[2].partition("###")[0]
    assert "- lcm: trained with one seed" in limits, "hyper-sd's recipe was trained with seeds 0 and 1"
    assert "unequal numbers of training images: hyper-sd 4,096; lightning 4,096; lcm 64; tcd 4,096" in limits
    assert "not all distilled from the same teacher" in limits
    assert "unequal rank" not in limits
    assert "A difference's interval is typically \u00b1" in limits
    assert "of 32 images lies above" in limits
    assert "changes that were not committed" not in write(tmp_path / "b", provenance={"git": "a" * 40})
    page = write(tmp_path / "c", provenance={"git": f"{'a' * 40}+changes"})
    assert "changes that were not committed" in page
    assert "trained with one seed" not in page, "no cards: nothing is known"


def test_the_interval_named_as_typical_is_the_median(tmp_path: Path) -> None:
    page = write(tmp_path)
    (section,) = read_sections([tmp_path / "runs" / "toy"])
    both = [*section.data.differences, *(d for c in section.contrasts for d in c.differences)]
    halves = [(d.high or 0) - (d.low or 0) for d in both if d.metric == CLIP.id]
    named = re.search(r"\u00b1([\d.]+) in CLIP score", page)
    assert named
    assert float(named[1]) == pytest.approx(np.median(halves) / 2, abs=0.05)


# how it says it


def test_labels_can_not_break_the_page(tmp_path: Path) -> None:
    """What a Markdown reader finds is what was meant: whole tables, no link, no tag, no emphasis of a name's."""
    run = make(tmp_path / "t[o]y|_x_")
    names = ["a|b", "[c](http://d)", "*e* `f`", "<b>g</b>"]
    for entry, label in zip(run.manifest["models"], names, strict=True):
        entry["label"] = label
    run.manifest["contrasts"] = [{**CONTRASTS[0], "name": "x | [y](z) <i> ~~w~~"}]
    write_json(run.folder / "run.json", run.manifest)
    write_results([run.folder], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    children = [child.type for token in parsed(page) for child in token.children or ()]
    assert "link_open" not in children
    assert "em_open" not in children
    inline_tags = {child.content for token in parsed(page) for child in token.children or ()
                   if child.type == "html_inline"}  # fmt: skip
    assert inline_tags <= {"<u>", "</u>"}
    for table in rows_of(page):
        assert {len(row) for row in table} == {len(table[0])}
    levels = rows_of(page)[0]
    assert [row[1] for row in levels[1:5]] == names
    assert levels[1][2].endswith("]"), "an interval keeps its brackets"
    assert re.search(r"\\\[[\d.]+, [\d.]+\\\]", page)
    assert headings(page)[0] == "Results of t[o]y|_x_"
    assert "x | [y](z) <i> ~~w~~" in headings(page)


def test_twice_the_same_bytes_and_remarks_kept_to_the_letter(tmp_path: Path) -> None:
    runs = [make(tmp_path / name, cards={"lcm": CARD}).folder for name in ("one", "two")]
    page = tmp_path / "docs" / "page.md"
    write_results(runs, page)
    first = page.read_bytes()
    write_results(runs, page)
    assert page.read_bytes() == first
    assert headings(first.decode())[0] == "Results of one and two"
    remarks = "\r\n\r\n**What it says.** \\[a\\] | \u00e9\t \n<!-- aside -->\n\n\n"
    page.write_bytes(first.replace(f"{OPEN}\n{CLOSE}".encode(), f"{OPEN}{remarks}{CLOSE}".encode()) + b"lost")
    write_results(runs, page)
    again = page.read_bytes().decode()
    assert again == first.decode().replace(f"{OPEN}\n{CLOSE}", f"{OPEN}{remarks}{CLOSE}")


@pytest.mark.parametrize(
    "text",
    [b"all mine", f"{OPEN} open".encode(), f"{CLOSE}{OPEN}".encode(), f"{OPEN}a{CLOSE}{OPEN}b{CLOSE}".encode(),
     f"{OPEN}{OPEN}{CLOSE}".encode(), b"", f"{OPEN}\xff".encode("latin-1") + CLOSE.encode()],
)  # fmt: skip
def test_a_page_that_may_be_a_persons_is_left_alone(tmp_path: Path, text: bytes) -> None:
    make(tmp_path / "toy")
    (tmp_path / "page.md").write_bytes(text)
    with pytest.raises(InputError, match=r"page\.md"):
        write_results([tmp_path / "toy"], tmp_path / "page.md")
    assert (tmp_path / "page.md").read_bytes() == text


def test_the_spec_on_the_page_runs_again(tmp_path: Path) -> None:
    page = write(tmp_path)
    block = re.search(r"```yaml\n(.*?)```", page, re.S)
    assert block
    (tmp_path / "spec.yaml").write_text(block[1])
    spec = load_spec(tmp_path / "spec.yaml", {})
    assert [contrast.model_dump(mode="json") for contrast in spec.contrasts] == CONTRASTS
    assert spec.metrics == (CLIP.id, AESTHETIC.id, FID.id)
    written = json.loads((tmp_path / "runs" / "toy" / "run.json").read_text())["spec"]
    assert spec.model_dump(mode="json", exclude={"out", "metrics", "contrasts"}) == {
        key: value for key, value in written.items() if key not in ("metrics", "contrasts")
    }


def test_no_folder_of_this_machine_is_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "here" / "runs" / "toy")
    monkeypatch.chdir(tmp_path / "here")
    for run in (Path("runs/toy"), tmp_path / "here" / "runs" / "toy"):
        write_results([run], tmp_path / "here" / "page.md")
        page = Path("page.md").read_text()
        assert "`hypersd-bench report runs/toy --results page.md`" in page
        assert str(tmp_path) not in page


# the command


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make(tmp_path / name).folder) for name in ("one", "two")]
    page = tmp_path / "page.md"
    assert main(["report", runs[0], "--results", str(page), "--out", str(tmp_path / "out")]) == 2
    assert main(["report", runs[0], runs[0], "--results", str(page)]) == 2
    assert not page.exists()
    capsys.readouterr()
    assert main(["report", *runs, "--results", str(page), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [run["title"] for run in said["runs"]] == ["one", "two"]
    assert len(said["runs"][1]["contrasts"][0]["differences"]) == 6
    assert page.exists()
    assert not (tmp_path / "one" / "report").exists()


# specs with contrasts


def plan_with(*contrasts: dict[str, Any]) -> Plan:
    spec = {"models": ["lcm", "tcd@2,4", "teacher@25"], "steps": [1, 2, 4], "num_prompts": 1}
    return make_plan(RunSpec.model_validate({**spec, "contrasts": contrasts}))


def test_contrasts_get_their_steps_and_leave_the_hash_alone(tmp_path: Path) -> None:
    plan = plan_with({"name": "x", "model": "lcm", "against": "tcd"})
    described = manifest(plan, "cpu", tmp_path)
    assert described["contrasts"] == [{"name": "x", "model": "lcm", "against": "tcd", "steps": [2, 4]}]
    assert described["spec_hash"] == manifest(plan_with(), "cpu", tmp_path)["spec_hash"]
    assert described["models"][0]["checkpoints"]["1"]["card"]["method"] == "lcm"


@pytest.mark.parametrize(
    ("contrast", "message"),
    [
        ({"model": "lmc"}, "unknown model 'lmc' in contrast 'x'; did you mean 'lcm'"),
        ({"against": "lcm"}, "compares lcm with itself"),
        ({"against": "teacher"}, "aren't both run at any one number of steps; they share: none"),
        ({"steps": [1, 2]}, "aren't both run at 1 steps; they share: 2, 4"),
    ],
)
def test_a_contrast_the_run_can_not_answer_is_refused(contrast: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_with({"name": "x", "model": "lcm", "against": "tcd", **contrast})


def test_contrasts_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="two contrasts are called 'x'"):
        plan_with(*[{"name": "x", "model": "lcm", "against": "tcd"}] * 2)


def test_a_run_that_goes_on_takes_new_contrasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in ("generate", "time_run", "keep_freed_memory"):
        monkeypatch.setattr(benchmark, step, lambda *_: None)
    benchmark.run_benchmark(plan_with(), tmp_path / "run", "cpu")
    benchmark.run_benchmark(plan_with({"name": "x", "model": "lcm", "against": "tcd"}), tmp_path / "run", "cpu")
    assert [c["name"] for c in RunStore.open(tmp_path / "run").manifest["contrasts"]] == ["x"]


# the examples


def lora(path: Path, contract: SamplerContract) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": np.zeros(1, np.float32)}, path, metadata={METADATA_KEY: contract.to_json()})


def commands(spec: Path) -> dict[str, list[str]]:
    """The ``distill`` commands in a spec's comments by their --out, as lists of arguments."""
    comments = [line.removeprefix("#").strip() for line in spec.read_text().splitlines() if line.startswith("#")]
    joined = re.sub(r" --set", "\n--set", "\n".join(comments)).replace("\n--set", " --set")
    found = [shlex.split(line) for line in joined.splitlines() if line.startswith("hypersd-bench distill")]
    return {words[words.index("--out") + 1]: words for words in found}


def test_the_ablations_compare_what_their_commands_make(tmp_path: Path) -> None:
    """The files named by each command's stages, and from them the checkpoint that every contrast's sides would get."""
    from distill.methods.hyper_sd import HyperSD
    from distill.overrides import override
    from distill.presets import find_preset

    example = SPECS / "pocket-ablations.yaml"
    made = commands(example)
    assert len(made) == 2
    for out, words in made.items():
        preset = find_preset(words[words.index("--preset") + 1])
        changes = [value for flag, value in pairwise(words) if flag == "--set"]
        for stage in HyperSD().stages(override(preset, changes)):
            lora(tmp_path / out / f"{stage.export}.safetensors", stage.contract)
    (tmp_path / "specs").mkdir()
    plan = make_plan(load_spec(example, {}), tmp_path / "specs")
    picked = {(c.label, c.steps): c.model.name for c in plan.configurations}
    assert {key: name for key, name in picked.items() if key[0] not in ("tcd", "teacher")} == {
        **{("tscd", k): f"hyper-sd-{k}steps-tscd" for k in (1, 2, 4, 8)},
        **{("hyper-sd", k): f"hyper-sd-{k}steps" for k in (2, 4, 8)},
        **{("unified", k): "hyper-sd-unified" for k in (1, 2, 4, 8)},
        ("dmd", 1): "hyper-sd-unified",
    }
    assert [len(contrast.steps or ()) for contrast in plan.contrasts] == [3, 3, 1, 1, 3]


@pytest.mark.parametrize("example", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_specs(example: Path) -> None:
    spec = load_spec(example, {})
    assert spec.name == example.stem
    assert {"diversity", "agreement"} < {metric.partition("/")[0] for metric in spec.metrics}
    assert spec.replicates > 1, "diversity needs two images of a prompt"
