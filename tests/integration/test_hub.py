"""Weights from the hub, through huggingface_hub as users have it, from a stand-in for the hub on this machine.

huggingface_hub reads its environment when imported, so everything here happens in processes of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from hypersd_bench import hub as ours
from hypersd_bench.errors import InputError
from hypersd_bench.pipelines import base_folder
from tests.hub import StandInHub, environment
from tests.tiny_base import make_tiny_base

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:1"  # nobody listens there
# Beyond two of the chunks of 10 MiB that huggingface_hub keeps a broken download by.
LARGE = save({"weight": np.arange(6 * 2**20, dtype=np.float32)})
SMALL = save({"weight": np.arange(300, dtype=np.float32)})
UNET = "unet/diffusion_pytorch_model"
PRELUDE = """
import json, os
from hypersd_bench import hub
from hypersd_bench.errors import InputError
from hypersd_bench.hub import *
hub.PAUSES = (0.05, 0.05, 0.05)
def tell(call, *arguments, **options):
    try:
        said = str(call(*arguments, **options))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps(said))
"""


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with StandInHub() as server:
        yield server


def run(code: str, env: dict[str, str]) -> tuple[list[Any], str]:
    """Run code behind the prelude; returns what it told, and its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# what comes, and from where


def test_a_broken_download_is_resumed_and_whole(hub: StandInHub, tmp_path: Path) -> None:
    commit = hub.add("acme/tiny", {"large.safetensors": LARGE}, gated_token="hf_known")
    hub.truncate("large.safetensors")
    code = "path = fetch_file('acme/tiny', 'large.safetensors')\ntell(str, path)\ntell(resolved_commit, path)\n"
    told, _ = run(code + "tell(check_whole, path)", environment(hub, tmp_path, HF_TOKEN="hf_known"))
    assert Path(told[0]).read_bytes() == LARGE
    assert told[1:] == [commit, sha256(LARGE)]
    parts = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert [part.range for part in parts] == ["", f"bytes={10 * 2**20}-"]
    assert not any(part.authorized for part in parts)  # the token stays with the hub


