"""Small stand-ins for the published judges, in the layout of their files, and other code's reading of them.

Nothing of theirs is random anew: equal calls write equal files.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
import timm.models.vision_transformer as timm_vit
import torch
import transformers
from PIL import Image
from torch import Tensor
from torchvision import transforms

from hypersd_bench.pocket.tokenizer import build_tokenizer

PROMPTS = ["a fox left of a pizza", "a car on a green background", "two very blue dogs"]
SIDE = 32  # pixels of every stand-in's pictures
CLIP_MEAN, CLIP_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
TINY_VISION = {"image_size": SIDE, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TINY_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def pictures(height: int, width: int, count: int = 3) -> Tensor:
    """Smooth random pictures (count, 3, H, W) uint8, so that PIL's rounding is all that differs."""
    coarse = torch.rand((count, 3, 6, 6), generator=torch.Generator().manual_seed(3))
    coarse = coarse * torch.linspace(1, 0.2, count)[:, None, None, None]
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (20 + 215 * fine).round().to(torch.uint8)


def pil(images: Tensor) -> list[Image.Image]:
    return [transforms.functional.to_pil_image(image) for image in images]


def spread(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights large enough that pictures and prompts get clearly different ratings."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "logit" not in name:
                fan_in = weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 / math.sqrt(fan_in))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def clip_steps(size: int) -> transforms.Compose:
    """CLIP's preprocessing by torchvision alone, as BLIP's and ImageReward's authors write it."""
    resize = transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC)
    steps = [resize, transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)]
    return transforms.Compose(steps)


def tiny_config(width: int, quick_gelu: bool) -> dict[str, Any]:
    """A small architecture for open_clip; ``width``: of the embedding."""
    return {"embed_dim": width, "vision_cfg": TINY_VISION, "text_cfg": TINY_TEXT, "quick_gelu": quick_gelu}


def write_hps(folder: Path) -> Any:
    """HPSv2.1's file, in half precision; returns what it holds. open_clip's ViT-H-14 must be small."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")).eval()
    spread(model)
    half = {name: value.half() for name, value in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": half}, folder / "HPS_v2.1_compressed.pt")
    model.load_state_dict(half)
    return model


def write_pick_score(folder: Path) -> transformers.CLIPModel:
    """PickScore's folder ``model`` and the folder ``tokenizer`` of the CLIP that it was tuned from."""
    tokenizer = build_tokenizer(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    shared = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **shared, "vocab_size": len(tokenizer), "max_position_embeddings": 16,
            "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "hidden_act": "gelu",
        },
        vision_config={**shared, "image_size": SIDE, "patch_size": 8, "hidden_act": "gelu"},
        projection_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    spread(model)
    model.save_pretrained(folder / "model")
    return model


def rewrite(file: Path, old: str, new: str) -> None:
    """Give one weight of a safetensors file another name."""
    state = safetensors.torch.load_file(file)
    state[new] = state.pop(old)
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})


class Blip:
    """ImageReward's file, and a reading of it by other code: timm's ViT, on which BLIP's was built, and plain BERT."""

    def __init__(self, folder: Path) -> None:
        self.words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({w for prompt in PROMPTS for w in prompt.split()})]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.txt").write_text("\n".join(self.words))
        self.tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(self.words)})
        self.tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        self.vision = timm_vit.VisionTransformer(
            img_size=SIDE, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=0
        )
        config = transformers.BertConfig(
            vocab_size=len(self.words), hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=96, max_position_embeddings=40, type_vocab_size=1,
            is_decoder=True, add_cross_attention=True, attn_implementation="eager",
        )  # fmt: skip
        self.text = transformers.BertModel(config, add_pooling_layer=False)
        sizes = (128, 64, 32, 16, 8, 1)
        linears = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        dropout = torch.nn.Dropout(0.2)
        self.head = torch.nn.Sequential(linears[0], dropout, linears[1], dropout, linears[2], dropout, *linears[3:])
        for module in (self.vision, self.text, self.head):
            spread(module)
            module.eval()
        with torch.no_grad():  # BLIP's BERT has no segments
            self.text.embeddings.token_type_embeddings.weight.zero_()
        torch.save(self.state(), folder / "ImageReward.pt")

    def state(self) -> dict[str, Tensor]:
        """Every tensor under the names of the published file."""
        parts = {"blip.visual_encoder": self.vision, "blip.text_encoder": self.text, "mlp.layers": self.head}
        state = {f"{stem}.{key}": value for stem, part in parts.items() for key, value in part.state_dict().items()}
        del state["blip.text_encoder.embeddings.token_type_embeddings.weight"]
        state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
        return state

    @torch.no_grad()
    def rate(self, images: Tensor, prompts: list[str] = PROMPTS) -> Tensor:
        """The authors' arithmetic on PIL's preprocessing."""
        x = torch.stack([clip_steps(SIDE)(image) for image in pil(images)])
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        # a mask of four dimensions is taken as it is: both ways, though the configuration says decoder
        visible = tokens.attention_mask[:, None, None, :].expand(-1, 1, 35, -1).bool()
        bias = torch.zeros(visible.shape).masked_fill(~visible, -1e9)
        read = self.text(
            tokens.input_ids, attention_mask=bias, encoder_hidden_states=self.vision.forward_features(x)
        ).last_hidden_state[:, 0]
        raw: Tensor = self.head(read)[:, 0]
        return (raw - 0.16717362830052426) / 1.0333394966054072
