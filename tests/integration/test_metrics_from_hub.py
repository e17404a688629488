"""Metrics whose weights come from the hub, through their real loading code, from small stand-ins in the real layout.

The architectures are shrunk where the libraries keep them: in open_clip's table of configs, in DINOv2's config file.
All that is downloaded and scored happens in one process of its own, which knows a stand-in for the hub alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from metrics.extractors import clip, dinov2
from metrics.extractors.clip import PublishedClip
from tests.hub import StandInHub, environment
from tests.unit.test_extractors import dinov2_by_timm, make_tiny_dinov2

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "aesthetic"
PROMPTS = ["a fox left of a pizza", "a car on a green background", "two very blue dogs"]
PUBLISHED = (clip.OPENAI_B_32, clip.OPENAI_L_14, clip.OPENAI_L_14_336, clip.LAION_G_14, clip.LAION_BIGG_14)
SCORES = {
    "clip-score/vit-b-32": (clip.OPENAI_B_32, "", 100),
    "clip-score/vit-l-14": (clip.OPENAI_L_14, "", 100),
    "clip-score/vit-g-14": (clip.LAION_G_14, "", 100),
    "clip-score/vit-bigg-14": (clip.LAION_BIGG_14, "", 100),
    "clip-score/vit-g-14-photo-256": (clip.LAION_G_14, "A photo depicts ", 1),
    "clip-s/vit-b-32": (clip.OPENAI_B_32, "A photo depicts ", 2.5),
}
CHILD = """
import json, sys
import numpy as np
import open_clip
import torch
from dataclasses import replace
from hypersd_bench import registry
from hypersd_bench.contracts import MetricContext
from hypersd_bench.errors import InputError
from metrics.extractors import clip, dinov2
open_clip.factory._MODEL_CONFIGS.update(json.loads(sys.argv[1]))
images = torch.from_numpy(np.load(sys.argv[2]))
prompts = json.loads(sys.argv[3])
context = MetricContext()
def tell(call):
    try:
        said = call()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps(said))
def judge(name):
    factory = registry.resolve("metric", name)
    before = factory.lacks()
    metric = factory(context)
    features = metric.extractor(images)
    found = metric.score_features(features, prompts) if factory.info.kind == "image" else features
    return [before, factory.lacks(), found.tolist()]
for name in json.loads(sys.argv[4]):
    tell(lambda: judge(name))
def load(**weights):
    return clip.load_open_clip(replace(clip.OPENAI_B_32, weights=replace(clip.OPENAI_B_32.weights, **weights)), "cpu")
