"""The disk below a queue: a small one, and one of which is seen when it has been written to."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fake_nvml.driver import compiler

# Each sync takes a little longer, so that an answer that does not wait for it comes before it.
_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
static void note(int fd) {
    char link[64], path[512], line[640];
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    int size = snprintf(line, sizeof line, "synced %lld %s\n",
                        now.tv_sec * 1000000000LL + now.tv_nsec, path);
    int out = open(getenv("SYNCS"), O_WRONLY | O_APPEND);
    if (out < 0 || write(out, line, size) != size) abort();
    close(out);
}
#define WATCHED(name) \
    int name(int fd) { \
        int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, #name); \
        usleep(10000); \
        int said = real(fd); \
        if (said == 0) note(fd); \
        return said; \
    }
WATCHED(fsync)
WATCHED(fdatasync)
"""


@dataclass(frozen=True)
class Syncs:
    """Each fsync and fdatasync of processes that have ``env``, once it is done."""

    shim: Path
    path: Path

    @property
    def env(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self.shim), "SYNCS": str(self.path)}

    def seen(self) -> list[tuple[int, str]]:
        """When (ns, as ``time.monotonic_ns``), and of which file."""
        lines = [line.split(maxsplit=2) for line in self.path.read_text().splitlines()]
        return [(int(at), path) for _, at, path in lines]


@contextlib.contextmanager
def watched_syncs() -> Iterator[Syncs]:
    """In a folder that every user may read: a PostgreSQL is another one."""
    cc = compiler()
    if cc is None:
        pytest.skip("no C compiler here (cc or gcc); it makes the library that watches fsync")
    with tempfile.TemporaryDirectory(prefix="hive-syncs-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        source, shim, path = folder / "shim.c", folder / "shim.so", folder / "syncs"
        source.write_text(_SHIM)
        path.touch()
        path.chmod(0o666)
        flags = ("-shared", "-fPIC", "-o", str(shim), str(source), "-ldl")
        subprocess.run([cc, *flags], check=True)
        yield Syncs(shim, path)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A folder is a disk of 6 MiB for the block's life."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be mounted here; it takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
