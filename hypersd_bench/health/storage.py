"""Disk, caches and the model hub: whether weights can come, and whether there is room for them."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from hypersd_bench.cache import CACHE_VARIABLE, own_cache
from hypersd_bench.health.finding import Finding
from hypersd_bench.hub import STATUS_TIMEOUT, HubStatus, hub_status

_MIB, _GIB = 2**20, 2**30
RUN_GIB, LEAST_GIB = 5.0, 0.25
SDXL_GIB = 30.0  # about what the weights of the shipped SDXL spec take


def examine_disk(folder: Path) -> Finding:
    """Look at the folder that runs are written to: it must be writable and have room."""
    free = shutil.disk_usage(folder).free / _GIB
    detail = f"{free:.1f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Finding("disk", "bad", f"{folder} can't be written to", "start from a folder of your own")
    if free > RUN_GIB:
        return Finding("disk", "ok", detail)
    remedy = "free some space, or start from a folder on a larger disk"
    return Finding("disk", "note" if free > LEAST_GIB else "bad", f"{detail}: images may not fit", remedy)


def examine_caches() -> Iterator[Finding]:
    """Look at the hub's cache and at this project's own."""
    from huggingface_hub.constants import HF_HUB_CACHE

    yield hub_cache(Path(HF_HUB_CACHE))
    own = own_cache()
    detail = f"{_size(own) / _MIB:.0f} MiB in {own}"
    if _writable(own):
        yield Finding("own cache", "ok", detail)
    else:
        remedy = f"set {CACHE_VARIABLE} to a folder of your own"
        yield Finding("own cache", "note", f"{detail}, which can't be written to: nothing is kept there", remedy)


def hub_cache(folder: Path) -> Finding:
    """Look at the hub's cache: weights of SDXL's size must fit, and be allowed in."""
    free = shutil.disk_usage(_existing(folder)).free / _GIB
    detail = f"{_size(folder) / _GIB:.1f} GiB in {folder}, {free:.1f} GiB free"
    if not _writable(folder):
        detail = f"{detail}, but it can't be written to: nothing can be downloaded"
        return Finding("hub cache", "note", detail, "set HF_HOME to a folder of your own")
    if free < SDXL_GIB:
        detail = f"{detail}: weights of SDXL's size need about {SDXL_GIB:.0f} GiB (the miniature none)"
        return Finding("hub cache", "note", detail, "free some space, or set HF_HOME to a folder on a larger disk")
    return Finding("hub cache", "ok", detail)


def start_hub_check() -> Callable[[], Finding]:
    """Ask the hub meanwhile; the function returned waits for the answer, no longer than ``STATUS_TIMEOUT`` more.

    A thread of its own, left behind at the end: looking up a name has no timeout.
    """
    with suppress(ImportError):
        import huggingface_hub.utils  # noqa: F401  # here, not by two threads at once

    found: list[Finding] = []

    def ask() -> None:
        try:
            found.append(hub_access(hub_status()))
        except Exception as error:  # such as an endpoint that is no address
            found.append(_unreachable("the hub", f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()

    def finding() -> Finding:
        thread.join(STATUS_TIMEOUT)
        return found[0] if found else _unreachable("the hub", "no answer in time")

    return finding


def hub_access(status: HubStatus) -> Finding:
    """Say whether weights can be downloaded, and as whom."""
    if status.offline:
        detail = "offline mode is on (HF_HUB_OFFLINE): weights come from the cache alone"
        return Finding("hub", "ok", detail)
    if not status.answers:
        return _unreachable(status.endpoint, status.problem)
    if status.token == "refused":
        remedy = "set HF_TOKEN to a valid token, or unset it and run `hf auth logout`"
        return Finding("hub", "note", f"{status.endpoint} answers, but refuses the token that is set", remedy)
    token = {
        "none": "no token: gated models will be refused",
        "valid": "token valid",
        "unchecked": "token set, but this endpoint does not say whether it is valid",
    }[status.token]
    return Finding("hub", "ok", f"{status.endpoint} answers; {token}")


def _unreachable(endpoint: str, problem: str) -> Finding:
    remedy = (
        "check the connection, a proxy and HF_ENDPOINT (a mirror's address), or set HF_HUB_OFFLINE=1 to go on with "
        "the weights in the cache"
    )
    return Finding("hub", "note", f"{endpoint} does not answer ({problem}); the miniature needs none", remedy)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that there is."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _writable(folder: Path) -> bool:
    return os.access(_existing(folder), os.W_OK)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, links not followed; what can't be read counts as nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total
