"""LoRA formats against diffusers' own loaders; exports against fresh pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from distill import export_verb
from distill.export_verb import export_run, probe
from distill.formats import (
    from_kohya,
    kohya_metadata,
    layers,
    model_spec,
    tensors_sha256,
    to_kohya,
)
from hypersd_bench.errors import HypersdBenchError, InputError
from hypersd_bench.pipelines import load_base
from hypersd_bench.provenance import sha256
from hypersd_bench.sampling import CARD_KEY, METADATA_KEY, read_contract, read_safetensors_metadata, tcd
from tests.tiny_base import make_tiny_base
from tests.tiny_sdxl import make_tiny_sdxl

SUFFIXES = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
            "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")  # fmt: skip
OUTER = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1",
         "add_embedding.linear_2")  # fmt: skip
RANK = 3
CONTRACT = tcd((1, 2, 4, 8))
CREATED = "2026-01-02T03:04:05+00:00"

SD15: dict[str, Any] = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
SDXL: dict[str, Any] = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def random_lora(
    unet: nn.Module, rank: int = RANK, dtype: torch.dtype = torch.float16, seed: int = 0
) -> dict[str, Tensor]:
    """A LoRA on every layer ``distill`` trains, strong enough that a wrong layer shows; conv layers included."""
    rng = torch.Generator().manual_seed(seed)
    lora: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(SUFFIXES):
            weight = module.weight
            a = torch.randn(rank, *weight.shape[1:], generator=rng) / weight[0].numel() ** 0.5
            b = 0.3 * torch.randn(len(weight), rank, *(1,) * (weight.ndim - 2), generator=rng)
            lora |= {f"unet.{name}.lora_A.weight": a.to(dtype), f"unet.{name}.lora_B.weight": b.to(dtype)}
    return lora


def update(pair: tuple[Tensor, Tensor]) -> Tensor:
    """The dense update B A as a matrix (out, in k k)."""
    a, b = pair
    return b.double().flatten(1) @ a.double().flatten(1)


# Key styles


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_every_layer_of_the_real_layouts_comes_back_from_kohya_keys(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    names = [
        n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n.endswith(SUFFIXES + OUTER)
    ]
    assert len(names) > 200
    lora = {}
    for i, name in enumerate(names):  # values tell the layers apart
        lora[f"unet.{name}.lora_A.weight"] = torch.full((2, 1), float(i))
        lora[f"unet.{name}.lora_B.weight"] = torch.full((1, 2), -float(i))
    kohya = to_kohya(lora, unet.config)
    assert len(kohya) == 3 * len(names)
    assert all(float(value) == 2 for key, value in kohya.items() if key.endswith(".alpha"))
    back = from_kohya(kohya, unet.config)
    assert back.keys() == lora.keys()
    assert all(torch.equal(back[key], lora[key]) for key in lora)


@pytest.mark.parametrize(
    ("module", "stability"),
    [  # Stability's names of SDXL's layers, as in its checkpoint
        ("conv_in", "input_blocks_0_0"),
        ("down_blocks.0.resnets.0.conv1", "input_blocks_1_0_in_layers_2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
        ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks_4_0_skip_connection"),
        ("down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
         "input_blocks_4_1_transformer_blocks_1_attn2_to_k"),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks_8_1_proj_in"),
        ("mid_block.resnets.0.time_emb_proj", "middle_block_0_emb_layers_1"),
        ("mid_block.attentions.0.transformer_blocks.9.ff.net.2", "middle_block_1_transformer_blocks_9_ff_net_2"),
        ("mid_block.resnets.1.conv2", "middle_block_2_out_layers_3"),
        ("up_blocks.0.resnets.2.conv1", "output_blocks_2_0_in_layers_2"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks_2_2_conv"),
        ("up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0",
         "output_blocks_4_1_transformer_blocks_0_attn1_to_out_0"),
        ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks_8_0_skip_connection"),
        ("conv_out", "out_2"),
    ],
)  # fmt: skip
def test_sdxl_layers_get_the_names_of_stabilitys_code(module: str, stability: str) -> None:
    lora = {f"unet.{module}.lora_A.weight": torch.ones(1, 2), f"unet.{module}.lora_B.weight": torch.ones(2, 1)}
    expected = {f"lora_unet_{stability}{end}" for end in (".lora_down.weight", ".lora_up.weight", ".alpha")}
    assert set(to_kohya(lora, {**SDXL, "layers_per_block": 2})) == expected


def test_sd15_layers_keep_diffusers_names_in_kohya_keys() -> None:
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    lora = {f"{key}.lora_A.weight": torch.ones(1, 2), f"{key}.lora_B.weight": torch.ones(2, 1)}
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert set(to_kohya(lora, SD15)) == {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"}


def test_a_foreign_alpha_becomes_part_of_b() -> None:
    name = "lora_unet_mid_block_resnets_0_conv1"
    a, b = torch.randn(4, 8, 3, 3), torch.randn(8, 4, 1, 1)
    tensors = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(1.0)}
    back = layers(from_kohya(tensors, {**SD15, "layers_per_block": 2}))["unet.mid_block.resnets.0.conv1"]
    torch.testing.assert_close(update(back), update((a, b)) / 4)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"unet.conv_in.lora_A.weight": torch.ones(1, 1)}, "only one of lora_A and lora_B"),
        ({"unet.conv_in.weight": torch.ones(1, 1)}, "no plain LoRA tensor"),
    ],
)
def test_what_is_no_lora_is_refused(lora: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_kohya(lora, SD15)


def test_foreign_keys_are_no_kohya_file() -> None:
    with pytest.raises(InputError):
        from_kohya({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, {**SD15, "layers_per_block": 2})
    with pytest.raises(InputError, match="alpha but no"):
        from_kohya({"lora_unet_x.alpha": torch.ones(())}, {**SD15, "layers_per_block": 2})


def test_a_layer_without_a_name_in_sdxls_code_is_refused() -> None:
    lora = {"unet.strange.0.lora_A.weight": torch.ones(1, 1), "unet.strange.0.lora_B.weight": torch.ones(1, 1)}
    with pytest.raises(InputError, match="no name in kohya's SDXL files"):
        to_kohya(lora, {**SDXL, "layers_per_block": 2})


# Metadata


def test_kohya_metadata_say_rank_convolutions_and_base() -> None:
    lora = {"unet.mid_block.resnets.0.conv1.lora_A.weight": torch.ones(4, 8, 3, 3),
            "unet.mid_block.resnets.0.conv1.lora_B.weight": torch.ones(8, 4, 1, 1)}  # fmt: skip
    found = kohya_metadata("x", lora, SDXL)
    assert (found["ss_network_module"], found["ss_network_dim"], found["ss_network_alpha"]) == (
        "networks.lora",
        "4",
        "4",
    )
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "4"}
    assert found["ss_base_model_version"] == "sdxl_base_v1-0"
    assert kohya_metadata("x", lora, SD15)["ss_base_model_version"] == "sd_v1"
    assert kohya_metadata("x", lora, {**SD15, "cross_attention_dim": 1024})["ss_v2"] == "True"


def test_model_spec_names_architecture_and_sampling() -> None:
    found = model_spec("x", SDXL, CONTRACT, "kohya", 1024, CREATED)
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert found["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert found["modelspec.usage_hint"] == "TCDScheduler; steps: 1, 2, 4, 8; guidance 0, eta 0.3"
    assert model_spec("x", SD15, CONTRACT, "unet", 512, CREATED)["modelspec.architecture"] == "stable-diffusion-v1"


def test_the_hash_is_of_the_tensors_not_of_the_metadata() -> None:
    tensors = {"b": torch.ones(2, dtype=torch.float16), "a": torch.zeros(3)}
    assert tensors_sha256(tensors) == tensors_sha256(dict(reversed(tensors.items())))
    assert tensors_sha256(tensors) != tensors_sha256({**tensors, "a": torch.ones(3)})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny bases in the layouts of Stable Diffusion 1.5 and XL."""
    return {
        "sd15": make_tiny_base(tmp_path_factory.mktemp("sd15") / "base"),
        "sdxl": make_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "base"),
    }


