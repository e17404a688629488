from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from distill.discriminator import Discriminator, teacher_features
from distill.losses import generator_loss
from distill.methods.lightning import frozen
from distill.roles import Roles
from distill.schedule import NoiseSchedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
    ).eval()  # fmt: skip


@pytest.fixture
def roles() -> Roles:
    cast = Roles(unet(), NoiseSchedule.from_config(SD), rank=2)
    cast.add("previous")
    with torch.no_grad():
        for i, adapter in enumerate(cast.adapters):
            for parameter in cast.parameters(adapter):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    return cast


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 8, generator=generator)
    return x, torch.tensor([0, 499, 999]), text


def trainable(roles: Roles) -> set[str]:
    return {name for name, parameter in roles.unet.named_parameters() if parameter.requires_grad}


def test_the_teacher_is_the_base_to_the_bit(roles: Roles, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, text = inputs
    with torch.no_grad():
        base = unet()(x, t, encoder_hidden_states=text).sample
    assert torch.equal(roles.predict("teacher", x, t, text), base)
    assert not torch.equal(roles.predict("student", x, t, text).detach(), base)


def test_every_role_answers_with_its_own_weights(roles: Roles, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    answers = [roles.predict(role, *inputs).detach() for role in ("teacher", "student", "ema", "previous")]
    assert all(not torch.allclose(a, b) for i, a in enumerate(answers) for b in answers[:i])
    roles.copy("student", "ema")
    assert torch.equal(roles.predict("ema", *inputs), roles.predict("student", *inputs).detach())


def test_a_new_student_is_the_teacher(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    cast = Roles(unet(), NoiseSchedule.from_config(SD), rank=2)
    for role in ("student", "ema"):
        assert torch.equal(cast.predict(role, *inputs).detach(), cast.predict("teacher", *inputs))


def test_only_the_student_receives_gradient(roles: Roles, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    student = roles.predict("student", *inputs)
    for role in ("teacher", "ema", "previous"):
        assert not roles.predict(role, *inputs).requires_grad
    student.square().mean().backward()  # after other roles had their turn
    with_gradient = {name for name, parameter in roles.unet.named_parameters() if parameter.grad is not None}
    assert with_gradient
    assert all(".student." in name for name in with_gradient)
    assert len(with_gradient) == len(roles.parameters("student"))


@pytest.mark.parametrize("role", ["teacher", "student", "ema", "previous"])
def test_only_the_student_is_ever_trainable(roles: Roles, role: str) -> None:
    with roles.acting(role):  # type: ignore[arg-type]
        assert all(".student." in name for name in trainable(roles))
    assert len(trainable(roles)) == len(roles.parameters("student"))


def test_the_student_is_back_after_an_error(roles: Roles) -> None:
    with pytest.raises(RuntimeError), roles.acting("ema"):
        raise RuntimeError
    assert all(".student." in name for name in trainable(roles))


def test_an_adapters_parameters_are_its_own(roles: Roles) -> None:
    names = {id(parameter): name for name, parameter in roles.unet.named_parameters()}
    for adapter in roles.adapters:
        assert all(f".{adapter}." in names[id(parameter)] for parameter in roles.parameters(adapter))


def test_the_running_mean_is_the_papers(roles: Roles) -> None:
    before = [parameter.clone() for parameter in roles.parameters("ema")]
    roles.update_ema(0.95)
    for old, new, student in zip(before, roles.parameters("ema"), roles.parameters("student"), strict=True):
        torch.testing.assert_close(new, 0.95 * old + 0.05 * student)


def test_guidance_is_the_usual_form_in_one_forward(roles: Roles, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, text = inputs
    empty, g = torch.zeros(1, 5, 8), torch.tensor([1.0, 2.0, 4.0])
    calls: list[int] = []
    handle = roles.unet.register_forward_hook(lambda *_: calls.append(1))
    guided = roles.guided(x, t, text, empty, g)
    handle.remove()
    assert len(calls) == 1
    eps_c, eps_u = roles.predict("teacher", x, t, text), roles.predict("teacher", x, t, empty.expand_as(text))
    torch.testing.assert_close(guided, eps_u + g[:, None, None, None] * (eps_c - eps_u), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided[0], eps_c[0], rtol=1e-4, atol=1e-5)  # g = 1 is no guidance


def test_features_are_those_inside_the_teacher(roles: Roles, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    seen: list[Tensor] = []
    hooks = [
        roles.unet.down_blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(out[0])),
        roles.unet.down_blocks[1].register_forward_hook(lambda _m, _i, out: seen.append(out[0])),
        roles.unet.mid_block.register_forward_hook(lambda _m, _i, out: seen.append(out)),
    ]
    roles.predict("teacher", *inputs)
    for hook in hooks:
        hook.remove()
    for ours, theirs in zip(teacher_features(roles, *inputs), seen, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("conditional", [True, False])
def test_the_discriminator_teaches_the_student_and_not_itself(
    roles: Roles, inputs: tuple[Tensor, Tensor, Tensor], conditional: bool
) -> None:
    x, t, text = inputs
    discriminator = Discriminator(roles.unet, conditional)
    fake = roles.predict("student", x, t, text)
    origin = teacher_features(roles, x, t, text) if conditional else None
    with frozen(discriminator):
        logits = discriminator(teacher_features(roles, fake, t, text), origin)
    generator_loss(logits).backward()
    assert logits.shape == (3, 3)  # two encoder blocks and the mid block
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert any(
        bool(parameter.grad.abs().sum() > 0) for parameter in roles.parameters("student") if parameter.grad is not None
    )
    assert all(parameter.requires_grad for parameter in discriminator.parameters())
