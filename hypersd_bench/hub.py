"""Weights from the model hub, through huggingface_hub as its users have it, and proof that they are whole.

HF_HOME, HF_TOKEN, HF_ENDPOINT (mirrors), HF_HUB_OFFLINE and the proxy variables mean what they mean to
huggingface_hub. What goes wrong is an ``InputError`` of one line that names the remedy; a token is in none of them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from hypersd_bench.cache import own_cache
from hypersd_bench.errors import InputError, first_line, unknown_name
from hypersd_bench.provenance import sha256
from hypersd_bench.sampling import read_safetensors_metadata

T = TypeVar("T")

# Of a pipeline or a model's own folder: neither single-file checkpoints beside it nor a second copy of its weights.
FILES = (
    "model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors",
    "config.json", "diffusion_pytorch_model*.json", "diffusion_pytorch_model*.safetensors",
)  # fmt: skip
IGNORED = ("*.fp16.*", "*.non_ema.*")

PAUSES = (0.5, 1.0, 2.0)  # seconds before each further try
TIMEOUT = 10.0  # seconds for an answer about a repository
STATUS_TIMEOUT = 5.0  # seconds
KNOWN = "stabilityai/stable-diffusion-xl-base-1.0"  # that any hub of use here, a mirror too, can be asked about
REMEMBERED_SIZE = 64 * 2**20  # bytes; smaller files are hashed each time

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SIZE_DIFFERS = "Consistency check failed"  # huggingface_hub has no class for it


@dataclass(frozen=True)
class HubStatus:
    """What ``hub_status`` found; ``problem`` says why ``endpoint`` did not answer, or is empty."""

    endpoint: str
    offline: bool
    answers: bool
    problem: str
    token: Literal["none", "valid", "refused", "unchecked"]


@dataclass(frozen=True)
class Holding:
    """What of a download is in the hub's cache.

    commit: what the revision is at, or, where the hub can't be asked, what was at it at the last download; empty if
    neither is known. size: bytes of it all. lacking: bytes still to come. Both are None where nobody can say, and
    ``problem`` says why.
    """

    commit: str
    size: int | None
    lacking: int | None
    problem: str = ""


@dataclass(frozen=True)
class _Wanted:
    """What is asked of the hub, what it lists, and the error in place of a listing."""

    repo: str
    revision: str
    file: str
    listed: Sequence[str]
    fault: Exception | None

    def __str__(self) -> str:
        return f"{self.file} of {self.repo}" if self.file else self.repo


# folders


def without_copies(files: Iterable[Path]) -> list[Path]:
    """Leave out a model's second copies in other precisions: another program may have put them into the shared cache.

    They are not downloaded here, and never loaded.
    """
    return [file for file in files if not any(fnmatch(file.name, pattern) for pattern in IGNORED)]


# downloads


def fetch_file(repo: str, file: str, revision: str = "main") -> Path:
    """Download one file of a repository into the hub's cache, once; a commit's cached file is found without network.

    Raises InputError when it can't be had.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if _COMMIT.fullmatch(revision):
        cached = try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    return _fetch(partial(hf_hub_download, repo, file, revision=revision), _ask(repo, revision, file))


def fetch_folder(
    repo: str,
    revision: str = "main",
    subfolder: str = "",
    allow: Sequence[str] = FILES,
    ignore: Sequence[str] = IGNORED,
) -> Path:
    """Download a repository's safetensors and configs into the hub's cache, once; returns the (sub)folder there.

    The patterns are relative to ``subfolder``, and ``*`` crosses folders. Raises InputError when it can't be had, and
    for a model whose weights are there as .bin alone.
    """
    from huggingface_hub import snapshot_download

    wanted = _ask(repo, revision)
    _refuse_pickles(wanted, f"{subfolder}/" if subfolder else "")
    patterns = _patterns(subfolder, allow, ignore)
    return _fetch(partial(snapshot_download, repo, revision=revision, **patterns), wanted) / subfolder


def _patterns(subfolder: str, allow: Sequence[str] = FILES, ignore: Sequence[str] = IGNORED) -> dict[str, list[str]]:
    prefix = f"{subfolder}/" if subfolder else ""
    return {"allow_patterns": [prefix + name for name in allow], "ignore_patterns": list(ignore)}


