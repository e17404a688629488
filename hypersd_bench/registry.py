"""Rows like ``"tcd" -> "distill.methods.tcd:TCD"``, resolved when first used.

Listing names imports nothing. Third parties add rows by entry points in the groups ``hypersd_bench.<kind>``; an entry
point that takes a name which is taken is an error.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from hypersd_bench.contracts import Verb
from hypersd_bench.errors import HypersdBenchError, unknown_name

METRICS = {
    "clip-score/pocket": "metrics.clip_score:POCKET",
    "clip-score/vit-b-32": "metrics.clip_score:VIT_B_32",
    "clip-score/vit-l-14": "metrics.clip_score:VIT_L_14",
    "clip-score/vit-g-14": "metrics.clip_score:VIT_G_14",
    "clip-score/vit-bigg-14": "metrics.clip_score:VIT_BIGG_14",
    "clip-score/vit-g-14-photo-256": "metrics.clip_score:VIT_G_14_PHOTO_256",
    "clip-s/vit-b-32": "metrics.clip_score:CLIP_S_VIT_B_32",
    "aesthetic/pocket": "metrics.aesthetic:POCKET",
    "aesthetic/laion-v2": "metrics.aesthetic:LAION_V2",
    "aesthetic/laion-v1": "metrics.aesthetic:LAION_V1",
    "fid/lite0": "metrics.set_metrics:FID_LITE0",
    "fid/clean": "metrics.set_metrics:FID_CLEAN",
    "fid/clean-512": "metrics.set_metrics:FID_CLEAN_512",
    "fid/tf1": "metrics.set_metrics:FID_TF1",
    "fid/pytorch-fid": "metrics.set_metrics:FID_PYTORCH_FID",
    "fid/torchmetrics": "metrics.set_metrics:FID_TORCHMETRICS",
    "patch-fid/clean": "metrics.set_metrics:PATCH_FID_CLEAN",
    "kid/lite0": "metrics.set_metrics:KID_LITE0",
    "kid/clean": "metrics.set_metrics:KID_CLEAN",
    "kid/tf1": "metrics.set_metrics:KID_TF1",
    "cmmd/pocket": "metrics.set_metrics:CMMD_POCKET",
    "cmmd/vit-l-14-336": "metrics.set_metrics:CMMD_VIT_L_14_336",
    "fd/dinov2": "metrics.set_metrics:FD_DINOV2",
    "precision/lite0": "metrics.set_metrics:PRECISION_LITE0",
    "recall/lite0": "metrics.set_metrics:RECALL_LITE0",
    "density/lite0": "metrics.set_metrics:DENSITY_LITE0",
    "coverage/lite0": "metrics.set_metrics:COVERAGE_LITE0",
    "precision/dinov2": "metrics.set_metrics:PRECISION_DINOV2",
    "recall/dinov2": "metrics.set_metrics:RECALL_DINOV2",
    "density/dinov2": "metrics.set_metrics:DENSITY_DINOV2",
    "coverage/dinov2": "metrics.set_metrics:COVERAGE_DINOV2",
    "image-reward/v1": "metrics.preference_models.image_reward:V1",
    "pick-score/v1": "metrics.preference_models.pick_score:V1",
    "hps/v2.1": "metrics.preference_models.hps:V2_1",
    "vqa-score/clip-flant5-xxl": "metrics.vqa_score:CLIP_FLANT5_XXL",
    "geneval/mask2former-swin-s": "metrics.geneval:MASK2FORMER_SWIN_S",
    "concept/pocket": "metrics.concept:POCKET",
    "diversity/lite0": "metrics.diversity:LITE0",
    "diversity/lpips": "metrics.diversity:LPIPS",
    "agreement/lite0": "metrics.agreement:LITE0",
    "agreement/lpips": "metrics.agreement:LPIPS",
}
METHODS = {
    "hyper-sd": "distill.methods.hyper_sd:HyperSD",
    "lcm": "distill.methods.lcm:LCM",
    "tcd": "distill.methods.tcd:TCD",
    "lightning": "distill.methods.lightning:Lightning",
}
REWARDS = {
    "aesthetic/pocket": "distill.rewards.pocket:AESTHETIC",
    "clip-score/pocket": "distill.rewards.pocket:CLIP_SCORE",
    "aesthetic/laion-v1": "distill.rewards.laion_aesthetic:V1",
    "aesthetic/laion-v2": "distill.rewards.laion_aesthetic:V2",
    "image-reward/v1": "distill.rewards.image_reward:V1",
    "hps/v2.1": "distill.rewards.hps:V2_1",
    "pick-score/v1": "distill.rewards.pick_score:V1",
}
SEGMENTERS = {
    "pocket": "distill.rewards.pocket_segmenter:load",
    "mask-rcnn": "distill.rewards.mask_rcnn:load",
}
FAMILIES = {
    "pocket": "hypersd_bench.catalog.pocket:models",
    "base": "hypersd_bench.catalog.base:models",
    "hyper-sd": "hypersd_bench.catalog.hyper_sd:models",
    "lightning": "hypersd_bench.catalog.lightning:models",
    "lcm": "hypersd_bench.catalog.lcm:models",
    "tcd": "hypersd_bench.catalog.tcd:models",
    "turbo": "hypersd_bench.catalog.turbo:models",
    "pcm": "hypersd_bench.catalog.pcm:models",
    "dmd2": "hypersd_bench.catalog.dmd2:models",
    "flash": "hypersd_bench.catalog.flash:models",
    "nitrofusion": "hypersd_bench.catalog.nitrofusion:models",
    "tdm": "hypersd_bench.catalog.tdm:models",
    "perflow": "hypersd_bench.catalog.perflow:models",
}
PROMPTS = {
    "pocket/held-out": "hypersd_bench.pocket.prompts:HELD_OUT",
    "pocket/train": "hypersd_bench.pocket.prompts:TRAIN",
    "coco/2017-val-5k": "hypersd_bench.prompt_sets.coco:VAL_2017_5K",
    "coco/2014-val-10k": "hypersd_bench.prompt_sets.coco:VAL_2014_10K",
    "coco/2014-val-30k": "hypersd_bench.prompt_sets.coco:VAL_2014_30K",
    "partiprompts": "hypersd_bench.prompt_sets.partiprompts:PARTI_PROMPTS",
    "drawbench": "hypersd_bench.prompt_sets.drawbench:DRAW_BENCH",
    "geneval": "hypersd_bench.prompt_sets.geneval:GEN_EVAL",
    "t2i-compbench": "hypersd_bench.prompt_sets.t2i_compbench:T2I_COMP_BENCH",
    "dpg": "hypersd_bench.prompt_sets.dpg:DPG",
    "hpsv2": "hypersd_bench.prompt_sets.hpsv2:HPS_V2",
}
ADVISERS = {  # what the core asks of the floors above it
    "power": "metrics.power:power_of",
}
VERBS = {
    "demo": Verb("hypersd_bench.cli.demo:demo", "The whole story on the miniature: distil, benchmark, score, report."),
    "list": Verb("hypersd_bench.cli.list:list_command", "What there is: models, methods, metrics, prompts."),
    "plan": Verb("hypersd_bench.cli.plan:plan", "What a spec will take before it is run: images, time, memory, disk."),
    "fetch": Verb("hypersd_bench.cli.plan:fetch", "Download and check all that a spec needs, for a run offline."),
    "run": Verb("hypersd_bench.cli.run:run", "Generate, score and time what a spec names; resumable."),
    "score": Verb("hypersd_bench.cli.run:score", "Score a run's images again, or with more metrics."),
    "verify": Verb("hypersd_bench.cli.verify:verify", "Whether a run, made here or elsewhere, holds what it says."),
    "export": Verb("hypersd_bench.cli.run:export", "Write a run's images and scores as parquet or CSV."),
    "compare": Verb("metrics.cli:compare", "Paired differences between the models of a run."),
    "reproduce": Verb("metrics.reproduce.cli:reproduce", "Published numbers beside ours, with window and verdict."),
    "distill": Verb("distill.cli:distill", "Train a few-step LoRA: hyper-sd, lcm, tcd, lightning."),
    "report": Verb("reports.cli:report", "A page to decide from, and tables to publish."),
    "study": Verb("user_study.cli:study", "Blind pairwise votes from people."),
    "pocket": Verb("hypersd_bench.cli.pocket:pocket", "Build, check and sample the miniature."),
    "doctor": Verb("hypersd_bench.cli.doctor:doctor", "What on this machine would spoil a result."),
}
_TABLES: dict[str, dict[str, Any]] = {
    "metric": METRICS,
    "method": METHODS,
    "reward": REWARDS,
    "segmenter": SEGMENTERS,
    "family": FAMILIES,
    "prompts": PROMPTS,
    "adviser": ADVISERS,
    "verb": VERBS,
}


@cache
def rows(kind: str) -> dict[str, Any]:
    """All rows of a kind (metric, method, reward, segmenter, family, prompts, adviser, verb).

    Ours, and those of entry points.
    """
    table = dict(_TABLES[kind])
    for point in entry_points(group=f"hypersd_bench.{kind}"):
        if point.name in table:
            owner = point.dist.name if point.dist else point.value
            raise HypersdBenchError(f"{owner} adds a {kind} named {point.name!r}, but that name is taken")
        table[point.name] = Verb(point.value, f"(from {point.value})") if kind == "verb" else point.value
    return table


def resolve(kind: str, name: str, where: str = "") -> Any:
    """Import what a row points to; an unknown name raises InputError with the nearest known one."""
    table = rows(kind)
    if name not in table:
        raise unknown_name(kind, name, table, where)
    row = table[name]
    module, _, attribute = (row.target if isinstance(row, Verb) else row).partition(":")
    return getattr(import_module(module), attribute)
