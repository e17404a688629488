"""A stage's student as a LoRA file or UNet folder that can't be sampled wrong, looked at before it counts.

The EMA is exported: over the last twenty or so steps of a short run it averages out what single batches did.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from distill.batch import Batch
from distill.pictures import looking_prompts, write_grid
from distill.roles import Roles
from distill.stages import Stage
from distill.unet_folder import WEIGHTS, move, unfinished, write_unet
from hypersd_bench.errors import HypersdBenchError
from hypersd_bench.pipelines import Pipeline, embedded_guidance, load_base, load_unet, sample, with_unet
from hypersd_bench.pocket.scenes import ATTRIBUTION
from hypersd_bench.sampling import METADATA_KEY, SamplerContract, ddim_trailing
from hypersd_bench.seeding import image_seed
from hypersd_bench.store import write_bytes

CARD_KEY = "hypersd_bench.card"
TOLERANCE = 0.02  # of the largest predicted noise; rounding to fp16 moves it by about a thousandth
TEACHER_STEPS = 25
CARD = """# {method}, distilled from {base}

{what} the UNet with SHA-256 `{sha256}`. Each says in its own metadata how it must be sampled.

| file | steps | scheduler | images seen | seconds of training |
|---|---|---|---|---|
{rows}

Made by `{command}` on {created} ({machine}, {device}). The exported weights are the running mean (EMA) of the student;
every stage starts from the exported weights of the stage before. Curves: `train.jsonl`, `tensorboard/`; pictures:
`samples/`, the teacher's in the first row.

{use}

## Health

{health}

Training data: {data}
"""
SCENES = f"rendered emoji scenes. {ATTRIBUTION}"
USE_LORA = """```python
pipe.load_lora_weights("{file}")
```"""
USE_UNET = """```python
unet = UNet2DConditionModel.from_pretrained("{file}")
pipe = DiffusionPipeline.from_pretrained("path/to/the/base", unet=unet)
```

`sampler.json` in the folder names the scheduler, its settings and the timesteps. Where `embedded_guidance` is a number,
it is what diffusers' pipelines take as `guidance_scale`; where it is null, guidance has to be off (`guidance_scale=1`).
"""
ONE_FILE = "1TB"  # the manifest knows a student by the hash of one file


class Exported(NamedTuple):
    """What a stage has left.

    path: the LoRA file or UNet folder. weights: the file with the weights. largest_difference: of the predicted noise
    from what was trained, relative to the largest noise.
    """

    path: Path
    weights: Path
    largest_difference: float


class Exporter:
    """Writes a run's students, and looks at each through one pipeline that training never touches."""

    def __init__(self, base: str, folder: Path, device: torch.device, teacher_guidance: float) -> None:
        self._base, self._folder, self._device, self._guidance = base, folder, device, teacher_guidance

    def export(self, stage: Stage, roles: Roles, batch: Batch, card: Mapping[str, Any]) -> Exported:
        """Write the EMA and its sample grid; raises HypersdBenchError when it loads as another model."""
        stage = replace(stage, contract=replace(stage.contract, prediction_type=roles.predicts("ema")))
        return (self._export_unet if roles.kind == "unet" else self._export_lora)(stage, roles, batch, card)

    def _export_lora(self, stage: Stage, roles: Roles, batch: Batch, card: Mapping[str, Any]) -> Exported:
        path = self._folder / f"{stage.export}.safetensors"
        write_lora(path, roles.state("ema"), stage.contract, card)
        teacher_row = self._teacher_row
        self._pipe.load_lora_weights(path.parent, weight_name=path.name)
        try:
            return Exported(path, path, self._look(self._pipe, stage, roles, batch, teacher_row))
        finally:
            self._pipe.unload_lora_weights()

    def _export_unet(self, stage: Stage, roles: Roles, batch: Batch, card: Mapping[str, Any]) -> Exported:
        path = self._folder / stage.export
        with unfinished(path) as partial:
            written = partial / path.name
            write_unet(
                written, roles.network("ema"), roles.state("ema"), torch.float16, stage.contract,
                _metadata(stage.contract, card), ONE_FILE,
            )  # fmt: skip
            pipe = with_unet(self._pipe, load_unet(written, self._device))
            difference = self._look(pipe, stage, roles, batch, self._teacher_row)
            move(written, path)
        del pipe
        gc.collect()  # pipelines hold reference cycles, and training wants the memory back
        return Exported(path, path / WEIGHTS.format(suffix=""), difference)

    def _look(self, pipe: Pipeline, stage: Stage, roles: Roles, batch: Batch, teacher_row: Tensor) -> float:
        """Compare what was loaded with what was trained, and sample it at each of its step counts."""
        difference = largest_difference(pipe, roles, batch, stage.contract)
        if not difference <= TOLERANCE:  # not >, which lets NaN through
            raise HypersdBenchError(
                f"{self._folder / stage.export} loads as another model than was trained: off by {difference:.1%}"
            )
        rows = [self._sample(pipe, stage.contract, steps) for steps in sorted(stage.contract.timesteps)]
        write_grid(self._folder / "samples" / f"{stage.name}.png", [teacher_row, *rows])
        return difference

    @cached_property
    def _pipe(self) -> Pipeline:
        return load_base(self._base, self._device)

    @cached_property
    def _teacher_row(self) -> Tensor:
        return self._sample(self._pipe, ddim_trailing((TEACHER_STEPS,), self._guidance), TEACHER_STEPS)

    def _sample(self, pipe: Pipeline, contract: SamplerContract, steps: int) -> Tensor:
        prompts = looking_prompts(pipe)
        seeds = [image_seed(0, prompt.id, 0) for prompt in prompts]
        return sample(pipe, contract, steps, [prompt.text for prompt in prompts], seeds)


