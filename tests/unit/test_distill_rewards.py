"""Rewards: real loaders on small stand-in files, each against its library's own path; gradient reaches the pixels."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from distill.rewards import hps, image_reward, laion_aesthetic, pick_score
from distill.rewards.contract import Reward, RewardFactory, RewardInfo
from distill.rewards.preprocess import clip_input
from hypersd_bench import registry
from hypersd_bench.contracts import FeatureMetric, MetricContext
from hypersd_bench.download import OwnerFile
from hypersd_bench.errors import InputError
from hypersd_bench.pocket import WEIGHTS
from hypersd_bench.pocket.scenes import render, scenes
from metrics import aesthetic, clip_score
from metrics.aesthetic import LinearHead, load_head
from metrics.extractors.clip import OPENAI_L_14, load_open_clip
from metrics.preference_models import hps as hps_model
from metrics.preference_models import image_reward as image_reward_model
from metrics.preference_models import pick_score as pick_score_model
from metrics.weights import WebFile
from tests.tiny_judges import (
    CLIP_STD,
    PROMPTS,
    Blip,
    clip_steps,
    pictures,
    pil,
    sha256,
    spread,
    tiny_config,
    write_hps,
    write_pick_score,
)

CPU = torch.device("cpu")
SIZES = [(32, 32), (48, 48), (40, 60)]  # transformers and torchvision round the middle of odd differences differently
DATA = Path(__file__).parents[3] / "shared" / "data" / "aesthetic"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")
needs_miniature = pytest.mark.skipif(
    not (WEIGHTS / "aesthetic.safetensors").is_file(), reason="the miniature is not built yet"
)
HPS_FILE = hps_model.WEIGHTS.file
HUB_ROWS = [name for name in registry.REWARDS if not name.endswith("/pocket")]


def assert_rewards(reward: Reward, images: Tensor, want: Tensor) -> None:
    """Hold that a reward says what the library says, and that its gradient is that of what it says.

    The library resizes with PIL, which rounds to whole levels; only pictures of the stand-ins' own size escape that.
    """
    tolerance = (want.max() - want.min()).item() * (1e-3 if images.shape[2:] == (32, 32) else 0.1)
    assert tolerance > 1e-5, "the stand-in rates everything alike"
    x = (images.float() / 255).requires_grad_()
    got = reward(x, PROMPTS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.detach(), want.float(), rtol=0, atol=tolerance)

    (gradient,) = torch.autograd.grad(got[0], x)
    assert gradient.isfinite().all()
    assert gradient[0].abs().sum() > 0
    assert gradient[1:].abs().sum() == 0, "a picture's reward depends on another picture"
    direction = gradient / gradient.norm()
    step = 0.02
    with torch.no_grad():
        rise = (reward(x + step * direction, PROMPTS) - reward(x - step * direction, PROMPTS))[0] / (2 * step)
    assert rise.item() == pytest.approx(gradient.norm().item(), rel=0.02)


# preprocessing


@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 400), (512, 384), (64, 64), (224, 224)])
def test_crop_is_what_pil_and_torchvision_do(height: int, width: int) -> None:
    images = pictures(height, width)
    want = torch.stack([clip_steps(224)(image) for image in pil(images)])
    level = 1 / 255 / min(CLIP_STD)
    torch.testing.assert_close(clip_input(images / 255, 224), want, rtol=0, atol=1.1 * level)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 400), (512, 384)])
def test_pad_is_open_clip_s_letterbox(height: int, width: int) -> None:
    images = pictures(height, width)
    letterbox = open_clip.image_transform(224, is_train=False, resize_mode="longest", fill_color=0)
    want = torch.stack([letterbox(image) for image in pil(images)])
    level = 1 / 255 / min(CLIP_STD)
    torch.testing.assert_close(clip_input(images / 255, 224, fit="pad"), want, rtol=0, atol=1.1 * level)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_gradient_of_preprocessing_is_its_finite_difference(fit: Any) -> None:
    x = torch.rand((2, 3, 40, 56), requires_grad=True)
    weight = torch.randn(2, 3, 24, 24)
    (gradient,) = torch.autograd.grad((clip_input(x, 24, fit) * weight).sum(), x)
    direction = torch.randn_like(x)
    with torch.no_grad():
        change = (clip_input(x + direction, 24, fit) - clip_input(x - direction, 24, fit)) * weight / 2
    assert change.sum().item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-3)


def test_pixels_of_any_precision_are_read_in_float32() -> None:
    assert clip_input(torch.rand((1, 3, 8, 8), dtype=torch.bfloat16), 8).dtype == torch.float32


# LAION


def tiny_open_clip(monkeypatch: pytest.MonkeyPatch, name: str, width: int, quick_gelu: bool) -> Any:
    """Make ``name`` a small architecture for open_clip, and return one of it."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, tiny_config(width, quick_gelu))
    model = open_clip.create_model(name).eval()
    spread(model)
    return model


