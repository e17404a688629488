"""SDXL-Lightning's discriminator on the teacher's own features (2402.13929, section 3.3).

The teacher's encoder and mid block give a feature map after every block; a small head on each looks at it and gives a
logit. Two departures: every encoder block has a head, where the paper has one on the mid block; and the backbone is
frozen or has a LoRA of its own (role ``backbone``), where the paper trains a whole copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from distill.batch import Condition
from distill.losses import discriminator_loss, generator_loss
from distill.presets import Preset
from distill.roles import Roles, precision
from distill.stages import Opponent

HEAD_WIDTH = 64  # ours
ADAM_BETAS = (0.0, 0.99)  # 2402.13929, section 4.1
GROUPS = 8  # ours; the paper's 32 is for heads of 1280 channels


class Discriminator(nn.Module):
    """Logits of a latent x at time t given text, and given where it came from if ``conditional``.

    conditional: D(x_t, x_s, t, s, c), which must continue x_t. Otherwise D'(x_s, s, c), which only must look real; it
    removes the ghost images that come from having to. backbone: the role whose features it reads.
    """

    def __init__(self, roles: Roles, conditional: bool, backbone: Literal["teacher", "backbone"] = "teacher") -> None:
        super().__init__()
        self.conditional, self.backbone = conditional, backbone
        config = roles.unet.config
        blocks = tuple(config.block_out_channels)
        sizes = [max(1, int(config.sample_size) // 2 ** min(i + 1, len(blocks) - 1)) for i in range(len(blocks))]
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
        return torch.cat([head(x.float()).float() for head, x in zip(self.heads, maps, strict=True)], dim=1)


class Match(NamedTuple):
    """Both players' losses of one batch, scalars, and the mean probabilities they give real and fake."""

    generator: Tensor
    discriminator: Tensor
    logs: dict[str, Tensor]


def play(
    roles: Roles, real: Tensor, fake: Tensor, s: Tensor, cond: Condition, origin: tuple[Tensor, Tensor] | None = None
) -> Match:
    """Let the stage's discriminator tell real from fake latents (B, C, h, w) at s (B,).

    origin: (x_t, t) that both were reached from; a discriminator that is not conditional does not look. Gradient of
    the generator's loss flows into ``fake``, that of the discriminator's into its heads, and its backbone if trained.
    """
    discriminator = roles.discriminator
    assert isinstance(discriminator, Discriminator)
    trained = discriminator.backbone == "backbone"
    s = s.clamp(min=0)  # the backbone has no name for the clean end

    def look(x: Tensor, t: Tensor, grad: bool) -> list[Tensor]:
        with torch.set_grad_enabled(grad):
            return features(roles, discriminator.backbone, x, t, cond)

    with frozen(discriminator, roles):
        source = look(*origin, grad=False) if origin and discriminator.conditional else None
        seen = look(fake, s, grad=True)
        generator = generator_loss(discriminator(seen, source))
    if trained:
        seen = look(fake.detach(), s, grad=True)
        source = look(*origin, grad=True) if origin and discriminator.conditional else None
    real_logits = discriminator(look(real, s, grad=trained), source)
    fake_logits = discriminator([x if trained else x.detach() for x in seen], source)
    logs = {"p_real": real_logits.detach().sigmoid().mean(), "p_fake": fake_logits.detach().sigmoid().mean()}
    return Match(generator, discriminator_loss(real_logits, fake_logits), logs)


def opponent(preset: Preset, conditional: bool) -> Opponent:
    """A stage's discriminator, with the preset's rate and backbone."""
    trained = preset.discriminator_backbone == "trained"
    return Opponent(
        name="discriminator",
        learning_rate=preset.discriminator_learning_rate,
        betas=ADAM_BETAS,
        make=partial(Discriminator, conditional=conditional, backbone="backbone" if trained else "teacher"),
        role="backbone" if trained else None,
    )


def head(channels: int, size: int) -> nn.Sequential:
    """4x4 convolutions of stride 2 with GroupNorm and SiLU down to a map of at most 2x2, then its mean logit."""
    layers: list[nn.Module] = []
    while size > 2:
        layers += [nn.Conv2d(channels, HEAD_WIDTH, 4, stride=2, padding=1), nn.GroupNorm(GROUPS, HEAD_WIDTH), nn.SiLU()]
        channels, size = HEAD_WIDTH, size // 2
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def features(roles: Roles, role: Literal["teacher", "backbone"], x: Tensor, t: Tensor, cond: Condition) -> list[Tensor]:
    """The feature maps of x (B, C, h, w) at t (B,): after every encoder block and after the mid block.

    Gradient flows to x when it asks for it, never to the teacher.
    """
    with roles.acting(role) as unet:
        x = x.to(precision(unet))
        told = cond.cast(precision(unet)).arguments
        emb = unet.time_embedding(unet.get_time_embed(x, t))
        added = unet.get_aug_embed(emb, **{"added_cond_kwargs": {}, **told})
        emb = emb if added is None else emb + added
        h = unet.conv_in(x)
        maps = []
        for block in unet.down_blocks:
            if getattr(block, "has_cross_attention", False):
                h, _ = block(h, emb, encoder_hidden_states=told["encoder_hidden_states"])
            else:
                h, _ = block(h, emb)
            maps.append(h)
        h = unet.mid_block(h, emb, encoder_hidden_states=told["encoder_hidden_states"])
    return [*maps, h]


@contextmanager
def frozen(discriminator: Discriminator, roles: Roles) -> Iterator[None]:
    """Inside the block the discriminator's parameters take no gradient; what flows through it still does."""
    with roles.frozen("backbone"):
        discriminator.requires_grad_(False)
        try:
            yield
        finally:
            discriminator.requires_grad_(True)