def look_up(
    repo: str, revision: str = "main", file: str = "", is_folder: bool = False, unreachable: str = ""
) -> Holding:
    """Look what of a file (``fetch_file``) or a folder (``fetch_folder``) is here; nothing is downloaded.

    unreachable: why the hub is not to be asked, where that is known (``hub_status``).
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    download: Callable[..., Any] = (
        partial(snapshot_download, repo, revision=revision, **_patterns(file))
        if is_folder
        else partial(hf_hub_download, repo, file, revision=revision)
    )
    problem = unreachable
    if not unreachable:
        wanted = _ask(repo, revision, file)
        try:
            if wanted.fault:
                raise wanted.fault
            found = _patiently(partial(download, dry_run=True))
            files = found if is_folder else [found]
            lacking = sum(one.file_size or 0 for one in files if one.will_download)
            commit = next((one.commit_hash for one in files), "")
            return Holding(commit, sum(one.file_size or 0 for one in files), lacking)
        except (_http_error(), OSError, ValueError, KeyError) as error:
            problem = str(_explained(error, wanted) or first_line(error))
    try:
        path = Path(download(local_files_only=True))
    except (_http_error(), OSError, ValueError, KeyError):
        return Holding("", None, None, problem)
    here = (path / file).rglob("*") if is_folder else [path]
    return Holding(resolved_commit(path), sum(one.stat().st_size for one in here if one.is_file()), 0)


def resolved_commit(path: Path) -> str:
    """The commit of the snapshot that a path lies in; empty outside the hub's cache."""
    for folder in (path.absolute(), *path.absolute().parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.name
    return ""


def _ask(repo: str, revision: str, file: str = "") -> _Wanted:
    """Ask the hub for a repository's listing, which also tells early, and soon, whether the hub can be asked at all.

    (huggingface_hub itself tries for 23 s to reach a hub that nobody answers for.)
    """
    from huggingface_hub import HfApi

    try:
        info = _patiently(lambda: HfApi().model_info(repo, revision=revision, timeout=TIMEOUT))
    except (_http_error(), OSError, ValueError, KeyError) as error:
        return _Wanted(repo, revision, file, (), error)
    return _Wanted(repo, revision, file, [sibling.rfilename for sibling in info.siblings or ()], None)


def _fetch(download: Callable[..., Any], wanted: _Wanted) -> Path:
    """Run a download of huggingface_hub; what the hub can't be asked for comes from its cache, if it is there."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        if wanted.fault is None:
            return Path(_patiently(download))
        try:
            return Path(download(local_files_only=True))
        except (LocalEntryNotFoundError, ValueError):
            raise wanted.fault from None
    except (_http_error(), OSError, ValueError, KeyError) as error:
        explained = _explained(error, wanted)
        if explained is None:
            raise
        raise explained from error


def _patiently(call: Callable[[], T]) -> T:
    """Call, and again after what may pass: 5xx, too many requests, broken connections, a file of another size.

    Within a download, huggingface_hub resumes by itself where a connection ends; it gives up at these.
    """
    for pause in PAUSES:
        try:
            return call()
        except (_http_error(), OSError) as error:
            if not _may_pass(error):
                raise
        time.sleep(pause)
    return call()


def _may_pass(error: Exception) -> bool:
    if not isinstance(error, _http_error()):
        return str(error).startswith(_SIZE_DIFFERS)
    status = _status(error)
    return status in (0, 408, 429) or status >= 500


def _http_error() -> type[Exception]:
    """The HTTPError of the client below huggingface_hub: httpx in its version 1, httpx2 in 2."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base


def _status(error: BaseException) -> int:
    """The status of the answer behind an error; 0 where none came."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _refuse_pickles(wanted: _Wanted, prefix: str) -> None:
    """Refuse a model of which there are .bin weights and no safetensors: unpickling may run code."""
    files = [Path(name) for name in wanted.listed if name.startswith(prefix)]
    models = {path.parent for path in files if path.name == "config.json"}
    whole = {path.parent for path in files if path.suffix == ".safetensors"}
    pickled = {path.parent for path in files if path.suffix == ".bin"} & models - whole
    lacking = sorted(str(folder) for folder in pickled if folder.name != "safety_checker")  # which nobody loads
    if lacking:
        where = "" if lacking == ["."] else f" in {', '.join(lacking)}"
        raise InputError(f"{wanted.repo} has .bin weights{where} and no safetensors, and loading .bin may run code; "
                         "name a revision or repository with safetensors, or a folder that you converted")  # fmt: skip


# errors


def _explained(error: Exception, wanted: _Wanted) -> InputError | None:
    """The one line for an error of a download; None for one that is not the hub's, such as a full disk."""
    from huggingface_hub import errors

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        from huggingface_hub.constants import HF_HUB_CACHE

        return InputError(f"{wanted} is not, or not whole, in the hub's cache {HF_HUB_CACHE}, and offline mode is on; "
                          "unset HF_HUB_OFFLINE, or run `hypersd-bench fetch SPEC` where there is network and bring "
                          "that machine's cache")  # fmt: skip
    if isinstance(cause, errors.HfHubHTTPError):
        return _refused(cause, wanted)
    if str(cause).startswith(_SIZE_DIFFERS):
        return InputError(f"{wanted} came {len(PAUSES) + 1} times from {_host()} in another size than announced; run "
                          "the same command again, or go round the proxy or mirror (HF_ENDPOINT)")  # fmt: skip
    if _token_cannot_be_sent(cause):
        return InputError("the token that is set holds a character that no token has; set HF_TOKEN anew, or unset it")
    if isinstance(cause, errors.HFValidationError):
        return InputError(f"{wanted.repo!r} is no repository's id ({first_line(cause)}); write owner/name")
    if isinstance(cause, OSError) and cause.filename and cause.errno not in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"can't use {cause.filename} for {wanted} ({cause.strerror}); set HF_HOME to a folder that "
                          "you can write to")  # fmt: skip
    if isinstance(cause, (errors.FileMetadataError, ValueError, KeyError)):
        return InputError(f"{_host()} does not answer as a hub does; check HF_ENDPOINT, and whether a proxy or a login "
                          "page answers in its place")  # fmt: skip
    if not isinstance(cause, _http_error()):
        return None
    if wanted.fault is None:
        return InputError(f"the download of {wanted} from {_host()} broke off ({first_line(cause)}); run the same "
                          "command again")  # fmt: skip
    return InputError(f"{wanted} is not in the hub's cache and {_host()} can't be reached ({first_line(cause)}); "
                      "check the network, a proxy and HF_ENDPOINT, give a local folder, or bring the cache of a "
                      "machine with network and set HF_HUB_OFFLINE=1")  # fmt: skip


