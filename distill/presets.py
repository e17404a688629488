"""Presets: how large a distillation is, and each method's settings for a kind of base, with their sources.

Every preset gives all methods the same teacher, data, rank and number of images seen. "ours" marks a value that no
paper states; a name without more is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from hypersd_bench.errors import InputError, unknown_name


@dataclass(frozen=True, kw_only=True)
class HyperSDSettings:
    """Hyper-SD (2404.13686) on one kind of base.

    segments: none leaves only the one-step stage, from the teacher. shares: of the images, for TSCD at each of them,
    then for the feedback LoRAs at all of them but the last, then for the one-step stage. mse_weights,
    adversarial_weights: of d, by segments. rewards: ids, optimised in the feedback and one-step stages, each times its
    own weight and the stage's scale. feedback_ratio: how much of the feedback LoRA is merged. timestep: what the
    one-step student is told it sees at t = T.
    """

    segments: tuple[int, ...] = (8, 4, 2, 1)
    grid: int = 40  # ours: LCM and TCD use 50, which misses boundaries of 8 and 4 segments
    shares: tuple[float, ...] = (1.0, 1.0, 1.0, 2.0)  # ours: the longer a segment, the farther consistency travels
    feedback_shares: tuple[float, ...] = (0.5, 0.5, 0.5)  # ours
    one_step_share: float = 2.0  # ours
    mse_weights: tuple[float, ...] = (1.0, 1.0, 0.5, 0.1)  # ours; the paper says only that it falls
    adversarial_weights: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0)  # ours; PCM 0.1 throughout
    huber_c: float | None = None  # None: MSE; else the pseudo-Huber distance with this c, as LCM
    offset_noise: float = 0.1  # the blog post the paper cites, unconfirmed
    rewards: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()  # rewards that are logged and never optimised
    perceptual: str | None = None  # segmenter of the perceptual reward (eq. 14)
    perceptual_weight: float = 0.1  # ours; unpublished
    reward_scale: float = 1e-3  # ReFL's released code, in the feedback stages
    feedback_ratio: float = 1.0  # ours; the paper merges "at a chosen ratio"
    feedback_learning_rate: float = 1e-5  # ours; ReFL's LoRA-free recipe
    timestep: int = 999  # unified LoRA; the dedicated UNet is told 800
    unet_timestep: int = 800
    one_step_learning_rate: float = 5e-5  # DMD2, LoRA
    critic_learning_rate: float = 5e-5  # DMD2, LoRA
    critic_updates: int = 5  # DMD2, SDXL; 10 for SD1.5
    real_guidance: float = 8.0  # DMD2, SDXL; 1.75 for SD1.5
    dmd_weight: float = 1.0  # DMD2
    one_step_mse_weight: float = 1.0  # ours; "MSE for stability", no weight printed
    one_step_reward_scale: float = 1e-3  # ours
    eta: float = 1.0  # the released unified LoRA's advice for TCD sampling


@dataclass(frozen=True, kw_only=True)
class LCMSettings:
    """LCM (2310.04378, as a LoRA 2311.05556) on one kind of base.

    guidance: range of g, equal ends fix it; None is the preset's. target: whose f the student is drawn to.
    embedded_guidance: g that a full UNet is sampled with, which is told w = g - 1. A rate that is None is the preset's.
    """

    grid: int = 50  # skip 20 of 1000
    huber_c: float = 1e-3  # diffusers' LCM scripts
    guidance: tuple[float, float] | None = None  # LCM-LoRA fixes w = 7.5, g = 8.5; ours: as all methods
    target: Literal["ema", "student"] = "ema"  # LCM; LCM-LoRA has no EMA
    embedded_guidance: float = 8.0  # the published lcm-sdxl
    learning_rate: float | None = None
    unet_learning_rate: float | None = None  # of a full UNet


@dataclass(frozen=True, kw_only=True)
class TCDSettings:
    """TCD (2402.19159) on one kind of base; a rate that is None is the preset's."""

    grid: int = 50  # as LCM
    eta: float = 0.3  # gamma, of sampling alone: the published LoRAs' advice
    learning_rate: float | None = None  # the paper's was not found


