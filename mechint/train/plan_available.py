"""How much memory a process may still take here: of the machine, of the container or job that it runs in, of a GPU."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def available_memory(device: str = "cpu", *, root: Path = ROOT) -> int | None:
    """Bytes that a process may still take without pushing others out; None where the system does not say.

    RAM: the least of what the kernel calls available, of what is left of every control group around this process
    (containers, SLURM jobs; version 1 and 2), and of `ulimit -v`. Pages that only cache files count as available.
    """
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        # what torch's allocator holds back for us is ours to use
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [value for value in (_machine(root), *_control_groups(root), _address_space()) if value is not None]
    return max(0, min(found)) if found else None


def resident_memory(*, root: Path = ROOT) -> int:
    """Bytes of RAM that this process has now, mapped files included; 0 where the system does not say."""
    try:
        return int((root / "proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _machine(root: Path) -> int | None:
    if sys.platform == "win32":
        return _windows()
    if sys.platform == "darwin" and root == ROOT:
        try:
            done = subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return read_vm_stat(done.stdout)
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def read_vm_stat(text: str) -> int | None:
    """Bytes that macOS gives out without swapping, from what `vm_stat` prints: pages free or to be dropped."""
    size = re.search(r"page size of (\d+) bytes", text)
    kinds = ("free", "inactive", "speculative", "purgeable")
    pages = [re.search(rf"^Pages {kind}:\s+(\d+)\.", text, re.MULTILINE) for kind in kinds]
    if size is None or pages[0] is None:
        return None
    return int(size[1]) * sum(int(found[1]) for found in pages if found)


def _windows() -> int | None:
    if sys.platform != "win32":
        return None
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "free", "t_page", "f_page", "t_virtual", "f_virtual", "ext")
        ]

    status = Status()
    status.length = ctypes.sizeof(status)
    return status.free if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None


def _control_groups(root: Path) -> Iterator[int | None]:
    """What is left of each control group around this process, the innermost first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            yield _left(base.joinpath(*parts[:depth]), *names)


def _left(group: Path, limit_name: str, usage_name: str, *cache_names: str) -> int | None:
    try:
        limit, usage = ((group / name).read_text().strip() for name in (limit_name, usage_name))
        if limit == "max":
            return None
        stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - int(usage) + sum(int(stat.get(name, 0)) for name in cache_names)
    except (OSError, ValueError):
        return None


def _address_space() -> int | None:
    """What is left of `ulimit -v`."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit == resource.RLIM_INFINITY:
            return None
        return limit - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError, ValueError):
        return None
