from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from distill.batch import Batch, Condition
from distill.checkpoint import Position
from distill.discriminator import Discriminator, features, play
from distill.export import Exported
from distill.methods import hyper_sd
from distill.roles import Adapter, Kind, Role, Roles, guidance_embedding
from distill.schedule import NoiseSchedule
from distill.stages import Stage
from hypersd_bench import registry
from hypersd_bench.errors import InputError
from tests.tiny_cast import SD, scatter, tiny_batch, tiny_cast, tiny_unet
from tests.tiny_runs import pipe_of, trainer_of

Inputs = tuple[Tensor, Tensor, Condition]
TRAINED_WITH: dict[str, tuple[Adapter, ...]] = {"teacher": (), "backbone": ("backbone",)}
ALL: tuple[Adapter, ...] = ("student", "ema", "previous", "critic", "feedback", "backbone")
ANSWERING: tuple[Role, ...] = ("teacher", "student", "ema", "previous", "critic", "backbone")


@pytest.fixture
def roles() -> Roles:
    return tiny_cast(*ALL[2:])


@pytest.fixture(params=["lora", "unet"])
def either(request: pytest.FixtureRequest) -> Roles:
    others = ALL[2:] if request.param == "lora" else ("previous", "critic", "backbone")
    return tiny_cast(*others, kind=request.param)


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(9)
    x, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 8, generator=generator)
    return x, torch.tensor([0, 499, 999]), Condition(text)


def trainable(roles: Roles) -> set[str]:
    """The roles with any parameter that asks for gradient; no weight of the base does."""
    owner = {id(parameter): adapter for adapter in roles.adapters for parameter in roles.parameters(adapter)}
    unets = {id(roles.network(role)): roles.network(role) for role in ANSWERING if role in roles._members}
    return {
        owner.get(id(parameter), "base")
        for unet in unets.values()
        for parameter in unet.parameters()
        if parameter.requires_grad
    }


def with_gradient(roles: Roles) -> set[str]:
    assert all(p.grad is None for name, p in roles.unet.named_parameters() if ".lora_" not in name)
    return {adapter for adapter in roles.adapters if any(p.grad is not None for p in roles.parameters(adapter))}


def snapshot(roles: Roles, *adapters: Adapter) -> dict[str, list[Tensor]]:
    return {adapter: [p.detach().clone() for p in roles.parameters(adapter)] for adapter in adapters}


def unchanged(roles: Roles, before: dict[str, list[Tensor]]) -> set[str]:
    return {
        adapter
        for adapter, values in before.items()
        if all(torch.equal(a, b) for a, b in zip(values, roles.parameters(cast(Adapter, adapter)), strict=True))
    }


def test_the_teacher_is_the_base_to_the_bit(either: Roles, inputs: Inputs) -> None:
    x, t, cond = inputs
    with torch.no_grad():
        base = tiny_unet()(x, t, encoder_hidden_states=cond.text).sample
    for before in ("student", "critic", "ema"):
        either.predict(before, *inputs)  # whoever spoke before
        assert torch.equal(either.predict("teacher", *inputs), base)
    assert not torch.equal(either.predict("student", *inputs).detach(), base)


def test_every_role_answers_with_its_own_weights(either: Roles, inputs: Inputs) -> None:
    answers = [either.predict(role, *inputs).detach() for role in ANSWERING]
    assert all(not torch.allclose(a, b) for i, a in enumerate(answers) for b in answers[:i])
    either.copy("student", "ema")
    assert torch.equal(either.predict("ema", *inputs), either.predict("student", *inputs).detach())


@pytest.mark.parametrize("kind", ["lora", "unet"])
def test_a_new_role_is_the_teacher(kind: Any, inputs: Inputs) -> None:
    roles = Roles(tiny_unet(), NoiseSchedule.from_config(SD), rank=2, kind=kind)
    for adapter in ("previous", "critic"):
        roles.add(adapter)
    for role in ("student", "ema", "previous", "critic"):
        answer = roles.predict(role, *inputs).detach()
        assert torch.equal(answer, roles.predict("teacher", *inputs))


def test_a_reset_role_is_the_teacher_again(roles: Roles, inputs: Inputs) -> None:
    others = snapshot(roles, "student", "ema", "previous", "feedback", "backbone")
    roles.reset("critic")
    assert torch.equal(roles.predict("critic", *inputs), roles.predict("teacher", *inputs))
    assert unchanged(roles, others) == others.keys()


