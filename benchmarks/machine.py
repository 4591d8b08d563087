"""What the benchmarks need without torch: NVIDIA's programs, what its driver reports, and files written completely."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from pathlib import Path

PROGRAMS = ("nvcc", "ncu", "compute-sanitizer", "cuobjdump", "nvdisasm", "g++")
DRIVER_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.mem",
    "power.limit",
    "ecc.mode.current",
)


def program(name: str) -> str | None:
    """The path of a program, also where only the CUDA toolkit's folder has it."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def asked_of_driver() -> dict[str, str]:
    """Driver, memory, clocks and power limit of the first GPU by nvidia-smi; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(DRIVER_FIELDS)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {}
    return dict(zip(DRIVER_FIELDS, said.split(", ")))


def process_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS, in bytes; 0 where there is no such file."""
    path = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.exists() else None
    return int(found[1]) * 1024 if found else 0


def reset_process_peak() -> int:
    """Resets VmHWM to the bytes that are resident now, and returns them."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return process_bytes("VmHWM")


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that no reader ever sees a part of it, also where this process is killed."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(text)
    draft.replace(path)
