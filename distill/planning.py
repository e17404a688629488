"""What a distillation will take, before it starts: memory and time of every stage, size of the caches.

Nothing is kept by hand that could go stale: every stage's own losses run, forward and backward, on the meta device at
the preset's sizes, under a meter of FLOPs and live memory (metering.py). Only configuration files are read.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from torch import Tensor, nn

from distill.architectures import Architecture, find_architecture
from distill.batch import Batch, Condition
from distill.judges_on_meta import Judges
from distill.metering import META, CudaRules, Meter, Record, Replayed
from distill.presets import Preset
from distill.roles import Adapter, Role, Roles
from distill.schedule import NoiseSchedule
from distill.sources.sizes import predicted_bytes
from distill.stages import LossFunction, Stage, wanted_roles
from hypersd_bench import registry
from hypersd_bench.errors import unknown_name
from hypersd_bench.pocket.training import fast_bf16

GIB = 2**30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Memory in GiB and dense half-precision TFLOP/s with float32 accumulation, from the makers' data sheets.
GPUS = {"rtx-4090": (24, 165.2), "a100-40gb": (40, 312.0), "a100-80gb": (80, 312.0), "h100": (80, 989.4)}
UTILISATION = {"cuda": 0.4, "cpu": 0.5}  # assumed, of the peak and of a large matrix product
CONTEXT_BYTES = int(0.6 * GIB)  # assumed: CUDA's context and kernels, outside PyTorch's own count
FRAGMENTATION = 0.05  # assumed: freed memory that is in pieces too small
DRAWS = 4  # of a stage's losses, whose rollouts are of random length
UNSAID_SAMPLES = 100_000  # images that the cache sizes are stated for where a preset doesn't say
# Measured: 0.5 % and, with checkpointing, 3.4 %: pytest tests/unit/test_distill_planning.py -k peak -s
ERROR_ON_MINIATURE = 0.05


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on the device while a stage trains, on each process.

    adapters: every role's own weights. gradients and optimizer: of who is trained. activations: all that lives for
    the step alone, at its highest. reserve: CUDA's context and fragmentation, assumed.
    """

    base: int
    autoencoder: int
    text_encoders: int
    adapters: int
    discriminator: int
    rewards: int
    gradients: int
    optimizer: int
    activations: int
    reserve: int

    @property
    def peak(self) -> int:
        """What PyTorch will have allocated at most (``torch.cuda.max_memory_allocated``)."""
        parts: dict[str, int] = asdict(self)
        return sum(parts.values()) - self.reserve

    @property
    def total(self) -> int:
        """What the device must have."""
        return self.peak + self.reserve


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage. flops: of one image seen, opponents and practice included. seconds: None where speed is unknown."""

    name: str
    images: int
    micro_batch: int
    memory: StageMemory
    flops: int
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class DistillPlan:
    """A distillation before it starts. parameters: how many weights each part has, by name."""

    method: str
    base: str
    preset: str
    device: str
    precision: str
    device_bytes: int | None
    tflops: float | None
    utilisation: float
    parameters: dict[str, int]
    stages: tuple[StagePlan, ...]
    cached_samples: int
    latents_bytes: int
    prompts_bytes: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """Training time of all stages."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if len(known) == len(self.stages) else None

    def to_json(self) -> dict[str, Any]:
        """Everything, with the sums."""
        stages = [
            {
                **asdict(stage),
                "memory": {**asdict(stage.memory), "peak": stage.memory.peak, "total": stage.memory.total},
            }
            for stage in self.stages
        ]
        return {**asdict(self), "stages": stages, "seconds": self.seconds}


@dataclass(frozen=True)
class Device:
    """Where the run is to be. kind: ``cpu`` or ``cuda``. memory: bytes. tflops: of large matrix products."""

    name: str
    kind: str
    memory: int | None
    tflops: float | None