def test_only_the_student_receives_gradient(either: Roles, inputs: Inputs) -> None:
    student = either.predict("student", *inputs)
    for role in ANSWERING:
        if role != "student":
            assert not either.predict(role, *inputs).requires_grad
    student.square().mean().backward()  # after other roles had their turn
    assert with_gradient(either) == {"student"}
    assert all(parameter.grad is not None for parameter in either.parameters("student"))


@pytest.mark.parametrize("role", ANSWERING)
def test_who_speaks_does_not_decide_who_is_trained(either: Roles, role: Role) -> None:
    with either.acting(role):
        assert trainable(either) == {"student"}
    with pytest.raises(RuntimeError), either.acting(role):
        raise RuntimeError
    assert trainable(either) == {"student"}
    assert either._active == "student"


@pytest.mark.parametrize("adapter", ["critic", "backbone"])
def test_a_trained_opponent_receives_gradient_beside_the_student(either: Roles, inputs: Inputs, adapter: Any) -> None:
    either.train("student", adapter)
    assert trainable(either) == {"student", adapter}
    assert not either.predict(adapter, *inputs).requires_grad  # a score is not a loss
    either.predict(adapter, *inputs, grad=True).square().mean().backward()
    assert with_gradient(either) == {adapter}
    either.train("student")
    assert trainable(either) == {"student"}


def test_the_critics_loss_reaches_the_critic_alone(roles: Roles) -> None:
    roles.train("student", "critic")
    batch = tiny_batch(2)
    hyper_sd.practice(batch, roles, torch.Generator().manual_seed(1), told=999).opponents["critic"].backward()
    assert with_gradient(roles) == {"critic"}


def test_feedback_is_a_lora_on_the_frozen_student(roles: Roles, inputs: Inputs) -> None:
    roles.reset("feedback")
    student = roles.predict("student", *inputs).detach()
    roles.train("feedback")
    roles.copy("feedback", "ema")
    torch.testing.assert_close(roles.predict("student", *inputs).detach(), student, rtol=1e-5, atol=1e-6)
    scatter(roles)
    merged = roles.predict("student", *inputs)
    assert not torch.allclose(merged, student)
    merged.square().mean().backward()
    assert with_gradient(roles) == {"feedback"}
    assert trainable(roles) == {"feedback"}


def test_feedback_adds_up_with_the_student(roles: Roles, inputs: Inputs) -> None:
    """B2 A2 x + B1 A1 x: one layer's answer under student and feedback is the sum of both corrections."""
    layer: Any = next(
        module for name, module in roles.unet.named_modules() if name.endswith("mid_block.resnets.0.conv1")
    )
    x = torch.randn(1, 16, 4, 4)

    def correction(adapter: str) -> Tensor:
        return layer.lora_B[adapter](layer.lora_A[adapter](x)) * layer.scaling[adapter]  # type: ignore[no-any-return]

    roles.train("feedback")
    with roles.acting("student"), torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base_layer(x) + correction("student") + correction("feedback"))
    with roles.acting("ema"), torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base_layer(x) + correction("student") + correction("ema"))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_feedback_is_merged_at_its_ratio(roles: Roles, ratio: float) -> None:
    """B = B_student + ratio B_feedback on the student's own A, whatever the mean of the feedback is."""
    roles.start_feedback()
    roles.train("feedback")
    roles.copy("feedback", "ema")
    with torch.no_grad():
        for b in roles.parameters("ema"):
            b.add_(torch.randn_like(b))
    before = snapshot(roles, "student", "ema")
    roles.merge_feedback(ratio)
    rows = zip(roles.parameters("ema"), before["student"], before["ema"], roles._is_b, strict=True)
    for merged, student, mean, is_b in rows:
        torch.testing.assert_close(merged.detach(), student + ratio * mean if is_b else mean)
    assert unchanged(roles, {"student": before["student"]}) == {"student"}


def test_after_feedback_the_student_is_alone_again(roles: Roles, inputs: Inputs) -> None:
    student = roles.predict("student", *inputs).detach()
    roles.train("feedback")
    assert not torch.equal(roles.predict("student", *inputs).detach(), student)
    roles.train("student")
    assert torch.equal(roles.predict("student", *inputs).detach(), student)