tell(lambda: str(load(repo="acme/wrong-key")))
tell(lambda: str(load(repo="acme/no-file")))
tell(lambda: str(load(repo="acme/cut")))
tell(lambda: str(load(sha256="0" * 64)))
open_clip.factory._MODEL_CONFIGS["ViT-B-32-quickgelu"]["quick_gelu"] = False
tell(lambda: str(load()))
dinov2.WEIGHTS = replace(dinov2.WEIGHTS, repo="acme/wrong-dinov2")
tell(lambda: str(dinov2._build("dinov2/vit-l-14", context)))
"""


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with StandInHub() as server:
        yield server


def config(published: PublishedClip) -> dict[str, Any]:
    """The published model's config, its sizes shrunk; L/14 keeps the width that LAION's heads read."""
    own = open_clip.get_model_config(published.config)
    assert own is not None
    dim = 768 if published is clip.OPENAI_L_14 else 24
    own["embed_dim"] = dim
    own["vision_cfg"] |= {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    own["text_cfg"] |= {"width": 32, "heads": 2, "layers": 1}
    return dict(own)


def build(published: PublishedClip) -> Any:
    """A random model of the shrunk config whose embeddings tell images and texts apart."""
    torch.manual_seed(PUBLISHED.index(published))
    sizes = config(published)
    model = open_clip.CLIP(sizes["embed_dim"], sizes["vision_cfg"], sizes["text_cfg"], quick_gelu=published.quick_gelu)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def embedded(model: Any, images: list[Image.Image], texts: list[str]) -> tuple[Tensor, Tensor]:
    preprocess = open_clip.image_transform(32, is_train=False)
    with torch.inference_mode():
        x = model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
        y = model.encode_text(open_clip.tokenize(texts), normalize=True)
    return x.double(), y.double()


def test_metrics_of_the_hub_give_what_their_weights_say(hub: StandInHub, tmp_path: Path) -> None:
    models = {published.config: build(published) for published in PUBLISHED}
    for published in PUBLISHED:
        hub.add(published.weights.repo, {clip.FILE: whole(models[published.config])})
    spoil(hub, models[clip.OPENAI_B_32.config])
    folder = make_tiny_dinov2(tmp_path / "dinov2")
    hub.add(dinov2.WEIGHTS.repo, {file: (folder / file).read_bytes() for file in dinov2.WEIGHTS.files})
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["layernorm.scale"] = state.pop("layernorm.weight")
    foreign = {"config.json": (folder / "config.json").read_bytes(),
               "model.safetensors": safetensors.torch.save(state, {"format": "pt"})}  # fmt: skip
    hub.add("acme/wrong-dinov2", foreign)

    coarse = torch.rand((3, 3, 6, 6), generator=torch.Generator().manual_seed(3))
    images = (255 * torch.nn.functional.interpolate(coarse, size=(48, 70), mode="bilinear")).round().byte()
    pictures = [to_pil_image(image) for image in images]
    names = [*SCORES, "cmmd/vit-l-14-336", "fd/dinov2", *(("aesthetic/laion-v1",) if DATA.is_dir() else ())]
    told = run_child(hub, tmp_path, images, names)
    found = dict(zip(names, told, strict=False))

    for name, (published, prefix, scale) in SCORES.items():
        before, after, scores = found[name]
        shared = name in ("clip-s/vit-b-32", "clip-score/vit-g-14-photo-256")  # downloaded for another metric
        assert before == ("" if shared else "to be downloaded")
        assert after == ""
        shown = [clip.dmd2_square(picture) for picture in pictures] if "256" in name else pictures
        x, y = embedded(models[published.config], shown, [prefix + prompt for prompt in PROMPTS])
        cosine = (x * y).sum(1)
        assert cosine.std() > 1e-3
        want = scale * (cosine.clamp(min=0) if name.startswith("clip-s/") else cosine)
        assert scores == pytest.approx(want.tolist(), abs=1e-4 * scale)
    squares = [clip.cmmd_square(picture) for picture in pictures]
    x, _ = embedded(models[clip.OPENAI_L_14_336.config], squares, PROMPTS)
    np.testing.assert_allclose(found["cmmd/vit-l-14-336"][2], x, atol=1e-5)
    np.testing.assert_allclose(found["fd/dinov2"][2], dinov2_by_timm(folder, dinov2.dinov2_input(images)), atol=2e-5)
    if DATA.is_dir():
        head = torch.load(DATA / "laion_v1" / "sa_0_4_vit_l_14_linear.pth", weights_only=True)
        x, _ = embedded(models[clip.OPENAI_L_14.config], pictures, PROMPTS)
        want = x @ head["weight"][0].double() + head["bias"].double()
        assert found["aesthetic/laion-v1"][2] == pytest.approx(want.tolist(), abs=1e-4)

    refusals = told[len(names) :]
    for said, wanted in zip(
        refusals,
        (
            ["can't load CLIP ViT-B/32 from", "text_projection", "download it again"],
            [f"'{clip.FILE}'", "acme/no-file", "HYPERSD_CLIP_VIT_B_32"],
            ["can't load CLIP ViT-B/32 from", "download it again"],
            ["is not the file expected", "sha256"],
            ["CLIP ViT-B/32: this open_clip builds ViT-B-32-quickgelu with GELU", "trained with QuickGELU; install"],
            ["DINOv2 ViT-L/14: its file has 1 missing keys, layernorm.weight the first", "HYPERSD_DINOV2_VIT_L_14"],
        ),
        strict=True,
    ):
        assert said.startswith("InputError: "), said
        assert "\n" not in said
        assert [words for words in wanted if words not in said] == [], said


def whole(model: Any) -> bytes:
    return safetensors.torch.save({name: value.contiguous() for name, value in model.state_dict().items()})


def spoil(hub: StandInHub, model: Any) -> None:
    """Serve the same weights with a key of another name, without the file, and cut short."""
    content = whole(model)
    state = safetensors.torch.load(content)
    state["text_projection.weight"] = state.pop("text_projection")
    hub.add("acme/wrong-key", {clip.FILE: safetensors.torch.save(state)})
    hub.add("acme/no-file", {"model.safetensors": content})
    hub.add("acme/cut", {clip.FILE: content[: len(content) // 2]})


def run_child(hub: StandInHub, home: Path, images: Tensor, names: list[str]) -> list[Any]:
    np.save(home / "images.npy", images.numpy())
    configs = {published.config: config(published) for published in PUBLISHED}
    more = {"HYPERSD_AESTHETIC_V1": str(DATA / "laion_v1" / "sa_0_4_vit_l_14_linear.pth")} if DATA.is_dir() else {}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(configs), str(home / "images.npy"), json.dumps(PROMPTS),
         json.dumps(names)],
        cwd=ROOT, env=environment(hub, home / "home", **more), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", '"'))]