def write_lora(path: Path, lora: Mapping[str, Tensor], contract: SamplerContract, card: Mapping[str, Any]) -> None:
    """Write a LoRA as fp16 under diffusers' keys, with its sampler contract and card in the metadata."""
    tensors = {f"unet.{name}": value.detach().to("cpu", torch.float16) for name, value in lora.items()}
    write_bytes(path, to_safetensors(tensors, metadata=_metadata(contract, card)))


def _metadata(contract: SamplerContract, card: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", METADATA_KEY: contract.to_json(), CARD_KEY: json.dumps(card, sort_keys=True)}


@torch.no_grad()
def largest_difference(pipe: Pipeline, roles: Roles, batch: Batch, contract: SamplerContract) -> float:
    """The largest difference between the pipeline's and the trained EMA's noise, relative to the largest noise.

    A UNet that embeds guidance is told the contract's: here as training embeds it, there as diffusers does.
    """
    device = batch.cond.text.device
    t = torch.linspace(0, roles.schedule.num_train_timesteps - 1, len(batch)).long().to(device)
    x = torch.randn((len(batch), *batch.latent_shape), generator=torch.Generator().manual_seed(0)).to(device)
    g = contract.embedded_guidance
    w = None if g is None else torch.full((len(batch),), g - 1, device=device)
    trained = roles.predict("ema", x, t, batch.cond, w=w)
    told = {**batch.cond.cast(pipe.unet.dtype).arguments, **embedded_guidance(pipe, contract, len(batch))}
    output = pipe.unet(x.to(pipe.unet.dtype), t, return_dict=False, **told)[0]
    loaded = roles.schedule.eps(output.float(), x, t, roles.predicts("ema"))
    return float((loaded - trained).abs().max() / trained.abs().max())


def _training_data(settings: Mapping[str, Any]) -> str:
    """What was trained on, in words; whose pictures the miniature itself was trained on is owed to their artists."""
    source = settings["data"]["source"]
    if source == "scenes":
        return SCENES
    return f"`{source}`." + (f" The base was trained on {SCENES}" if settings["base"] == "pocket" else "")


def write_card(folder: Path, manifest: Mapping[str, Any], command: str, health: Sequence[str] = ()) -> None:
    """Write the run's README.md: what the files are, how they were made, how to use them."""
    settings, stages = manifest["settings"], [s for s in manifest["stages"] if "/" not in s["file"]]
    rows = "\n".join(
        f"| `{s['file']}` | {', '.join(map(str, s['steps']))} | {s['scheduler']} | {s['images_seen']} "
        f"| {s['seconds']:.0f} |"
        for s in stages
    )
    whole = settings["preset"]["student"] == "unet"
    text = CARD.format(
        method=settings["method"], base=settings["base"], sha256=settings["base_unet_sha256"], rows=rows,
        what="Whole UNets (fp16), trained from" if whole else f"LoRAs of rank {settings['preset']['rank']} on",
        command=command, use=(USE_UNET if whole else USE_LORA).format(file=stages[-1]["file"]),
        created=manifest["provenance"]["created"], machine=manifest["provenance"]["machine"],
        device=manifest["provenance"]["device"], data=_training_data(settings),
        health="\n".join(f"- {line}" for line in health),
    )  # fmt: skip
    write_bytes(folder / "README.md", text.encode())