@pytest.fixture
def tiny_vit_l(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small CLIP where ViT-L/14's weights are looked for."""
    model = tiny_open_clip(monkeypatch, "ViT-L-14-quickgelu", 768, quick_gelu=True)
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "clip.safetensors"
    )
    monkeypatch.setenv("HYPERSD_CLIP_VIT_L_14", str(tmp_path / "clip.safetensors"))


def rated_by_metric_path(head: LinearHead, images: Tensor) -> Tensor:
    """Ratings through the metrics' encoder, which preprocesses uint8 with PIL and has no gradient."""
    return head(load_open_clip(OPENAI_L_14, "cpu").embed_images(images))


@pytest.mark.usefixtures("tiny_vit_l")
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_laion_rates_as_the_metric_does(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    linear = torch.nn.Linear(768, 1)
    torch.save(linear.state_dict(), tmp_path / "head.pth")
    monkeypatch.setenv("HYPERSD_HEAD", str(tmp_path / "head.pth"))
    digest = hashlib.sha256((tmp_path / "head.pth").read_bytes()).hexdigest()
    build = laion_aesthetic._Head(WebFile("head", "HYPERSD_HEAD", OwnerFile("head.pth", "nowhere", digest)))
    images = pictures(height, width)
    want = rated_by_metric_path(load_head(tmp_path / "head.pth", digest), images)
    assert_rewards(build(laion_aesthetic.V2.info, CPU), images, want)


@needs_data
@pytest.mark.usefixtures("tiny_vit_l")
@pytest.mark.parametrize(
    ("factory", "variable", "file"),
    [
        (laion_aesthetic.V2, "HYPERSD_AESTHETIC_V2", "improved/sac+logos+ava1-l14-linearMSE.pth"),
        (laion_aesthetic.V1, "HYPERSD_AESTHETIC_V1", "laion_v1/sa_0_4_vit_l_14_linear.pth"),
    ],
)
def test_published_heads_load_and_rate(
    factory: RewardFactory, variable: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(DATA / file))
    reward = factory(CPU)
    assert isinstance(reward, laion_aesthetic.LaionAesthetic)
    images = pictures(48, 48)
    assert_rewards(reward, images, rated_by_metric_path(reward.head, images))


V1_L14 = [-2.457909, -0.137857, 1.895110, 3.584934, 5.099726, 6.470104, 7.786991, 9.048001, 10.226408, 11.304426]
V2_L14 = [1.655480, 2.359275, 3.069824, 3.672451, 4.238010, 4.701021, 5.073054, 5.365362, 5.576664, 5.746761]


@needs_data
@pytest.mark.parametrize(
    ("factory", "variable", "file", "golden"),
    [
        (laion_aesthetic.V2, "HYPERSD_AESTHETIC_V2", "improved/sac+logos+ava1-l14-linearMSE.pth", V2_L14),
        (laion_aesthetic.V1, "HYPERSD_AESTHETIC_V1", "laion_v1/sa_0_4_vit_l_14_linear.pth", V1_L14),
    ],
)
@pytest.mark.usefixtures("tiny_vit_l")
def test_published_heads_give_their_golden_values(
    factory: RewardFactory, variable: str, file: str, golden: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(DATA / file))
    reward = factory(CPU)
    assert isinstance(reward, laion_aesthetic.LaionAesthetic)
    rows = [np.load(DATA / f"laion_v1/vit_l_14_embeddings/rating{i}.npy", allow_pickle=False) for i in range(10)]
    embedded = torch.from_numpy(np.concatenate(rows)).float()
    assert reward.head(embedded).tolist() == pytest.approx(golden, abs=1e-4)
    assert reward.head(30 * embedded).tolist() == pytest.approx(golden, abs=1e-4)


# HPS


@pytest.fixture
def tiny_hps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A small CLIP where HPSv2.1's file is looked for."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", tiny_config(48, quick_gelu=False))
    model = write_hps(tmp_path)
    monkeypatch.setenv("HYPERSD_HPS_V2_1", str(tmp_path / HPS_FILE))
    monkeypatch.setattr(hps_model, "WEIGHTS", replace(hps_model.WEIGHTS, sha256=sha256(tmp_path / HPS_FILE)))
    return model


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_hps_is_a_hundred_cosines_of_open_clip(height: int, width: int, tiny_hps: Any) -> None:
    images = pictures(height, width)
    letterbox = open_clip.image_transform(32, is_train=False, resize_mode="longest", fill_color=0)
    with torch.no_grad():
        shown = tiny_hps.encode_image(torch.stack([letterbox(image) for image in pil(images)]))
        said = tiny_hps.encode_text(open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
    want = 100 * torch.nn.functional.cosine_similarity(shown, said)
    assert_rewards(hps.V2_1(CPU), images, want)


# PickScore


@pytest.fixture
def tiny_pick_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> transformers.CLIPModel:
    """A small CLIPModel and a tokenizer in the folders that PickScore is looked for in."""
    model = write_pick_score(tmp_path)
    monkeypatch.setenv("HYPERSD_PICK_SCORE", str(tmp_path / "model"))
    monkeypatch.setenv("HYPERSD_CLIP_VIT_H_14_TOKENIZER", str(tmp_path / "tokenizer"))
    monkeypatch.setattr(pick_score_model, "SHA256", sha256(tmp_path / "model" / "model.safetensors"))
    return model


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pick_score_is_transformers_own_logit(
    height: int, width: int, tiny_pick_score: transformers.CLIPModel, tmp_path: Path
) -> None:
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
    )
    images = pictures(height, width)
    inputs = processor(
        text=PROMPTS, images=pil(images), padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        want = tiny_pick_score(**inputs).logits_per_image.diagonal()
    assert_rewards(pick_score.V1(CPU), images, want)


@pytest.mark.usefixtures("tiny_pick_score")
def test_pick_score_cuts_long_prompts_before_their_end_token() -> None:
    reward, x = pick_score.V1(CPU), pictures(32, 32, count=1) / 255
    tokenizer = pick_score_model.load(CPU).tokenizer
    assert tokenizer("a fox " * 40, truncation=True, max_length=16).input_ids[-1] == tokenizer.eos_token_id
    assert reward(x, ["a fox " * 40]).item() == pytest.approx(reward(x, ["a fox " * 50]).item())


# ImageReward


@pytest.fixture
def blip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Blip:
    monkeypatch.setenv("HYPERSD_IMAGE_REWARD", str(tmp_path / "ImageReward.pt"))
    monkeypatch.setenv("HYPERSD_BERT_TOKENIZER", str(tmp_path))
    blip = Blip(tmp_path)
    pin_image_reward(monkeypatch, tmp_path)
    return blip


def pin_image_reward(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Expect the file in a folder, and no other."""
    pinned = replace(image_reward_model.WEIGHTS, sha256=sha256(folder / "ImageReward.pt"))
    monkeypatch.setattr(image_reward_model, "WEIGHTS", pinned)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_image_reward_reads_its_file_as_timm_and_bert_do(height: int, width: int, blip: Blip) -> None:
    images = pictures(height, width)
    reward = image_reward.V1(CPU)
    assert_rewards(reward, images, blip.rate(images))
    assert image_reward_model.load(CPU).vision.post_layernorm.eps == blip.vision.norm.eps


@pytest.mark.usefixtures("blip")
def test_image_reward_reads_35_tokens_and_no_more() -> None:
    reward, x = image_reward.V1(CPU), pictures(32, 32, count=1) / 255
    long = "a fox left of a pizza " * 8
    assert reward(x, [long]).item() == pytest.approx(reward(x, [long + "dogs"]).item())
    assert reward(x, ["a fox"]).item() != pytest.approx(reward(x, ["a fox dogs"]).item(), abs=1e-3)


def test_image_reward_without_a_layer_is_refused(blip: Blip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = blip.state()
    del state["blip.visual_encoder.blocks.1.attn.qkv.weight"]
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(InputError, match="is not the file expected"):
        image_reward.V1(CPU)
    pin_image_reward(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=r"can't load ImageReward from .*ImageReward\.pt: it has no \S+qkv.weight;"):
        image_reward.V1(CPU)


# the miniature


@needs_miniature
@pytest.mark.parametrize(
    ("name", "metric"), [("aesthetic/pocket", aesthetic.POCKET), ("clip-score/pocket", clip_score.POCKET)]
)
def test_the_miniature_s_rewards_are_its_metrics(name: str, metric: Any) -> None:
    shown = list(scenes(7, 3, "held-out"))
    images = torch.from_numpy(np.stack([render(scene).image for scene in shown])).permute(0, 3, 1, 2)
    judge = metric(MetricContext())
    by_features = isinstance(judge, FeatureMetric)
    want = judge.score_features(judge.extractor(images), PROMPTS) if by_features else judge.score(images, PROMPTS)
    reward: Reward = registry.resolve("reward", name)(CPU)
    x = (images.float() / 255).requires_grad_()
    got = reward(x, PROMPTS)
    assert got.tolist() == pytest.approx(want.tolist(), abs=1e-3)
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert gradient.isfinite().all()
    assert (gradient.abs().sum((1, 2, 3)) > 0).all()
    with pytest.raises(InputError, match="judges 64 x 64 pictures of the miniature, not 32 x 64"):
        reward(x[:, :, :32], PROMPTS)


@needs_miniature
def test_rewards_do_not_depend_on_the_student_s_precision() -> None:
    reward: Reward = registry.resolve("reward", "clip-score/pocket")(CPU)
    x = pictures(64, 64) / 255
    with torch.autocast("cpu", torch.bfloat16):
        mixed = reward(x, PROMPTS)
    torch.testing.assert_close(mixed, reward(x, PROMPTS))


# every row


@pytest.mark.parametrize("name", registry.REWARDS)
def test_rows_declare_themselves_before_their_weights_load(name: str) -> None:
    info: RewardInfo = registry.resolve("reward", name).info
    assert info.id == name
    assert info.id in info.trains
    assert math.isfinite(info.hinge)
    assert info.weight > 0


@pytest.mark.parametrize("name", HUB_ROWS)
def test_missing_weights_name_the_remedy(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith("HYPERSD_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"(hf download \S+/\S+|put \S+) .*or set HYPERSD_\w+") as missing:
        registry.resolve("reward", name)(CPU)
    assert "\n" not in str(missing.value)


def _runs_code(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (path.with_suffix(".ran"),)

    path.write_bytes(pickle.dumps({"state_dict": Evil()}))


@pytest.mark.parametrize(("factory", "model"), [(hps.V2_1, hps_model), (image_reward.V1, image_reward_model)])
@pytest.mark.usefixtures("blip", "tiny_hps")
def test_nothing_in_a_downloaded_file_is_run(
    factory: RewardFactory, model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _runs_code(tmp_path / "evil.pt")
    monkeypatch.setenv(model.WEIGHTS.variable, str(tmp_path / "evil.pt"))
    monkeypatch.setattr(model, "WEIGHTS", replace(model.WEIGHTS, sha256=sha256(tmp_path / "evil.pt")))
    with pytest.raises(InputError, match="can't load"):
        factory(CPU)
    assert not (tmp_path / "evil.ran").exists()


def test_an_incomplete_folder_is_named_with_what_it_lacks(
    tiny_pick_score: transformers.CLIPModel, tmp_path: Path
) -> None:
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors missing in .*HYPERSD_PICK_SCORE"):
        pick_score.V1(CPU)