def make_plan(
    method: str, base: str, preset: Preset, device: str = "cpu", *, tflops: float | None = None,
    samples: int | None = None,
) -> DistillPlan:  # fmt: skip
    """Plan a distillation on ``cpu``, ``cuda`` or a card of ``GPUS``, which need not be in this machine.

    tflops: the device's speed, instead of a measurement or the table. samples: of the caches.
    """
    where = find_device(device, preset, tflops)
    architecture = find_architecture(base)
    stages: tuple[Stage, ...] = registry.resolve("method", method)().stages(preset)
    bench = _Bench(architecture, preset, stages, where.kind)
    planned = tuple(bench.plan(stage, where) for stage in stages)
    count = samples or (preset.scenes if base == "pocket" else UNSAID_SAMPLES)
    caches = predicted_bytes(count, count, architecture.encoded(preset.resolution))
    return DistillPlan(
        method=method, base=base, preset=preset.name, device=where.name, precision=preset.precision,
        device_bytes=where.memory, tflops=where.tflops, utilisation=UTILISATION[where.kind],
        parameters=bench.parameters(), stages=planned, cached_samples=count, latents_bytes=caches.latents,
        prompts_bytes=caches.prompts, warnings=tuple(_warnings(planned, where, preset)),
        notes=tuple(_notes(bench, where, base, tflops)),
    )  # fmt: skip


def find_device(name: str, preset: Preset, tflops: float | None = None) -> Device:
    """A device by name, with its memory and speed as far as they are known here."""
    if name == "cpu":
        dtype = torch.bfloat16 if fast_bf16(torch.device("cpu")) else torch.float32
        return Device(
            "cpu",
            "cpu",
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            tflops or measure_tflops("cpu", dtype),
        )
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            return Device(f"{name} (none here)", "cuda", None, tflops)
        properties = torch.cuda.get_device_properties(torch.device(name))
        dtype = torch.bfloat16 if preset.precision == "fp32" else DTYPES[preset.precision]
        return Device(properties.name, "cuda", properties.total_memory, tflops or measure_tflops(name, dtype))
    if name not in GPUS:
        raise unknown_name("device", name, ["cpu", "cuda", *GPUS])
    memory, peak = GPUS[name]
    return Device(name, "cuda", memory * GIB, tflops or peak)


