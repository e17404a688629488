"""Why a number of ours may lie outside its window: a table of rules over what is known of the run.

A rule whose condition can be decided is named only where it holds (``certain``); one that can't is named as something
to check, where metric, direction and size of the difference allow it. Figures are those of the literature the rules
name; none of them is a correction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from metrics.reproduce.window import family_of

CLIP = ("clip-score", "clip-s")
FRECHET = ("fid", "patch-fid")
RAW_RATING = 15.0  # an aesthetic rating beyond it is of an embedding that was not normalised: 20 to 30 in place of 5
JPEG = frozenset({".jpg", ".jpeg"})


@dataclass(frozen=True, slots=True)
class Cause:
    """A possible cause; certain: its condition holds here, and is not only to be checked."""

    text: str
    certain: bool


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of one number and of the run that it is of; values are in our unit.

    n: our prompts. prompts_listed: whether the source's own list of prompts was run. assumption: of the column.
    differs: what the source does and the run does not. breaches, unconfirmed: of the model's sampler
    (``catalog.guard``, the catalogue). precision: as the manifest says. defects: images by defect, of ``images``.
    truncated: prompts that are longer than the text encoder reads. reference_suffixes: of the reference's files, empty
    where unknown.
    """

    metric: str
    published: float
    ours: float
    n: int
    n_published: int | None
    prompts_listed: bool = True
    assumption: str = ""
    differs: tuple[str, ...] = ()
    breaches: tuple[str, ...] = ()
    unconfirmed: str = ""
    precision: str = ""
    defects: Mapping[str, int] = field(default_factory=dict)
    images: int = 0
    truncated: int = 0
    reference_suffixes: frozenset[str] = frozenset()

    @property
    def difference(self) -> float:
        """Ours minus theirs."""
        return self.ours - self.published

    @property
    def ratio(self) -> float:
        """Ours over theirs; 0 where theirs is 0."""
        return self.ours / self.published if self.published else 0.0


@dataclass(frozen=True)
class Rule:
    """families: of metrics, empty for all. find: the cause in words, empty where it does not apply."""

    families: tuple[str, ...]
    certain: bool
    find: Callable[[Evidence], str]


def likely_causes(evidence: Evidence) -> list[Cause]:
    """The causes that apply, those that certainly hold first."""
    family = family_of(evidence.metric)
    found = [
        Cause(text, rule.certain)
        for rule in RULES
        if not rule.families or family in rule.families
        if (text := rule.find(evidence))
    ]
    return sorted(found, key=lambda cause: not cause.certain)


def _scale(e: Evidence) -> str:
    if any(0.8 < ratio < 1.25 for ratio in (e.ratio / 100, e.ratio * 100)):
        return "a factor of 100: one of the two is a cosine, the other x100"
    if family_of(e.metric) in CLIP and any(0.92 < ratio < 1.08 for ratio in (e.ratio / 2.5, e.ratio * 2.5)):
        return "a factor of 2.5: one of the two is CLIP-S, 2.5 max(cos, 0), the other the cosine x100"
    return ""


def _not_normalised(e: Evidence) -> str:
    side = "ours" if abs(e.ours) > RAW_RATING else "theirs" if abs(e.published) > RAW_RATING else ""
    return f"{side}: the CLIP embedding was not L2-normalised, which gives 20 to 30 in place of about 5" if side else ""


def _defective(e: Evidence) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in sorted(e.defects.items()) if count)
    if not counts:
        return ""
    black = "; SDXL's autoencoder overflows to black in float16" if e.defects.get("black") else ""
    return f"{counts} of {e.images} images, which are not scored{black}"


def _fewer_prompts(e: Evidence) -> str:
    if e.n_published is None or e.n == e.n_published:
        return ""
    return f"other prompts: {e.n:,} of ours against {e.n_published:,}"


def _other_list(e: Evidence) -> str:
    return "" if e.prompts_listed else "other prompts: the source's own list is not what was run"


def _reference_of_other_photos(e: Evidence) -> str:
    return "" if e.prompts_listed else "the reference may be other photos: FID moves with which of COCO's are taken"


def _jpeg(e: Evidence) -> str:
    if e.reference_suffixes & JPEG:
        return "the reference is JPEG files: compression shifts FID, and the source may have re-encoded them"
    return ""


def _jpeg_unknown(e: Evidence) -> str:
    return "" if e.reference_suffixes else "whether the reference is JPEG files as the source had them"


def _activation(e: Evidence) -> str:
    if 0.3 <= abs(e.difference) < 4:
        lower = "ours (which checks its activation)" if e.difference < 0 else "theirs"
        words = "GELU in place of QuickGELU, or the prefix 'A photo depicts': each moves CLIP by a point or so"
        return f"{words}; the lower side is {lower}"
    return ""


def _backbone(e: Evidence) -> str:
    if abs(e.difference) >= 4 and not _scale(e):
        return "another CLIP backbone: the same images give about 32 with ViT-B/32 and about 26 in other protocols"
    return ""


def _other_predictor(e: Evidence) -> str:
    if abs(e.difference) >= 0.1 and not _not_normalised(e):
        return "LAION predictor V1 in place of V2, or GELU in place of QuickGELU under it (0.6 lower on one photo)"
    return ""


def _resize(e: Evidence) -> str:
    lower = "lower" if e.difference < 0 else "higher"
    return (
        f"resize filter: aliased filters moved FID by 6 and more against PIL's on photographs of faces; ours is {lower}"
    )


def _breaches(e: Evidence) -> str:
    return f"sampled otherwise than the catalogue's entry says: {'; '.join(e.breaches)}" if e.breaches else ""


def _precision(e: Evidence) -> str:
    return (
        f"precision: ours is {e.precision}, theirs may be another" if e.precision.startswith(("float16", "bf")) else ""
    )


def _truncated(e: Evidence) -> str:
    return f"{e.truncated} prompts are longer than the text encoder reads" if e.truncated else ""


RULES = (
    Rule((), True, _scale),
    Rule(("aesthetic",), True, _not_normalised),
    Rule((), True, _defective),
    Rule((), True, _fewer_prompts),
    Rule((), True, _other_list),
    Rule((), True, lambda e: "; ".join(e.differs)),
    Rule((), True, _breaches),
    Rule(FRECHET, True, _jpeg),
    Rule(CLIP, False, _backbone),
    Rule(CLIP, False, _activation),
    Rule(("aesthetic",), False, _other_predictor),
    Rule(FRECHET, False, _resize),
    Rule(FRECHET, False, _reference_of_other_photos),
    Rule(FRECHET, False, _jpeg_unknown),
    Rule((), False, lambda e: f"assumed: {e.assumption}" if e.assumption else ""),
    Rule((), False, lambda e: f"not confirmed in the catalogue: {e.unconfirmed}" if e.unconfirmed else ""),
    Rule((), False, _precision),
    Rule((), False, _truncated),
)
