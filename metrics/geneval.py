"""GenEval (Ghosh et al. 2310.11513): whether a detector finds what the prompt names, so many, so placed, so coloured.

The rules are those of the authors' evaluation code (djghosh13/geneval), written anew over any detector; overlapping
boxes are kept, as by its defaults. Its table has the mean over six tasks (``macro_mean``); a run's level is the mean
over images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hypersd_bench.contracts import MetricContext, MetricInfo
from hypersd_bench.download import OwnerFile, cache_folder, fetch
from hypersd_bench.errors import InputError, first_line
from hypersd_bench.prompt_sets.geneval import GEN_EVAL
from hypersd_bench.prompts import CACHED_AS
from metrics.extractors.clip import VIT_L_14, ClipExtractor
from metrics.factory import Factory, Package
from metrics.preference_models.base import refuse
from metrics.weights import WebFile, loading

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # confidence that a detection must exceed
MAX_OBJECTS = 16  # of a class: the most confident ones
POSITION_THRESHOLD = 0.1  # of both objects' sizes together: nearer centres are neither left nor right
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
BACKGROUND = "#999"  # where an object's mask isn't
RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # COCO's to GenEval's

PACKAGE = Package("mmdet", "pip install mmdet 'mmcv>=2.0,<2.2' mmengine")
_NAME = "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco"
CONFIG = f"mmdet::mask2former/{_NAME}.py"
MASK2FORMER = WebFile(
    "Mask2Former Swin-S (mmdet 3)",
    "HYPERSD_MASK2FORMER",
    OwnerFile(
        f"{_NAME}_20220504_001756-c9d0c4f2.pth",
        f"https://download.openmmlab.com/mmdetection/v3.0/mask2former/{_NAME}/{_NAME}_20220504_001756-c9d0c4f2.pth",
        "c9d0c4f2",  # first digits, as its name says
    ),
)


@dataclass(frozen=True, eq=False, slots=True)
class Detection:
    """An object that a detector sees.

    name: its class, in GenEval's words. box: (4,) left, top, right, bottom in pixels. mask: (H, W) bool, or None from
    a detector of boxes alone.
    """

    name: str
    confidence: float
    box: NDArray[np.float64]
    mask: NDArray[np.bool_] | None = None


class Detector(Protocol):
    """Finds COCO's 80 classes in an image."""

    def __call__(self, image: NDArray[np.uint8]) -> Sequence[Detection]:
        """Detect objects of an image (H, W, 3) uint8 RGB, in any order, the unlikely ones too."""
        ...