def measure_tflops(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product on this device, the best of five."""
    side = 1024 if device == "cpu" else 8192
    a = torch.randn(side, side, device=device).to(dtype)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e12


class _Bench:
    """A run's cast and batch on the meta device, on which each stage's losses are run and measured."""

    def __init__(self, architecture: Architecture, preset: Preset, stages: Sequence[Stage], kind: str) -> None:
        self.preset, self.kind = preset, kind
        self.dtype = DTYPES[preset.precision]
        half = self.dtype if self.dtype != torch.float32 else torch.bfloat16
        self.rules = CudaRules(half if kind == "cuda" or fast_bf16(torch.device("cpu")) else None)
        self.micro_batch = preset.batch_size // preset.accumulate
        parts = architecture.parts
        with META:
            unet = _Unet.from_config(dict(parts["unet"]))
            unet.stated_dtype = self.dtype
            nn.Module.to(unet, self.dtype).eval()
            self.vae = AutoencoderKL.from_config(dict(parts["vae"])).eval().requires_grad_(False)
        if not parts["vae"].get("force_upcast", True):
            self.vae.to(self.dtype)
        if kind == "cpu":
            unet.set_attn_processor(AttnProcessor())  # as pipelines.load_base
        self.text_encoders = [_text_encoder(config) for config in architecture.text_encoders]
        self.base_parameters = list(unet.parameters())
        schedule = NoiseSchedule.from_config(parts["scheduler"], set_alpha_to_one=True, device="meta")
        self.roles = self._cast(unet, schedule, stages)
        self.batch = _batch(architecture, preset, self.micro_batch)
        self.meter = Meter()
        self.unknown_judges: list[str] = []
        self.judged = any(stage.rewards for stage in stages)
        self.records: dict[Hashable, Record] = {}
        for network in {id(m): m for m in map(self.roles.network, self.roles._members)}.values():
            for name, block in _blocks(network):
                block.forward = Replayed(block, name, self.meter, self.records, self._who)
        self.vae.decoder.forward = Replayed(self.vae.decoder, "decoder", self.meter, self.records)
        self._resident = _resident(self)
        self._judges: dict[tuple[str, ...], Judges] = {}

    def _cast(self, unet: UNet2DConditionModel, schedule: NoiseSchedule, stages: Sequence[Stage]) -> Roles:
        with META:
            roles = _QuickRoles(
                unet, schedule, self.preset.rank, kind=self.preset.student,
                embeds_guidance=any(stage.embeds_guidance for stage in stages),
            )  # fmt: skip
            roles.rules = self.rules
            for adapter in wanted_roles(stages):
                roles.add(adapter)
        for network in map(roles.network, roles._members):
            if isinstance(network, _Unet):
                network.stated_dtype = next(network.parameters()).dtype  # a student of its own is in float32
        if self.preset.gradient_checkpointing:
            roles.enable_checkpointing()
        return roles

    def _who(self) -> tuple[Hashable, bool]:
        """How many adapters answer, and whether any weights of who answers are trained."""
        roles = self.roles
        adapters = roles._members[roles._active].adapters
        owned: Iterable[Any] = adapters or ((roles._active,) if roles._active in roles.adapters else ())
        trained = any(p.requires_grad for name in owned for p in roles.parameters(name)[:2])  # feedback's A is not
        return len(adapters), trained

    def parameters(self) -> dict[str, int]:
        """How many weights each part has."""
        counts = {"unet": _count(self.base_parameters), "autoencoder": _count(self.vae.parameters())}
        counts["text encoders"] = sum(_count(encoder.parameters()) for encoder in self.text_encoders)
        return counts | {name: _count(self.roles.parameters(name)) for name in self.roles.adapters}

    def plan(self, stage: Stage, where: Device) -> StagePlan:
        """Measure a stage."""
        roles = self.roles
        roles.train(stage.trains, *(opponent.role for opponent in stage.opponents if opponent.role))
        judges = self._judges_of(stage)
        roles.feedback, roles.discriminator = judges, None
        for opponent in stage.opponents:
            if opponent.make is not None:
                with META:
                    roles.discriminator = opponent.make(roles)
        heads = list(roles.discriminator.parameters()) if roles.discriminator else []
        trained = [*roles.parameters(stage.trains), *heads]
        trained += [p for opponent in stage.opponents if opponent.role for p in roles.parameters(opponent.role)]
        trained = [parameter for parameter in trained if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        activations, flops = self._measure(stage.losses, trained)
        if stage.practice is not None and stage.practice_steps:
            more, practice = self._measure(stage.practice, trained)
            activations, flops = max(activations, more), flops + stage.practice_steps * practice
        for parameter in trained:
            parameter.grad = None
        if judges is not None:
            self.unknown_judges += judges.unknown
        memory = self._memory(trained, heads, judges, activations)
        flops //= self.micro_batch
        speed = where.tflops and where.tflops * 1e12 * UTILISATION[where.kind]
        return StagePlan(
            name=stage.name, images=stage.images, micro_batch=self.micro_batch, memory=memory, flops=flops,
            seconds=flops * stage.images / speed if speed else None,
        )  # fmt: skip

    def _judges_of(self, stage: Stage) -> Judges | None:
        if stage.rewards and stage.rewards not in self._judges:
            judges = Judges(self.vae, self.rules, self.preset, stage.rewards)
            for i, network in enumerate(judges.seeing()):
                network.forward = Replayed(network, f"judge{len(self._judges)}-{i}", self.meter, self.records)
            self._judges[stage.rewards] = judges
        return self._judges[stage.rewards] if stage.rewards else None

    def _memory(self, trained: list[Any], heads: list[Any], judges: Judges | None, activations: int) -> StageMemory:
        adapters = [p for name in self.roles.adapters for p in self.roles.parameters(name)]
        parts = {
            "base": _bytes(self.base_parameters),
            "autoencoder": _bytes(self.vae.parameters()),
            "text_encoders": sum(_count(encoder.parameters()) * self.dtype.itemsize for encoder in self.text_encoders),
            "adapters": _bytes(adapters),
            "discriminator": _bytes(heads),
            "rewards": _bytes(judges.parameters()) if judges else 0,
            "gradients": _bytes(trained),
            "optimizer": 2 * _bytes(trained),  # Adam's moments
            "activations": activations,
        }
        reserve = CONTEXT_BYTES + int(FRAGMENTATION * sum(parts.values())) if self.kind == "cuda" else 0
        return StageMemory(**parts, reserve=reserve)

    def _measure(self, function: LossFunction, trained: list[Any]) -> tuple[int, int]:
        """Highest bytes and mean FLOPs of a function's losses and their backward passes (a few draws)."""
        own = [*trained, *(p.grad for p in trained)]
        own += self.roles.feedback.parameters() if self.roles.feedback else []
        peak, counts = 0, [0]
        for draw in range(DRAWS):
            self.meter.reset([*self._resident, *own])
            with self.rules, self.meter:
                losses = function(self.batch, self.roles, torch.Generator().manual_seed(draw))
                learners = [loss for loss in (losses.student, *losses.opponents.values()) if loss is not None]
                for loss in learners:
                    loss.backward()
            peak = max(peak, self.meter.peak)
            counts = [self.meter.flops] if draw == 0 else [*counts, self.meter.flops]
            del losses, learners
            if draw == 1 and len(set(counts)) == 1:
                break
        return peak, sum(counts) // len(counts)


class _Unet(UNet2DConditionModel):  # type: ignore[misc]  # diffusers has no types
    """A UNet that knows its precision without a search through all its weights, which takes longer than the rest."""

    stated_dtype = torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """Its precision."""
        return self.stated_dtype


class _QuickRoles(Roles):
    """The same roles; adapters after the first are put on the known layers, without PEFT's search for them."""

    rules: CudaRules

    @contextmanager
    def acting(self, role: Role) -> Iterator[UNet2DConditionModel]:
        """As ever; PyTorch leaves function modes in a backward pass, and a recomputation there must be under them."""
        with super().acting(role) as unet, nullcontext() if torch._C._len_torch_function_stack() else self.rules:
            yield unet

    def _add_lora(self, adapter: Adapter) -> None:
        if not self._layers:
            super()._add_lora(adapter)
            return
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, init_lora_weights="gaussian")
        for layer in self._layers:
            layer.update_layer(adapter, self.rank, lora_alpha=self.rank, config=config)
        self._parameters[adapter] = [p for name, p in self.unet.named_parameters() if f".{adapter}." in name]
        for parameter in self._parameters[adapter]:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.float()
        if adapter != "feedback":
            self._members[adapter] = type(self._members["teacher"])(self.unet, (adapter,))
        self._activate(self._active)


