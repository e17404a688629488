"""LCM, TCD and SDXL-Lightning against their papers' formulas, diffusers' schedulers and published settings."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from distill.discriminator import Discriminator, features
from distill.losses import boundary_scalings
from distill.methods import lcm, lightning, tcd
from distill.presets import PRESETS, LCMSettings, LightningSettings, find_preset
from distill.roles import Kind, Roles, guidance_embedding
from distill.schedule import NoiseSchedule
from distill.segments import draw_interval
from distill.stages import Method, Stage, draw_guidance, draw_noise
from hypersd_bench.errors import InputError
from hypersd_bench.pipelines import encode_prompts, load_base, sample_latents
from hypersd_bench.sampling import SamplerContract, euler_trailing, trailing
from tests.tiny_base import make_tiny_base
from tests.tiny_cast import SD, scatter, tiny_batch, tiny_cast, tiny_unet

ABAR = DDIMScheduler(**SD).alphas_cumprod.double()
STABLE = (9, 249, 499, 749)
FULL = replace(find_preset("sdxl"), student="unet")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def ddim(x: Tensor, eps: Tensor, t: int, s: int) -> Tensor:
    """2010.02502, eq. 12; s = -1 is the clean end."""
    abar_s = ABAR[s] if s >= 0 else torch.tensor(1.0)
    x0 = (x - (1 - ABAR[t]).sqrt() * eps) / ABAR[t].sqrt()
    moved: Tensor = abar_s.sqrt() * x0 + (1 - abar_s).sqrt() * eps
    return moved


def embedding_cast() -> Roles:
    """Full UNets that are told w, each with weights of its own."""
    schedule = NoiseSchedule.from_config(SD, set_alpha_to_one=True)
    roles = Roles(tiny_unet(), schedule, rank=2, kind="unet", embeds_guidance=True)
    scatter(roles)
    return roles


def embed(w: Tensor) -> Tensor:
    """diffusers' own embedding of w."""
    embedding: Tensor = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    return embedding


def answer(unet: UNet2DConditionModel, x: Tensor, t: int, text: Tensor, w: float | None = None) -> Tensor:
    """A UNet's output for one image, asked directly."""
    told = None if w is None else embed(torch.tensor([w]))
    with torch.no_grad():
        output: Tensor = unet(x[None].float(), t, encoder_hidden_states=text[None], timestep_cond=told).sample[0]
    return output.double()


def named(stages: tuple[Stage, ...]) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages}


# LCM


def test_the_embedding_of_w_is_diffusers() -> None:
    w = torch.linspace(2, 14, 25)
    torch.testing.assert_close(guidance_embedding(w), embed(w))


def test_the_boundary_scalings_are_lcm_schedulers() -> None:
    t = torch.arange(0, 1000, 37)
    c_skip, c_out = (c.flatten() for c in boundary_scalings(t))
    theirs = [LCMScheduler().get_scalings_for_boundary_condition_discrete(float(step)) for step in t]
    torch.testing.assert_close(c_skip, torch.tensor([skip for skip, _ in theirs], dtype=torch.float64))
    torch.testing.assert_close(c_out, torch.tensor([out for _, out in theirs], dtype=torch.float64))
    assert (float(c_skip[0]), float(c_out[0])) == (1.0, 0.0)


@pytest.mark.parametrize("target", ["ema", "student"])
def test_lcm_of_a_full_unet_is_its_papers_loss(target: str) -> None:
    roles, batch = embedding_cast(), tiny_batch()
    settings = LCMSettings(target=target)  # type: ignore[arg-type]
    guidance = (3.0, 15.0)
    loss = lcm.consistency(batch, roles, seeded(), guidance=guidance, settings=settings, told_w=True).student
    rng = seeded()
    draws = draw_interval(6, 1, 1000, 50, rng)
    w, eps = draw_guidance(batch, guidance, rng).double() - 1, draw_noise(batch.latents, rng)
    assert bool(((w >= 2) & (w <= 14)).all())  # LCM's own range
    teacher, student = roles.network("teacher"), roles.network("student")
    judge, scheduler = roles.network(target), LCMScheduler(**SD)  # type: ignore[arg-type]

    def f(unet: UNet2DConditionModel, x: Tensor, t: int, text: Tensor, w: float) -> Tensor:
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        consistent: Tensor = c_skip * x + c_out * ddim(x, answer(unet, x, t, text, w), t, -1)
        return consistent

    distances = []
    for i, (t, t_prev) in enumerate(zip(draws.t.tolist(), draws.t_prev.tolist(), strict=True)):
        assert t_prev == max(t - 20, 0)
        text, empty = batch.cond.text[i], batch.uncond.text[0]
        x = scheduler.add_noise(batch.latents[i], eps[i], torch.tensor([t])).double()
        eps_c, eps_u = answer(teacher, x, t, text), answer(teacher, x, t, empty)
        x_prev = ddim(x, eps_c + w[i] * (eps_c - eps_u), t, t_prev)
        distances.append(f(student, x, t, text, float(w[i])) - f(judge, x_prev, t_prev, text, float(w[i])))
    d = torch.stack(distances)
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(float((torch.sqrt(d**2 + 1e-6) - 1e-3).mean()), rel=1e-3)


