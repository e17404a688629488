"""Published results, table by table, with the protocol of each: numbers of two tables are never comparable."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hypersd_bench.catalog.spec import Published

UNSTATED = "-"  # a base that a table does not state: such a row belongs to no entry


@dataclass(frozen=True)
class Table:
    """A published table: each line of ``rows`` is base, family, steps, and a value for each column (``-``: none)."""

    source: str
    protocol: str
    columns: tuple[str, ...]
    rows: str

    def published(self, base: str, family: str, steps: Collection[int]) -> list[Published]:
        """The rows of a family at these step counts."""
        return [
            Published(self.source, self.protocol, row_steps, values)
            for row_base, row_family, row_steps, values in self.parsed()
            if (row_base, row_family) == (base, family) and row_steps in steps
        ]

    def parsed(self) -> list[tuple[str, str, int, dict[str, float]]]:
        """The rows as base, family, steps and the values by column."""
        parsed = []
        for line in self.rows.strip().splitlines():
            base, family, steps, *cells = line.split()
            pairs = zip(self.columns, cells, strict=True)
            parsed.append((base, family, int(steps), {name: float(cell) for name, cell in pairs if cell != "-"}))
        return parsed


def published(base: str, family: str, steps: Collection[int]) -> tuple[Published, ...]:
    """What is published of a family on a base at these step counts, in the order of ``TABLES``."""
    return tuple(row for table in TABLES for row in table.published(base, family, steps))


_HYPER_SD = "arXiv 2404.13686 v3"
_HYPER_SD_PROTOCOL = (
    "COCO-5k prompts (list unpublished), SD1.5 at 512 px, SDXL at 1024, Turbo at 512; CLIP ViT-B/32 x100; LAION "
    "aesthetic, variant unstated; ImageReward; PickScore as cosine; bases at guidance 7.5"
)
_HYPER_SD_COLUMNS = ("CLIP", "Aes", "IR", "Pick")

TABLES = (
    Table(
        f"Hyper-SD, {_HYPER_SD}, Table 2",
        _HYPER_SD_PROTOCOL,
        _HYPER_SD_COLUMNS,
        """
        sd15 teacher            25  31.88 5.26  0.18 0.217
        sd15 lcm                 4  30.36 5.66 -0.37 0.212
        sd15 tcd                 4  30.62 5.45 -0.15 0.214
        sd15 perflow             4  30.77 5.64 -0.35 0.208
        sd15 hyper-sd            1  30.87 5.79  0.29 0.215
        sdxl teacher            25  33.16 5.54  0.87 0.229
        sdxl lcm                 4  32.43 5.42  0.48 0.224
        sdxl tcd                 4  32.45 5.42  0.67 0.226
        sdxl lightning-lora      4  32.40 5.63  0.72 0.229
        sdxl hyper-sd            4  32.56 5.74  0.93 0.232
        sdxl turbo               1  32.33 5.33  0.78 0.228
        sdxl lightning           1  32.17 5.34  0.54 0.223
        sdxl hyper-sd            1  32.85 5.85  1.19 0.231
        """,
    ),
    Table(
        f"Hyper-SD, {_HYPER_SD}, Table 3 (its rows TSCD + HFL; 4 steps are Table 2's Hyper-SDXL)",
        _HYPER_SD_PROTOCOL,
        _HYPER_SD_COLUMNS,
        """
        sdxl hyper-sd            2  32.61 5.84 1.04 0.232
        sdxl hyper-sd            8  32.56 5.89 0.93 0.232
        """,
    ),
    Table(
        f"Hyper-SD, {_HYPER_SD}, Table 4",
        _HYPER_SD_PROTOCOL,
        _HYPER_SD_COLUMNS,
        """
        sd15 hyper-sd-unified    8  30.73 5.47 0.53 0.224
        sd15 hyper-sd-unified    4  31.07 5.55 0.53 0.224
        sd15 hyper-sd-unified    2  31.21 5.93 0.45 0.222
        sd15 hyper-sd-unified    1  30.87 5.79 0.29 0.215
        sdxl hyper-sd-unified    8  32.54 5.83 1.14 0.233
        sdxl hyper-sd-unified    4  32.51 5.52 1.15 0.234
        sdxl hyper-sd-unified    2  32.59 5.71 1.15 0.234
        sdxl hyper-sd-unified    1  32.59 5.69 1.06 0.226
        """,
    ),
    Table(
        "NitroFusion, arXiv 2412.02030, Table 1",
        "COCO-5k at 1024 px; CLIP ViT-B/32 as cosine; UNet or LoRA is not stated",
        ("CLIP", "FID", "Aes", "IR"),
        """
        sdxl teacher            25  .320 23.30 5.58  .782
        sdxl turbo               4  .317 29.07 5.51  .848
        sdxl turbo               1  .318 28.99 5.38  .782
        sdxl lightning           4  .312 28.95 5.75  .749
        sdxl lightning           1  .313 29.23 5.65  .557
        sdxl hyper-sd            4  .314 34.49 5.87 1.091
        sdxl hyper-sd            1  .317 36.77 6.00 1.169
        sdxl dmd2                4  .316 24.57 5.54  .880
        sdxl dmd2                1  .320 23.91 5.47  .825
        sdxl nitro-realism       4  .313 29.09 5.60  .945
        sdxl nitro-realism       1  .320 25.61 5.56  .856
        sdxl nitro-vibrant       4  .312 39.76 5.85 1.034
        sdxl nitro-vibrant       1  .314 38.49 5.92  .991
        """,
    ),
    Table(
        "SDXL-Lightning, arXiv 2402.13929, its own table",
        "first 10K COCO validation prompts, clean-fid; patch FID on the 299 px centre crop; CLIP x100",
        ("FID", "patch FID", "CLIP"),
        """
        sdxl teacher            32  18.49  35.89 26.48
        sdxl lcm-unet            1  80.01 158.90 23.65
        sdxl lcm-unet            4  21.85  42.53 26.09
        sdxl lcm                 4  21.50  40.38 26.18
        sdxl turbo               1  23.71  43.69 26.36
        sdxl turbo               4  22.58  42.65 26.18
        sdxl lightning           1  22.61  41.53 26.02
        sdxl lightning           2  23.11  35.12 25.98
        sdxl lightning           4  22.30  33.52 26.07
        sdxl lightning           8  21.43  33.55 25.86
        sdxl lightning-lora      2  23.39  40.54 26.18
        sdxl lightning-lora      4  23.01  34.10 26.04
        sdxl lightning-lora      8  22.30  33.92 25.77
        """,
    ),
    Table(
        "DMD2, arXiv 2405.14867",
        "10K COCO2014 captions, images and references at 512 px, clean-fid",
        ("FID",),
        """
        sdxl dmd2                4  19.32
        sdxl dmd2-lora           4  19.68
        sdxl dmd2                1  19.01
        """,
    ),
    Table(
        "UniFL, arXiv 2404.05595",
        "COCO2017 validation, 5k; UNet or LoRA is not stated",
        ("FID",),
        """
        sdxl teacher            25  27.92
        sdxl lcm                 4  27.23
        sdxl turbo               4  30.43
        sdxl lightning           4  28.48
        """,
    ),
    Table(
        "TCD, arXiv 2402.19159 (read in secondary sources)",
        "COCO-5k; PickScore x100; base model not stated",
        ("FID", "Pick"),
        """
        -    tcd                 4  12.68 22.31
        -    lcm                 4  15.03 22.20
        """,
    ),
    Table(
        "LCM, arXiv 2310.04378 (read in secondary sources)",
        "512 px, guidance weight w = 8; base model not stated",
        ("FID",),
        """
        -    lcm-unet            1  35.36
        -    lcm-unet            2  13.3
        -    lcm-unet            4  11.10
        -    lcm-unet            8  11.8
        """,
    ),
    Table(
        "SenseFlow's README (arXiv 2506.00523; its authors' own numbers)",
        "COCO-5K; FID-T and patch FID-T against the teacher's samples; CLIP as cosine, PickScore x100; UNet or LoRA is "
        "not stated; the teacher's 80 evaluations are 40 guided steps",
        ("FID-T", "patch FID-T", "CLIP", "HPSv2", "Pick", "IR"),
        """
        sdxl teacher            40  -     -     .3293 .2930 22.67 .8719
        sdxl lcm                 4  18.47 30.63 .3230 .2824 22.22 .5693
        sdxl pcm                 4  14.38 17.77 .3242 .2920 22.54 .6926
        sdxl flash               4  17.97 23.24 .3216 .2830 22.17 .4295
        sdxl lightning           4  13.67 16.57 .3214 .2931 22.80 .7799
        sdxl hyper-sd            4  13.71 17.49 .3254 .3000 22.98 .9777
        sdxl dmd2                4  15.04 18.72 .3277 .2963 22.98 .9324
        sdxl senseflow           4  17.76 21.01 .3248 .3010 23.17 .9951
        """,
    ),
)
