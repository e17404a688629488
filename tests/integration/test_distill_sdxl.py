"""Every stage of every method on a tiny random base in SDXL's layout: losses, gradients, and what the UNet is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.batch import Batch, Condition, Instances
from distill.loop import Trainer
from distill.roles import Adapter, Kind
from hypersd_bench import registry
from hypersd_bench.pipelines import Pipeline, encode_empty, encode_prompts, load_base
from tests.tiny_cast import scatter
from tests.tiny_runs import trainer_of
from tests.tiny_sdxl import POOLED, WIDTHS, make_tiny_sdxl

PROMPTS = ["a fox on a green background", "a pizza", "a cat left of a dog on a red background"]
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return load_base(str(folder))


@pytest.fixture(scope="module")
def batch(pipe: Pipeline) -> Batch:
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[:, 8:40, 8:40] = True
    fox = Instances(torch.tensor([0]), masks, torch.tensor([[8.0, 8.0, 39.0, 39.0]]))
    return Batch(
        z0=torch.randn(len(PROMPTS), *SHAPE, generator=torch.Generator().manual_seed(1)),
        cond=encode_prompts(pipe, PROMPTS), uncond=encode_empty(pipe), prompts=PROMPTS, ids=PROMPTS,
        latent_shape=SHAPE, instances=[fox] * len(PROMPTS),
    )  # fmt: skip


def test_a_condition_is_sdxls(batch: Batch) -> None:
    cond, uncond = batch.cond, batch.uncond
    assert cond.text.shape[2] == sum(WIDTHS)
    assert cond.pooled is not None
    assert cond.pooled.shape == (3, POOLED)
    assert cond.time_ids is not None
    assert cond.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 3
    assert not bool(uncond.text.any())  # not the embedding of "": SDXL was trained on zeros
    assert uncond.pooled is not None
    assert not bool(uncond.pooled.any())
    assert uncond.time_ids is not None
    assert uncond.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]]


def test_the_unet_hears_all_of_it(folder: Path, batch: Batch) -> None:
    """Text, pooled text and time ids each change the answer, in the roles and in what the discriminator reads."""
    from distill.discriminator import features

    roles = trainer_of("hyper-sd", load_base(str(folder))).roles
    scatter(roles)
    x, t, cond = batch.latents, torch.tensor([0, 499, 999]), batch.cond
    assert cond.pooled is not None
    assert cond.time_ids is not None
    others = {
        "text": replace(cond, text=cond.text + 1),
        "pooled": replace(cond, pooled=cond.pooled + 1),
        "time ids": replace(cond, time_ids=cond.time_ids + 100),
    }
    for role in ("teacher", "student", "critic"):
        answer = roles.predict(role, x, t, cond).detach()
        for what, other in others.items():
            assert not torch.allclose(roles.predict(role, x, t, other).detach(), answer), (role, what)
    with torch.no_grad():
        read = features(roles, "teacher", x, t, cond)[-1]
        for what, other in others.items():
            assert not torch.allclose(features(roles, "teacher", x, t, other)[-1], read), what


def test_roles_answer_as_diffusers_pipeline_asks(folder: Path, batch: Batch) -> None:
    """The teacher's answer is the untouched UNet's, asked as StableDiffusionXLPipeline asks it, to the bit."""
    untouched = load_base(str(folder)).unet
    roles = trainer_of("hyper-sd", load_base(str(folder))).roles
    x, t, cond = batch.latents, torch.tensor([0, 499, 999]), batch.cond
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    with torch.no_grad():
        theirs = untouched(x, t, encoder_hidden_states=cond.text, added_cond_kwargs=added).sample
    assert torch.equal(roles.predict("teacher", x, t, cond), theirs)


def test_guidance_starts_from_zeros(folder: Path, batch: Batch) -> None:
    roles = trainer_of("lcm", load_base(str(folder))).roles
    x, t, cond = batch.latents, torch.tensor([19, 499, 999]), batch.cond
    assert cond.pooled is not None
    zeros = Condition(torch.zeros_like(cond.text), torch.zeros_like(cond.pooled), cond.time_ids)
    eps_c, eps_u = roles.predict("teacher", x, t, cond), roles.predict("teacher", x, t, zeros)
    guided = roles.guided(x, t, cond, batch.uncond, torch.full((3,), 5.0))
    torch.testing.assert_close(guided, eps_u + 5 * (eps_c - eps_u), rtol=1e-3, atol=1e-4)


def gradient_of(trainer: Trainer, adapter: Adapter) -> Tensor:
    found = [p.grad.flatten() for p in trainer.roles.parameters(adapter) if p.grad is not None]
    return torch.cat(found) if found else torch.zeros(0)


@pytest.mark.parametrize("kind", ["lora", "unet"])
@pytest.mark.parametrize("method", sorted(registry.METHODS))
def test_every_stage_has_its_losses_and_gradients(folder: Path, batch: Batch, method: str, kind: Kind) -> None:
    trainer = trainer_of(method, load_base(str(folder)), kind)
    roles = trainer.roles
    for stage in trainer.stages:
        trainer._begin(stage, None)
        for parameter in roles.parameters(stage.trains):  # away from B = 0, where half the gradient is zero
            parameter.data += 0.02 * torch.randn(parameter.shape)
        functions: list[Any] = [stage.losses, *([stage.practice] if stage.practice else [])]
        for function in functions:
            losses = function(batch, roles, torch.Generator().manual_seed(3))
            learners = {opponent.name: opponent.role for opponent in stage.opponents}
            assert losses.opponents.keys() == learners.keys(), stage.name
            for name, loss in losses.opponents.items():
                loss.backward()
                if role := learners[name]:
                    gradient = gradient_of(trainer, role)
                    assert bool(gradient.isfinite().all()), (stage.name, name)
                    assert bool(gradient.any()), (stage.name, name)
            assert not gradient_of(trainer, stage.trains).any(), stage.name
            if function is stage.practice:
                assert losses.student is None
                continue
            assert losses.student is not None
            losses.student.backward()
            gradient = gradient_of(trainer, stage.trains)
            assert bool(losses.student.isfinite()), stage.name
            assert bool(gradient.isfinite().all()), stage.name
            assert bool(gradient.any()), stage.name
            trained = {stage.trains, *(role for role in learners.values() if role)}
            assert {a for a in roles.adapters if len(gradient_of(trainer, a))} == trained, stage.name
            for adapter in roles.adapters:
                for parameter in roles.parameters(adapter):
                    parameter.grad = None
        roles.copy("student", "ema")


def test_prompts_alone_feed_feedback_and_distribution_matching(folder: Path, batch: Batch) -> None:
    trainer = trainer_of("hyper-sd", load_base(str(folder)))
    alone = replace(batch, z0=None, instances=None)
    for stage in trainer.stages:
        if not stage.needs_images:
            trainer._begin(stage, None)
            losses = stage.losses(alone, trainer.roles, torch.Generator().manual_seed(3))
            assert losses.student is not None
            losses.student.backward()
            assert bool(gradient_of(trainer, stage.trains).isfinite().all())