def test_lcm_teaches_the_embedding_of_w() -> None:
    roles, batch = embedding_cast(), tiny_batch()
    loss = lcm.consistency(batch, roles, seeded(), guidance=(3, 15), settings=LCMSettings(), told_w=True).student
    assert loss is not None
    loss.backward()
    assert float(roles.network("student").time_embedding.cond_proj.weight.grad.abs().sum()) > 0


def test_lcm_can_fix_guidance_as_lcm_lora_does() -> None:
    preset = replace(find_preset("sdxl"), lcm=LCMSettings(guidance=(8.5, 8.5)))
    (stage,) = lcm.LCM().stages(preset)
    roles, batch = tiny_cast(), tiny_batch()
    asked: list[Tensor] = []
    guided = roles.guided
    roles.guided = lambda *args: asked.append(args[-1]) or guided(*args)  # type: ignore[method-assign,func-returns-value]
    stage.losses(batch, roles, seeded())
    assert asked[0].tolist() == [8.5] * 6


def test_only_a_full_unet_is_told_w() -> None:
    (lora,), (unet,) = lcm.LCM().stages(find_preset("sdxl")), lcm.LCM().stages(FULL)
    assert (lora.embeds_guidance, lora.contract.embedded_guidance, lora.learning_rate) == (False, None, 1e-4)
    assert (unet.embeds_guidance, unet.contract.embedded_guidance, unet.learning_rate) == (True, 8.0, 1e-6)
    assert unet.contract.guidance_scale <= 1
    assert SamplerContract.from_json(unet.contract.to_json()).embedded_guidance == 8.0


def test_a_lora_cant_be_told_w() -> None:
    with pytest.raises(InputError, match="--student unet"):
        Roles(tiny_unet(), NoiseSchedule.from_config(SD), rank=2, embeds_guidance=True)


def test_a_contract_has_one_kind_of_guidance() -> None:
    with pytest.raises(InputError, match="both"):
        SamplerContract("LCMScheduler", {1: (999,)}, guidance_scale=7.5, embedded_guidance=8.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("rivals") / "base")


def test_embedded_guidance_is_what_diffusers_pipeline_does(base: Path) -> None:
    """A full UNet of LCM, sampled by our harness and by the stock pipeline with guidance_scale g."""
    pipe = load_base(str(base))
    roles = Roles(pipe.unet, tiny_cast().schedule, rank=2, kind="unet", embeds_guidance=True)
    with torch.no_grad():
        roles.network("ema").time_embedding.cond_proj.weight.normal_(std=0.2)
    pipe.unet = roles.network("ema")
    (stage,) = lcm.LCM().stages(FULL)
    ours = {
        g: sample_latents(pipe, replace(stage.contract, embedded_guidance=g), 4, encode_prompts(pipe, ["a"]), [3])
        for g in (3.0, 8.0)
    }
    assert not torch.allclose(ours[3.0], ours[8.0], rtol=1e-2)
    pipe.scheduler = stage.contract.make_scheduler(pipe.scheduler.config)
    for g, latents in ours.items():
        theirs = pipe(
            ["a"], num_inference_steps=4, timesteps=list(stage.contract.timesteps[4]), guidance_scale=g,
            latents=None, generator=[torch.Generator().manual_seed(3)], output_type="latent",
        )  # fmt: skip
        torch.testing.assert_close(latents, theirs.images, rtol=1e-3, atol=1e-3)