ColourNamer = Callable[["NDArray[np.uint8]", Sequence[Detection], str], list[str]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One clause of a prompt: at least ``count`` objects of a class, all of one colour, all so placed.

    position: a relation (left of, right of, above, below) and the number of the clause whose objects it is to.
    """

    name: str
    count: int
    colour: str = ""
    position: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """What makes an image of a prompt correct. too_many: classes, each with the count that is one too many."""

    task: str
    wanted: tuple[Wanted, ...]
    too_many: tuple[Wanted, ...] = ()


@dataclass(slots=True)
class GenEval:
    """GenEval's verdict on each image of its prompts, 1 correct and 0 not; an ImageMetric."""

    info: MetricInfo
    rules: Mapping[str, Rule]
    detector: Detector
    colours: ColourNamer

    def score(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Judge images (N, 3, H, W) uint8 RGB of N prompts of GenEval's: (N,) of 0 and 1; InputError for others."""
        rules = [self._rule(prompt) for prompt in prompts]
        verdicts = np.empty(len(images))
        for i, (image, rule) in enumerate(zip(images, rules, strict=True)):
            pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
            verdicts[i] = judge(rule, self.detector(pixels), partial(self.colours, pixels))
        return verdicts

    def _rule(self, prompt: str) -> Rule:
        rule = self.rules.get(prompt.strip())
        if rule is None:
            raise InputError(
                f"{self.info.id} judges GenEval's {len(self.rules)} prompts alone, not {prompt!r}; "
                "run it on the prompt set geneval"
            )
        return rule


def judge(
    rule: Rule, detections: Sequence[Detection], colours: Callable[[Sequence[Detection], str], list[str]]
) -> bool:
    """Whether an image's detections are what its prompt asks for.

    Of each class only the most confident objects count, as many as are wanted. colours: names theirs.
    """
    objects = confident(detections, COUNTING_THRESHOLD if rule.task == "counting" else THRESHOLD)
    matched: list[Sequence[Detection] | None] = []
    for wanted in rule.wanted:
        found = objects.get(wanted.name, [])[: wanted.count]
        right = len(found) == wanted.count
        if right and wanted.colour:
            right = colours(found, wanted.name) == [wanted.colour] * wanted.count
        if right and wanted.position:
            relation, other = wanted.position
            targets = matched[other]
            right = targets is not None and all(relation in relations(a, b) for a in found for b in targets)
        matched.append(found if right else None)
    return None not in matched and all(len(objects.get(one.name, [])) < one.count for one in rule.too_many)


def confident(detections: Sequence[Detection], threshold: float) -> dict[str, list[Detection]]:
    """Detections above a confidence by class, at most 16 of each, the surest first."""
    objects: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda one: -one.confidence):
        if one.confidence > threshold and len(objects.setdefault(one.name, [])) < MAX_OBJECTS:
            objects[one.name].append(one)
    return objects


def relations(a: Detection, b: Detection) -> set[str]:
    """How a lies to b: left of, right of, above, below, two of them on a diagonal, or none where they are too near.

    The offset of the centres, shortened on each axis by a tenth of both widths (heights), counts on an axis where it
    is over half the whole offset.
    """
    corners_a, corners_b = (one.box[:4].reshape(2, 2).astype(np.float64) for one in (a, b))
    offset = corners_a.mean(0) - corners_b.mean(0)
    sizes = np.abs(np.diff(corners_a, axis=0) + np.diff(corners_b, axis=0))[0]
    left = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0)
    if np.all(np.abs(left) < 1e-3):
        return set()
    x, y = left / np.linalg.norm(offset)
    found = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in found.items() if holds}


@dataclass(frozen=True, slots=True)
class ClipColours:
    """The colour of an object that a CLIP finds nearest: masked on grey, cut out, against three sentences a colour."""

    clip: ClipExtractor

    def __call__(self, image: NDArray[np.uint8], objects: Sequence[Detection], name: str) -> list[str]:
        """Name the colours of objects of one class in an image (H, W, 3) uint8 RGB."""
        import torch

        texts = [line.format(colour=colour, name=name) for colour in COLOURS for line in TEMPLATES]
        means = self.clip.embed_texts(texts).reshape(len(COLOURS), len(TEMPLATES), -1).mean(1)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        cuts = [torch.from_numpy(cut_out(image, one)).permute(2, 0, 1)[None] for one in objects]
        return [COLOURS[int((means @ self.clip(cut)[0]).argmax())] for cut in cuts]


def cut_out(image: NDArray[np.uint8], one: Detection) -> NDArray[np.uint8]:
    """What an image (H, W, 3) uint8 shows in an object's box, grey where its mask isn't: (h, w, 3)."""
    from PIL import Image

    picture = Image.fromarray(image)
    if one.mask is not None:
        blank = Image.new("RGB", picture.size, BACKGROUND)
        picture = Image.composite(picture, blank, Image.fromarray(one.mask))
    left, top, right, bottom = (round(float(side)) for side in one.box[:4])
    return np.array(picture.crop((left, top, max(right, left + 1), max(bottom, top + 1))))