def test_training_feedback_leaves_the_student_as_it_was(roles: Roles, inputs: Inputs) -> None:
    before = snapshot(roles, "student", "previous", "critic", "backbone")
    feedback = snapshot(roles, "feedback")
    roles.train("feedback")
    optimizer = torch.optim.AdamW(roles.parameters("feedback"), lr=0.1)
    for _ in range(3):
        roles.predict("student", *inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        roles.update_ema(0.5)
    assert unchanged(roles, before) == before.keys()
    assert unchanged(roles, feedback) == set()


def test_a_full_student_is_a_unet_of_its_own(inputs: Inputs) -> None:
    roles = tiny_cast("previous", "critic", kind="unet")
    base = {id(parameter) for parameter in roles.unet.parameters()}
    for adapter in ("student", "ema", "previous"):
        assert not base & {id(parameter) for parameter in roles.parameters(adapter)}
        assert len(roles.state(adapter)) == len(tiny_unet().state_dict())
    assert roles.network("student") is not roles.unet
    assert roles.network("critic") is roles.unet


def test_an_embedding_of_guidance_starts_silent_and_then_matters(inputs: Inputs) -> None:
    roles = Roles(tiny_unet(), NoiseSchedule.from_config(SD), rank=2, kind="unet", embeds_guidance=True)
    w = torch.tensor([2.0, 7.0, 14.0])
    assert torch.equal(roles.predict("student", *inputs, w=w).detach(), roles.predict("teacher", *inputs))
    torch.nn.init.normal_(roles.network("student").time_embedding.cond_proj.weight)
    answers = [roles.predict("student", *inputs, w=value).detach() for value in (w, w + 1)]
    assert not torch.allclose(answers[0], answers[1])
    with pytest.raises(InputError, match="--student unet"):
        Roles(tiny_unet(), NoiseSchedule.from_config(SD), rank=2, embeds_guidance=True)


def test_the_embedding_of_guidance_is_that_of_diffusers_pipelines() -> None:
    from diffusers import LatentConsistencyModelPipeline

    w = torch.tensor([0.0, 2.0, 7.5, 14.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(SimpleNamespace(), w, embedding_dim=256)
    torch.testing.assert_close(guidance_embedding(w), theirs, rtol=1e-4, atol=1e-4)


def test_a_role_owns_its_parameters_and_shares_none(either: Roles) -> None:
    owners = [{id(parameter) for parameter in either.parameters(adapter)} for adapter in either.adapters]
    assert all(owners)
    assert len(set().union(*owners)) == sum(map(len, owners))


def test_a_rank_above_a_layers_width_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"rank 64 is larger than the base's layer .* at most \d+"):
        Roles(tiny_unet(), NoiseSchedule.from_config(SD), rank=64)


def test_the_running_mean_is_the_papers(either: Roles) -> None:
    before = snapshot(either, "ema")["ema"]
    either.update_ema(0.95)
    for old, new, student in zip(before, either.parameters("ema"), either.parameters("student"), strict=True):
        torch.testing.assert_close(new, 0.95 * old + 0.05 * student)
    assert not any(parameter.requires_grad for parameter in either.parameters("ema"))


def test_the_running_mean_of_feedback_is_feedbacks(roles: Roles) -> None:
    before = snapshot(roles, "ema")["ema"]
    roles.train("feedback")
    roles.update_ema(0.9)
    for old, new, lora in zip(before, roles.parameters("ema"), roles.parameters("feedback"), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * lora)


def test_guidance_is_the_usual_form_in_one_forward(roles: Roles, inputs: Inputs) -> None:
    x, t, cond = inputs
    uncond, g = Condition(torch.zeros(1, 5, 8)), torch.tensor([1.0, 2.0, 4.0])
    calls: list[int] = []
    handle = roles.unet.register_forward_hook(lambda *_: calls.append(1))
    guided = roles.guided(x, t, cond, uncond, g)
    handle.remove()
    assert len(calls) == 1
    eps_c, eps_u = roles.predict("teacher", x, t, cond), roles.predict("teacher", x, t, uncond.expand(3))
    torch.testing.assert_close(guided, eps_u + g[:, None, None, None] * (eps_c - eps_u), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided[0], eps_c[0], rtol=1e-4, atol=1e-5)  # g = 1 is no guidance


@pytest.mark.parametrize("role", ["teacher", "backbone"])
def test_features_are_those_inside_the_unet(roles: Roles, inputs: Inputs, role: Any) -> None:
    seen: list[Tensor] = []
    hooks = [
        roles.unet.down_blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(out[0])),
        roles.unet.down_blocks[1].register_forward_hook(lambda _m, _i, out: seen.append(out[0])),
        roles.unet.mid_block.register_forward_hook(lambda _m, _i, out: seen.append(out)),
    ]
    roles.predict(role, *inputs)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(features(roles, role, *inputs), seen, strict=True))


