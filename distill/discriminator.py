"""SDXL-Lightning's discriminator on the frozen teacher's own features (2402.13929, section 3.3).

The teacher's encoder and mid block (adapters off) give a feature map after every block; a small head on each looks at
it and gives a logit. Departures, both for a budget of minutes: the backbone stays frozen, where the paper trains it
too, and every encoder block has a head, where the paper has one on the mid block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from distill.roles import Roles

HEAD_WIDTH = 64  # ours
GROUPS = 8  # ours; the paper's 32 is for heads of 1280 channels


class Discriminator(nn.Module):
    """Logits of a latent x at time t given text, and given where it came from if ``conditional``.

    conditional: D(x_t, x_s, t, s, c), which must continue x_t. Otherwise D'(x_s, s, c), which only must look real; it
    removes the ghost images that come from having to.
    """

    def __init__(self, unet: UNet2DConditionModel, conditional: bool) -> None:
        super().__init__()
        self.conditional = conditional
        blocks = tuple(unet.config.block_out_channels)
        sizes = [max(1, int(unet.config.sample_size) // 2 ** min(i + 1, len(blocks) - 1)) for i in range(len(blocks))]
        self.heads = nn.ModuleList(
            head(width * (2 if conditional else 1), size)
            for width, size in zip((*blocks, blocks[-1]), (*sizes, sizes[-1]), strict=True)
        )

    def forward(self, features: Sequence[Tensor], origin: Sequence[Tensor] | None = None) -> Tensor:
        """Logits (B, number of heads) float32 of a latent's features, beside those of x_t if conditional."""
        maps = list(features)
        if self.conditional:
            assert origin is not None, "a conditional discriminator needs the features of x_t"
            maps = [torch.cat(pair, dim=1) for pair in zip(features, origin, strict=True)]
        return torch.cat([head(x).float() for head, x in zip(self.heads, maps, strict=True)], dim=1)


def head(channels: int, size: int) -> nn.Sequential:
    """4x4 convolutions of stride 2 with GroupNorm and SiLU down to a map of at most 2x2, then its mean logit."""
    layers: list[nn.Module] = []
    while size > 2:
        layers += [nn.Conv2d(channels, HEAD_WIDTH, 4, stride=2, padding=1), nn.GroupNorm(GROUPS, HEAD_WIDTH), nn.SiLU()]
        channels, size = HEAD_WIDTH, size // 2
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def teacher_features(roles: Roles, x: Tensor, t: Tensor, text: Tensor) -> list[Tensor]:
    """The teacher's feature maps of x (B, C, h, w) at t (B,): after every encoder block and after the mid block.

    Gradient flows to x when it asks for it, never to the teacher.
    """
    unet = roles.unet
    with roles.acting("teacher"):
        emb = unet.time_embedding(unet.get_time_embed(x, t))
        h = unet.conv_in(x)
        features = []
        for block in unet.down_blocks:
            if getattr(block, "has_cross_attention", False):
                h, _ = block(h, emb, encoder_hidden_states=text)
            else:
                h, _ = block(h, emb)
            features.append(h)
        h = unet.mid_block(h, emb, encoder_hidden_states=text)
    return [*features, h]