def test_a_folder_comes_without_copies_and_is_found_again(hub: StandInHub, tmp_path: Path) -> None:
    pipeline = {
        "model_index.json": b"{}", "unet/config.json": b"{}", f"{UNET}.safetensors": SMALL, f"{UNET}.bin": b"pickle",
        "tokenizer/merges.txt": b"a b", "safety_checker/pytorch_model.bin": b"pickle",
        "safety_checker/config.json": b"{}", "embedding.bin": b"pickle",
    }  # fmt: skip
    copies = {f"{UNET}.fp16.safetensors": b"x", f"{UNET}.non_ema.safetensors": b"x", "all.safetensors": b"x"}
    extra = {f"scheduler/{i}.json": b"%d" % i for i in range(30)}
    commit = hub.add("acme/tiny", pipeline | copies | extra)
    model = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": SMALL}
    hub.add("acme/unet", {**{f"student/{name}": model[name] for name in model}, "other/config.json": b"{}"})
    hub.add("acme/root", {**model, "README.md": b"", "lora.safetensors": SMALL})
    code = """
def names(*arguments, **options):
    folder = fetch_folder(*arguments, **options)
    print(json.dumps(sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())))
names('acme/tiny')
names('acme/unet', subfolder='student')
names('acme/root')
"""
    (whole, unet, root), _ = run(code, environment(hub, tmp_path))
    kept = [name for name in pipeline if not name.endswith(".bin")]
    assert whole == sorted([*kept, *extra])
    assert unet == root == sorted(model)

    arrived = len(hub.requests)
    code += f"""
tell(fetch_file, 'acme/tiny', 'unet/config.json', {commit!r})
tell(fetch_file, 'acme/tiny', 'all.safetensors')
tell(fetch_folder, 'acme/other')
"""
    for settings, why in (({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"), ({"HF_ENDPOINT": NOWHERE}, "127.0.0.1:1 ")):
        (*found, pinned, file, folder), _ = run(code, environment(hub, tmp_path, **settings))
        assert found == [whole, unet, root]
        assert Path(pinned).read_bytes() == b"{}"
        assert file.startswith("InputError: all.safetensors of acme/tiny is not")
        assert folder.startswith("InputError: acme/other is not")
        assert why in file
        assert why in folder
        assert ("hypersd-bench fetch SPEC" in file) == (why == "HF_HUB_OFFLINE")
    assert len(hub.requests) == arrived


def test_a_commits_file_is_found_without_asking(hub: StandInHub, tmp_path: Path) -> None:
    commit = hub.add("acme/tiny", {"a.safetensors": SMALL})
    code = f"for _ in range(2):\n    tell(fetch_file, 'acme/tiny', 'a.safetensors', {commit!r})\n"
    told, _ = run(code, environment(hub, tmp_path))
    assert told[0] == told[1]
    assert len([request for request in hub.requests if request.method == "HEAD"]) == 1
    assert len([request for request in hub.requests if request.path.startswith("/api/")]) == 1


def test_what_may_pass_is_tried_again(hub: StandInHub, tmp_path: Path) -> None:
    hub.add("acme/tiny", dict.fromkeys(("a.safetensors", "b.safetensors", "c.safetensors", "d.safetensors"), SMALL))
    hub.fail("api/models/acme/tiny/revision/main", status=502, times=2)
    hub.fail("a.safetensors", status=503, times=3, method="GET")
    hub.drop("b.safetensors", method="HEAD")
    hub.fail("c.safetensors", status=500, times=1, method="HEAD")
    hub.fail("d.safetensors", status=429, times=1, method="HEAD")
    code = "for name in 'abcd':\n    tell(lambda: check_whole(fetch_file('acme/tiny', f'{name}.safetensors')))\n"
    assert run(code, environment(hub, tmp_path))[0] == [sha256(SMALL)] * 4


# what can't be had


def test_each_refusal_is_one_line_with_its_remedy(hub: StandInHub, tmp_path: Path) -> None:
    hub.add("acme/tiny", {"Hyper-SD15-1step-lora.safetensors": SMALL, "short.safetensors": SMALL, "big.bin": LARGE})
    hub.add("acme/login", {"a.safetensors": SMALL})
    hub.add("acme/ill", {"a.safetensors": SMALL, "b.safetensors": SMALL})
    hub.add("acme/gated", {"a.safetensors": SMALL}, gated_token="hf_other")
    hub.add("acme/pickled", {"unet/config.json": b"{}", f"{UNET}.bin": b"x", "vae/model.safetensors": SMALL})
    hub.shorten("short.safetensors")
    hub.fail("api/models/acme/login/revision/main", status=200, times=9)  # somebody answers, but no hub
    hub.fail("acme/ill/a.safetensors", status=504, times=9, method="GET")
    hub.fail("resolve/main/b.safetensors", status=200, times=9, method="HEAD")
    hub.fail("api/models/acme/down/revision/main", status=503, times=9)
    hub.fail("api/models/acme/teapot/revision/main", status=418, times=9)
    host = hub.url.removeprefix("http://")
    cases: dict[str, list[str]] = {
        "fetch_file, 'acme/nothing', 'a.safetensors'": [host, "no repository 'acme/nothing'", "no token", "HF_TOKEN"],
        "fetch_folder, 'acme/nothing'": [host, "no repository 'acme/nothing'", "no token is set", "HF_TOKEN"],
        "fetch_file, 'acme/tiny', 'Hyper-SD15-1steps-lora.safetensors'": [
            "acme/tiny at main; did you mean 'Hyper-SD15-1step-lora.safetensors'?"
        ],
        "fetch_file, 'acme/tiny', 'short.safetensors', 'v2'": ["acme/tiny has no revision 'v2'", "commit"],
        "fetch_folder, 'acme/tiny', 'v2'": ["acme/tiny has no revision 'v2'", "commit"],
        "fetch_file, 'acme/gated', 'a.safetensors'": [
            f"gated and no token is set; accept its licence at {hub.url}/acme/gated,", "HF_TOKEN"
        ],
        "fetch_folder, 'acme/gated', 'main', '', ['*']": ["gated and no token is set", "licence", "HF_TOKEN"],
        "fetch_folder, 'acme/pickled'": ["acme/pickled has .bin weights in unet and no safetensors"],
        "fetch_file, 'acme/tiny', 'short.safetensors'": ["short.safetensors of acme/tiny came 4 times", "size"],
        "fetch_file, 'acme/login', 'a.safetensors'": [f"{host} does not answer as a hub does; check HF_ENDPOINT"],
        "fetch_file, 'acme/ill', 'a.safetensors'": [f"{host} answers 504 for a.safetensors of acme/ill, 4 times"],
        "fetch_file, 'acme/ill', 'b.safetensors'": [f"{host} does not answer as a hub does; check HF_ENDPOINT"],
        "fetch_file, 'acme/down', 'a.safetensors'": [f"{host} answers 503 for a.safetensors of acme/down", "mirror"],
        "fetch_file, 'acme/teapot', 'a.safetensors'": [f"{host} answers 418", "HF_ENDPOINT"],
        "fetch_file, 'acme/a/b', 'a.safetensors'": ["'acme/a/b' is no repository's id", "owner/name"],
    }  # fmt: skip
    code = "".join(f"tell({case})\n" for case in cases)
    # a write that fails for a reason of this machine, as on a full disk, is not the hub's and not put in its words
    code += "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
    code += "tell(fetch_file, 'acme/tiny', 'big.bin')\n"
    (*told, full), _ = run(code, environment(hub, tmp_path))
    for said, wanted in zip(told, cases.values(), strict=True):
        assert said.startswith("InputError: ")
        assert "\n" not in said
        assert [words for words in wanted if words not in said] == [], said
    assert full.startswith("OSError: [Errno 27]")


@pytest.mark.parametrize(
    ("token", "of_gated", "of_open", "status"),
    [
        ("hf_other", "gated and the token that is set has no access; accept its licence", "whole", "valid"),
        ("hf_wrongsecret", "does not accept the token that is set; set HF_TOKEN", "does not accept", "refused"),
        ("hf_wrong\x0bsecret", "set HF_TOKEN anew", "set HF_TOKEN anew", "refused"),  # the HTTP client would quote it
        ("hf_wröngsecret", "set HF_TOKEN anew", "set HF_TOKEN anew", "refused"),
        ("hf_right", "whole", "whole", "valid"),
    ],
)
def test_a_token_counts_and_is_never_told(
    hub: StandInHub, tmp_path: Path, token: str, of_gated: str, of_open: str, status: str
) -> None:
    hub.add("acme/open", {"a.safetensors": SMALL})
    hub.add("acme/gated", {"a.safetensors": SMALL}, gated_token="hf_right")
    hub.add("acme/another", {}, gated_token="hf_other")
    code = """
for repo in ('acme/gated', 'acme/open'):
    tell(lambda: f"whole {check_whole(fetch_file(repo, 'a.safetensors'))}")
tell(lambda: hub_status().token)
tell(hub_status)
"""
    (gated, open_, found, everything), stderr = run(code, environment(hub, tmp_path, HF_TOKEN=token))
    assert of_gated in gated
    assert of_open in open_
    assert found == status
    assert not [text for text in (gated, open_, everything, stderr) if "secret" in text or "hf_" in text]


def test_the_status_says_whether_the_hub_answers(hub: StandInHub, tmp_path: Path) -> None:
    code = "from dataclasses import astuple\nprint(json.dumps(astuple(hub_status())))"
    (here,), _ = run(code, environment(hub, tmp_path))
    assert here == [hub.url, False, True, "", "none"]
    settings = {"HF_ENDPOINT": "http://user:secret@127.0.0.1:1", "HF_TOKEN": "hf_a"}
    ((*nowhere, problem, token),), _ = run(code, environment(hub, tmp_path, **settings))
    assert nowhere == ["http://127.0.0.1:1", False, False]
    assert "refused" in problem
    assert token == "unchecked"
    (offline,), _ = run(code, environment(hub, tmp_path, HF_HUB_OFFLINE="1"))
    assert offline == [hub.url, True, False, "offline mode is on", "none"]


def test_an_address_that_is_no_hub_is_said_to_be_none(hub: StandInHub, tmp_path: Path) -> None:
    code = "from dataclasses import astuple\nprint(json.dumps(astuple(hub_status())))"
    (malformed,), _ = run(code, environment(hub, tmp_path, HF_ENDPOINT="htp:/user:secret@nowhere"))
    assert malformed[:3] == ["htp:/nowhere", False, False]
    assert "protocol" in malformed[3]
    no_hub = hub.cdn.removesuffix("/cdn")  # answers 404
    (other,), _ = run(code, environment(hub, tmp_path, HF_ENDPOINT=no_hub))
    assert other == [no_hub, False, False, "it answers 404, and not as a hub does", "none"]
    hub.fail("api/whoami-v2", status=404)  # a mirror of models alone
    (mirror,), _ = run(code, environment(hub, tmp_path, HF_TOKEN="hf_a"))
    assert mirror == [hub.url, False, True, "", "unchecked"]


def test_a_cache_that_can_not_be_written_is_named(hub: StandInHub, tmp_path: Path) -> None:
    hub.add("acme/tiny", {"a.safetensors": SMALL, "config.json": b"{}"})
    (tmp_path / "file").write_text("x")
    code = "tell(fetch_file, 'acme/tiny', 'a.safetensors')\ntell(fetch_folder, 'acme/tiny', allow=['*'])\n"
    for said in run(code, environment(hub, tmp_path / "file" / "home"))[0]:
        assert said.startswith("InputError: can't use ")
        assert str(tmp_path / "file") in said
        assert said.endswith("set HF_HOME to a folder that you can write to")
        assert "\n" not in said


# whether it is whole


def test_tampered_and_truncated_files_name_what_to_delete(hub: StandInHub, tmp_path: Path) -> None:
    hub.add("acme/tiny", {"a.safetensors": SMALL, "config.json": b"{}"})
    hub.tamper("a.safetensors")
    code = """
path = fetch_file('acme/tiny', 'a.safetensors')
tell(check_whole, path)
tell(path.resolve)
os.truncate(path, path.stat().st_size // 2)
tell(check_whole, path)
tell(lambda: check_whole(fetch_file('acme/tiny', 'config.json')))
"""
    (tampered, blob, truncated, config), _ = run(code, environment(hub, tmp_path))
    found = sha256(SMALL[:-1] + bytes([SMALL[-1] ^ 1]))
    assert tampered.startswith("InputError: ")
    assert f"its SHA-256 is {found}, announced was {sha256(SMALL)}; delete {blob} and run" in tampered
    assert "not a whole safetensors file" in truncated
    assert f"delete {blob} and run" in truncated
    assert config == sha256(b"{}")
    Path(blob).unlink()
    hub.heal()
    assert run(code, environment(hub, tmp_path))[0][0] == sha256(SMALL)  # the remedy works


def test_any_file_can_be_checked_and_belongs_to_no_commit(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(SMALL)
    assert ours.check_whole(path) == sha256(SMALL)
    assert ours.resolved_commit(path) == ""
    path.write_bytes(SMALL[:-4])
    with pytest.raises(InputError, match="not a whole safetensors file") as told:
        ours.check_whole(path)
    assert "delete" not in str(told.value)  # a file of the user's own
    with pytest.raises(InputError, match="can't read"):
        ours.file_sha256(tmp_path / "absent")


def test_a_large_files_hash_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERSD_BENCH_CACHE", str(tmp_path / "cache"))
    remembered = tmp_path / "cache" / "hashes.json"
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(b"")
    os.truncate(large, ours.REMEMBERED_SIZE)
    small.write_bytes(b"small")
    empty = hashlib.sha256(bytes(ours.REMEMBERED_SIZE)).hexdigest()

    assert ours.file_sha256(small) == sha256(b"small")
    assert not remembered.exists()
    assert ours.file_sha256(large) == empty
    assert list(json.loads(remembered.read_text()).values()) == [empty]

    def rewrite(content: str) -> Callable[[], object]:
        return lambda: remembered.write_text(content)

    (key,) = json.loads(remembered.read_text())
    remembered.write_text(json.dumps({key: "0" * 64}))
    assert ours.file_sha256(large) == "0" * 64  # not hashed again
    for spoil in (rewrite("no json"), rewrite("[]"), rewrite(json.dumps({key: 7})), remembered.unlink):
        spoil()
        assert ours.file_sha256(large) == empty
    os.utime(large, ns=(0, 0))
    remembered.write_text(json.dumps({key: "0" * 64}))
    assert ours.file_sha256(large) == empty  # another time, another file
    monkeypatch.setenv("HYPERSD_BENCH_CACHE", str(small / "under-a-file"))
    assert ours.file_sha256(large) == empty


# a base by its hub id


def test_a_base_is_downloaded_once_and_then_found_offline(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_base(tmp_path / "base")
    files = {str(path.relative_to(base)): path.read_bytes() for path in sorted(base.rglob("*")) if path.is_file()}
    hub.add("acme/tiny", {**files, f"{UNET}.fp16.safetensors": b"not asked for"})
    code = """
from hypersd_bench.pipelines import base_folder, load_base
load_base('acme/tiny')
tell(base_folder, 'acme/tiny')
tell(base_folder, 'acme/nothing')
"""
    (folder, nothing), _ = run(code, environment(hub, tmp_path / "home"))
    assert sorted(path.name for path in Path(folder, "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert nothing.startswith("InputError: ")
    assert "acme/nothing" in nothing
    assert "HF_TOKEN" in nothing
    assert "\n" not in nothing
    # this process is offline, as all tests are: a second one would only import everything again
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    arrived = len(hub.requests)
    assert str(base_folder("acme/tiny")) == folder
    with pytest.raises(InputError, match="acme/nothing"):
        base_folder("acme/nothing")
    assert len(hub.requests) == arrived
