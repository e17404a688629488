"""ImageReward, PickScore, HPSv2.1, VQAScore: stand-in files through the real loaders, scores against other code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from hypersd_bench import registry
from hypersd_bench.contracts import ImageMetric, MetricContext
from hypersd_bench.errors import InputError
from metrics import vqa_score
from metrics.preference_models import hps, image_reward, pick_score
from metrics.preference_models.base import crop, letterbox
from tests.tiny_judges import (
    CLIP_MEAN,
    CLIP_STD,
    PROMPTS,
    SIDE,
    Blip,
    clip_steps,
    pictures,
    pil,
    rewrite,
    sha256,
    tiny_config,
    write_hps,
    write_pick_score,
)

NAMES = ("image-reward/v1", "pick-score/v1", "hps/v2.1")
MODULES: dict[str, Any] = dict(zip(NAMES, (image_reward, pick_score, hps), strict=True))
SIZES = [(32, 32), (48, 48), (40, 60), (61, 45), (128, 96)]


@dataclass
class Judges:
    """The stand-ins' models, and the folder in which their files lie."""

    folder: Path
    blip: Blip
    clip: transformers.CLIPModel
    hps: Any

    def file(self, name: str) -> Path:
        return {
            "image-reward/v1": self.folder / "ImageReward.pt",
            "pick-score/v1": self.folder / "model" / "model.safetensors",
            "hps/v2.1": self.folder / "HPS_v2.1_compressed.pt",
        }[name]

    def pin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Expect the files as they are now."""
        for name, module in MODULES.items():
            if name == "pick-score/v1":
                monkeypatch.setattr(module, "SHA256", sha256(self.file(name)))
            else:
                monkeypatch.setattr(module, "WEIGHTS", replace(module.WEIGHTS, sha256=sha256(self.file(name))))


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Judges:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", tiny_config(48, quick_gelu=False))
    judges = Judges(tmp_path, Blip(tmp_path), write_pick_score(tmp_path), write_hps(tmp_path))
    for variable, path in (
        ("HYPERSD_IMAGE_REWARD", judges.file("image-reward/v1")), ("HYPERSD_BERT_TOKENIZER", tmp_path),
        ("HYPERSD_PICK_SCORE", tmp_path / "model"), ("HYPERSD_CLIP_VIT_H_14_TOKENIZER", tmp_path / "tokenizer"),
        ("HYPERSD_HPS_V2_1", judges.file("hps/v2.1")),
    ):  # fmt: skip
        monkeypatch.setenv(variable, str(path))
    judges.pin(monkeypatch)
    return judges


def load(name: str) -> ImageMetric:
    metric: ImageMetric = registry.resolve("metric", name)(MetricContext())
    return metric


def assert_scores(got: NDArray[np.float64], want: Tensor, share: float = 1e-4) -> None:
    """Hold that scores are those of other code, to a share of their range."""
    spread = (want.max() - want.min()).item()
    assert spread > 0.01, "the stand-in rates everything alike"
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want.double().numpy(), rtol=0, atol=share * spread)


# against the authors' libraries


TEXTS = [" ".join(PROMPTS[:1] * 12), *PROMPTS[1:]]  # the first is cut by all three


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_image_reward_is_its_authors_arithmetic_in_timm_and_bert(height: int, width: int, judges: Judges) -> None:
    images = pictures(height, width)
    assert_scores(load("image-reward/v1").score(images, TEXTS), judges.blip.rate(images, TEXTS))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pick_score_is_transformers_own_logit_of_its_own_processor(height: int, width: int, judges: Judges) -> None:
    images = pictures(height, width)
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        transformers.CLIPTokenizer.from_pretrained(judges.folder / "tokenizer"),
    )
    asked = processor(text=TEXTS, images=pil(images), padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        assert_scores(load("pick-score/v1").score(images, TEXTS), judges.clip(**asked).logits_per_image.diagonal())


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_hps_is_a_hundred_cosines_of_open_clip(height: int, width: int, judges: Judges) -> None:
    images = pictures(height, width)
    by_open_clip = open_clip.image_transform(SIDE, is_train=False, resize_mode="longest", fill_color=0)
    scores = load("hps/v2.1").score(images, TEXTS)
    with torch.no_grad():
        said = judges.hps.encode_text(open_clip.get_tokenizer("ViT-H-14")(TEXTS))
        for prepare, share in ((hps_steps, 1e-4), (by_open_clip, 0.05)):  # open_clip's rounds to whole levels
            seen = judges.hps.encode_image(torch.stack([prepare(image) for image in pil(images)]))
            assert_scores(scores, 100 * torch.nn.functional.cosine_similarity(seen, said), share)


def hps_steps(image: Image.Image) -> Tensor:
    """HPSv2's order by torchvision's own steps: a tensor, its long side to 32 pixels, black around, normalised."""
    x = functional.to_tensor(image)
    height, width = (round(side * SIDE / max(x.shape[1:])) for side in x.shape[1:])
    x = functional.resize(x, [height, width], functional.InterpolationMode.BICUBIC)
    canvas = torch.zeros(3, SIDE, SIDE)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    canvas[:, top : top + height, left : left + width] = x
    normalised: Tensor = functional.normalize(canvas, CLIP_MEAN, CLIP_STD)
    return normalised


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (512, 768), (301, 400), (224, 225), (100, 333)])
def test_crops_are_torchvision_s_and_transformers_own(height: int, width: int) -> None:
    (image,) = pil(pictures(height, width, count=1))
    torch.testing.assert_close(crop(image, 224), clip_steps(224)(image), rtol=0, atol=1e-6)
    theirs = transformers.CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(crop(image, 224, middle="floored"), theirs, rtol=0, atol=2e-6)


def test_pictures_of_any_mode_are_read_as_rgb() -> None:
    (image,) = pil(pictures(40, 60, count=1))
    grey = image.convert("L")
    for prepare in (crop, letterbox):
        torch.testing.assert_close(prepare(grey, SIDE), prepare(grey.convert("RGB"), SIDE))
        torch.testing.assert_close(prepare(image.convert("RGBA"), SIDE), prepare(image, SIDE))


def test_a_letterbox_keeps_what_a_crop_cuts() -> None:
    picture = Image.new("RGB", (96, 32))
    picture.paste((255, 255, 255), (0, 0, 8, 32))  # at the left edge
    black = functional.normalize(torch.zeros(3, SIDE, SIDE), CLIP_MEAN, CLIP_STD)
    assert torch.equal(crop(picture, SIDE), black)
    seen = letterbox(picture, SIDE)
    assert torch.equal(seen[:, :10], black[:, :10])
    assert torch.equal(seen[:, 22:], black[:, 22:])
    assert seen[:, 16, 0].min() > 1


# what a score may not depend on


@pytest.mark.usefixtures("judges")
@pytest.mark.parametrize("name", NAMES)
def test_batches_other_images_and_autocast_change_nothing(name: str) -> None:
    metric = load(name)
    images = pictures(40, 60, count=35)  # more than a batch
    prompts = [" ".join(PROMPTS[i % 3].split()[: 2 + i % 4]) for i in range(35)]  # padded to different lengths
    whole = metric.score(images, prompts)
    alone = [metric.score(images[i : i + 1], prompts[i : i + 1])[0] for i in range(0, 35, 3)]
    np.testing.assert_allclose(whole[::3], alone, rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(metric.score(images, prompts), whole)
    assert metric.score(images[:0], []).shape == (0,)


@pytest.mark.usefixtures("judges")
@pytest.mark.parametrize("name", NAMES)
def test_what_a_long_prompt_says_after_the_cut_does_not_count(name: str) -> None:
    metric, image = load(name), pictures(32, 32, count=1)
    long = "a fox left of a pizza " * 20
    score = {text: metric.score(image, [text])[0] for text in (long, long + "two dogs", "two dogs " + long, "a fox")}
    assert score[long] == pytest.approx(score[long + "two dogs"], abs=1e-6)
    assert abs(score[long] - score["two dogs " + long]) > 1e-3
    assert abs(score[long] - score["a fox"]) > 1e-3


# which way round


def prefer_in_pick_score(judges: Judges, shown: Tensor) -> None:
    """Projections that send each picture and its own prompt to the same axis."""
    folder = judges.folder / "model"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(judges.folder / "tokenizer")
    with torch.no_grad():
        seen = judges.clip.vision_model(shown).pooler_output
        read = judges.clip.text_model(**tokenizer(PROMPTS, padding=True, return_tensors="pt")).pooler_output
        axes = torch.eye(3, 32)
        judges.clip.visual_projection.weight.copy_((torch.linalg.pinv(seen) @ axes).T)
        judges.clip.text_projection.weight.copy_((torch.linalg.pinv(read) @ axes).T)
    judges.clip.save_pretrained(folder)


def prefer_in_hps(judges: Judges, shown: Tensor) -> None:
    model = judges.hps
    image, text = model.visual.proj, model.text_projection
    model.visual.proj = model.text_projection = None
    with torch.no_grad():
        read = model.encode_text(open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
        for weight, before in ((image, model.encode_image(shown)), (text, read)):
            weight.copy_(torch.linalg.pinv(before) @ torch.eye(3, weight.shape[1]))
    model.visual.proj, model.text_projection = image, text
    torch.save({"state_dict": model.state_dict()}, judges.file("hps/v2.1"))


def prefer_in_image_reward(judges: Judges, images: Tensor) -> None:
    """A head that gives 1 to what the network makes of a picture with its own prompt, and -1 with another's."""
    blip, pairs = judges.blip, [(i, j) for i in range(3) for j in range(3)]
    read: list[Tensor] = []
    hook = blip.head.register_forward_hook(lambda _, given, __: read.append(given[0]))
    blip.rate(images[[i for i, _ in pairs]], [PROMPTS[j] for _, j in pairs])
    hook.remove()
    wanted = torch.tensor([1.0 if i == j else -1.0 for i, j in pairs])
    linears = [layer for layer in blip.head if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        for layer in linears:
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[0, 0] = 1
        linears[0].weight[0] = torch.linalg.pinv(read[0]) @ wanted
    torch.save(blip.state(), judges.file("image-reward/v1"))


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_of_its_prompt_scores_higher(name: str, judges: Judges, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(SIDE, SIDE)
    shown = torch.stack([clip_steps(SIDE)(image) for image in pil(images)])
    before = load(name).score(images, PROMPTS)
    assert np.abs(before - load(name).score(images, [*PROMPTS[1:], PROMPTS[0]])).max() > 0.01
    if name == "image-reward/v1":
        prefer_in_image_reward(judges, images)
    else:
        (prefer_in_hps if name == "hps/v2.1" else prefer_in_pick_score)(judges, shown)
    judges.pin(monkeypatch)
    metric = load(name)
    table = np.array([metric.score(images[[i] * 3], PROMPTS) for i in range(3)])  # pictures by prompts
    assert metric.info.direction == "higher"
    assert table.argmax(0).tolist() == table.argmax(1).tolist() == [0, 1, 2]
    np.testing.assert_allclose(metric.score(images, PROMPTS), table.diagonal(), atol=1e-4)


# files that are missing, or others


def lose_a_weight(path: Path) -> None:
    if path.suffix == ".safetensors":
        rewrite(path, "text_projection.weight", "text_projection.wait")
        return
    state = torch.load(path, weights_only=True)
    weights = state.get("state_dict", state)
    weights[f"{next(iter(weights))}_"] = weights.pop(next(iter(weights)))
    torch.save(state, path)


def be_another_format(path: Path) -> None:
    path.write_bytes(b"not weights")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [lose_a_weight, be_another_format])
def test_damaged_weights_are_one_line(
    name: str, damage: Callable[[Path], None], judges: Judges, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(judges.file(name))
    with pytest.raises(InputError, match=r"is not the file expected \(sha256 \w+...") as told:
        load(name)
    assert "\n" not in str(told.value)
    judges.pin(monkeypatch)
    reason = r"it has no [\w.]+( and \d+ more)?; download" if damage is lose_a_weight else r"\S"
    with pytest.raises(InputError, match=rf"can't load \w+.* from \S+: {reason}") as told:
        load(name)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", NAMES)
def test_missing_files_name_what_is_missing_and_the_remedy(
    name: str, judges: Judges, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = registry.resolve("metric", name)
    assert factory.lacks() == ""
    judges.file(name).unlink()
    with pytest.raises(InputError, match=f"{factory.weights[0].variable}") as told:
        load(name)
    assert "\n" not in str(told.value)
    for one in factory.weights:
        monkeypatch.delenv(one.variable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(judges.folder / "cache"))
    assert factory.lacks().startswith("to be downloaded")
    assert factory.needs == tuple(one.what for one in factory.weights)
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE.*or hf download \S+ \S+, or set HYPERSD_\w+"):
        load(name)


def test_a_config_of_another_size_is_refused(judges: Judges) -> None:
    file = judges.folder / "model" / "config.json"
    file.write_text(file.read_text().replace('"projection_dim": 32', '"projection_dim": 16'))
    with pytest.raises(InputError, match="can't load PickScore from"):
        load("pick-score/v1")
    assert safetensors.torch.load_file(judges.file("pick-score/v1"))  # the weights themselves are whole


# VQAScore


class Answerer:
    """t2v_metrics' VQAScore as its users know it: paths and texts to a table of scores."""

    def __init__(self, model: str, device: str = "cuda", cache_dir: str = "./hf_cache/") -> None:
        assert cache_dir != "./hf_cache/", "weights would land in the working folder"
        self.model, self.device = model, device
        self.paths: list[Path] = []

    def __call__(self, images: list[str], texts: list[str]) -> Tensor:
        self.paths += map(Path, images)
        shown = [np.asarray(Image.open(path).convert("RGB")) for path in images]
        channels = {"red": 0, "green": 1, "blue": 2}
        return torch.tensor([[float(pixels[..., channels[text]].mean()) / 255 for text in texts] for pixels in shown])


@pytest.fixture
def t2v_metrics(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the package, where it isn't installed and where it is."""
    module: Any = ModuleType("t2v_metrics")
    module.__spec__ = ModuleSpec("t2v_metrics", None)
    module.VQAScore = Answerer
    module.list_all_vqascore_models = lambda: ["clip-flant5-xxl", "clip-flant5-xl"]
    monkeypatch.setitem(sys.modules, "t2v_metrics", module)
    return module


@pytest.mark.usefixtures("t2v_metrics")
def test_vqa_score_asks_of_each_image_its_own_text() -> None:
    metric = vqa_score.CLIP_FLANT5_XXL(MetricContext())
    assert isinstance(metric, vqa_score.VqaScore)
    assert isinstance(metric.scorer, Answerer)
    assert (metric.scorer.model, metric.scorer.device) == ("clip-flant5-xxl", "cpu")
    images = torch.tensor([[255, 51, 0], [0, 102, 153]], dtype=torch.uint8)[:, :, None, None].expand(-1, 3, 8, 12)
    assert metric.score(images, ["red", "green"]) == pytest.approx([1.0, 0.4])
    assert metric.score(images, ["green", "blue"]) == pytest.approx([0.2, 0.6])
    assert metric.score(images[:0], []).shape == (0,)
    assert {path.suffix for path in metric.scorer.paths} == {".png"}
    assert not any(path.parent.exists() for path in metric.scorer.paths)


def test_vqa_score_without_its_model_names_the_release(t2v_metrics: Any) -> None:
    t2v_metrics.list_all_vqascore_models = lambda: ["qwen3-vl-8b"]  # as of 3.1
    with pytest.raises(InputError, match=r"no clip-flant5-xxl; pip install t2v-metrics==3\.0$"):
        vqa_score.CLIP_FLANT5_XXL(MetricContext())
    t2v_metrics.list_all_vqascore_models = lambda: ["clip-flant5-xxl"]

    def fails(**_: object) -> None:
        raise OSError("no such repository\nand more")

    t2v_metrics.VQAScore = fails
    with pytest.raises(InputError, match=r"can't load clip-flant5-xxl \(no such repository\); hf download"):
        vqa_score.CLIP_FLANT5_XXL(MetricContext())


def test_vqa_score_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    factory = vqa_score.CLIP_FLANT5_XXL
    monkeypatch.setattr("metrics.factory.find_spec", lambda name: None)
    assert factory.lacks() == "not installed: pip install t2v-metrics==3.0"
    with pytest.raises(InputError, match=r"needs t2v_metrics: pip install t2v-metrics==3\.0"):
        factory(MetricContext())
    (tmp_path / "t2v_metrics.py").write_text("raise RuntimeError('ffmpeg is not found. Install with:\\nconda')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("metrics.factory.find_spec", lambda name: SimpleNamespace(name=name))
    with pytest.raises(InputError, match=r"t2v_metrics can't be imported \(ffmpeg is not found\. Install with:\)$"):
        factory(MetricContext())