def _refused(error: Exception, wanted: _Wanted) -> InputError:
    """The one line for an answer that the hub gave."""
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT

    status = _status(error)
    given = "the token that is set has no access" if _token() else "no token is set"
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{wanted.repo} is gated and {given}; accept its licence at {ENDPOINT}/{wanted.repo}, then "
                          "set HF_TOKEN to a token of that account")  # fmt: skip
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{wanted.repo} has no revision {wanted.revision!r}; name a branch, a tag or a whole commit")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return unknown_name("file", wanted.file, wanted.listed, f"{wanted.repo} at {wanted.revision}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(f"{_host()} has no repository {wanted.repo!r}, or it is private and {given}; check the name, "
                          "or set HF_TOKEN to a token that may read it")  # fmt: skip
    if status == 401:
        return InputError(f"{_host()} does not accept the token that is set; set HF_TOKEN to a valid one, or unset it "
                          "(and `hf auth logout`) for public repositories")  # fmt: skip
    if status == 403:
        return InputError(f"{_host()} denies access to {wanted}; set HF_TOKEN to a token that may read it")
    if _may_pass(error):
        return InputError(f"{_host()} answers {status} for {wanted}, {len(PAUSES) + 1} times; run the same command "
                          "again later, or use a mirror (HF_ENDPOINT) or a local folder")  # fmt: skip
    return InputError(f"{_host()} answers {status} for {wanted}; check the name and HF_ENDPOINT")


def _endpoint() -> str:
    """The endpoint's address, without a password that it may hold."""
    from huggingface_hub.constants import ENDPOINT

    return re.sub(r"[^/]*@", "", ENDPOINT)


def _host() -> str:
    """The endpoint's host and port."""
    found = re.match(r"\w+://([^/]+)", _endpoint())
    return found[1] if found else "the hub's endpoint"