def test_embedded_guidance_needs_a_unet_that_embeds_it(base: Path) -> None:
    pipe = load_base(str(base))
    (stage,) = lcm.LCM().stages(FULL)
    with pytest.raises(InputError, match="embeds none"):
        sample_latents(pipe, stage.contract, 1, encode_prompts(pipe, ["a"]), [3])


# TCD


def test_tcds_end_is_uniform_from_the_clean_end_up() -> None:
    ends = Counter(tcd.draw_end(torch.full((40_000,), 79), 20, seeded()).tolist())
    assert set(ends) == {0, 19, 39, 59, 79}
    assert all(abs(count / 40_000 - 0.2) < 0.01 for count in ends.values())  # 5 standard errors


def test_tcds_gamma_is_of_sampling_alone() -> None:
    preset = find_preset("sdxl")
    other = replace(preset, tcd=replace(preset.tcd, eta=0.9))
    (stage,), (changed,) = tcd.TCD().stages(preset), tcd.TCD().stages(other)
    assert (stage.contract.eta, changed.contract.eta) == (0.3, 0.9)
    losses = [one.losses(tiny_batch(), tiny_cast(), seeded()).student for one in (stage, changed)]
    assert torch.equal(*(loss.detach() for loss in losses if loss is not None))


# SDXL-Lightning: spans


@pytest.mark.parametrize(("before", "n"), [(128, 32), (64, 32), (32, 8), (8, 4), (4, 2), (8, 2), (2, 1), (4, 1)])
def test_spans_cover_exactly_the_trailing_schedule(before: int, n: int) -> None:
    span = lightning.draw_span(tiny_batch(600), tiny_cast(), seeded(), before, n)
    student, teacher = [*trailing(n), -1], [*trailing(before), -1]
    assert {*zip(span.t.tolist(), span.s.tolist(), strict=True)} == set(pairwise(student))
    walks = {tuple(stops) for stops in span.stops.tolist()}
    assert {step for walk in walks for step in pairwise(walk)} == set(pairwise(teacher))


def test_at_the_start_of_sampling_there_is_nothing_but_noise() -> None:
    """Section 3.5: at T the student starts from sigma_T eps, without the picture that noise at T still holds."""
    batch = tiny_batch(64)
    bright = replace(batch, z0=batch.latents + 100)
    spans = [lightning.draw_span(each, tiny_cast(), seeded(), 8, 4) for each in (batch, bright)]
    pure = spans[0].t == 999
    assert 0 < int(pure.sum()) < 64
    assert torch.equal(spans[0].x[pure], spans[1].x[pure])
    assert not torch.isclose(spans[0].x[~pure], spans[1].x[~pure]).any()
    sigma = (1 - ABAR[999]).sqrt()
    assert float(spans[0].x[pure].std()) == pytest.approx(float(sigma), rel=0.1)


