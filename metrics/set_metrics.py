"""Metrics of a whole set of images beside a reference set: what an extractor's features look like, as one number.

The id names the features and the statistic: numbers of two conventions are never compared, nor those of two references
or of two numbers of images, which the store records with each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypersd_bench.contracts import Direction, Extractor, MetricInfo
from metrics.extractors import clip, dinov2, inception, lite0
from metrics.extractors.network import Source
from metrics.factory import Factory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hypersd_bench.contracts import ReferenceMoments

BIAS = "depends on the number of images"
TF_SCALE = "(x - 128) / 128"
LITE0 = "EfficientNet-Lite0 ImageNet features, bicubic with antialias to 128 px"
CLEAN = f"Inception-v3 of 2015-12-05 as clean-fid has it: PIL bicubic to 299 px in float32, clipped, {TF_SCALE}"
TF1 = f"Inception-v3 of 2015-12-05 as torch-fidelity has it: TensorFlow 1's bilinear to 299 px, {TF_SCALE}"
DINOV2 = "DINOv2 ViT-L/14 class token as dgm-eval has it: squeezed to 224 px by PIL bicubic, 8 bits"
KID = "cubic kernel, unbiased, over all pairs and not random subsets, x1000 (often printed without)"
BALLS = ("precision", "density")
OUTLIERS = "; outliers of the reference may count noise as within it: read with recall and coverage"
K_MANIFOLD = 3  # neighbours: Kynkäänniemi et al. 1904.06991
K_DENSITY = 5  # Naeem et al. 2002.09797


@dataclass(slots=True)
class SetStatistic:
    """A statistic of an extractor's features, the one that the info names; a SetMetric."""

    info: MetricInfo
    extractor: Extractor

    def distance(self, features: NDArray[np.float32], reference: NDArray[np.float32] | ReferenceMoments) -> float:
        """The statistic for (N, d) features against (M, d) reference features, or statistics of them."""
        from metrics.set_statistics import evaluate

        return evaluate(self.info.statistic, features, reference)


def _row(
    id: str, label: str, statistic: str, source: Source[Extractor], note: str, *, direction: Direction = "lower",
    unit: str = "distance", version: str = "1", min_images: int = 2, min_size: int = 1,
) -> Factory[SetStatistic]:  # fmt: skip
    info = MetricInfo(
        id, label, direction, unit, "set", version, note, source.id, statistic, min_images=min_images, min_size=min_size
    )
    return Factory(
        info, lambda info, context: SetStatistic(info, source.load(context)), source.weights, source.packages
    )


def _manifold(statistic: str, variant: str, label: str, source: Source[Extractor]) -> Factory[SetStatistic]:
    """Precision, recall, density or coverage: shares of images near others of the other set."""
    k = K_MANIFOLD if statistic in ("precision", "recall") else K_DENSITY
    paper = "Kynkäänniemi et al. 2019" if k == K_MANIFOLD else "Naeem et al. 2020"
    about = {
        "precision": "share of images within the reference's manifold",
        "recall": "share of the reference within the images' manifold",
        "density": "how many of the reference's neighbourhoods an image lies in, over k; may exceed 1",
        "coverage": "share of the reference's neighbourhoods that hold an image",
    }[statistic]
    features = LITE0 if variant == "lite0" else DINOV2
    return _row(
        f"{statistic}/{variant}", f"{statistic.capitalize()} ({label})", statistic, source,
        f"{about}, k={k} ({paper}); {features}; {BIAS}, of both sets{OUTLIERS if statistic in BALLS else ''}",
        direction="higher", unit="ratio" if statistic == "density" else "share", min_images=k + 1,
    )  # fmt: skip


