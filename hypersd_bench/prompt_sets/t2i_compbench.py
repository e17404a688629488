"""T2I-CompBench++ (Huang et al. 2023, arXiv:2307.06350): the eight validation files, 300 prompts each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypersd_bench.download import OwnerFile
from hypersd_bench.prompt_sets.tables import Row, read_lines
from hypersd_bench.prompts import PromptSource

_COMMIT = "1b7094991a57f3c22abdd4f6e8ba6c1a15517073"
_FOLDER = f"https://raw.githubusercontent.com/Karine-Huang/T2I-CompBench/{_COMMIT}/examples/dataset"
_SHA256 = {  # by category, in the order of the list
    "color": "1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d",
    "shape": "37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae",
    "texture": "fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f",
    "spatial": "8707a1d7e42ce3002d95363cf55f74bd043c843ae27108f5125aaaa7840ca988",
    "3d_spatial": "c9953597315f36a5fcb41291bb19bdc6ab5f64a0fa760d691b4854a73f5d1fe9",
    "numeracy": "dad8df141604b70ba7554bec724e3db0a80023680769b5c514854ea2d2527bbe",
    "non_spatial": "04c56cc9ac441dc9ea6c5157652058bd1635b5308526dd31bb29a1caab9a758d",
    "complex": "1b808018b8d9916db3d47d5aa2ef18377a3549a56901a474156f799824cdf3b4",
}


def _parse(paths: Sequence[Path]) -> list[Row]:
    return [(text, category) for category, path in zip(_SHA256, paths, strict=True) for text, _ in read_lines(path)]


T2I_COMP_BENCH = PromptSource(
    id="t2i-compbench",
    count=2_400,
    license="MIT",
    url="https://github.com/Karine-Huang/T2I-CompBench",
    parse=_parse,
    files=tuple(
        OwnerFile(f"t2i-compbench/{category}_val.txt", f"{_FOLDER}/{category}_val.txt", sha256)
        for category, sha256 in _SHA256.items()
    ),
    prompts_sha256="1819ceafe130ceebed18217559f531b12e0dae2f88a831a7983560b37851111a",
    note="8 categories of 300; one prompt occurs twice",
)