# what is recomputed in the backward pass must be what was computed, whoever has spoken in between


def gradients(roles: Roles, adapter: Adapter, loss: Tensor) -> list[Tensor]:
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in roles.parameters(adapter)]
    for each in roles.adapters:
        for parameter in roles.parameters(each):
            parameter.grad = None
    return found


@pytest.mark.parametrize("between", ANSWERING)
def test_checkpointing_gives_the_same_gradients_whoever_spoke_in_between(
    either: Roles, inputs: Inputs, between: Role
) -> None:
    def student_gradients() -> list[Tensor]:
        loss = either.predict("student", *inputs).square().mean()
        either._activate(between)  # and still speaks when backward runs
        found = gradients(either, "student", loss)
        either._activate("student")
        return found

    plain = student_gradients()
    either.enable_checkpointing()
    calls: list[int] = []
    block = either.network("student").down_blocks[0].resnets[0]
    handle = block.register_forward_pre_hook(lambda *_: calls.append(1))  # recomputing stops before the end
    recomputed = student_gradients()
    handle.remove()
    assert len(calls) == 2  # once forward, once in backward
    assert any(bool(g.any()) for g in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_checkpointing_gives_feedback_and_critic_the_same_gradients(roles: Roles, inputs: Inputs) -> None:
    def both() -> list[Tensor]:
        roles.train("feedback", "critic")
        feedback = roles.predict("student", *inputs).square().mean()
        critic = roles.predict("critic", *inputs, grad=True).square().mean()
        return gradients(roles, "feedback", feedback) + gradients(roles, "critic", critic)

    plain = both()
    roles.enable_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, both(), strict=True))


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("backbone", ["teacher", "backbone"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_player_learns_from_its_own_loss(
    roles: Roles, inputs: Inputs, conditional: bool, backbone: Any, checkpointing: bool
) -> None:
    roles.train("student", *TRAINED_WITH[backbone])
    roles.discriminator = discriminator = Discriminator(roles, conditional, backbone)
    if checkpointing:
        roles.enable_checkpointing()
    x, t, cond = inputs
    fake = roles.predict("student", x, t, cond)
    match = play(roles, x, fake, torch.tensor([-1, 249, 499]), cond, origin=(x, t))
    match.generator.backward()
    assert with_gradient(roles) == {"student"}
    assert any(bool(p.grad.any()) for p in roles.parameters("student") if p.grad is not None)
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    roles.unet.zero_grad()
    match.discriminator.backward()
    assert with_gradient(roles) == ({"backbone"} if backbone == "backbone" else set())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    assert discriminator(features(roles, backbone, x, t, cond), features(roles, backbone, x, t, cond) if conditional
                         else None).shape == (3, 3)  # two encoder blocks and the mid block  # fmt: skip


@pytest.mark.parametrize("backbone", ["teacher", "backbone"])
def test_checkpointing_gives_both_players_the_same_gradients(roles: Roles, inputs: Inputs, backbone: Any) -> None:
    roles.train("student", *TRAINED_WITH[backbone])
    torch.manual_seed(3)
    roles.discriminator = Discriminator(roles, True, backbone)
    x, t, cond = inputs

    def both() -> list[Tensor]:
        match = play(roles, x, roles.predict("student", x, t, cond), torch.tensor([-1, 249, 499]), cond, (x, t))
        student = gradients(roles, "student", match.generator)
        return student + gradients(roles, "backbone", match.discriminator)

    plain = both()
    roles.enable_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, both(), strict=True))


# what the loop does with the cast, at the start of every stage of every method


def beginnings(name: str, kind: Kind = "lora") -> Any:
    """A trainer on the tiny UNet, whose stages need no pictures looked at."""
    trainer: Any = trainer_of(name, pipe_of(tiny_unet(), SD), kind)
    trainer._judges = lambda stage: None
    return trainer


