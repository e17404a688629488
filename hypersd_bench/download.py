"""Files that their owners publish outside the hub, prompts and weights: downloaded once, checked, cached."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hypersd_bench import provenance
from hypersd_bench.cache import own_cache
from hypersd_bench.errors import InputError

if TYPE_CHECKING:
    from requests import RequestException

RETRIES = 2  # after a failed try; they wait one second, then two
TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class OwnerFile:
    """A file as its owner publishes it; ``name`` is where it lies in the cache.

    Pinned by ``sha256`` (or its first digits, where only those are known), or by the id that git has for it
    (``git_blob``, 40 hex digits) where only that is known.
    """

    name: str
    url: str
    sha256: str = ""
    git_blob: str = ""

    @property
    def pinned(self) -> bool:
        """Whether a hash of it is known."""
        return bool(self.sha256 or self.git_blob)

    def check(self, path: Path) -> None:
        """Raise InputError unless the file at ``path`` is the pinned one; anything is, where no hash is known."""
        for pin, digest in ((self.sha256, provenance.sha256), (self.git_blob, _git_blob)):
            if pin and not (found := digest(path)).startswith(pin):
                raise InputError(f"{path} is not {self.url}: its hash is {found}, the pinned one {pin}")


def cache_folder(kind: str) -> Path:
    """Where downloaded files of a kind (prompts, weights) lie: in the user's cache, or in HYPERSD_BENCH_CACHE."""
    return own_cache() / kind


def fetch(file: OwnerFile, kind: str, remedy: str) -> Path:
    """Path of the cached file, downloaded if it is not there; InputError if it can't be had or is another one.

    kind: of file, which names its folder. remedy: what an error tells the user to do.
    """
    import pooch
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from requests import RequestException

    folder = cache_folder(kind)
    if HF_HUB_OFFLINE and not (folder / file.name).exists():  # one switch for all that is downloaded
        raise InputError(f"{file.url} is not here yet, and HF_HUB_OFFLINE is set; {remedy}")
    pooch.get_logger().setLevel("ERROR")  # what fails is said in one line
    store = pooch.create(
        folder,
        base_url="",
        registry={file.name: f"sha256:{file.sha256}" if len(file.sha256) == 64 else None},
        urls={file.name: file.url},
        retry_if_failed=RETRIES,
    )
    try:
        path = Path(store.fetch(file.name, downloader=_download))
    except RequestException as error:
        raise InputError(f"can't download {file.url} ({_reason(error)}); {remedy}") from error
    except ValueError as error:  # pooch names both hashes in its first sentence
        raise InputError(f"{file.url} is not what it was: {str(error).partition('. ')[0]}; {remedy}") from error
    except OSError as error:
        detail = error.strerror or error
        raise InputError(f"can't write {folder}: {detail}; set HYPERSD_BENCH_CACHE to another folder") from error
    try:
        file.check(path)
    except InputError as error:
        path.unlink()
        raise InputError(f"{error}; {remedy}") from error
    return path


def _download(url: str, target: object, store: object) -> None:
    import pooch
    from requests import RequestException

    try:
        pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=TIMEOUT_S)(url, target, store)
    except RequestException as error:
        if error.response is not None:
            error.response.close()  # pooch leaves that to the garbage collector
        raise


def _git_blob(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _reason(error: RequestException) -> str:
    """A request's failure in a few words: its own text is a nest of reprs."""
    from requests import ConnectionError, Timeout
    from requests.exceptions import ChunkedEncodingError

    if isinstance(error, ChunkedEncodingError):
        return "it broke off"
    if error.response is not None:
        return f"HTTP {error.response.status_code} {error.response.reason}"
    if isinstance(error, Timeout):
        return f"no answer in {TIMEOUT_S} s"
    return "can't connect" if isinstance(error, ConnectionError) else type(error).__name__