def _token_cannot_be_sent(error: BaseException) -> bool:
    """Whether an error is the HTTP client's, about the header of the token; such an error quotes the token."""
    return isinstance(error, UnicodeError) or "Bearer" in str(error)


# whether files are whole


def check_whole(path: Path) -> str:
    """Check a weights file, and return its SHA-256.

    A safetensors file must be as long as its header says, and a file that the hub stores by LFS must have the content
    that the hub announced: it lies in the cache under that content's SHA-256. Raises InputError with both hashes.
    """
    announced = _announced_sha256(path)
    remedy = f"delete {path.resolve()} and run the same command again"
    if path.suffix == ".safetensors":
        try:
            read_safetensors_metadata(path)
        except InputError as error:
            if not announced:
                raise
            raise InputError(f"{error}: {remedy}") from error
    found = file_sha256(path)
    if announced and found != announced:
        raise InputError(f"{path} is not what the hub announced: its SHA-256 is {found}, announced was {announced}; "
                         f"{remedy}")  # fmt: skip
    return found


def file_sha256(path: Path) -> str:
    """Hash a file; a large one's hash is remembered, in HYPERSD_BENCH_CACHE, until its size or time changes."""
    try:
        stat = path.stat()
        if stat.st_size < REMEMBERED_SIZE:
            return sha256(path)
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        known = _remembered().get(key)
        if isinstance(known, str) and _SHA256.fullmatch(known):
            return known
        found = sha256(path)
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from error
    _remember(key, found)
    return found


def _announced_sha256(path: Path) -> str:
    """The SHA-256 under which a file lies in the hub's cache; empty for any other file.

    Link by link, as the entry in blobs/ may itself be a link, to a store shared by repositories.
    """
    step = path.absolute()
    while not (step.parent.name == "blobs" and _SHA256.fullmatch(step.name)):
        if not step.is_symlink():
            return ""
        step = step.parent / step.readlink()
    return step.name


def _hashes_file() -> Path:
    return own_cache() / "hashes.json"


def _remembered() -> dict[str, Any]:
    try:
        known = json.loads(_hashes_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(key: str, value: str) -> None:
    """Add a hash, atomically; where that can't be written it is computed again the next time."""
    path = _hashes_file()
    written = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps({**_remembered(), key: value}, indent=1), encoding="utf-8")
        written.replace(path)


# for `hypersd-bench doctor`


def hub_status() -> HubStatus:
    """Ask the endpoint who the token's owner is: whether a hub answers within 5 s, and whether it accepts the token."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    token = _token()
    endpoint = _endpoint()
    known: Literal["none", "unchecked"] = "unchecked" if token else "none"
    if HF_HUB_OFFLINE:
        return HubStatus(endpoint, True, False, "offline mode is on", known)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = get_session().get(f"{ENDPOINT}/api/whoami-v2", headers=headers, timeout=STATUS_TIMEOUT)
        tells = answer.status_code in (200, 401, 403) and _is_a_hubs(answer)
        if not tells:  # a mirror may know models alone
            answer = get_session().get(f"{ENDPOINT}/api/models/{KNOWN}", headers=headers, timeout=STATUS_TIMEOUT)
    except (_http_error(), OSError, UnicodeError) as error:
        if _token_cannot_be_sent(error):
            return HubStatus(endpoint, False, False, "the token can't be sent", "refused")
        return HubStatus(endpoint, False, False, first_line(error), known)
    if not _is_a_hubs(answer):
        return HubStatus(endpoint, False, False, f"it answers {answer.status_code}, and not as a hub does", known)
    if not token or not tells:
        return HubStatus(endpoint, False, True, "", known)
    return HubStatus(endpoint, False, True, "", "valid" if answer.status_code == 200 else "refused")


def _is_a_hubs(answer: Any) -> bool:
    """Whether a hub gave an answer: its refusals carry a header of their own, all else is a JSON object."""
    if "X-Error-Message" in answer.headers or "X-Error-Code" in answer.headers:
        return True
    try:
        return answer.status_code in (200, 401, 403) and isinstance(answer.json(), dict)
    except ValueError:
        return False


def _token() -> str:
    from huggingface_hub import get_token

    return get_token() or ""
