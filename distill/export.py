"""A stage's student as a LoRA file that can't be sampled wrong, looked at once more before it counts.

The EMA is exported: over the last twenty or so steps of a short run it averages out what single batches did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from distill.batch import Batch
from distill.formats import compress, concatenate
from distill.pictures import looking_prompts, write_grid
from distill.roles import Roles
from distill.stages import Stage
from hypersd_bench.errors import HypersdBenchError
from hypersd_bench.pipelines import Pipeline, load_base, sample
from hypersd_bench.pocket.scenes import ATTRIBUTION
from hypersd_bench.sampling import METADATA_KEY, SamplerContract, ddim_trailing
from hypersd_bench.seeding import image_seed
from hypersd_bench.store import write_bytes

CARD_KEY = "hypersd_bench.card"
TOLERANCE = 0.02  # of the largest predicted noise; rounding to fp16 moves it by about a thousandth
TEACHER_STEPS = 25
CARD = """# {method}, distilled from {base}

LoRAs of rank {rank} on the UNet with SHA-256 `{sha256}`. Each file says in its own metadata how it must be sampled.

| file | steps | scheduler | images seen | seconds of training |
|---|---|---|---|---|
{rows}

Made by `{command}` on {created} ({machine}, {device}). The exported weights are the running mean (EMA) of the student;
every stage starts from the exported weights of the stage before. Curves: `train.jsonl`, `tensorboard/`; pictures:
`samples/`, the teacher's in the first row.

```python
pipe.load_lora_weights("{file}")
```

## Health

{health}

Training pictures: rendered emoji scenes. {attribution}
"""


class Exporter:
    """Writes a run's LoRAs, and looks at each through one pipeline that training never touches."""

    def __init__(self, base: str, folder: Path, device: torch.device, teacher_guidance: float) -> None:
        self._base, self._folder, self._device, self._guidance = base, folder, device, teacher_guidance

    def export(self, stage: Stage, roles: Roles, batch: Batch, card: Mapping[str, Any]) -> float:
        """Write the EMA and its sample grid; returns the file's largest relative difference from what was trained."""
        path = self._folder / f"{stage.export}.safetensors"
        contract = replace(stage.contract, prediction_type=roles.predicts("ema"))
        write_lora(path, trained_lora(stage, roles), contract, card)
        teacher_row = self._teacher_row
        self._pipe.load_lora_weights(path.parent, weight_name=path.name)
        try:
            difference = largest_difference(self._pipe, roles, batch)
            if not difference <= TOLERANCE:  # not >, which lets NaN through
                raise HypersdBenchError(f"{path} loads as another model than was trained: off by {difference:.1%}")
            rows = [self._sample(contract, steps) for steps in sorted(contract.timesteps)]
            write_grid(self._folder / "samples" / f"{stage.name}.png", [teacher_row, *rows])
        finally:
            self._pipe.unload_lora_weights()
        return difference

    @cached_property
    def _pipe(self) -> Pipeline:
        return load_base(self._base, self._device)

    @cached_property
    def _teacher_row(self) -> Tensor:
        return self._sample(ddim_trailing((TEACHER_STEPS,), self._guidance), TEACHER_STEPS)

    def _sample(self, contract: SamplerContract, steps: int) -> Tensor:
        prompts = looking_prompts(self._pipe)
        seeds = [image_seed(0, prompt.id, 0) for prompt in prompts]
        return sample(self._pipe, contract, steps, [prompt.text for prompt in prompts], seeds)


def trained_lora(stage: Stage, roles: Roles) -> dict[str, Tensor]:
    """The EMA under PEFT's names; a feedback LoRA is merged into the student's, at the stage's ratio and its rank."""
    ema = roles.state("ema")
    if stage.trains == "student":
        return ema
    return compress(concatenate(roles.state("student"), ema, stage.feedback_ratio), roles.rank)[0]


def write_lora(path: Path, lora: Mapping[str, Tensor], contract: SamplerContract, card: Mapping[str, Any]) -> None:
    """Write a LoRA as fp16 under diffusers' keys, with its sampler contract and card in the metadata."""
    tensors = {f"unet.{name}": value.detach().to("cpu", torch.float16) for name, value in lora.items()}
    metadata = {"format": "pt", METADATA_KEY: contract.to_json(), CARD_KEY: json.dumps(card, sort_keys=True)}
    write_bytes(path, to_safetensors(tensors, metadata=metadata))


@torch.no_grad()
def largest_difference(pipe: Pipeline, roles: Roles, batch: Batch) -> float:
    """The largest difference between the pipeline's and the trained EMA's noise, relative to the largest noise."""
    device = batch.cond.text.device
    t = torch.linspace(0, roles.schedule.num_train_timesteps - 1, len(batch)).long().to(device)
    x = torch.randn((len(batch), *batch.latent_shape), generator=torch.Generator().manual_seed(0)).to(device)
    trained = roles.predict("ema", x, t, batch.cond)
    output = pipe.unet(x.to(pipe.unet.dtype), t, return_dict=False, **batch.cond.cast(pipe.unet.dtype).arguments)[0]
    loaded = roles.schedule.eps(output.float(), x, t, roles.predicts("ema"))
    return float((loaded - trained).abs().max() / trained.abs().max())


def write_card(folder: Path, manifest: Mapping[str, Any], command: str, health: Sequence[str] = ()) -> None:
    """Write the run's README.md: what the files are, how they were made, how to use them."""
    settings, stages = manifest["settings"], [s for s in manifest["stages"] if "/" not in s["file"]]
    rows = "\n".join(
        f"| `{s['file']}` | {', '.join(map(str, s['steps']))} | {s['scheduler']} | {s['images_seen']} "
        f"| {s['seconds']:.0f} |"
        for s in stages
    )
    text = CARD.format(
        method=settings["method"], base=settings["base"], sha256=settings["base_unet_sha256"], rows=rows,
        rank=settings["preset"]["rank"], seed=settings["seed"], command=command, file=stages[-1]["file"],
        created=manifest["provenance"]["created"], machine=manifest["provenance"]["machine"],
        device=manifest["provenance"]["device"], attribution=ATTRIBUTION,
        health="\n".join(f"- {line}" for line in health),
    )  # fmt: skip
    write_bytes(folder / "README.md", text.encode())
