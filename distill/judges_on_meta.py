"""The judges of feedback without weights, so that a plan can count their parameters and run them on the meta device.

What a reward costs is its image tower, with gradient to the pixels, and all its weights in float32. A reward that is
not named here is left out of the plan, which says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.metering import META, CudaRules
from distill.presets import Preset

DETECTOR_SIDE = 800  # torchvision's Mask R-CNN resizes to it


@dataclass(frozen=True)
class Judge:
    """A judge's networks, the one that sees pixels, and how (B, 3, H, W) run through it: any tensor comes out."""

    networks: tuple[nn.Module, ...]
    seeing: nn.Module
    look: Callable[[Tensor], Tensor]

    def parameters(self) -> list[Tensor]:
        """All weights, those of the text towers as well."""
        return [tensor for network in self.networks for tensor in (*network.parameters(), *network.buffers())]


class Judges:
    """Stands for ``feedback.Feedback``: decodes, lets every judge look, sums up."""

    def __init__(self, vae: Any, rules: CudaRules, preset: Preset, rewards: Sequence[str]) -> None:
        chosen = preset.hyper_sd
        watched = [name for name in chosen.watched if name not in rewards]
        segmenter = chosen.perceptual
        names = [*rewards, *watched, *([f"segmenter/{segmenter}"] if segmenter else [])]
        self.unknown = [name for name in names if name not in _BUILD]
        self._vae, self._dtype, self._rules = vae, vae.dtype, rules
        self._rewards = [_build(name) for name in rewards if name in _BUILD]
        self._watched = [_build(name) for name in watched if name in _BUILD]
        self._segmenter = _build(f"segmenter/{segmenter}") if f"segmenter/{segmenter}" in _BUILD else None

    @property
    def _all(self) -> list[Judge]:
        return [*self._rewards, *self._watched, *([self._segmenter] if self._segmenter else [])]

    def parameters(self) -> list[Tensor]:
        """The weights of all judges."""
        return [tensor for judge in self._all for tensor in judge.parameters()]

    def seeing(self) -> list[nn.Module]:
        """The networks that look at pixels."""
        return [judge.seeing for judge in self._all]

    def decode(self, x0: Tensor) -> Tensor:
        """Latents to pixels, outside autocast, with gradient."""
        with self._rules.full_precision():
            pixels: Tensor = self._vae.decode(x0.to(self._dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def judge(self, x0: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss that runs through the rewards that are optimised; the others look without gradient."""
        pixels = self.decode(x0)
        loss = pixels.new_zeros(())
        with self._rules.full_precision():
            for judge in self._rewards:
                loss = loss + judge.look(pixels).mean()
            with torch.no_grad():
                for judge in self._watched:
                    judge.look(pixels)
        return loss, {}

    def perceptual(self, x0: Tensor, instances: Any, seed: int) -> Tensor:
        """The same through the segmenter's image network."""
        pixels = self.decode(x0)
        if self._segmenter is None:
            return pixels.mean()
        with self._rules.full_precision():
            return self._segmenter.look(pixels).mean()


def _build(name: str) -> Judge:
    with META:
        judge = _BUILD[name]()
    for network in judge.networks:
        network.eval().requires_grad_(False)
    return judge


def _clip(architecture: str) -> Judge:
    import open_clip

    clip = open_clip.CLIP(**open_clip.get_model_config(architecture))  # create_model would warn: no weights
    return Judge((clip,), clip.visual, lambda pixels: clip.encode_image(F.interpolate(pixels, clip.visual.image_size)))


def _blip() -> Judge:
    """ImageReward's: a ViT-L/16 at 224 pixels, and BERT base with attention to it (2304.05977)."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
            patch_size=16,
        )
    )  # fmt: skip
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, is_decoder=True,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    return Judge((vision, text), vision, lambda pixels: vision(F.interpolate(pixels, 224)).last_hidden_state)


def _pocket_clip() -> Judge:
    import copy

    from hypersd_bench.pocket import WEIGHTS
    from hypersd_bench.pocket.clip import load_clip

    with torch.device("cpu"):
        loaded = load_clip(WEIGHTS / "clip", WEIGHTS / "base" / "tokenizer", "cpu")
    clip: Any = copy.deepcopy(loaded.model).to(META)
    return Judge((clip,), clip.visual, lambda pixels: clip.encode_image(F.interpolate(pixels, clip.visual.image_size)))


def _pocket_segmenter() -> Judge:
    from hypersd_bench.pocket.segmenter import Solo

    solo = Solo()
    return Judge((solo,), solo, lambda pixels: sum(x.mean() for x in solo(pixels)))


def _mask_rcnn() -> Judge:
    """The backbone and its pyramid, by far the most of it; proposals and heads depend on what is seen."""
    from distill.rewards.mask_rcnn import detector

    model = detector()
    return Judge((model,), model.backbone, lambda pixels: sum(
        x.mean() for x in model.backbone(F.interpolate(pixels, DETECTOR_SIDE)).values()
    ))  # fmt: skip


_BUILD: dict[str, Callable[[], Judge]] = {
    "aesthetic/laion-v1": lambda: _clip("ViT-L-14-quickgelu"),
    "aesthetic/laion-v2": lambda: _clip("ViT-L-14-quickgelu"),
    "hps/v2.1": lambda: _clip("ViT-H-14"),
    "pick-score/v1": lambda: _clip("ViT-H-14"),
    "image-reward/v1": _blip,
    "aesthetic/pocket": _pocket_clip,
    "clip-score/pocket": _pocket_clip,
    "segmenter/pocket": _pocket_segmenter,
    "segmenter/mask-rcnn": _mask_rcnn,
}
