"""GenEval's rules on hand-placed boxes, its six tasks on all of its prompts, mmdet's detector through a stand-in."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from hypersd_bench import registry
from hypersd_bench.contracts import ImageMetric, MetricContext
from hypersd_bench.errors import InputError
from metrics import geneval
from metrics.extractors.clip import ClipExtractor
from metrics.geneval import ClipColours, Detection, GenEval, Rule, Wanted, confident, cut_out, judge, relations
from tests.tiny_judges import tiny_config

DATA = Path(__file__).parents[3] / "shared" / "data" / "prompts" / "geneval"
METADATA = DATA / "evaluation_metadata.jsonl"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")
INFO = geneval.MASK2FORMER_SWIN_S.info


def seen(name: str, x: float = 50, y: float = 50, side: float = 20, confidence: float = 0.95) -> Detection:
    """An object whose middle is at x, y."""
    half = side / 2
    return Detection(name, confidence, np.array([x - half, y - half, x + half, y + half]))


def no_colours(objects: Sequence[Detection], name: str) -> list[str]:
    raise AssertionError("no colour was asked for")


def colours(*given: tuple[Detection, str]) -> Callable[[Sequence[Detection], str], list[str]]:
    table = {id(one): colour for one, colour in given}
    return lambda objects, name: [table[id(one)] for one in objects]


# the rules, by hand


@pytest.mark.parametrize(
    ("x", "y", "want"),
    [
        (20, 50, {"left of"}), (80, 50, {"right of"}), (50, 20, {"above"}), (50, 80, {"below"}),  # y grows downwards
        (90, 90, {"right of", "below"}), (10, 10, {"left of", "above"}),
        (100, 64, {"right of"}),  # 10/52 of the way down: under half
        (53.9, 50, set()), (54.1, 50, set()), (60, 50, {"right of"}),  # 0.1 x (20 + 20) is taken off: 4 pixels
    ],
)  # fmt: skip
def test_positions_are_of_the_first_to_the_second(x: float, y: float, want: set[str]) -> None:
    assert relations(seen("dog", x, y), seen("cat", 50, 50)) == want


def test_large_objects_must_lie_further_apart() -> None:
    assert relations(seen("dog", 62, 50, side=20), seen("cat", 50, 50, side=20)) == {"right of"}
    assert relations(seen("dog", 62, 50, side=90), seen("cat", 50, 50, side=20)) == set()


def test_a_position_holds_for_its_pair_the_right_way_round() -> None:
    rule = Rule("position", (Wanted("bear", 1), Wanted("dog", 1, position=("right of", 0))))
    assert judge(rule, [seen("bear", 20), seen("dog", 80)], no_colours)
    assert not judge(rule, [seen("bear", 80), seen("dog", 20)], no_colours)
    assert not judge(rule, [seen("bear", 50, 20), seen("dog", 50, 80)], no_colours)
    assert not judge(rule, [seen("dog", 80)], no_colours)
    # only the surest of each counts
    second = [seen("bear", 20), seen("dog", 80, confidence=0.8), seen("dog", 1, confidence=0.9)]
    assert not judge(rule, second, no_colours)


@pytest.mark.parametrize(("count", "want"), [(0, False), (1, False), (2, True), (3, False), (20, False)])
def test_a_count_is_neither_more_nor_less(count: int, want: bool) -> None:
    rule = Rule("counting", (Wanted("clock", 2),), (Wanted("clock", 3),))
    unsure = [seen("clock", confidence=0.9), seen("cat")]  # counting takes what is above 0.9
    assert judge(rule, [seen("clock", x=i) for i in range(count)] + unsure, no_colours) is want


def test_confidence_must_exceed_its_threshold() -> None:
    for task, confidence in (("single_object", 0.3), ("two_object", 0.3), ("counting", 0.9)):
        rule = Rule(task, (Wanted("bench", 1),))
        assert not judge(rule, [seen("bench", confidence=confidence)], no_colours)
        assert judge(rule, [seen("bench", confidence=confidence + 1e-6)], no_colours)
    assert not judge(rule, [seen("cow")], no_colours)


def test_of_a_class_the_sixteen_surest_are_kept_in_order_and_overlaps_too() -> None:
    many = [seen("cow", confidence=0.5 + i / 100) for i in range(20)]  # all in one place
    kept = confident([*many, seen("dog", confidence=0.2)], 0.3)
    assert list(kept) == ["cow"]
    assert [one.confidence for one in kept["cow"]] == [one.confidence for one in reversed(many[4:])]


def test_two_objects_must_both_be_there() -> None:
    rule = Rule("two_object", (Wanted("bench", 1), Wanted("sports ball", 1)))
    assert judge(rule, [seen("sports ball"), seen("bench"), seen("bench"), seen("person")], no_colours)
    assert not judge(rule, [seen("bench"), seen("bench")], no_colours)


def test_colours_belong_to_their_objects() -> None:
    rule = Rule("color_attr", (Wanted("apple", 1, "black"), Wanted("wine glass", 1, "purple")))
    apple, glass, other = seen("apple"), seen("wine glass"), seen("apple", confidence=0.5)
    assert judge(rule, [apple, glass, other], colours((apple, "black"), (glass, "purple")))
    assert not judge(rule, [apple, glass], colours((apple, "purple"), (glass, "black")))
    # a second apple of the right colour doesn't help the surest one
    assert not judge(rule, [apple, glass, other], colours((apple, "red"), (glass, "purple"), (other, "black")))


# all of its prompts


@needs_data
def test_every_prompt_can_be_met_and_missed() -> None:
    rules = geneval.read_rules(METADATA)
    tasks = Counter(rule.task for rule in rules.values())
    assert tasks == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100
    }  # fmt: skip
    places = {"": (50, 50), "left of": (10, 50), "right of": (90, 50), "above": (50, 10), "below": (50, 90)}
    for prompt, rule in rules.items():
        objects, table = [], []
        for wanted in rule.wanted:
            x, y = places[wanted.position[0] if wanted.position else ""]
            for _ in range(wanted.count):
                objects.append(seen(wanted.name, x, y))
                table.append((objects[-1], wanted.colour))
        assert judge(rule, objects, colours(*table)), prompt
        assert not judge(rule, objects[:-1], colours(*table)), prompt
        assert not judge(rule, [], no_colours), prompt
        if rule.task == "counting":
            assert not judge(rule, [*objects, objects[0]], no_colours), prompt
        if rule.task in ("colors", "color_attr"):
            assert not judge(rule, objects, colours(*table[:-1], (table[-1][0], "grey"))), prompt
        if rule.task == "position":
            first, last = objects
            assert not judge(rule, [replace(first, box=last.box), replace(last, box=first.box)], no_colours), prompt


@needs_data
def test_the_detector_s_classes_are_genevals() -> None:
    assert geneval.object_names() == (DATA / "object_names.txt").read_text().splitlines()
    wanted = {w.name for rule in geneval.read_rules(METADATA).values() for w in rule.wanted}
    assert wanted <= set(geneval.object_names())


PUBLISHED = {  # GenEval's README: a model's score, then its six tasks
    "minDALL-E": (0.23, (0.73, 0.11, 0.12, 0.37, 0.02, 0.01)),
    "Stable Diffusion v1.5": (0.43, (0.97, 0.38, 0.35, 0.76, 0.04, 0.06)),
    "Stable Diffusion v2.1": (0.50, (0.98, 0.51, 0.44, 0.85, 0.07, 0.17)),
    "Stable Diffusion XL": (0.55, (0.98, 0.74, 0.39, 0.85, 0.15, 0.23)),
    "IF-XL": (0.61, (0.97, 0.74, 0.66, 0.81, 0.13, 0.35)),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_score_is_the_mean_of_the_tasks_as_published(model: str) -> None:
    want, rates = PUBLISHED[model]
    sizes = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    verdicts, tasks = [], []
    for (task, size), rate in zip(sizes.items(), rates, strict=True):
        right = round(4 * size * rate)
        verdicts += [1.0] * right + [0.0] * (4 * size - right)
        tasks += [task] * (4 * size)
    assert geneval.macro_mean(verdicts, tasks) == pytest.approx(want, abs=0.0075)  # of figures rounded to 0.01


def test_the_score_weighs_tasks_alike_whatever_their_size() -> None:
    assert geneval.macro_mean([1, 0, 0, 0], ["colors", "position", "position", "position"]) == 0.5
    assert geneval.macro_mean([1, 0, 0, 0], ["colors"] * 4) == 0.25
    assert np.isnan(geneval.macro_mean([], []))
    with pytest.raises(ValueError, match="2 verdicts do not pair up with 1 tasks"):
        geneval.macro_mean([1, 0], ["colors"])


# colours


class MeanColour:
    """A CLIP of one idea: an image is its mean colour; a text is the colour that it names."""

    rgb: ClassVar = {
        "red": (9, 0, 0), "orange": (9, 5, 0), "yellow": (9, 9, 0), "green": (0, 9, 0), "blue": (0, 0, 9),
        "purple": (5, 0, 9), "pink": (9, 5, 7), "brown": (5, 3, 1), "black": (0, 0, 0.001), "white": (9, 9, 9),
    }  # fmt: skip

    def __init__(self) -> None:
        self.texts: list[str] = []

    def embed_images(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.float().mean((2, 3)), dim=1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        self.texts += texts
        named = [next(colour for colour in self.rgb if f" {colour}" in text) for text in texts]
        return torch.nn.functional.normalize(torch.tensor([self.rgb[colour] for colour in named]).float(), dim=1)


def test_a_colour_is_the_object_s_own_and_not_its_background_s() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:] = (0, 0, 255)
    image[10:30, 20:30] = (255, 0, 0)
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:30] = True
    box = np.array([10.2, 4.6, 39.7, 35.4])
    masked, bare = Detection("car", 0.9, box, mask), Detection("car", 0.9, box)
    encoder = MeanColour()
    name = ClipColours(ClipExtractor("clip", "v1", encoder))
    assert name(image, [masked, bare], "car")[1] == "purple"  # red on much blue
    assert name(image, [Detection("car", 0.9, np.array([20.0, 10, 30, 30]), mask)], "car") == ["red"]
    assert [text for text in encoder.texts if " red" in text] == [
        "a photo of a red car", "a photo of a red-colored car", "a photo of a red object"
    ]  # fmt: skip
    assert len(encoder.texts) == 30

    cut = cut_out(image, masked)
    assert cut.shape == (30, 30, 3)  # 5 to 35, 10 to 40: rounded
    assert (cut[5:25, 10:20] == (255, 0, 0)).all()
    cut[5:25, 10:20] = 0x99
    assert (cut == 0x99).all()
    assert (cut_out(image, bare)[0, 0] == (0, 0, 255)).all()


# the metric


class FakeDetector:
    """Sees what it is told to see in an image of one brightness."""

    def __init__(self, by_red: dict[int, list[Detection]]) -> None:
        self.by_red = by_red

    def __call__(self, image: NDArray[np.uint8]) -> list[Detection]:
        assert image.dtype == np.uint8
        assert image.shape == (8, 12, 3)
        return self.by_red[int(image[0, 0, 0])]


def test_each_image_is_judged_by_its_own_prompt() -> None:
    rules = {
        "a photo of a bench": Rule("single_object", (Wanted("bench", 1),)),
        "a photo of a red car": Rule("colors", (Wanted("car", 1, "red"),)),
    }
    detector = FakeDetector({1: [seen("bench")], 2: [seen("car")], 3: []})
    asked: list[tuple[int, str]] = []

    def namer(image: NDArray[np.uint8], objects: Sequence[Detection], name: str) -> list[str]:
        asked.append((int(image[0, 0, 0]), name))
        return ["red"] * len(objects)

    metric = GenEval(INFO, rules, detector, namer)
    assert isinstance(metric, ImageMetric)
    images = torch.tensor([1, 2, 3, 1], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 12)
    bench, car = rules
    verdicts = metric.score(images, [bench, car, bench, f" {car}\n"])
    assert verdicts.dtype == np.float64
    assert verdicts.tolist() == [1, 1, 0, 0]
    assert asked == [(2, "car")]
    with pytest.raises(InputError, match=r"GenEval's 2 prompts alone, not 'a bench'; run it on the prompt set geneval"):
        metric.score(images, [bench, bench, bench, "a bench"])


def test_another_file_than_its_metadata_is_refused(tmp_path: Path) -> None:
    for text in ("no json", '{"prompt": "a photo of a bench"}', '["a"]'):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(InputError, match=r"a\.jsonl is not GenEval's evaluation_metadata\.jsonl"):
            geneval.read_rules(tmp_path / "a.jsonl")


# mmdet


class TinyMask2Former(torch.nn.Module):
    """mmdet's model as it comes from ``init_detector``; it sees the rows of red, in BGR, as a stop sign."""

    def __init__(self) -> None:
        super().__init__()
        self.panoptic_head = torch.nn.Linear(3, 2)

    def see(self, image: NDArray[np.uint8]) -> SimpleNamespace:
        assert image.flags.c_contiguous
        red = torch.from_numpy((image[..., 2] == 255).copy())
        boxes = torch.tensor([[0.0, 0, image.shape[1], image.shape[0]]] * 2)
        scores = torch.tensor([float(red.any()) * 0.95, 0.1])
        found = SimpleNamespace(
            labels=torch.tensor([11, 64]), scores=scores, bboxes=boxes, masks=torch.stack([red, ~red])
        )
        return SimpleNamespace(pred_instances=found)