FID_LITE0 = _row("fid/lite0", "FID (lite0)", "frechet", lite0.LITE0, f"{LITE0}; {BIAS}; not published FID")
FID_CLEAN = _row(
    "fid/clean", "FID (clean)", "frechet", inception.CLEAN,
    f"{CLEAN}; {BIAS}; not DMD2's, which is fid/clean-512",
)  # fmt: skip
FID_CLEAN_512 = _row(
    "fid/clean-512", "FID (clean, 512)", "frechet", inception.CLEAN_512,
    f"DMD2's: both sets are centre squares of 512 px by PIL's Lanczos before; {CLEAN}; {BIAS}",
)  # fmt: skip
FID_TF1 = _row("fid/tf1", "FID (TF1)", "frechet", inception.TF1, f"{TF1}, the original's; aliased above 299 px; {BIAS}")
FID_PYTORCH_FID = _row(
    "fid/pytorch-fid", "FID (pytorch-fid)", "frechet", inception.PYTORCH_FID,
    f"Inception-v3 of 2015-12-05 as pytorch-fid has it: torch's bilinear without antialias to 299 px, 2 x - 1; {BIAS}",
)  # fmt: skip
FID_TORCHMETRICS = _row(
    "fid/torchmetrics", "FID (torchmetrics)", "frechet", inception.TORCHMETRICS,
    f"Inception-v3 of 2015-12-05 as torchmetrics 1.8 and newer have it: torch's bilinear with antialias to 299 px, "
    f"{TF_SCALE}; {BIAS}; older torchmetrics is fid/tf1",
)  # fmt: skip
PATCH_FID_CLEAN = _row(
    "patch-fid/clean", "Patch FID", "frechet", inception.PATCH,
    f"DMD2's: the centre of 299 px without resize, {TF_SCALE}, Inception-v3 of 2015-12-05; the reference is cropped "
    f"alike, photos smaller than that resized as by clean-fid; {BIAS}",
    min_size=inception.SIZE,
)  # fmt: skip
KID_LITE0 = _row("kid/lite0", "KID (lite0)", "kid", lite0.LITE0, f"{KID}; {LITE0}; not published KID")
KID_CLEAN = _row("kid/clean", "KID (clean)", "kid", inception.CLEAN, f"{KID}; {CLEAN}")
KID_TF1 = _row("kid/tf1", "KID (TF1)", "kid", inception.TF1, f"{KID}; {TF1}")
CMMD_POCKET = _row(
    "cmmd/pocket", "CMMD (pocket)", "cmmd", clip.POCKET,
    "CMMD's kernel on the miniature's own CLIP: only for images of the miniature, 64 px; not published CMMD",
)  # fmt: skip
CMMD_VIT_L_14_336 = _row(
    "cmmd/vit-l-14-336", "CMMD", "cmmd", clip.VIT_L_14_336,
    "Jayasumana et al. 2024: OpenAI ViT-L/14 at 336 px with QuickGELU, centre square by PIL bicubic, unit length, "
    "Gaussian kernel of sigma 10, x1000; small reference photographs favour smooth images",
)  # fmt: skip
FD_DINOV2 = _row(
    "fd/dinov2", "FD-DINOv2", "frechet", dinov2.VIT_L_14,
    f"{DINOV2}; {BIAS}; edm2's and torch-fidelity's resize otherwise and give other numbers",
)  # fmt: skip
PRECISION_LITE0 = _manifold("precision", "lite0", "lite0", lite0.LITE0)
RECALL_LITE0 = _manifold("recall", "lite0", "lite0", lite0.LITE0)
DENSITY_LITE0 = _manifold("density", "lite0", "lite0", lite0.LITE0)
COVERAGE_LITE0 = _manifold("coverage", "lite0", "lite0", lite0.LITE0)
PRECISION_DINOV2 = _manifold("precision", "dinov2", "DINOv2", dinov2.VIT_L_14)
RECALL_DINOV2 = _manifold("recall", "dinov2", "DINOv2", dinov2.VIT_L_14)
DENSITY_DINOV2 = _manifold("density", "dinov2", "DINOv2", dinov2.VIT_L_14)
COVERAGE_DINOV2 = _manifold("coverage", "dinov2", "DINOv2", dinov2.VIT_L_14)