def _resident(bench: _Bench) -> list[Tensor]:
    """All tensors that are there before any step."""
    networks = {id(m): m for m in map(bench.roles.network, bench.roles._members)}.values()
    held = [tensor for module in (*networks, bench.vae) for tensor in (*module.parameters(), *module.buffers())]
    schedule, batch = bench.roles.schedule, bench.batch
    conditions = [value for cond in (batch.cond, batch.uncond) for value in (cond.text, cond.pooled, cond.time_ids)]
    held += [schedule.alphas, schedule.sigmas, batch.latents, *(value for value in conditions if value is not None)]
    return held


def _blocks(unet: UNet2DConditionModel) -> list[tuple[str, nn.Module]]:
    named = [(f"down{i}", block) for i, block in enumerate(unet.down_blocks)]
    named += [(f"up{i}", block) for i, block in enumerate(unet.up_blocks)]
    return [*named, ("mid", unet.mid_block)]


def _batch(architecture: Architecture, preset: Preset, size: int) -> Batch:
    shape = architecture.encoded(preset.resolution)
    empty = partial(torch.empty, device=META)

    def condition(rows: int) -> Condition:
        if not shape.pooled_width:
            return Condition(empty(rows, shape.tokens, shape.text_width))
        pooled = empty(rows, shape.pooled_width)
        return Condition(empty(rows, shape.tokens, shape.text_width), pooled, empty(rows, 6))

    return Batch(
        z0=empty(size, *shape.latent), cond=condition(size), uncond=condition(1), prompts=["a fox"] * size,
        ids=["plan"] * size, latent_shape=shape.latent, instances=[],
    )  # fmt: skip