@pytest.mark.parametrize(("before", "n"), [(2, 1), (4, 1), (4, 2), (8, 2)])
def test_few_step_students_also_start_in_between(before: int, n: int) -> None:
    span = lightning.draw_span(tiny_batch(200), tiny_cast(), seeded(), before, n, train_points=4)
    length = 1000 // n
    want = {(t, max(t - length, -1)) for t in (249, 499, 749, 999)}
    assert {*zip(span.t.tolist(), span.s.tolist(), strict=True)} == want
    for stops in span.stops.tolist():
        assert stops == [max(stops[0] - i * 1000 // before, -1) for i in range(before // n + 1)]


def test_who_has_arrived_at_the_clean_end_stays() -> None:
    """The walk from 250 by a teacher of four steps is its one step, whatever the others of the batch still do."""
    roles, batch = tiny_cast("previous", "older"), tiny_batch()
    span = lightning.draw_span(batch, roles, seeded(), 4, 1, train_points=4)
    assert {249, 999} < set(span.t.tolist())
    walked = lightning.walk(batch, roles, span, teacher="older")
    for i, stops in enumerate(span.stops.tolist()):
        x = span.x[i].double()
        for t, s in pairwise(sorted({*stops}, reverse=True)):
            with roles.acting("older") as unet:
                x = ddim(x, answer(unet, x, t, batch.cond.text[i]), t, s)
        torch.testing.assert_close(walked[i].double(), x, rtol=1e-3, atol=1e-3)


# SDXL-Lightning: stages


def test_a_share_of_nothing_drops_its_stage() -> None:
    stages = lightning.Lightning().stages(find_preset("sdxl"))
    assert [stage.name for stage in stages] == [
        "32-guided-mse", "8-conditional", "8-unconditional", "4-conditional", "4-unconditional",
        "2-conditional", "2-unconditional", "1-conditional", "1-unconditional",
    ]  # fmt: skip
    assert sum(stage.images for stage in stages) == find_preset("sdxl").images
    assert [stage.name for stage in stages if stage.new_previous] == [f"{n}-conditional" for n in (8, 4, 2, 1)]


def test_warm_up_starts_a_step_count_where_it_has_a_share() -> None:
    stages = named(lightning.Lightning().stages(find_preset("pocket")))
    assert len(stages) == 13
    assert [name for name, stage in stages.items() if stage.new_previous] == [f"{n}-mse" for n in (8, 4, 2, 1)]


@pytest.mark.parametrize("student", ["lora", "unet"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_each_step_count_publishes_its_last_stage(preset: str, student: str) -> None:
    stages = lightning.Lightning().stages(replace(find_preset(preset), student=student))  # type: ignore[arg-type]
    published = {stage.export: stage.contract for stage in stages if "/" not in stage.export}
    assert list(published) == [f"lightning-{n}steps" for n in (8, 4, 2, 1)]
    assert len({stage.export for stage in stages}) == len(stages)
    assert stages[0].export.startswith("stages/")


def test_rates_and_optimizers_are_the_papers() -> None:
    lora, unet = (lightning.Lightning().stages(replace(find_preset("sdxl"), student=kind)) for kind in ("lora", "unet"))
    for stages, rate in ((lora, 1e-6), (unet, 5e-7)):
        assert (stages[0].learning_rate, stages[0].betas) == (1e-5, (0.9, 0.999))
        players = [stage for stage in stages[1:] if stage.opponents]
        assert {stage.learning_rate for stage in players} == {rate}
        assert {opponent.learning_rate for stage in players for opponent in stage.opponents} == {rate}
        assert {stage.betas for stage in players} == {(0.0, 0.99)}
    assert find_preset("sdxl").lightning.guidance == 6.0


def test_only_the_one_step_unet_changes_form() -> None:
    unet, lora = lightning.Lightning().stages(FULL), lightning.Lightning().stages(find_preset("sdxl"))
    assert [stage.name for stage in unet if stage.prediction_type == "sample"] == [
        "1-convert", "1-conditional", "1-unconditional",
    ]  # fmt: skip
    assert all((stage.contract.prediction_type == "sample") == (stage.prediction_type == "sample") for stage in unet)
    assert named(unet)["1-convert"].new_previous
    assert all(stage.prediction_type is None for stage in lora)
    kept = replace(FULL, lightning=replace(FULL.lightning, one_step_x0=False))
    assert all(stage.prediction_type is None for stage in lightning.Lightning().stages(kept))


def test_full_weights_may_go_on_with_the_last_objective() -> None:
    merged = replace(FULL, lightning=replace(FULL.lightning, merge=True))
    names = [stage.name for stage in lightning.Lightning().stages(merged)]
    assert names[1:4] == ["8-conditional", "8-unconditional", "8-full"]
    with pytest.raises(InputError, match="--student unet"):
        lightning.Lightning().stages(replace(merged, student="lora"))


def test_the_last_step_counts_skip_a_level() -> None:
    stages = named(lightning.Lightning().stages(FULL))
    assert {name for name, stage in stages.items() if stage.older} == {"2-unconditional", "1-unconditional"}
    walked: dict[str, tuple[int, set[str]]] = {}
    for name in ("2-conditional", "2-unconditional", "1-conditional", "1-unconditional"):
        roles, batch = tiny_cast("previous", "older"), tiny_batch()
        roles.discriminator = Discriminator(roles, conditional="unconditional" not in name)
        asked: list[str] = []
        predict = roles.predict
        roles.predict = lambda role, *args, **kw: asked.append(role) or predict(role, *args, **kw)  # type: ignore[method-assign,func-returns-value]  # noqa: B023
        stages[name].losses(batch, roles, seeded())
        walked[name] = (sum(role in ("previous", "older") for role in asked), {*asked} - {"student"})
    assert walked == {
        "2-conditional": (2, {"previous"}), "2-unconditional": (4, {"older"}),
        "1-conditional": (2, {"previous"}), "1-unconditional": (4, {"older"}),
    }  # fmt: skip
    flat = replace(FULL, lightning=replace(FULL.lightning, skip_level=False))
    assert not any(stage.older for stage in lightning.Lightning().stages(flat))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"chain": (32, 12)}, "whole part"), ({"chain": (8, 8)}, "whole part"), ({"teacher_steps": 100}, "whole part"),
     ({"shares": (0.0, 0.0, 0.0)}, "not be negative"), ({"shares": (-1.0, 1.0, 1.0)}, "not be negative"),
     ({"chain": (6, 3, 1), "teacher_steps": 12}, "train_points")],
)  # fmt: skip
def test_a_chain_that_cant_be_trained_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LightningSettings(**settings)  # type: ignore[arg-type]


