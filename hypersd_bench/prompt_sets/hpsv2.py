"""HPSv2's benchmark prompts (Wu et al. 2023, arXiv:2306.09341): four styles, 800 prompts each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypersd_bench.download import OwnerFile
from hypersd_bench.prompt_sets.tables import Row, read_json
from hypersd_bench.prompts import PromptSource

_REVISION = "b9517430f34b1080d4f741118d2a440155a165cd"
_FOLDER = f"https://huggingface.co/datasets/zhwang/HPDv2/resolve/{_REVISION}/benchmark"
_SHA256 = {  # by style, in the owner's order
    "anime": "6b38a479cc6f899866e9b7a8bf91f096b4afc6883b95275a61891327182b14ae",
    "concept-art": "530d057deafcb82c581e9d1be2ffcb98828fe99f0b54257414d2ab8a5cf2b83e",
    "paintings": "6570d39467e08b24b64e5b8a4177b0f61c525631121dc5a91fe2ab956eab4d5f",
    "photo": "92a3c9a0f743f66eb87bd112cdda830d6bdb4c073c86021d53b74001fcb18052",
}


def _parse(paths: Sequence[Path]) -> list[Row]:
    return [(text, style) for style, path in zip(_SHA256, paths, strict=True) for text, _ in read_json(path)]


HPS_V2 = PromptSource(
    id="hpsv2",
    count=3_200,
    license="Apache-2.0 (code; none stated with the prompts)",
    url="https://huggingface.co/datasets/zhwang/HPDv2",
    parse=_parse,
    files=tuple(
        OwnerFile(f"hpsv2/{style}.json", f"{_FOLDER}/{style}.json", sha256) for style, sha256 in _SHA256.items()
    ),
    note="4 styles of 800; revision and hashes as others recorded them, unconfirmed",
)