def _text_encoder(config: Any) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    projected = "CLIPTextModelWithProjection" in config.get("architectures", ())
    with META:
        encoder: nn.Module = (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**config))
    return encoder


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _warnings(stages: Sequence[StagePlan], where: Device, preset: Preset) -> Iterable[str]:
    """What will not fit, and what to do about it."""
    if where.memory is None:
        return
    for stage in stages:
        if stage.memory.total <= where.memory:
            continue
        remedies = []
        if stage.micro_batch > 1:
            remedies.append(f"a larger accumulate than {preset.accumulate} (micro-batch {stage.micro_batch} now)")
        if not preset.gradient_checkpointing:
            remedies.append("gradient_checkpointing")
        if preset.student == "unet":
            remedies.append("--student lora")
        if stage.memory.rewards:
            remedies.append("no rewards (decoding with gradient takes the most)")
        if preset.name == "sdxl":
            remedies.append("--preset sdxl-24gb")
        remedies.append("a larger device")
        yield (f"{stage.name} needs about {stage.memory.total / GIB:.1f} GiB, {where.name} has "
               f"{where.memory / GIB:.1f}: {', or '.join(remedies)}")  # fmt: skip


def _notes(bench: _Bench, where: Device, base: str, tflops: float | None) -> Iterable[str]:
    """What the numbers rest on."""
    yield (f"memory is an estimate: on the miniature, on a CPU, a stage's peak was off by at most "
           f"{ERROR_ON_MINIATURE:.0%}")  # fmt: skip
    if where.kind == "cuda":
        yield (f"reserve: {CONTEXT_BYTES / GIB:.1f} GiB for CUDA itself and {FRAGMENTATION:.0%} for fragmentation, "
               "assumed")  # fmt: skip
    if where.tflops is None:
        yield "time: unknown without the device's speed; give --tflops, or one of " + ", ".join(GPUS)
    else:
        source = "given" if tflops else "from the data sheet" if where.name in GPUS else "measured here"
        yield (f"time: {where.tflops:.3g} TFLOP/s {source}, {UTILISATION[where.kind]:.0%} of it used (assumed); "
               "training alone, on one device, without loading data, samples and exports")  # fmt: skip
    yield "text encoders are counted as if they stayed on the device"
    if bench.judged and bench.preset.hyper_sd.perceptual == "mask-rcnn":
        yield "Mask R-CNN: its backbone's activations; those of its heads depend on what is seen"
    if bench.unknown_judges:
        yield f"not counted, unknown to the plan: {', '.join(dict.fromkeys(bench.unknown_judges))}"


def render(plan: DistillPlan) -> str:
    """The plan as plain text."""
    import io

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("stage")
    for heading in ("images", "base", "other", "roles", "trained", "step", "peak", "needs", "TFLOP/img", "time"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        m = stage.memory
        sizes = (m.base, m.autoencoder + m.text_encoders + m.rewards, m.adapters + m.discriminator,
                 m.gradients + m.optimizer, m.activations, m.peak, m.total)  # fmt: skip
        table.add_row(
            stage.name, f"{stage.images:,}", *(f"{size / GIB:.2f}" for size in sizes), f"{stage.flops / 1e12:.3g}",
            _duration(stage.seconds),
        )  # fmt: skip
    out = io.StringIO()
    console = Console(file=out, width=120, color_system=None)
    console.print(
        f"{plan.method} on {plan.base}, preset {plan.preset}, {plan.precision}, {plan.device}"
        f"{'' if plan.device_bytes is None else f' ({plan.device_bytes / GIB:.0f} GiB)'}", highlight=False,
    )  # fmt: skip
    console.print("parameters: " + ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in plan.parameters.items()))
    console.print(table)
    console.print(
        "GiB: base UNet; other = autoencoder, text encoders, rewards; roles = adapters and discriminator; trained = "
        "gradients and Adam's moments; step = activations at their highest; peak = sum; needs = with reserve"
    )
    console.print(f"time: {_duration(plan.seconds)} in all")
    console.print(
        f"caches, optional, for {plan.cached_samples:,} samples: latents {plan.latents_bytes / 1e9:.3g} GB, "
        f"prompts {plan.prompts_bytes / 1e9:.3g} GB"
    )
    for note in plan.notes:
        console.print(f"note: {note}")
    for warning in plan.warnings:
        console.print(f"WARNING: {warning}")
    return out.getvalue().rstrip()


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"