def macro_mean(verdicts: ArrayLike, tasks: Sequence[str]) -> float:
    """GenEval's score: the mean over tasks of the mean verdict of each task's images; NaN for no images."""
    values, names = np.asarray(verdicts, dtype=np.float64), np.asarray(tasks)
    if values.shape != names.shape:
        raise ValueError(f"{values.size} verdicts do not pair up with {names.size} tasks")
    means = [values[names == name].mean() for name in np.unique(names)]
    return float(np.mean(means)) if means else float("nan")


def read_rules(path: Path) -> dict[str, Rule]:
    """The rules of GenEval's ``evaluation_metadata.jsonl``, by prompt; InputError for another file."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return {row["prompt"].strip(): _rule(row) for row in rows}
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{path} is not GenEval's evaluation_metadata.jsonl ({first_line(error)})") from error


def _rule(row: Mapping[str, Any]) -> Rule:
    wanted, too_many = (tuple(map(_wanted, row.get(key, ()))) for key in ("include", "exclude"))
    return Rule(row["tag"], wanted, too_many)


def _wanted(clause: Mapping[str, Any]) -> Wanted:
    position = clause.get("position")
    return Wanted(
        clause["class"], clause["count"], clause.get("color", ""), (position[0], position[1]) if position else None
    )


@dataclass(frozen=True, slots=True)
class Mask2Former:
    """mmdet's Mask2Former as a Detector."""

    model: Any
    detect: Callable[[Any, NDArray[np.uint8]], Any]  # mmdet's inference_detector
    names: Sequence[str]

    def __call__(self, image: NDArray[np.uint8]) -> list[Detection]:
        """Detect objects of an image (H, W, 3) uint8 RGB; mmdet reads BGR."""
        found = self.detect(self.model, np.ascontiguousarray(image[..., ::-1])).pred_instances
        labels, scores, boxes, masks = (
            getattr(found, part).cpu().numpy() for part in ("labels", "scores", "bboxes", "masks")
        )
        return [
            Detection(self.names[label], float(score), box.astype(np.float64), mask.astype(bool))
            for label, score, box, mask in zip(labels, scores, boxes, masks, strict=True)
        ]


def object_names() -> list[str]:
    """COCO's 80 classes in the detector's order, in GenEval's words."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    return [RENAMED.get(name, name) for name in names if name not in ("__background__", "N/A")]


def load_mask2former(device: str) -> Mask2Former:
    """Build the detector from mmdet's configuration; its weights are read here, as mmdet would unpickle the file."""
    import torch

    path = MASK2FORMER.path()
    try:
        apis, hub = import_module("mmdet.apis"), import_module("mmengine.hub")
    except Exception as error:  # mmcv without its compiled operators, a version that mmdet refuses
        raise InputError(f"mmdet can't be imported ({first_line(error)}); {PACKAGE.install}") from error
    with loading(MASK2FORMER.what, path):
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        model = apis.init_detector(hub.get_config(CONFIG), None, device=device, palette="coco")
        missing = set(model.load_state_dict(state, strict=False).missing_keys)
        refuse([name for name, _ in model.named_parameters() if name in missing])  # buffers differ between releases
    return Mask2Former(model, apis.inference_detector, object_names())


def _mask2former(info: MetricInfo, context: MetricContext) -> GenEval:
    owner = GEN_EVAL.files[0]
    rules = read_rules(fetch(owner, CACHED_AS, f"put it at {cache_folder(CACHED_AS) / owner.name}"))
    detector = load_mask2former(context.device)
    return GenEval(info, rules, detector, ClipColours(VIT_L_14.load(context)))


MASK2FORMER_SWIN_S = Factory(
    MetricInfo(
        "geneval/mask2former-swin-s", "GenEval", "higher", "rate", "image",
        note="share of correct images; the published score is the mean over six tasks, with four images a prompt; "
        "GenEval's prompts alone; Mask2Former by mmdet 3 where its authors have mmdet 2; colours by CLIP ViT-L/14",
    ),
    _mask2former,
    weights=(MASK2FORMER, *VIT_L_14.weights),
    packages=(PACKAGE,),
)  # fmt: skip
