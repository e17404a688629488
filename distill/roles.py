"""One frozen UNet, several roles: the teacher is the UNet with its adapters off, every other role is a LoRA adapter.

teacher    adapters off: the base to the bit
student    the only role that ever receives gradient, and the active one between calls
ema        running mean of the student, the target of consistency losses and what is exported
previous   a frozen copy of the student of the stage before (progressive distillation)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from distill.schedule import NoiseSchedule
from hypersd_bench.errors import InputError

Adapter = Literal["student", "ema", "previous"]
Role = Literal["teacher", "student", "ema", "previous"]

# The layers of LCM-LoRA 2311.05556 as diffusers trains it: attention, feed-forward, every convolution of the blocks.
TARGET_MODULES = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


class Roles:
    """The cast of a distillation: who is active, who gets gradient; plus the schedule they all live on.

    ``discriminator`` is the current stage's, if it has one.
    """

    def __init__(self, unet: UNet2DConditionModel, schedule: NoiseSchedule, rank: int, seed: int = 0) -> None:
        self.unet = unet.requires_grad_(False)
        self.schedule = schedule
        self.rank = rank
        self.discriminator: nn.Module | None = None
        self._layers: list[BaseTunerLayer] = []
        self._adapters: dict[Adapter, list[nn.Parameter]] = {}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.add("student")
        self.add("ema")

    def add(self, adapter: Adapter) -> None:
        """Add an adapter: the student equals the base, any other equals the student and is frozen."""
        config = LoraConfig(
            r=self.rank, lora_alpha=self.rank, target_modules=list(TARGET_MODULES), init_lora_weights="gaussian"
        )
        try:
            with warnings.catch_warnings():  # PEFT asks whether several adapters are meant: they are
                warnings.filterwarnings("ignore", message="Already found a `peft_config`", category=UserWarning)
                self.unet.add_adapter(config, adapter)
        except ValueError as error:
            raise InputError(f"the base's UNet can't take this LoRA: {error}") from error
        self._layers = [module for module in self.unet.modules() if isinstance(module, BaseTunerLayer)]
        self._adapters[adapter] = [p for name, p in self.unet.named_parameters() if f".{adapter}." in name]
        for layer in self._layers:
            layer.cast_input_dtype_enabled = False  # all weights are float32; under autocast the cast is a detour
        self._activate("student")
        self.copy("student", adapter)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters there are."""
        return tuple(self._adapters)

    @contextmanager
    def acting(self, role: Role) -> Iterator[None]:
        """Let ``role`` answer calls of the UNet inside the block; afterwards it is the student's turn again."""
        if role == "student":
            yield
            return
        self._activate(role)
        try:
            yield
        finally:
            self._activate("student")

    def predict(self, role: Role, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The noise a role sees in x (B, C, h, w) at t (B,) given text (B, L, d): (B, C, h, w) float32.

        Only the student's answer carries gradient.
        """
        with self.acting(role), torch.set_grad_enabled(role == "student" and torch.is_grad_enabled()):
            output = self.unet(x, t, encoder_hidden_states=text, return_dict=False)[0]
        return self.schedule.eps(output.float(), x, t)

    def guided(self, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, g: Tensor) -> Tensor:
        """The teacher's guided noise eps_u + g (eps_c - eps_u), both halves in one forward; g is (B,)."""
        both = torch.cat([empty.expand_as(text), text])
        eps_u, eps_c = self.predict("teacher", torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return eps_u + g.reshape(-1, 1, 1, 1) * (eps_c - eps_u)

    def parameters(self, adapter: Adapter) -> list[nn.Parameter]:
        """An adapter's parameters, always in the same order."""
        return self._adapters[adapter]

    @torch.no_grad()
    def copy(self, source: Adapter, target: Adapter) -> None:
        """Set the weights of one adapter to another's."""
        for a, b in zip(self.parameters(source), self.parameters(target), strict=True):
            b.copy_(a)

    @torch.no_grad()
    def update_ema(self, mu: float) -> None:
        """ema = mu ema + (1 - mu) student."""
        for average, value in zip(self.parameters("ema"), self.parameters("student"), strict=True):
            average.lerp_(value, 1 - mu)

    def state(self, adapter: Adapter) -> dict[str, Tensor]:
        """An adapter's weights under PEFT's names, as diffusers saves them."""
        state: dict[str, Tensor] = get_peft_model_state_dict(self.unet, adapter_name=adapter)
        return state

    def _activate(self, role: Role) -> None:
        """Switch through PEFT's layers; only an active student is trainable (PEFT would make any active one so)."""
        for layer in self._layers:
            if role == "teacher":
                layer.enable_adapters(False)
                continue
            if layer.disable_adapters:
                layer.enable_adapters(True)
            layer.set_adapter([role], inference_mode=role != "student")