# SDXL-Lightning: x0 form


def test_one_euler_step_returns_exactly_the_x0_students_prediction() -> None:
    roles, batch = tiny_cast("previous", kind="unet"), tiny_batch()
    roles.student_predicts = "sample"
    span = lightning.draw_span(batch, roles, seeded(), 2, 1)
    with torch.no_grad():
        reached = lightning.student_step(batch, roles, span)
        output = roles.network("student")(span.x, span.t, encoder_hidden_states=batch.cond.text).sample
    torch.testing.assert_close(reached, output, rtol=1e-4, atol=1e-4)
    contract = named(lightning.Lightning().stages(FULL))["1-unconditional"].contract
    scheduler = contract.make_scheduler(SD)
    assert isinstance(scheduler, EulerDiscreteScheduler)
    contract.set_timesteps(scheduler, 1)
    eps = span.x / roles.schedule.sigma(span.t).float()
    x = eps * scheduler.init_noise_sigma
    x_in = scheduler.scale_model_input(x, scheduler.timesteps[0])
    torch.testing.assert_close(x_in, span.x, rtol=1e-5, atol=1e-5)  # training sees what Euler feeds
    ended = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(ended, output, rtol=1e-4, atol=1e-4)


def test_only_student_and_ema_are_in_x0_form() -> None:
    roles, batch = tiny_cast("previous", kind="unet"), tiny_batch()
    t = torch.full((6,), 500)
    before = {role: roles.predict(role, batch.latents, t, batch.cond) for role in ("teacher", "previous", "ema")}
    roles.student_predicts = "sample"
    after = {role: roles.predict(role, batch.latents, t, batch.cond) for role in before}  # type: ignore[arg-type]
    assert torch.equal(before["teacher"], after["teacher"])
    assert torch.equal(before["previous"], after["previous"])
    x0 = roles.schedule.x0(batch.latents, after["ema"], t)
    torch.testing.assert_close(x0, before["ema"], rtol=1e-3, atol=1e-4)  # the same output, read as x0


def test_the_switch_to_x0_form_is_equation_29() -> None:
    roles, batch = tiny_cast("previous", kind="unet"), tiny_batch()
    roles.student_predicts = "sample"
    settings = LightningSettings()
    loss = lightning.convert(batch, roles, seeded(), before=2, n=1, settings=settings).student
    span = lightning.draw_span(batch, roles, seeded(), 2, 1, 4)
    per_image = []
    for i, t in enumerate(span.t.tolist()):
        x, text = span.x[i].double(), batch.cond.text[i]
        frozen = ddim(x, answer(roles.network("previous"), x, t, text), t, -1)
        per_image.append((answer(roles.network("student"), x, t, text) - frozen).square().mean())
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(float(torch.stack(per_image).mean()), rel=1e-3)


# SDXL-Lightning: what the discriminator sees


def test_noise_levels_are_drawn_5_to_1() -> None:
    chosen = find_preset("sdxl").lightning
    for weights, share in ((chosen.conditional_weights, 1 / 4), (chosen.unconditional_weights, 5 / 8)):
        drawn = Counter(lightning.draw_noise_level(40_000, chosen.discriminator_timesteps, weights, seeded()).tolist())
        assert set(drawn) == set(STABLE)
        others = (1 - share) / 3
        assert drawn[9] / 40_000 == pytest.approx(share, abs=0.0125)  # 5 standard errors
        assert all(drawn[t] / 40_000 == pytest.approx(others, abs=0.0125) for t in STABLE[1:])


