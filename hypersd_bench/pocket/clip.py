"""Stage ``clip``: a small CLIP (Radford et al. 2103.00020) of scenes and captions, built and loaded through open_clip.

Every training batch holds scenes beside their twins, the same scene with the two emoji swapped or on another
background, so that the judge learns to see a single wrong word.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from hypersd_bench.errors import InputError
from hypersd_bench.pocket.pictures import Pictures, as_float, flawed, weights_file
from hypersd_bench.pocket.scenes import BACKGROUND_NAMES, SIZE, Scene, scenes
from hypersd_bench.pocket.tokenizer import MAX_LENGTH
from hypersd_bench.pocket.training import Schedule, fit, scene_pool
from hypersd_bench.sampling import read_safetensors_metadata
from hypersd_bench.store import write_bytes, write_json

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
EMBEDDING = 128
WIDTH = 24
TEXTURE = 2 * 4 * WIDTH  # mean and spread of every channel of the image tower's first stage
MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class PocketClip:
    """The miniature's CLIP, ready to judge."""

    model: open_clip.CLIP
    tokenizer: HFTokenizer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.logit_scale.device
        return device

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images (N, 3, 64, 64) uint8: (N, d) float32 of unit length, on the model's device."""
        parts = [self.image_features(as_float(part, self.device)) for part in images.split(256)]
        return torch.cat(parts)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embed texts: (N, d) float32 of unit length, on the model's device."""
        features: Tensor = self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=True)
        return features

    def image_features(self, x: Tensor) -> Tensor:
        """Embed images (N, 3, 64, 64) in [0, 1], with gradient: (N, d) float32 of unit length."""
        features: Tensor = self.model.encode_image(preprocess(x), normalize=True)
        return features

    def texture_features(self, x: Tensor) -> Tensor:
        """Mean and spread of the first stage's channels for images (N, 3, 64, 64) in [0, 1], with gradient.

        Returns (N, 192) float32. The embedding forgets how a picture was spoiled, because its caption stays true.
        """
        with torch.autocast(x.device.type, enabled=False):
            maps: Tensor = self.model.visual.layer1(self.model.visual.stem(preprocess(x)))
        spread = (maps.var((2, 3)) + 1e-6).sqrt()
        return torch.cat([maps.mean((2, 3)), spread], dim=1)


def preprocess(x: Tensor) -> Tensor:
    """Images in [0, 1] to what the image tower takes, [-1, 1]."""
    return 2 * x - 1


def clip_config(vocab_size: int) -> dict[str, Any]:
    """The model's description in open_clip's own terms."""
    return {
        "embed_dim": EMBEDDING,
        # CLIP's own ResNet: on so few pictures it learns faster than a transformer, and a step costs a third; its last
        # 2x2 map keeps left and right apart
        "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": WIDTH, "head_width": 32},
        "text_cfg": {"context_length": MAX_LENGTH, "vocab_size": vocab_size, "width": 128, "heads": 4, "layers": 2},
    }


def open_tokenizer(folder: Path) -> HFTokenizer:
    """Open a tokenizer folder as open_clip does."""
    weights_file(folder, "tokenizer_config.json", "tokenizer")
    return HFTokenizer(str(folder), context_length=MAX_LENGTH)


def train_clip(
    folder: Path,
    tokenizer_folder: Path,
    schedule: Schedule,
    pool_size: int,
    device: torch.device,
    vae: AutoencoderKL | None = None,
) -> tuple[PocketClip, dict[str, Any]]:
    """Train on rendered scenes, part of them seen through ``vae``; returns the judge and the facts of the training."""
    tokenizer = open_tokenizer(tokenizer_folder)
    pictures = Pictures(scene_pool(folder, pool_size), vae, folder)
    batches = TwinBatches(tuple(scenes(0, pool_size)))
    torch.manual_seed(0)
    clip = PocketClip(open_clip.CLIP(**clip_config(len(tokenizer.tokenizer))).to(device), tokenizer)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([step, 4])
        index = batches.draw(schedule.batch_size, rng)
        tokens = tokenizer([batches.scenes[i].caption for i in index]).to(device)
        images = clip.image_features(flawed(pictures.draw(index, rng, device), rng))
        texts = clip.model.encode_text(tokens, normalize=True)
        scale = clip.model.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        return info_nce(images.float(), texts.float(), scale)

    return clip, fit("clip", clip.model, loss_at, schedule, folder, device)


def info_nce(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Symmetric contrastive loss of unit embeddings (N, d) whose N captions all differ (2103.00020, figure 3)."""
    logits = scale * images @ texts.T
    labels = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return loss, {"accuracy": float((logits.argmax(1) == labels).float().mean()), "scale": float(scale.detach())}


class TwinBatches:
    """Draws batches of scenes whose captions all differ, most of them beside a twin that differs in one thing."""

    def __init__(self, pool: tuple[Scene, ...]) -> None:
        """Index a pool of scenes by what they show."""
        self.scenes = pool

    @cached_property
    def _showing(self) -> dict[tuple[tuple[str, ...], str], list[int]]:
        index = defaultdict(list)
        for i, scene in enumerate(self.scenes):
            index[scene.concepts, scene.background].append(i)
        return dict(index)

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Indices of ``count`` scenes, fewer if the pool holds fewer captions."""
        count = min(count, len(self._showing))
        chosen: dict[tuple[tuple[str, ...], str], None] = {}
        while len(chosen) < count:
            scene = self.scenes[int(rng.integers(len(self.scenes)))]
            chosen[scene.concepts, scene.background] = None
            twin = self._twin(scene, rng)
            if twin in self._showing:
                chosen[twin] = None
        picked = list(chosen)[:count]
        return np.array([rng.choice(self._showing[shown]) for shown in picked], np.int64)

    def _twin(self, scene: Scene, rng: np.random.Generator) -> tuple[tuple[str, ...], str]:
        if len(scene.concepts) == 2 and rng.random() < 0.5:
            return scene.concepts[::-1], scene.background
        return scene.concepts, str(rng.choice(BACKGROUND_NAMES))


def save_clip(model: open_clip.CLIP, folder: Path) -> None:
    """Write a folder that ``open_clip.create_model("local-dir:...")`` reads; weights in half precision."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    halves = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(halves, {"format": "pt"}))
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": SIZE}
    config = {"model_cfg": clip_config(model.vocab_size), "preprocess_cfg": preprocessing}
    write_json(folder / CONFIG_FILE, config)


def load_clip(folder: Path, tokenizer_folder: Path, device: torch.device | str = "cpu") -> PocketClip:
    """Load the judge; raises InputError when its files are missing or broken."""
    read_safetensors_metadata(weights_file(folder, WEIGHTS_FILE, "clip"))
    weights_file(folder, CONFIG_FILE, "clip")
    try:
        model = open_clip.create_model(f"local-dir:{folder}", device=device)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"the CLIP in {folder} can't be loaded: {str(error).splitlines()[0]}") from error
    return PocketClip(model.eval().requires_grad_(False), open_tokenizer(tokenizer_folder))