def write_run(folder: Path, base: Path, students: tuple[str, ...] = ("student",), state: str = "done") -> Path:
    """Write a run folder as ``distill`` leaves it, with random students."""
    folder.mkdir(parents=True)
    unet = UNet2DConditionModel.from_pretrained(base / "unet", local_files_only=True)
    digest = sha256(base / "unet" / "diffusion_pytorch_model.safetensors")
    stages = []
    for seed, name in enumerate(students):
        card = json.dumps({"method": "tcd", "stage": name, "base_unet_sha256": digest, "rank": RANK})
        metadata = {"format": "pt", METADATA_KEY: CONTRACT.to_json(), CARD_KEY: card}
        if name.endswith("-unet"):
            unet.save_pretrained(folder / name)
            file = folder / name / "diffusion_pytorch_model.safetensors"
            changed = {k: v + 0.02 * torch.randn_like(v) for k, v in load_file(file).items()}
            file.write_bytes(to_safetensors(changed, metadata=metadata))
            stages.append({"name": name, "file": name})
            continue
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(to_safetensors(random_lora(unet, seed=seed), metadata=metadata))
        stages.append({"name": name, "file": f"{name}.safetensors", "sha256": sha256(path)})
    manifest = {"settings": {"method": "tcd", "base": str(base), "base_unet_sha256": digest}, "state": state,
                "provenance": {"created": CREATED}, "stages": stages}  # fmt: skip
    (folder / "distill.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_kohya_and_diffusers_files_make_the_same_pictures(layout: str, bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases[layout])
    source = load_file(run / "student.safetensors")
    outputs, pictures = {}, {}
    for form in ("diffusers", "kohya"):
        (exported,) = export_run(run, form=form, dtype="fp16")
        assert exported.largest_difference == 0  # renamed, not changed
        assert (exported.form, exported.steps) == (form, (1, 2, 4, 8))
        pipe: Any = load_base(str(bases[layout]))
        plain = probe(pipe.unet)
        pipe.load_lora_weights(exported.path.parent, weight_name=exported.path.name)
        outputs[form] = probe(pipe.unet)
        assert (outputs[form] - plain).abs().max() > 0.1 * plain.abs().max()  # the LoRA does something
        pictures[form] = pipe(
            "a fox", num_inference_steps=2, height=64, width=64, output_type="pt", guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        read = load_file(exported.path)
        read = from_kohya(read, pipe.unet.config) if form == "kohya" else read
        assert read.keys() == source.keys()
        assert all(torch.equal(read[key], source[key]) for key in source)  # the round trip is exact
    assert torch.equal(outputs["kohya"], outputs["diffusers"])
    assert torch.equal(pictures["kohya"], pictures["diffusers"])
    keys = set(load_file(run / "export" / "student-kohya-fp16.safetensors"))
    assert all(key.startswith("lora_unet_") for key in keys)
    assert any("_input_blocks_" in key for key in keys) == (layout == "sdxl")


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_contract_and_card_travel_in_both_formats(form: str, bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["sdxl"])
    (exported,) = export_run(run, form=form, dtype="bf16", out=tmp_path / "out")
    assert exported.path == tmp_path / "out" / f"student-{form}-bf16.safetensors"
    assert read_contract(exported.path) == CONTRACT
    metadata = read_safetensors_metadata(exported.path)
    card = json.loads(metadata[CARD_KEY])
    assert (card["method"], card["format"], card["dtype"]) == ("tcd", form, "bf16")
    assert metadata["modelspec.title"] == exported.path.stem
    assert metadata["modelspec.resolution"] == "64x64"
    assert metadata["modelspec.date"] == CREATED
    assert metadata["modelspec.hash_sha256"] == tensors_sha256(load_file(exported.path))
    assert ("ss_network_dim" in metadata) == (form == "kohya")
    weights = {key: value for key, value in load_file(exported.path).items() if not key.endswith(".alpha")}
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert 0 < exported.largest_difference < 0.05
    assert exported.size == exported.path.stat().st_size


@pytest.mark.parametrize(
    ("layout", "dtype", "bound"),
    [("sd15", "fp32", 1e-5), ("sd15", "float16", 5e-3), ("sdxl", "fp16", 5e-3), ("sdxl", "bf16", 5e-2)],
)
def test_fused_weights_are_base_plus_update(
    layout: str, dtype: str, bound: float, bases: dict[str, Path], tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", bases[layout])
    (exported,) = export_run(run, dtype=dtype, fuse=True)
    assert exported.form == "unet"
    assert exported.largest_difference < bound
    (file,) = exported.path.glob("*.safetensors")
    assert read_contract(file) == CONTRACT
    assert json.loads((exported.path / "sampler.json").read_text()) == json.loads(CONTRACT.to_json())
    fused = load_file(file)
    base = load_file(bases[layout] / "unet" / "diffusion_pytorch_model.safetensors")
    pairs = layers(load_file(run / "student.safetensors"))
    assert fused.keys() == base.keys()
    assert {value.dtype for value in fused.values()} == {export_verb.DTYPES[exported.dtype]}
    for key, weight in base.items():
        pair = pairs.get(f"unet.{key.removesuffix('.weight')}")
        expected = weight.double() + (update(pair).reshape(weight.shape) if pair else 0)
        rounding = torch.finfo(fused[key].dtype).eps
        torch.testing.assert_close(fused[key].double(), expected, rtol=rounding, atol=1e-6)


def test_large_fused_weights_are_sharded_and_every_shard_has_the_contract(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_verb, "MAX_SHARD_SIZE", "500KB")
    run = write_run(tmp_path / "run", bases["sd15"])
    (exported,) = export_run(run, dtype="fp32", fuse=True)
    shards = sorted(exported.path.glob("*.safetensors"))
    assert len(shards) > 1
    assert all(read_contract(shard) == CONTRACT for shard in shards)
    assert exported.size == sum(shard.stat().st_size for shard in shards)


def test_whole_unets_are_cast_and_no_lora_format_holds_them(bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["sd15"], students=("student", "one-step-unet"))
    with pytest.raises(InputError, match="whole UNet, which no LoRA format can hold"):
        export_run(run, form="kohya")
    assert not (run / "export").exists()
    (lora,) = export_run(run, form="kohya", files=["student"])
    assert lora.path.name == "student-kohya-fp16.safetensors"
    (exported,) = export_run(run, dtype="fp16", files=["one-step-unet"])
    assert exported.path == run / "export" / "one-step-unet-fp16"
    (file,) = exported.path.glob("*.safetensors")
    trained = load_file(run / "one-step-unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, trained[key].half()) for key, value in load_file(file).items())
    assert read_contract(file) == CONTRACT


def test_a_scale_in_the_contract_is_fused_once(bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["sd15"])
    path = run / "student.safetensors"
    metadata = read_safetensors_metadata(path)
    contract = {**json.loads(metadata[METADATA_KEY]), "lora_scale": 0.5}
    path.write_bytes(to_safetensors(load_file(path), metadata={**metadata, METADATA_KEY: json.dumps(contract)}))
    manifest = json.loads((run / "distill.json").read_text())
    manifest["stages"][0]["sha256"] = sha256(path)
    (run / "distill.json").write_text(json.dumps(manifest))
    (exported,) = export_run(run, dtype="fp32", fuse=True)
    assert read_contract(next(exported.path.glob("*.safetensors"))).lora_scale == 1
    key = "mid_block.resnets.0.conv1.weight"
    base = load_file(bases["sd15"] / "unet" / "diffusion_pytorch_model.safetensors")[key]
    pair = layers(load_file(path))[f"unet.{key.removesuffix('.weight')}"]
    fused = load_file(next(exported.path.glob("*.safetensors")))[key]
    torch.testing.assert_close(
        fused.double(), base.double() + 0.5 * update(pair).reshape(base.shape), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("spoil", ["dropped", "swapped", "nan"])
def test_a_file_that_behaves_otherwise_is_removed(
    spoil: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", bases["sd15"])
    key = "unet.mid_block.resnets.0.conv2.lora_B.weight"

    def wrong(lora: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        if spoil == "dropped":
            return to_kohya({key: value for key, value in lora.items() if "conv1" not in key}, config)
        if spoil == "swapped":
            return to_kohya({key: lora[key.replace("attn1.to_q", "attn1.to_v")].clone() for key in lora}, config)
        return to_kohya({**lora, key: torch.full_like(lora[key], torch.nan)}, config)

    monkeypatch.setattr(export_verb, "to_kohya", wrong)
    with pytest.raises(HypersdBenchError, match="was removed: loaded again it is off"):
        export_run(run, form="kohya")
    assert list((run / "export").iterdir()) == []


def test_exporting_again_replaces_and_a_strangers_folder_stays(bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["sd15"])
    (first,) = export_run(run, fuse=True)
    (second,) = export_run(run, fuse=True)
    assert first == second
    (first.path / "sampler.json").unlink()
    with pytest.raises(InputError, match="exists and is no exported UNet"):
        export_run(run, fuse=True)
    assert list(first.path.glob("*.safetensors"))


def test_finished_stages_of_an_unfinished_run_can_be_exported(bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["sd15"], ("stages/8", "hyper-8steps"), state="running")
    assert [exported.source.name for exported in export_run(run)] == ["hyper-8steps.safetensors"]
    (intermediate,) = export_run(run, files=["stages/8.safetensors"])
    assert intermediate.source == run / "stages" / "8.safetensors"
    with pytest.raises(InputError, match=r"not finished\); did you mean 'hyper-8steps.safetensors'"):
        export_run(run, files=["hyper-4steps"])
    manifest = json.loads((run / "distill.json").read_text())
    (run / "distill.json").write_text(json.dumps({**manifest, "stages": manifest["stages"][:1]}))
    with pytest.raises(InputError, match=r"only intermediate stages are finished: stages/8\.safetensors"):
        export_run(run)
    (run / "distill.json").write_text(json.dumps({**manifest, "stages": []}))
    with pytest.raises(InputError, match="no stage of this run is finished yet"):
        export_run(run)


def test_bad_input_is_one_line_and_writes_nothing(bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["sd15"])
    with pytest.raises(InputError, match="unknown format 'koyha'; did you mean 'kohya'"):
        export_run(run, form="koyha")
    with pytest.raises(InputError, match="unknown dtype 'fp61'; did you mean 'fp16'"):
        export_run(run, dtype="fp61")
    with pytest.raises(InputError, match="leave out one of the two"):
        export_run(run, form="kohya", fuse=True)
    with pytest.raises(InputError, match=r"is no distillation \(no distill\.json\)"):
        export_run(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a file; give a folder"):
        export_run(run, out=run / "distill.json")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "distill.json").write_text("{")
    with pytest.raises(InputError, match="no whole manifest"):
        export_run(tmp_path / "broken")
    assert sorted(path.name for path in run.iterdir()) == ["distill.json", "student.safetensors"]


def test_a_changed_or_missing_student_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["sd15"])
    path = run / "student.safetensors"
    path.write_bytes(to_safetensors(load_file(path)))
    with pytest.raises(InputError, match="is not the file this run wrote"):
        export_run(run)
    path.unlink()
    with pytest.raises(InputError, match=r"is gone though distill\.json names it"):
        export_run(run)


def test_another_base_or_none_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["sd15"])
    manifest = json.loads((run / "distill.json").read_text())
    for base, message in (
        (bases["sdxl"], "is not the one trained on"),
        (tmp_path / "gone", "not a diffusers pipeline"),
    ):
        settings = {**manifest["settings"], "base": str(base)}
        (run / "distill.json").write_text(json.dumps({**manifest, "settings": settings}))
        with pytest.raises(InputError, match=message):
            export_run(run)
    assert not (run / "export").exists()
