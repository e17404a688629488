"""Presets: how large a distillation is. What belongs to a method alone stands in the method's file.

Every preset gives all methods the same teacher, data, rank and number of images seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypersd_bench.errors import InputError, unknown_name


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes and rates of a distillation.

    images: training images seen, over all stages. batch_size: images per optimizer step, in ``accumulate`` parts.
    warmup: fraction of a stage's steps with rising learning rate. guidance: range of the teacher's g (usual form).
    scenes: size of the pool of training scenes. checkpoint_every_s: seconds between checkpoints.
    """

    name: str
    images: int
    batch_size: int = 64  # ours: what two CPU cores train at full speed
    accumulate: int = 1
    rank: int = 8  # ours: 0.53 M parameters on the miniature, 1.1 MB as fp16; the papers' 64 is for SD1.5 and SDXL
    learning_rate: float = 1e-3  # ours: a short budget; LCM-LoRA 1e-4, Hyper-SD 1e-6 at batch 512
    adversarial_learning_rate: float = 1e-4  # ours; Lightning 1e-6 for student and discriminator alike
    discriminator_learning_rate: float = 1e-3  # ours: its heads start from nothing and have some dozen steps
    warmup: float = 0.05  # ours
    guidance: tuple[float, float] = (2.0, 4.0)  # ours: the miniature's teacher is best near 3; papers w in [2, 14]
    ema: float = 0.95  # LCM; TCD community code
    grad_clip: float = 1.0  # diffusers' LCM scripts
    scenes: int = 8192  # ours
    checkpoint_every_s: float = 60.0

    def __post_init__(self) -> None:
        step = self.batch_size
        if self.images < 1 or self.images % step:
            near = max(step, round(self.images / step) * step)
            raise InputError(f"{self.images} images are no whole number of batches of {step}; {near} would be")
        if step % self.accumulate:
            raise InputError(f"a batch of {step} images can't be accumulated in {self.accumulate} equal parts")


PRESETS = {
    "pocket": Preset(name="pocket", images=16384),
    "pocket-demo": Preset(name="pocket-demo", images=4096, scenes=2048),
    "tiny": Preset(name="tiny", images=128, batch_size=4, rank=2, scenes=16),
}


def find_preset(name: str) -> Preset:
    """The preset of a name; an unknown one raises InputError with the nearest known."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]