@pytest.mark.parametrize("kind", ["lora", "unet"])
@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_no_optimizer_ever_holds_another_roles_parameters(name: str, kind: Kind) -> None:
    trainer = beginnings(name, kind)
    roles: Roles = trainer.roles
    for stage in trainer.stages:
        trainer._begin(stage, None)
        others = {opponent.role for opponent in stage.opponents if opponent.role}
        assert trainable(roles) == {stage.trains, *others}
        held = {
            optimizer: [p for group in trainer.optimizers[optimizer].param_groups for p in group["params"]]
            for optimizer in trainer.optimizers
        }
        assert held.keys() == {"student", *(opponent.name for opponent in stage.opponents)}
        own = roles.parameters(stage.trains)
        assert {id(p) for p in held["student"]} == {id(p) for p in own if p.requires_grad}
        assert len(held["student"]) == len(own) // (2 if stage.trains == "feedback" else 1)  # its A is the student's
        for opponent in stage.opponents:
            own = list(roles.parameters(opponent.role)) if opponent.role else []
            assert roles.discriminator is not None or opponent.make is None
            own += list(roles.discriminator.parameters()) if opponent.make and roles.discriminator else []
            assert {id(p) for p in held[opponent.name]} == {id(p) for p in own}
        everything = [id(p) for parameters in held.values() for p in parameters]
        assert len(set(everything)) == len(everything)
        assert not {id(p) for p in roles.parameters("ema")} & set(everything)


@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_every_stage_starts_from_the_student_before_and_a_fresh_mean(name: str) -> None:
    trainer = beginnings(name)
    roles: Roles = trainer.roles
    for stage in trainer.stages:
        scatter(roles)  # as if the stage before had trained everybody
        before = snapshot(roles, "student")
        trainer._begin(stage, None)
        assert unchanged(roles, before) == {"student"}
        assert unchanged(roles, {"ema": [p.detach() for p in roles.parameters(stage.trains)]}) == {"ema"}
        if stage.new_previous:
            assert unchanged(roles, {"previous": before["student"]}) == {"previous"}
        fresh = {"critic", "backbone", *(["feedback"] if stage.trains == "feedback" else [])}
        for adapter in fresh & set(roles.adapters):
            b = [p for n, p in roles.unet.named_parameters() if f".lora_B.{adapter}." in n]
            assert all(not bool(p.any()) for p in b)  # no opinion yet


def test_finishing_a_feedback_stage_hands_on_the_student_it_found(tmp_path: Path) -> None:
    trainer = beginnings("hyper-sd")
    roles: Roles = trainer.roles
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"")
    trainer.exporter = SimpleNamespace(export=lambda *_: Exported(weights, weights, 0.0))
    trainer.run = SimpleNamespace(
        path=tmp_path, finish_stage=lambda entry: None, manifest={"settings": {"base_unet_sha256": ""}}
    )
    trainer.data = SimpleNamespace(batch=lambda *_: tiny_batch(2))
    trainer._save = lambda: None
    stages: dict[str, Stage] = {stage.name: stage for stage in trainer.stages}
    for name in ("2-segments", "2-feedback"):
        stage = stages[name]
        trainer._begin(stage, None)
        scatter(roles)
        before, mean = snapshot(roles, "student"), snapshot(roles, "ema")
        trainer._finish_stage(stage)
        trainer.position = Position()
        if stage.trains == "student":
            assert unchanged(roles, {"student": mean["ema"]}) == {"student"}
        else:
            assert unchanged(roles, before) == {"student"}


def test_batches_of_one_condition_only(inputs: Inputs) -> None:
    """Rows, expansion and joining of conditions keep what belongs to an image together."""
    cond = Condition(torch.arange(6.0).reshape(3, 2, 1), torch.arange(3.0)[:, None], torch.arange(18.0).reshape(3, 6))
    picked = cond.rows(torch.tensor([2, 0]))
    assert picked.text[:, 0, 0].tolist() == [4, 0]
    assert picked.pooled is not None
    assert picked.pooled.flatten().tolist() == [2, 0]
    assert len(cond.rows(slice(0, 1)).expand(5)) == 5
    batch: Batch = tiny_batch(2)
    assert len(batch) == 2
