"""One frozen UNet, several roles: the teacher is the UNet with its adapters off, the others are LoRA adapters on it.

teacher    adapters off: the base to the bit
student    what a stage trains, and the active role between calls
ema        running mean of what is trained: the target of consistency losses, and what is exported
previous   a frozen copy of the student of the stage before (progressive distillation)
older      what ``previous`` was before that (its skip-level teacher)
critic     the fake score of distribution matching, a model of what the student makes
feedback   human feedback's own LoRA: while it is trained, the student is the frozen student plus this
backbone   the discriminator's own view of the teacher's features, where its backbone is trained too

A full-weights student (``kind="unet"``) and its ema, previous and older are UNets of their own; teacher, critic and
backbone still share the base. A role is entered through ``acting`` and left by the end of its block.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.batch import Condition, join
from distill.schedule import NoiseSchedule
from distill.sharding import shard, whole
from hypersd_bench.errors import InputError

Adapter = Literal["student", "ema", "previous", "older", "critic", "feedback", "backbone"]
Role = Literal["teacher", "student", "ema", "previous", "older", "critic", "backbone"]
Kind = Literal["lora", "unet"]

# The layers of LCM-LoRA 2311.05556 as diffusers trains it: attention, feed-forward, every convolution of the blocks.
TARGET_MODULES = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
OWN_WEIGHTS = ("student", "ema", "previous", "older")  # the roles that are UNets of their own when the student is one
GUIDANCE_DIM = 256  # 2310.04378, appendix: width of the embedding of w


@dataclass
class _Member:
    """Who answers for a role: a UNet under some of its adapters; none of them is the bare UNet."""

    unet: UNet2DConditionModel
    adapters: tuple[str, ...] = ()


class Roles:
    """The cast of a distillation: who is active, who gets gradient; plus the schedule they all live on.

    ``discriminator`` and ``feedback`` are the current stage's, if it has them. ``student_predicts`` is what the output
    of student and ema means in it, None for the base's prediction type.
    """

    def __init__(
        self, unet: UNet2DConditionModel, schedule: NoiseSchedule, rank: int, seed: int = 0, *,
        kind: Kind = "lora", embeds_guidance: bool = False,
    ) -> None:  # fmt: skip
        self.unet = unet.requires_grad_(False)
        self.schedule, self.rank, self.kind, self._seed = schedule, rank, kind, seed
        self.embeds_guidance = embeds_guidance
        self.discriminator: nn.Module | None = None
        self.feedback: Any = None
        self.student_predicts: str | None = None
        self.checkpointing = False
        self.sharded = False
        self._layers: list[BaseTunerLayer] = []
        self._parameters: dict[Adapter, list[nn.Parameter]] = {}
        self._members: dict[Role, _Member] = {"teacher": _Member(self.unet)}
        self._active: Role = "student"
        self._taking: tuple[Adapter, ...] = ()
        if embeds_guidance and kind == "lora":
            raise InputError(
                "a LoRA can't add an embedding of guidance to the UNet; train full weights: --student unet"
            )
        for adapter in ("student", "ema"):
            self.add(adapter)
        self.train("student")

    def add(self, adapter: Adapter) -> None:
        """Add a role that equals the base; it takes no gradient until ``train`` says so."""
        if self.kind == "unet" and adapter in OWN_WEIGHTS:
            unet = _with_guidance_embedding(self.unet) if self.embeds_guidance else copy.deepcopy(self._bare_unet)
            unet.requires_grad_(False)
            for parameter in unet.parameters():
                parameter.data = parameter.data.float()  # also of a half-precision base: Adam needs the mantissa
            self._members[adapter] = _Member(unet)  # type: ignore[index]  # OWN_WEIGHTS are roles
            self._parameters[adapter] = list(unet.parameters())
        else:
            self._add_lora(adapter)
        if self.checkpointing:
            self.enable_checkpointing()

    def _add_lora(self, adapter: Adapter) -> None:
        config = LoraConfig(
            r=self.rank, lora_alpha=self.rank, target_modules=list(TARGET_MODULES), init_lora_weights="gaussian"
        )
        if not self._layers:
            _check_rank(self.unet, self.rank)
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(_cuda_devices(self.unet)):
                torch.manual_seed(self._seed)
                # PEFT asks whether several adapters are meant: they are
                warnings.filterwarnings("ignore", message="Already found a `peft_config`", category=UserWarning)
                self.unet.add_adapter(config, adapter)
        except ValueError as error:
            raise InputError(f"the base's UNet can't take this LoRA: {error}") from error
        self._layers = [module for module in self.unet.modules() if isinstance(module, BaseTunerLayer)]
        named = [(name, p) for name, p in self.unet.named_parameters() if f".{adapter}." in name]
        self._parameters[adapter] = [parameter for _, parameter in named]
        self._is_b = [".lora_B." in name for name, _ in named]
        for parameter in self._parameters[adapter]:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.float()  # also on a half-precision base: Adam needs the mantissa
        for layer in self._layers:
            layer.cast_input_dtype_enabled = False  # autocast does it; PEFT's own cast is a detour
        if adapter != "feedback":
            self._members[adapter] = _Member(self.unet, (adapter,))
        self._activate(self._active)

    @property
    def _bare_unet(self) -> UNet2DConditionModel:
        assert not self._layers, "own weights are added before the first adapter"
        return self.unet

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The roles with weights of their own, adapters or UNets."""
        return tuple(self._parameters)

    def train(self, trained: Literal["student", "feedback"], *others: Adapter) -> None:
        """Let the student's weights, or its feedback LoRA's, take gradient, and others' beside it; nobody else's.

        With ``feedback`` the roles student and ema become the frozen student plus the LoRA and plus its mean.
        """
        self.trained: Adapter = trained
        if self.kind == "lora":
            beside = ("student",) if trained == "feedback" else ()
            self._members["student"] = _Member(self.unet, (*beside, trained))
            self._members["ema"] = _Member(self.unet, (*beside, "ema"))
        self._take((trained, *others))
        self._activate("student")

    @contextmanager
    def frozen(self, adapter: Adapter) -> Iterator[None]:
        """Inside the block a role's weights take no gradient; what flows through them still does."""
        before = self._taking
        self._take(tuple(each for each in before if each != adapter))
        try:
            yield
        finally:
            self._take(before)

    def _take(self, adapters: tuple[Adapter, ...]) -> None:
        """Let these roles' weights take gradient and nobody else's."""
        self._taking = adapters
        for adapter, parameters in self._parameters.items():
            for parameter in parameters:
                parameter.requires_grad_(adapter in adapters)
        if "feedback" in adapters:
            for parameter, _, is_b in self._feedback_rows():
                parameter.requires_grad_(is_b)

    @contextmanager
    def acting(self, role: Role) -> Iterator[UNet2DConditionModel]:
        """Let ``role`` answer inside the block, through the UNet that is given; then whoever did before."""
        before = self._active
        self._activate(role)
        try:
            yield self._members[role].unet
        finally:
            self._activate(before)

    def predict(
        self, role: Role, x: Tensor, t: Tensor, cond: Condition, *, grad: bool | None = None, w: Tensor | None = None
    ) -> Tensor:
        """The noise a role sees in x (B, C, h, w) at t (B,) under a condition of B rows: (B, C, h, w) float32.

        Only the student's answer carries gradient, unless ``grad`` says otherwise. w: (B,), for UNets that embed it.
        """
        wanted = torch.is_grad_enabled() and (role == "student" if grad is None else grad)
        embedded = None if w is None else guidance_embedding(w).to(x.dtype)
        with self.acting(role) as unet, torch.set_grad_enabled(wanted):
            output = unet(
                x.to(precision(unet)),
                t,
                timestep_cond=embedded,
                return_dict=False,
                **cond.cast(precision(unet)).arguments,
            )[0]
        return self.schedule.eps(output.float(), x, t, self.predicts(role))

    def predicts(self, role: Role) -> str:
        """What a role's output means, in diffusers' words."""
        own = self.student_predicts if role in ("student", "ema") else None
        return own or self.schedule.prediction_type

    def guided(self, x: Tensor, t: Tensor, cond: Condition, uncond: Condition, g: Tensor) -> Tensor:
        """The teacher's guided noise eps_u + g (eps_c - eps_u), both halves in one forward; g is (B,)."""
        both = join(replace(uncond.expand(len(x)), time_ids=cond.time_ids), cond)
        eps_u, eps_c = self.predict("teacher", torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return eps_u + g.reshape(-1, 1, 1, 1) * (eps_c - eps_u)

    def parameters(self, adapter: Adapter) -> list[nn.Parameter]:
        """A role's own parameters, always in the same order."""
        return self._parameters[adapter]

    def trainable(self, adapter: Adapter) -> list[nn.Parameter]:
        """Those of a role's parameters that take gradient."""
        return [parameter for parameter in self.parameters(adapter) if parameter.requires_grad]

    @torch.no_grad()
    def copy(self, source: Adapter, target: Adapter) -> None:
        """Set the weights of one role to another's."""
        for a, b in zip(self.parameters(source), self.parameters(target), strict=True):
            b.copy_(a)

    @torch.no_grad()
    def reset(self, adapter: Adapter) -> None:
        """Make an adapter equal to no adapter again: a new A, B = 0."""
        with torch.random.fork_rng(_cuda_devices(self.unet)):
            torch.manual_seed(self._seed)
            for layer in self._layers:
                layer.reset_lora_parameters(adapter, "gaussian")

    @torch.no_grad()
    def start_feedback(self) -> None:
        """Make the feedback LoRA nothing again: the student's own A, which stays frozen, and B = 0.

        The sum of two LoRAs of rank r has rank 2 r, unless they share their A. So the merge is exact, and its file as
        large as any other method's.
        """
        for ours, students, is_b in self._feedback_rows():
            ours.zero_() if is_b else ours.copy_(students)

    @torch.no_grad()
    def merge_feedback(self, ratio: float) -> None:
        """Make the EMA of the feedback LoRA the student plus ``ratio`` times it; the student stays as it is."""
        rows = zip(self.parameters("ema"), self.parameters("student"), self._is_b, strict=True)
        for ema, student, is_b in rows:
            if is_b:
                ema.mul_(ratio).add_(student)
        self.train("student")

    def _feedback_rows(self) -> Iterator[tuple[nn.Parameter, nn.Parameter, bool]]:
        return zip(self.parameters("feedback"), self.parameters("student"), self._is_b, strict=True)

    @torch.no_grad()
    def update_ema(self, mu: float) -> None:
        """ema = mu ema + (1 - mu) of what is trained."""
        torch._foreach_lerp_([*self.parameters("ema")], [*self.parameters(self.trained)], 1 - mu)

    def state(self, adapter: Adapter) -> dict[str, Tensor]:
        """A role's weights: a LoRA under PEFT's names, as diffusers saves it, or a whole UNet's."""
        if self.kind == "unet" and adapter in OWN_WEIGHTS:
            whole: dict[str, Tensor] = self.network(adapter).state_dict()  # type: ignore[arg-type]  # as above
            return whole
        lora: dict[str, Tensor] = get_peft_model_state_dict(self.unet, adapter_name=adapter)
        return lora

    def network(self, role: Role) -> UNet2DConditionModel:
        """The UNet that answers for a role."""
        return self._members[role].unet

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass, under the role that was active in the forward pass."""
        self.checkpointing = True

        def recomputed(module: nn.Module, *inputs: Any) -> Any:
            role, taking = self._active, self._taking  # the backward pass comes when others may be active and trained

            def run(*again: Any) -> Any:
                now = self._taking
                if now != taking:
                    self._take(taking)
                try:
                    with self.acting(role):
                        return module(*again)
                finally:
                    if now != taking:
                        self._take(now)

            return checkpoint(run, *inputs, use_reentrant=False)

        for unet in {id(member.unet): member.unet for member in self._members.values()}.values():
            unet.enable_gradient_checkpointing(recomputed)

    def shard(self) -> None:
        """Spread the UNets that are roles' own over the processes; those that share the base stay whole."""
        for adapter in [each for each in self.adapters if each in OWN_WEIGHTS]:
            unet = self.network(adapter)  # type: ignore[arg-type]  # OWN_WEIGHTS are roles
            shard(unet)
            self._parameters[adapter] = list(unet.parameters())
        self.sharded = True
        self._take(self._taking)

    @contextmanager
    def gathered(self, role: Role) -> Iterator[None]:
        """Inside the block a plain UNet of the gathered weights answers for a role, for a process that works alone.

        All processes must enter it.
        """
        if not self.sharded:
            yield
            return
        sharded = self._members[role]
        plain = UNet2DConditionModel.from_config(sharded.unet.config)
        plain.load_state_dict(whole(dict(sharded.unet.state_dict())))
        plain.set_attn_processor(next(iter(self.unet.attn_processors.values())))
        self._members[role] = _Member(plain.to(self.unet.device).eval().requires_grad_(False))
        try:
            yield
        finally:
            self._members[role] = sharded

    def compile(self) -> None:
        """Compile every UNet; one graph for each role."""
        for unet in {id(member.unet): member.unet for member in self._members.values()}.values():
            unet.compile(dynamic=False)

    def _activate(self, role: Role) -> None:
        """Switch by PEFT's own two fields: its methods would also decide who is trainable, and that is ``train``'s."""
        self._active = role
        member = self._members.get(role)
        if member is None or member.unet is not self.unet:
            return
        for layer in self._layers:
            layer._disable_adapters = not member.adapters
            layer._active_adapter = list(member.adapters)


def precision(unet: UNet2DConditionModel) -> torch.dtype:
    """A UNet's precision, at once: its own ``dtype`` walks all parameters, at every call."""
    dtype: torch.dtype = unet.conv_in.weight.dtype
    return dtype


def guidance_embedding(w: Tensor) -> Tensor:
    """LCM's sinusoidal embedding of 1000 w for w (B,): (B, 256) float32 (2310.04378, appendix; sines first)."""
    half = GUIDANCE_DIM // 2
    frequencies = torch.exp(-torch.arange(half, device=w.device) * (torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000 * w.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _with_guidance_embedding(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy that also takes an embedding of w; it starts as the original, for the new layer gives zero."""
    config = {name: value for name, value in unet.config.items() if name != "_use_default_values"}  # it would win
    wider: UNet2DConditionModel = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": GUIDANCE_DIM})
    missing, unexpected = wider.load_state_dict(unet.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"]
    assert not unexpected
    nn.init.zeros_(wider.time_embedding.cond_proj.weight)
    wider.set_attn_processor(next(iter(unet.attn_processors.values())))
    return wider.to(unet.device).eval()


def _check_rank(unet: nn.Module, rank: int) -> None:
    """Raise InputError naming the narrowest layer when a LoRA of this rank would be wider than it."""
    widths = {
        name: min(module.weight.shape[:2])
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(TARGET_MODULES)
    }
    name = min(widths, key=lambda name: widths[name], default=None)
    if name is None:
        raise InputError("the base's UNet has no layer that these LoRAs go on (attention, convolutions)")
    if rank > widths[name]:
        raise InputError(f"a LoRA of rank {rank} is larger than the base's layer {name}, which has {widths[name]} "
                         f"channels; choose a rank of at most {widths[name]}")  # fmt: skip


def _cuda_devices(unet: UNet2DConditionModel) -> list[torch.device]:
    return [unet.device] if unet.device.type == "cuda" else []