@pytest.mark.parametrize("conditional", [True, False])
def test_the_one_step_discriminator_sees_both_latents_noised_alike(
    monkeypatch: pytest.MonkeyPatch, conditional: bool
) -> None:
    """Equations 25 and 26, by their definition: D(forward(x0, eps*, t*), t*, c), beside x_t's features or not."""
    roles, batch = tiny_cast("previous"), tiny_batch()
    roles.discriminator = Discriminator(roles, conditional)
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(roles: Roles, role: object, x: Tensor, t: Tensor, cond: object) -> list[Tensor]:
        seen.append((x.detach(), t))
        return features(roles, role, x, t, cond)  # type: ignore[arg-type]

    monkeypatch.setattr("distill.discriminator.features", spy)
    lightning.adversarial(
        batch, roles, seeded(), before=2, n=1, settings=LightningSettings(), noise_weights=(5.0, 1.0, 1.0, 1.0)
    )
    span = lightning.draw_span(batch, roles, rng := seeded(), 2, 1, 4)
    t_star = lightning.draw_noise_level(6, STABLE, (5.0, 1.0, 1.0, 1.0), rng)
    eps = draw_noise(span.x, rng)
    scheduler = DDIMScheduler(**SD)
    real = scheduler.add_noise(lightning.walk(batch, roles, span), eps, t_star)
    with torch.no_grad():
        fake = scheduler.add_noise(lightning.student_step(batch, roles, span), eps, t_star)
    looked_at = [(span.x, span.t)] if conditional else []
    looked_at += [(fake, t_star), (real, t_star)]
    assert len(seen) == len(looked_at)
    for (x, t), (want_x, want_t) in zip(seen, looked_at, strict=True):
        assert torch.equal(t, want_t)
        torch.testing.assert_close(x, want_x, rtol=1e-4, atol=1e-4)


def test_students_of_more_steps_are_judged_where_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    roles, batch = tiny_cast("previous"), tiny_batch()
    roles.discriminator = Discriminator(roles, conditional=False)
    judged: list[Tensor] = []

    def spy(roles: Roles, role: object, x: Tensor, t: Tensor, cond: object) -> list[Tensor]:
        judged.append(t)
        return features(roles, role, x, t, cond)  # type: ignore[arg-type]

    monkeypatch.setattr("distill.discriminator.features", spy)
    named(lightning.Lightning().stages(find_preset("sdxl")))["4-unconditional"].losses(batch, roles, seeded())
    span = lightning.draw_span(batch, roles, seeded(), 8, 4)
    assert all(torch.equal(t, span.s.clamp(min=0)) for t in judged)


@pytest.mark.parametrize("student", ["lora", "unet"])
@pytest.mark.parametrize("method", [lcm.LCM(), tcd.TCD(), lightning.Lightning()], ids=lambda method: method.name)
def test_every_stage_trains(method: Method, student: Kind) -> None:
    """One batch through each stage's loss, full weights too: finite, and gradient for the student."""
    tiny = find_preset("tiny")
    chosen = replace(tiny, student=student, lightning=replace(tiny.lightning, merge=student == "unet"))
    stages, batch = method.stages(chosen), tiny_batch(4)
    roles = embedding_cast() if stages[0].embeds_guidance else tiny_cast("previous", "older", kind=student)
    for stage in stages:
        roles.student_predicts = stage.prediction_type
        for opponent in stage.opponents:
            assert opponent.make is not None
            roles.discriminator = opponent.make(roles)
        losses = stage.losses(batch, roles, seeded())
        assert losses.student is not None
        gradients = torch.autograd.grad(losses.student, roles.parameters("student"), allow_unused=True)
        reached = [gradient for gradient in gradients if gradient is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in reached), stage.name
        assert any(bool(gradient.any()) for gradient in reached), stage.name
        assert set(losses.opponents) == {opponent.name for opponent in stage.opponents}


def test_lightnings_contracts_are_the_published_ones() -> None:
    assert euler_trailing((4,)).timesteps[4] == (999, 749, 499, 249)
    for stage in lightning.Lightning().stages(find_preset("sdxl")):
        assert stage.contract.scheduler == "EulerDiscreteScheduler"
        assert stage.contract.guidance_scale == 0.0