@pytest.fixture
def mmdet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """mmdet 3 in small, and the file that its model's weights are looked for in."""
    modules: dict[str, Any] = {name: ModuleType(name) for name in ("mmdet", "mmdet.apis", "mmengine", "mmengine.hub")}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    modules["mmengine.hub"].get_config = lambda path: {"path": path}

    def init_detector(
        config: dict[str, str], checkpoint: str | None, device: str = "cuda:0", palette: str = "none"
    ) -> TinyMask2Former:
        assert checkpoint is None, "mmdet would unpickle it"
        assert config["path"] == "mmdet::mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py"
        return TinyMask2Former().to(device).eval()

    modules["mmdet.apis"].init_detector = init_detector
    modules["mmdet.apis"].inference_detector = lambda model, image: model.see(image)
    path = tmp_path / "mask2former.pth"
    torch.save({"state_dict": TinyMask2Former().state_dict(), "meta": {"epoch": 50}}, path)
    monkeypatch.setenv("HYPERSD_MASK2FORMER", str(path))
    pin(monkeypatch, path)
    return path


def pin(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    file = replace(geneval.MASK2FORMER.file, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(geneval, "MASK2FORMER", replace(geneval.MASK2FORMER, file=file))


@needs_data
@pytest.mark.usefixtures("mmdet")
def test_the_row_builds_from_its_files_and_judges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "prompts" / "geneval").mkdir(parents=True)
    shutil.copy(METADATA, tmp_path / "prompts" / "geneval")
    monkeypatch.setenv("HYPERSD_BENCH_CACHE", str(tmp_path))
    config = tiny_config(48, quick_gelu=True)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-L-14-quickgelu", config)
    clip = open_clip.CLIP(**config).state_dict()
    safetensors.torch.save_file({k: v.contiguous() for k, v in clip.items()}, tmp_path / "clip.safetensors")
    monkeypatch.setenv("HYPERSD_CLIP_VIT_L_14", str(tmp_path / "clip.safetensors"))
    factory = registry.resolve("metric", "geneval/mask2former-swin-s")
    assert factory.lacks() == ""
    metric: GenEval = factory(MetricContext())
    images = torch.zeros((3, 3, 16, 16), dtype=torch.uint8)
    images[:2, 0, 4:8] = 255
    prompts = ["a photo of a stop sign", "a photo of a bench", "a photo of a stop sign"]
    assert metric.score(images, prompts).tolist() == [1, 0, 0]
    prompt = next(p for p, rule in metric.rules.items() if rule.wanted[0].name == "stop sign" and rule.task == "colors")
    (coloured,) = metric.score(images[:1], [prompt])
    assert coloured in (0, 1)


def test_the_detector_gives_what_mmdet_sees_in_rgb(mmdet: Path) -> None:
    detector = geneval.load_mask2former("cpu")
    image = np.zeros((16, 24, 3), np.uint8)
    image[4:8, :, 0] = 255
    sign, mouse = detector(image)
    assert (sign.name, mouse.name) == ("stop sign", "computer mouse")
    assert sign.confidence == pytest.approx(0.95)
    assert sign.mask is not None
    assert np.array_equal(sign.mask, image[..., 0] == 255)
    assert torch.equal(detector.model.panoptic_head.weight, torch.load(mmdet)["state_dict"]["panoptic_head.weight"])


def test_foreign_weights_of_the_detector_are_refused(mmdet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": {"head.weight": torch.zeros(2)}}, mmdet)
    with pytest.raises(InputError, match="is not the file expected"):
        geneval.load_mask2former("cpu")
    pin(monkeypatch, mmdet)
    with pytest.raises(
        InputError, match=r"can't load Mask2Former .*: it has no panoptic_head\.bias and 1 more; "
    ) as told:
        geneval.load_mask2former("cpu")
    assert "\n" not in str(told.value)


def test_without_mmdet_one_line_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    factory = geneval.MASK2FORMER_SWIN_S
    monkeypatch.setattr("metrics.factory.find_spec", lambda name: None)
    assert factory.lacks().startswith("not installed: pip install mmdet")
    with pytest.raises(InputError, match=r"geneval/mask2former-swin-s needs mmdet: pip install mmdet"):
        factory(MetricContext())
    monkeypatch.setattr(geneval, "MASK2FORMER", SimpleNamespace(path=lambda: tmp_path))
    monkeypatch.setitem(sys.modules, "mmdet.apis", None)  # as good as broken
    with pytest.raises(InputError, match=r"mmdet can't be imported \(.*\); pip install mmdet"):
        geneval.load_mask2former("cpu")
