"""THE training loop: accumulate, step, clip, EMA, checkpoint, log, samples. It knows stages and losses, no method.

Everything random in a step is drawn from (seed, stage, images seen), and everything else is in the checkpoint, so a
run that was stopped anywhere and resumed is, to the bit on one CPU, the run that was not.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from distill.batch import Batch
from distill.checkpoint import Position, RunFolder, load_position, load_state
from distill.export import Exporter, write_card
from distill.feedback import Feedback
from distill.journal import Journal
from distill.pictures import looking_prompts
from distill.roles import Adapter, Roles
from distill.schedule import NoiseSchedule
from distill.scoreboard import Scoreboard
from distill.settings import Settings
from distill.sharding import spread, spread_state, whole
from distill.signals import Interrupt
from distill.sources.opening import open_data
from distill.sources.prefetch import Prefetch
from distill.stages import Losses, LossFunction, Stage, wanted_roles
from hypersd_bench import registry
from hypersd_bench.errors import HypersdBenchError, InputError
from hypersd_bench.pipelines import load_base
from hypersd_bench.pocket.training import fast_bf16
from hypersd_bench.provenance import collect, sha256
from hypersd_bench.seeding import image_seed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOG_EVERY = 5  # optimizer steps
CHECKED_IMAGES = 16  # on which an exported file is compared with what was trained


def train(settings: Settings, out: Path, device: str = "cpu", fresh: bool = False) -> dict[str, Any]:
    """Distil, or go on distilling, into the folder ``out``; returns its manifest (``distill.json``).

    Raises InputError for a folder of other settings, KeyboardInterrupt once a checkpoint is kept after Ctrl-C.
    """
    stages: tuple[Stage, ...] = registry.resolve("method", settings.method)().stages(settings.preset)
    processes = PartialState(cpu=device == "cpu")
    with processes.main_process_first():
        run = RunFolder.open(out, settings, collect(device).to_json(), fresh and processes.is_main_process)
    if not run.done:
        try:
            trainer = Trainer(settings, run, stages, device)
        except InputError:
            run.discard()
            raise
        trainer.run_all()
        if not processes.is_main_process:  # the main process alone has written it
            run = RunFolder.open(out, settings, {}, fresh=False)
    return run.manifest


class Trainer:
    """A run in progress: its cast, optimizers and position."""

    def __init__(self, settings: Settings, run: RunFolder, stages: tuple[Stage, ...], device: str) -> None:
        self.settings, self.preset, self.run, self.stages = settings, settings.preset, run, stages
        self.accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=_mixed_precision(self.preset.precision, torch.device(device)),
            gradient_accumulation_steps=self.preset.accumulate,
            log_with=["tensorboard", *self.preset.trackers],
            project_dir=str(run.path),
        )
        self._check_batch()
        absent = [name for name in self.preset.trackers if name not in map(str, get_available_trackers())]
        if absent:  # accelerate would go on without it
            raise InputError(f"tracker {absent[0]!r} is not installed; pip install 'hypersd-bench[{absent[0]}]'")
        self.main: bool = self.accelerator.is_main_process  # the one that writes
        self.device: torch.device = self.accelerator.device
        self.pipe = load_base(settings.base, self.device, DTYPES[self.preset.precision])
        if self.device.type == "cuda":  # convolutions are faster so; on a CPU nothing was gained
            self.pipe.unet.to(memory_format=torch.channels_last)
        cache = run.path / "cache" / run.manifest["settings"]["base_unet_sha256"][:12]
        with self.accelerator.main_process_first():  # the others find the caches filled
            data = open_data(settings.training_data, self.pipe, cache)
        self.data = Prefetch(data, pin=self.device.type == "cuda")
        if not self.data.has_images and (stage := next((s for s in stages if s.needs_images), None)):
            raise InputError(f"{settings.method}'s stage {stage.name} needs images, and {settings.data.source} holds "
                             "prompts alone; name shards or a folder with --data")  # fmt: skip
        for judged in {stage.rewards: stage for stage in stages}.values():
            self._judges(judged)  # loaded and dropped: a missing one is told now, not after days of other stages
        self.roles = self._cast()
        self.optimizers: dict[str, Any] = {}
        self.position = Position()
        self.window: list[dict[str, Tensor]] = []
        guidance = sum(self.preset.guidance) / 2
        self.exporter = Exporter(settings.base, run.path, self.device, guidance)
        scoreboard = Scoreboard(
            self.pipe, self.roles, run.path, looking_prompts(self.pipe), self.preset.scoreboard, guidance,
            self.preset.sample_every_s,
        )  # fmt: skip
        self.journal = Journal(run.path, self.accelerator, scoreboard)

    def _check_batch(self) -> None:
        processes, size, parts = self.accelerator.num_processes, self.preset.batch_size, self.preset.accumulate
        if size % (parts * processes):
            raise InputError(
                f"a batch of {size} images can't be shared by {processes} processes in {parts} equal parts each; "
                f"start a number of processes that divides {size // parts}"
            )

    def _cast(self) -> Roles:
        """The roles that the stages need, on the base's UNet."""
        schedule = NoiseSchedule.from_config(self.pipe.scheduler.config, set_alpha_to_one=True, device=self.device)
        roles = Roles(
            self.pipe.unet, schedule, self.preset.rank, self.settings.seed, kind=self.preset.student,
            embeds_guidance=any(stage.embeds_guidance for stage in self.stages),
        )  # fmt: skip
        for adapter in wanted_roles(self.stages):
            roles.add(adapter)
        if self.preset.gradient_checkpointing:
            roles.enable_checkpointing()
        if self.preset.compile:
            roles.compile()
        if self.preset.fsdp and roles.kind == "lora":
            raise InputError("fsdp spreads full UNets; a LoRA needs none: say --student unet, or leave fsdp out")
        if self.preset.fsdp and self.accelerator.num_processes > 1:
            roles.shard()
        return roles

    def run_all(self) -> None:
        """Train every stage that is not finished yet."""
        checkpoint = self.run.latest()
        self.position = load_position(checkpoint)
        self.journal.open(self.position.images)
        total = sum(stage.images for stage in self.stages)
        with (
            Interrupt() as interrupt,
            tqdm(
                total=total,
                initial=self.position.images,
                unit="img",
                mininterval=1,
                smoothing=0.1,
                disable=not self.main,
            ) as bar,
        ):
            for index in range(self.position.stage, len(self.stages)):
                bar.set_description(f"{self.settings.method} {self.stages[index].name}")
                self._begin(self.stages[index], checkpoint)
                checkpoint = None
                self._train_stage(self.stages[index], bar, interrupt)
                self._finish_stage(self.stages[index])
        if self.main:
            write_card(self.run.path, self.run.manifest, self.settings.command, self.journal.close())
            self.run.finish()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _begin(self, stage: Stage, checkpoint: Path | None) -> None:
        """Set the cast as a stage starts, fresh EMA, optimizers and opponents; or as the checkpoint left it."""
        if checkpoint is not None:
            self._load_adapters(checkpoint)
        if self.position.stage_images == 0:
            self._fresh_roles(stage)
        others: list[Adapter] = [opponent.role for opponent in stage.opponents if opponent.role]
        self.roles.train(stage.trains, *others)
        self.roles.student_predicts = stage.prediction_type
        self.roles.feedback = self._judges(stage)
        self.roles.discriminator = None
        self.accelerator._optimizers.clear()  # those of the stage before
        self.optimizers = {
            "student": self._optimizer(self.roles.trainable(stage.trains), stage.learning_rate, stage.betas)
        }
        for opponent in stage.opponents:
            parameters = list(self.roles.parameters(opponent.role)) if opponent.role else []
            if opponent.make is not None:
                with torch.random.fork_rng():
                    torch.manual_seed(image_seed(self.settings.seed, f"{opponent.name}/{stage.name}", 0))
                    self.roles.discriminator = opponent.make(self.roles).to(self.device)
                parameters += self.roles.discriminator.parameters()
            self.optimizers[opponent.name] = self._optimizer(parameters, opponent.learning_rate, opponent.betas)
        if checkpoint is not None and self.position.stage_images > 0:
            self._load_training(checkpoint)

    def _fresh_roles(self, stage: Stage) -> None:
        """What a stage starts from: the student of the stage before, its copies, and opponents that know nothing."""
        if stage.new_previous:
            if "older" in self.roles.adapters:
                self.roles.copy("previous", "older")
            self.roles.copy("student", "previous")
        for adapter in ("critic", "backbone"):
            if adapter in self.roles.adapters:
                self.roles.reset(adapter)
        if stage.trains == "feedback":
            self.roles.start_feedback()
        self.roles.copy(stage.trains, "ema")

    def _judges(self, stage: Stage) -> Feedback | None:
        """Who looks at the pictures of a stage that optimises rewards."""
        if not stage.rewards:
            return None
        chosen = self.preset.hyper_sd
        return Feedback(
            self.pipe.vae, stage.rewards, chosen.watched, chosen.perceptual, self.preset.gradient_checkpointing
        )

    def _optimizer(self, parameters: list[nn.Parameter], rate: float, betas: tuple[float, float]) -> Any:
        adam = torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=self.preset.weight_decay, fused=True)
        return self.accelerator.prepare_optimizer(adam)

    def _train_stage(self, stage: Stage, bar: tqdm[Any], interrupt: Interrupt) -> None:
        num_steps = stage.images // self.preset.batch_size
        step = self.position.stage_images // self.preset.batch_size
        self.window, saved, logged = [], time.monotonic(), time.monotonic()
        while step < num_steps:
            factor = learning_rate_factor(step, num_steps, self.preset.warmup)
            self._step(stage, factor)
            step += 1
            bar.update(self.preset.batch_size)
            if step % LOG_EVERY == 0 or step == num_steps or (interrupt.asked and self.accelerator.num_processes == 1):
                now = time.monotonic()
                stop, save, look = self._agree(
                    interrupt.asked, now - saved > self.preset.checkpoint_every_s, self.journal.scoreboard.due
                )
                self._advance(now - logged)
                bar.set_postfix(loss=f"{self._write_log(stage, step, factor, now - logged):.4g}")
                logged = now
                if look and step < num_steps:
                    with self.roles.gathered("ema"):
                        self.journal.look(stage, self.position.images)
                    logged = time.monotonic()
                if stop or (step < num_steps and save):
                    self._save()
                    saved = now
                if stop:
                    raise KeyboardInterrupt

    def _agree(self, *asked: bool) -> list[bool]:
        """What any process asks for, known to all: Ctrl-C may reach but one, and their clocks differ."""
        if self.accelerator.num_processes == 1:
            return list(asked)
        counts = self.accelerator.reduce(torch.tensor(asked, device=self.device).float(), reduction="sum")
        return [bool(count) for count in counts.tolist()]

    def _step(self, stage: Stage, factor: float) -> None:
        """One step of the student, after its opponents' practice, at ``factor`` times the stage's learning rates."""
        for turn in range(stage.practice_steps):
            assert stage.practice is not None
            self._turn(stage, stage.practice, f"{stage.name}/practice-{turn}", factor)
        figures = self._turn(stage, stage.losses, stage.name, factor)
        self.roles.update_ema(self.preset.ema)
        self.window.append(figures)

    def _turn(self, stage: Stage, function: LossFunction, salt: str, factor: float) -> dict[str, Tensor]:
        """One update of everybody that ``function`` gives a loss, from ``accumulate`` parts of one batch.

        Returns what to log, averaged over the parts.
        """
        parts: list[dict[str, Tensor]] = []
        rates = {opponent.name: opponent.learning_rate for opponent in stage.opponents}
        for batch, rng in self._parts(salt):
            with self.accelerator.accumulate():
                with self.accelerator.autocast():
                    losses = function(batch, self.roles, rng)
                learners = dict(losses.opponents)
                if losses.student is not None:
                    rates["student"], learners["student"] = stage.learning_rate, losses.student
                for loss in learners.values():
                    self.accelerator.backward(loss)
                parts.append(_figures(losses))
        norm = torch.zeros(())
        for name in learners:
            optimizer = self.optimizers[name]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self._average_gradients(parameters)
            clipped = self.accelerator.clip_grad_norm_(parameters, self.preset.grad_clip)
            norm = whole(clipped) if name == "student" else norm
            for group in optimizer.param_groups:
                group["lr"] = factor * rates[name]
            optimizer.step()
            optimizer.zero_grad()
        means = {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}
        return {**means, "grad_norm": norm.detach()}

    def _parts(self, salt: str) -> Iterator[tuple[Batch, torch.Generator]]:
        """This process's parts of the step's batch, each with the randomness of its place among all images."""
        processes = self.accelerator.num_processes
        size = self.preset.batch_size // self.preset.accumulate // processes
        seen = self.position.images + len(self.window) * self.preset.batch_size
        for part in range(self.preset.accumulate):
            place = seen + (part * processes + self.accelerator.process_index) * size
            yield (
                self.data.batch(place, size),
                torch.Generator().manual_seed(image_seed(self.settings.seed, salt, place)),
            )

    def _average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Average over processes. Not DDP's wrapper: several roles share the UNet, and each turn trains others."""
        own = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]  # FSDP's are done
        if self.accelerator.num_processes > 1 and own:
            flat = self.accelerator.reduce(torch.cat([grad.flatten() for grad in own]), reduction="mean")
            for grad, mean in zip(own, flat.split([grad.numel() for grad in own]), strict=True):
                grad.copy_(mean.view_as(grad))

    def _advance(self, seconds: float) -> None:
        images = len(self.window) * self.preset.batch_size
        self.position = Position(
            stage=self.position.stage,
            stage_images=self.position.stage_images + images,
            images=self.position.images + images,
            seconds=self.position.seconds + seconds,
        )

    def _write_log(self, stage: Stage, step: int, factor: float, seconds: float) -> float:
        """Log the window's means and start a new one; stops the run at the first loss that is no number."""
        figures = self._figures_of_window()
        first_step = step - len(self.window) + 1
        finite = figures["loss"].isfinite() & figures["grad_norm"].isfinite()
        bad = [first_step + i for i, good in enumerate(finite.tolist()) if not good]
        if bad:
            kept = self.run.latest()
            place = self.position.images - (step + 1 - bad[0]) * self.preset.batch_size
            ids = self.data.batch(place, self.preset.batch_size).ids
            raise HypersdBenchError(
                f"{self.settings.method} {stage.name}: loss or gradient is not finite at step {bad[0]} (images "
                f"{', '.join(ids[:4])}{', ...' if len(ids) > 4 else ''}); last good checkpoint: {kept or 'none yet'}; "
                "lower the learning rate, or start over with --fresh"
            )
        means = {name: float(values.mean()) for name, values in figures.items()}
        images = len(self.window) * self.preset.batch_size
        row = {
            "method": self.settings.method, "stage": stage.name, "step": step, "images_seen": self.position.images,
            **means, "learning_rate": factor * stage.learning_rate, "images_per_s": round(images / seconds, 2),
            "seconds": round(self.position.seconds, 2),
        }  # fmt: skip
        self.journal.write(row, means)
        self.window = []
        return means["loss"]

    def _figures_of_window(self) -> dict[str, Tensor]:
        """Every figure of the window's steps, (steps,) float64 on the CPU, averaged over processes."""
        names = list(self.window[0])
        table = torch.stack(
            [torch.stack([row[name].to(self.device) for row in self.window]).double() for name in names]
        )
        if self.accelerator.num_processes > 1:
            table = self.accelerator.reduce(table, reduction="mean")
        return dict(zip(names, table.cpu(), strict=True))

    def _finish_stage(self, stage: Stage) -> None:
        """Export the stage's EMA, and hand it on as the next stage's student; a feedback stage leaves the student."""
        if stage.trains == "feedback":
            self.roles.merge_feedback(stage.feedback_ratio)
        with self.roles.gathered("ema"):
            if self.main:
                self._publish(stage)
        if stage.trains == "student":
            self.roles.copy("ema", "student")
        self.position = Position(self.position.stage + 1, 0, self.position.images, self.position.seconds)
        self._save()

    def _publish(self, stage: Stage) -> None:
        """Write the stage's student, look at it once more, and enter it in the manifest."""
        written = self.exporter.export(stage, self.roles, self.data.batch(0, CHECKED_IMAGES), self._card(stage))
        difference = written.largest_difference
        tqdm.write(
            f"{stage.name}: {written.path}, reloaded, differs from the trained student by at most {difference:.1e}",
            file=sys.stderr,  # stdout is for --json
        )
        self.run.finish_stage({
            "name": stage.name, "file": str(written.path.relative_to(self.run.path)), "sha256": sha256(written.weights),
            "steps": sorted(stage.contract.timesteps), "scheduler": stage.contract.scheduler, "images": stage.images,
            "images_seen": self.position.images, "seconds": round(self.position.seconds, 1),
            "largest_difference": difference,
        })  # fmt: skip

    def _card(self, stage: Stage) -> dict[str, Any]:
        return {
            "method": self.settings.method, "stage": stage.name, "base": self.settings.base,
            "base_unet_sha256": self.run.manifest["settings"]["base_unet_sha256"], "preset": self.preset.name,
            "rank": self.preset.rank if self.preset.student == "lora" else None, "weights": "ema",
            "images_seen": self.position.images,
            "seed": self.settings.seed, "seconds": round(self.position.seconds, 1), "command": self.settings.command,
            "trained_on": list(self.roles.feedback.trains) if self.roles.feedback else [],
        }  # fmt: skip

    def _save(self) -> None:
        weights, optimizers = self._state()
        if self.main:
            self.run.save(self.position, weights, optimizers)
        self.accelerator.wait_for_everyone()

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and optimizer states for a checkpoint, gathered where they are sharded."""
        weights: dict[str, Tensor] = {}
        for adapter in self.roles.adapters:
            weights |= {f"{adapter}.{i}": p for i, p in enumerate(self.roles.parameters(adapter))}
        if self.roles.discriminator is not None:
            weights |= {f"discriminator.{name}": value for name, value in self.roles.discriminator.state_dict().items()}
        return whole(weights), whole({name: value.state_dict() for name, value in self.optimizers.items()})

    @torch.no_grad()
    def _load_adapters(self, checkpoint: Path) -> None:
        weights, _ = load_state(checkpoint)
        for adapter in self.roles.adapters:
            for i, parameter in enumerate(self.roles.parameters(adapter)):
                parameter.copy_(spread(weights[f"{adapter}.{i}"], parameter))

    def _load_training(self, checkpoint: Path) -> None:
        weights, optimizers = load_state(checkpoint)
        for name, optimizer in self.optimizers.items():
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            optimizer.load_state_dict(spread_state(optimizers[name], parameters))
        if self.roles.discriminator is not None:
            prefix = "discriminator."
            state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            self.roles.discriminator.load_state_dict(state)


def learning_rate_factor(step: int, num_steps: int, warmup: float) -> float:
    """Linear warm-up over the first ``warmup`` of the steps, then cosine down to a tenth."""
    warm = max(1, round(warmup * num_steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, num_steps - warm)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def _mixed_precision(base: str, device: torch.device) -> str:
    """The autocast beside a base of this precision; LoRAs are float32 on any base, and need one on a half."""
    return base if base != "fp32" else "bf16" if fast_bf16(device) else "no"


def _figures(losses: Losses) -> dict[str, Tensor]:
    """What a part of a batch logs, left on its device."""
    student = {} if losses.student is None else {"loss": losses.student.detach()}
    opponents = {f"{name}_loss": loss.detach() for name, loss in losses.opponents.items()}
    return {**student, **opponents, **losses.logs}
