"""Pixels to latents and prompts to embeddings, exactly as a base's own pipeline does it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from distill.batch import Condition
from hypersd_bench.errors import InputError
from hypersd_bench.pipelines import Pipeline, encode_empty, encode_prompts, is_sdxl, pixel_size


@dataclass(frozen=True, slots=True)
class Embeddings:
    """text: (B, L, d) float32. pooled: (B, p) float32, for SDXL alone."""

    text: Tensor
    pooled: Tensor | None = None

    def rows(self, index: Tensor) -> Embeddings:
        """Some of the prompts, also the same one several times."""
        return Embeddings(self.text[index], None if self.pooled is None else self.pooled[index])

    def cpu(self) -> Embeddings:
        """The same in main memory."""
        return Embeddings(self.text.cpu(), None if self.pooled is None else self.pooled.cpu())


class Encoder:
    """The autoencoder and the text encoders of a Stable Diffusion 1.x or XL pipeline.

    An autoencoder whose configuration says ``force_upcast``, as SDXL's does, overflows in half precision: it is moved
    to float32 here and stays there.
    """

    def __init__(self, pipe: Pipeline, image_batch: int = 8, prompt_batch: int = 64) -> None:
        self.pipe = pipe
        self.device = torch.device(pipe.device)  # asked once: diffusers looks through all modules for it
        self.sdxl = is_sdxl(pipe)
        self.image_batch, self.prompt_batch = image_batch, prompt_batch
        self.too_long: set[str] = set()
        if pipe.vae.dtype != torch.float32 and pipe.vae.config.get("force_upcast", True):
            pipe.vae.to(torch.float32)
        side = pipe.unet.config.sample_size
        self.latent_shape: tuple[int, int, int] = (pipe.unet.config.in_channels, side, side)
        self.factor = int(pipe.vae_scale_factor)
        if pipe.vae.config.latent_channels != self.latent_shape[0]:
            raise InputError(
                f"the base's autoencoder gives {pipe.vae.config.latent_channels} channels, its UNet takes "
                f"{self.latent_shape[0]}; inpainting and editing models can't be distilled"
            )

    @property
    def resolution(self) -> int:
        """Pixels of a side of a square image at the base's size."""
        return pixel_size(self.pipe)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Encode (B, H, W, 3) uint8 pixels as the posterior's mean, scaled: (B, C, H/f, W/f) float32 on the device."""
        with torch.autocast(self.device.type, enabled=False):
            parts = [self._encode_part(part) for part in pixels.split(self.image_batch)]
        return torch.cat(parts)

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Embeddings:
        """Encode prompts; each distinct one once. Those above the token limit are noted in ``too_long``."""
        distinct = list(dict.fromkeys(texts))
        self._note_long(distinct)
        chunks = [distinct[i : i + self.prompt_batch] for i in range(0, len(distinct), self.prompt_batch)]
        with self._quiet():
            parts = [self._embed(chunk) for chunk in chunks]
        text = torch.cat([part.text for part in parts])
        pooled = [part.pooled for part in parts if part.pooled is not None]
        row = {prompt: i for i, prompt in enumerate(distinct)}
        index = torch.tensor([row[prompt] for prompt in texts], device=text.device)
        return Embeddings(text, torch.cat(pooled) if pooled else None).rows(index)

    @cached_property
    def empty(self) -> Embeddings:
        """What this base takes for no prompt, one row: zeros for SDXL (as configured), else the encoded empty text."""
        with torch.no_grad():
            encoded = encode_empty(self.pipe)
        return Embeddings(encoded.text.float(), None if encoded.pooled is None else encoded.pooled.float())

    def condition(self, embeddings: Embeddings, time_ids: Tensor) -> Condition:
        """Embeddings and size ids (B, 6) as the UNet's condition, on the device."""
        if not self.sdxl:
            return Condition(embeddings.text.to(self.device))
        assert embeddings.pooled is not None
        ids = time_ids.to(self.device, torch.float32)
        return Condition(embeddings.text.to(self.device), embeddings.pooled.to(self.device), ids)

    @cached_property
    def image_hash(self) -> str:
        """Hash of what turns pixels into latents."""
        config = {key: self.pipe.vae.config.get(key) for key in ("scaling_factor", "shift_factor", "latents_mean")}
        return weights_hash([self.pipe.vae], repr((config, self.pipe.vae.config.get("latents_std"))))

    @cached_property
    def prompt_hash(self) -> str:
        """Hash of what turns prompts into embeddings."""
        tokenizers = [self.pipe.tokenizer, *([self.pipe.tokenizer_2] if self.sdxl else [])]
        facts = [(sorted(t.get_vocab().items()), t.model_max_length, t.pad_token) for t in tokenizers]
        return weights_hash([self.pipe.text_encoder, *([self.pipe.text_encoder_2] if self.sdxl else [])], repr(facts))

    def _encode_part(self, pixels: Tensor) -> Tensor:
        vae, config = self.pipe.vae, self.pipe.vae.config
        x = pixels.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        z: Tensor = vae.encode(x.to(vae.dtype)).latent_dist.mode().float()
        scale = float(config.scaling_factor)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            return (z - _per_channel(mean, z)) * scale / _per_channel(std, z)
        return (z - float(config.get("shift_factor") or 0.0)) * scale

    def _embed(self, texts: list[str]) -> Embeddings:
        encoded = encode_prompts(self.pipe, texts)
        return Embeddings(encoded.text.float(), None if encoded.pooled is None else encoded.pooled.float())

    def _note_long(self, texts: list[str]) -> None:
        tokenizer = self.pipe.tokenizer
        limit = tokenizer.model_max_length
        # a token is at least a letter: most prompts need no second look
        doubtful = [text for text in texts if len(text) > limit - 2]
        if doubtful:
            lengths = [len(ids) for ids in tokenizer(doubtful, verbose=False).input_ids]
            self.too_long.update(text for text, length in zip(doubtful, lengths, strict=True) if length > limit)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keep the pipeline from printing every prompt it cuts: they are counted."""
        loggers = [logging.getLogger(type(self.pipe).__module__), logging.getLogger("transformers")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def weights_hash(models: Sequence[nn.Module], facts: str) -> str:
    """Hash of all weights, of their precision, and of further facts."""
    digest = hashlib.sha256(facts.encode())
    for model in models:
        for name, value in model.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float32)[None, :, None, None]