@dataclass(frozen=True, kw_only=True)
class LightningSettings:
    """SDXL-Lightning (2402.13929) on one kind of base.

    first_share and shares: of the images, for the guided stage, and for every step count's MSE warm-up, conditional
    and unconditional objective; a share of 0 drops the stage. train_points: how many timesteps students of fewer steps
    are trained at. skip_level: whether the last two step counts take the student before the one before as teacher of
    their unconditional objective. discriminator_timesteps: t*, which a one-step student's and its teacher's latents
    are noised to, with these weights under the conditional and the later objectives. one_step_x0: whether the one-step
    student is switched to x0 form; merge: whether full weights go on with the last objective; both for full UNets
    alone. Rates that are None are the preset's.
    """

    teacher_steps: int = 128
    chain: tuple[int, ...] = (32, 8, 4, 2, 1)
    first_share: float = 1.0  # ours; no share is published
    shares: tuple[float, float, float] = (0.0, 1.0, 1.0)  # ours; the paper has no warm-up
    convert_share: float = 1.0  # ours; of the switch to x0 form
    merge_share: float = 1.0  # ours
    guidance: float = 6.0  # of the first stage alone
    train_points: int = 4  # {250, 500, 750, 1000}
    skip_level: bool = True
    discriminator_timesteps: tuple[int, ...] = (9, 249, 499, 749)  # {10, 250, 500, 750}, counted from 1
    conditional_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    unconditional_weights: tuple[float, ...] = (5.0, 1.0, 1.0, 1.0)  # "after the model is trained stable"; when: ours
    one_step_x0: bool = True
    merge: bool = False
    first_learning_rate: float | None = None
    unet_learning_rate: float | None = None  # of a full UNet and its discriminators

    def __post_init__(self) -> None:
        steps = (self.teacher_steps, *self.chain)
        if not self.chain or any(a % b or a <= b for a, b in pairwise(steps)):
            raise InputError(
                f"Lightning's step counts {', '.join(map(str, steps))} must each be a whole part of the one before"
            )
        if any(self.train_points % n for n in self.chain if n < self.train_points):
            raise InputError(
                f"Lightning's train_points {self.train_points} must be a multiple of every step count of the chain "
                f"below it: {', '.join(map(str, self.chain))}"
            )
        if min(self.shares) < 0 or self.first_share <= 0 or sum(self.shares) <= 0:
            raise InputError(
                f"Lightning's shares {self.shares} must not be negative, and neither they nor first_share all 0"
            )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes and rates of a distillation.

    images: training images seen, over all stages. batch_size: images per optimizer step over all processes, in
    ``accumulate`` parts on each. warmup: fraction of a stage's steps with rising learning rate. guidance: range of
    the teacher's g (usual form). scenes: size of the pool of training scenes. cache: keep latents and embeddings on
    disk. resolution: pixels, 0 is the base's own.
    precision: of the frozen base. sample_every_s: seconds between sample grids and scoreboards; 0 is never. scoreboard:
    ids of the metrics on it.
    """

    name: str
    images: int
    batch_size: int = 64  # ours: what two CPU cores train at full speed
    accumulate: int = 1
    rank: int = 8  # ours: 0.53 M parameters on the miniature, 1.1 MB as fp16; the papers' 64 is for SD1.5 and SDXL
    student: Literal["lora", "unet"] = "lora"
    learning_rate: float = 1e-3  # ours: a short budget; LCM-LoRA 1e-4, Hyper-SD 1e-6 at batch 512
    adversarial_learning_rate: float = 1e-4  # ours; Lightning 1e-6 for student and discriminator alike
    discriminator_learning_rate: float = 1e-3  # ours: its heads start from nothing and have some dozen steps
    discriminator_backbone: Literal["frozen", "trained"] = "frozen"  # Lightning trains it; ours: a LoRA of it
    warmup: float = 0.05  # ours
    weight_decay: float = 0.0  # ours
    guidance: tuple[float, float] = (2.0, 4.0)  # ours: the miniature's teacher is best near 3; papers w in [2, 14]
    ema: float = 0.95  # LCM; TCD community code
    grad_clip: float = 1.0  # diffusers' LCM scripts
    scenes: int = 8192  # ours
    cache: bool = False
    resolution: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    trackers: tuple[Literal["wandb"], ...] = ()  # beside TensorBoard and JSONL, which are always written
    gradient_checkpointing: bool = False
    fsdp: bool = False  # full UNets over several processes: weights, gradients and Adam's moments in shards
    compile: bool = False  # docs/negative-results.md: does not pay on two CPU cores
    checkpoint_every_s: float = 60.0
    sample_every_s: float = 120.0
    scoreboard: tuple[str, ...] = ("clip-score/pocket", "aesthetic/pocket", "concept/pocket", "diversity/lite0")
    hyper_sd: HyperSDSettings = field(default_factory=HyperSDSettings)
    lcm: LCMSettings = field(default_factory=LCMSettings)
    tcd: TCDSettings = field(default_factory=TCDSettings)
    lightning: LightningSettings = field(default_factory=LightningSettings)

    def __post_init__(self) -> None:
        step = self.batch_size
        if self.images < 1 or self.images % step:
            near = max(step, round(self.images / step) * step)
            raise InputError(f"{self.images} images are no whole number of batches of {step}; {near} would be")
        if step % self.accumulate:
            raise InputError(f"a batch of {step} images can't be accumulated in {self.accumulate} equal parts")


# The miniature: a short budget on 8x8 latents, so rates are higher and stages shorter than any paper's. All ours.
_POCKET_HYPER_SD = HyperSDSettings(
    rewards=("aesthetic/pocket", "clip-score/pocket"),
    watched=("concept/pocket",),  # the checker, which no training follows
    perceptual="pocket",
    shares=(1.0, 1.0, 1.0, 2.0),
    feedback_shares=(1.0, 1.0, 1.0),
    one_step_share=3.0,
    mse_weights=(1.0, 1.0, 1.0, 0.5),
    adversarial_weights=(0.0, 0.0, 1e-3, 2e-3),  # the discriminator's gradient is some hundred times the distance's
    reward_scale=1e-2,
    perceptual_weight=2e-2,
    feedback_learning_rate=1.5e-3,
    one_step_learning_rate=2e-3,
    one_step_reward_scale=1e-2,
    one_step_mse_weight=5.0,
    critic_learning_rate=2e-3,
    critic_updates=2,
    real_guidance=3.0,
    offset_noise=0.0,
)
_POCKET_LIGHTNING = LightningSettings(
    teacher_steps=64,  # half the teacher's cost; on a small model DDIM is long converged
    guidance=3.0,  # where the miniature's teacher is best, and the middle of all methods' range
    shares=(2.0, 1.0, 1.0),  # in some dozen steps an adversarial loss alone has nothing to hold on to
    first_share=4.0,
)
_POCKET = Preset(
    name="pocket",
    images=32768,
    hyper_sd=_POCKET_HYPER_SD,
    lcm=LCMSettings(embedded_guidance=3.0),  # the middle of the range
    lightning=_POCKET_LIGHTNING,
)

_SD15 = Preset(
    name="sd15",
    images=512 * 16_000,  # ours: 4,000 iterations (LCM) in each of four TSCD stages, batch 512 (Hyper-SD)
    batch_size=512,
    accumulate=32,
    rank=64,  # LCM-LoRA; the size of the published Hyper-SD files
    learning_rate=1e-6,
    adversarial_learning_rate=1e-6,  # Lightning, LoRA
    discriminator_learning_rate=1e-6,  # Lightning
    discriminator_backbone="trained",
    weight_decay=0.01,  # DMD2
    guidance=(3.0, 15.0),  # LCM, TCD: w in [2, 14], g = 1 + w
    resolution=512,
    precision="bf16",
    gradient_checkpointing=True,
    checkpoint_every_s=1800.0,
    sample_every_s=1800.0,
    scoreboard=("clip-score/vit-b-32", "aesthetic/laion-v2", "diversity/lite0"),
    hyper_sd=HyperSDSettings(
        rewards=("aesthetic/laion-v2", "image-reward/v1"),
        watched=("pick-score/v1", "hps/v2.1"),
        perceptual="mask-rcnn",
        real_guidance=1.75,  # DMD2, SD1.5
        critic_updates=10,  # DMD2, SD1.5
    ),
    lcm=LCMSettings(learning_rate=1e-4, unet_learning_rate=1e-6),  # LCM-LoRA; LCM
    tcd=TCDSettings(learning_rate=4.5e-6),  # community code
    lightning=LightningSettings(
        guidance=7.5,  # AnimateDiff-Lightning 2403.12706, the same recipe on SD1.5
        first_learning_rate=1e-5,
        unet_learning_rate=5e-7,
    ),
)
_SDXL_LIGHTNING = replace(_SD15.lightning, guidance=6.0)

PRESETS = {
    "pocket": _POCKET,
    "pocket-demo": replace(_POCKET, name="pocket-demo", images=4096, scenes=2048, sample_every_s=0.0),
    "tiny": replace(_POCKET, name="tiny", images=128, batch_size=4, rank=2, scenes=16, sample_every_s=0.0),
    "sd15": _SD15,
    "sdxl": replace(
        _SD15, name="sdxl", resolution=1024,
        hyper_sd=replace(_SD15.hyper_sd, real_guidance=8.0, critic_updates=5),  # DMD2, SDXL
        lightning=_SDXL_LIGHTNING,
    ),
    "sdxl-24gb": replace(
        _SD15, name="sdxl-24gb", resolution=1024, batch_size=64, accumulate=64, images=64 * 16_000,
        learning_rate=1e-5,  # ours: a batch an eighth as large, and Adam
        discriminator_backbone="frozen",
        hyper_sd=replace(
            _SD15.hyper_sd, real_guidance=8.0, critic_updates=5,
            rewards=(), watched=(), perceptual=None,  # ours: decoding 1024 pixels with gradient does not fit in 24 GB
        ),
        lightning=_SDXL_LIGHTNING,
    ),
}  # fmt: skip


def find_preset(name: str) -> Preset:
    """The preset of a name; an unknown one raises InputError with the nearest known."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]
