"""The CUDA kernel compiles for every GPU, and its images are kept on disk where nobody else may write."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from cases import MOMENTUM_BITS
from emulated import COMBINATIONS, needs_nvrtc

from lion8bit.backends import cuda, nvrtc
from lion8bit.layout import DTYPES, WEIGHT_ROUNDING

pytestmark = pytest.mark.usefixtures("one_thread")


@needs_nvrtc
def test_nvrtc_compiles_every_dtype_and_rounding() -> None:
    for (param, grad, rounding), bits in itertools.product(COMBINATIONS, MOMENTUM_BITS):
        shape = (DTYPES[param], DTYPES[grad], bits, 128, WEIGHT_ROUNDING[rounding])
        kernel = nvrtc.Kernel(*shape, general=bits < 32, capacity=nvrtc.SMALL)
        assert nvrtc.compile_kernel(kernel, "sm_90").startswith(b"\x7fELF")


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "compute_80"])
def test_nvrtc_compiles_for_every_architecture(arch: str) -> None:
    if int(arch.partition("_")[2]) not in nvrtc.toolchain()[1]:
        pytest.skip(f"this NVRTC does not know {arch}")
    for kernel in (
        nvrtc.Kernel(0, 0, 8, 64, 0, False, nvrtc.LARGE),
        nvrtc.Kernel(1, 1, 8, 128, 0, False, nvrtc.LARGE),
        nvrtc.Kernel(1, 0, 8, 256, 1, True, nvrtc.SMALL),
        nvrtc.Kernel(1, 1, 8, 128, 2, False, nvrtc.LARGE),
        nvrtc.Kernel(1, 1, 8, 128, 1, True, nvrtc.LARGE, on_device=True),
        nvrtc.Kernel(2, 2, 32, 128, 1, False, nvrtc.SMALL),
        nvrtc.Kernel(0, 0, 4, 64, 0, False, nvrtc.LARGE),
        nvrtc.Kernel(1, 1, 4, 64, 1, False, nvrtc.LARGE),
        nvrtc.Kernel(1, 1, 4, 64, 2, True, nvrtc.LARGE, on_device=True),
    ):
        assert nvrtc.compile_kernel(kernel, arch)[:4] == (b"\x7fELF" if arch.startswith("sm") else b"//\n/")


WITH_NVRTC = """
import ctypes, sys, pytest
ctypes.CDLL(sys.argv[1])  # cuda-bindings takes what is loaded
from lion8bit.backends import nvrtc
assert nvrtc.toolchain()[0] == (12, 4), nvrtc.toolchain()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[2], "-k", "every_architecture"]))
"""


@needs_nvrtc
def test_oldest_nvrtc_compiles_it() -> None:
    """The one of PyTorch 2.6 for CUDA 12.4, in a separate process."""
    try:
        files = metadata.files("nvidia-cuda-nvrtc-cu12") or []
    except metadata.PackageNotFoundError:
        pytest.skip("needs nvidia-cuda-nvrtc-cu12")
    (oldest,) = (str(file.locate()) for file in files if file.name == "libnvrtc.so.12")
    command = [sys.executable, "-c", WITH_NVRTC, oldest, __file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@needs_nvrtc
def test_architecture_is_the_gpu_or_the_newest_older_one() -> None:
    newest = nvrtc.toolchain()[1][-1]
    assert nvrtc.architecture(90) == "sm_90"
    assert nvrtc.architecture(newest) == f"sm_{newest}"
    assert nvrtc.architecture(newest + 1) == f"compute_{newest}"
    with pytest.raises(RuntimeError, match=r"compute capability must be .* got 3\.5"):
        nvrtc.architecture(35)


@needs_nvrtc
def test_compile_error_shows_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"cuda_kernel.cu": b'#include "block_math.h"\nnonsense;', "block_math.h": b""}
    monkeypatch.setattr(nvrtc, "sources", lambda: broken)
    with pytest.raises(RuntimeError, match=r"(?s)compiling cuda_kernel.cu .*nonsense"):
        nvrtc.compile_kernel(nvrtc.Kernel(0, 0, 8, 128, 0, False, nvrtc.SMALL), "sm_90")


@needs_nvrtc
def test_images_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, str(tmp_path / "deep" / "cache"))
    kernel = nvrtc.Kernel(0, 0, 32, 128, 0, False, nvrtc.SMALL)
    compiled = nvrtc.image(kernel, "sm_90")
    (stored,) = (tmp_path / "deep" / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "compile_kernel", lambda *_: pytest.fail("compiled again"))
        assert nvrtc.image(kernel, "sm_90") == compiled
    stored.write_bytes(stored.read_bytes()[:-1])  # cut short by a full disk, say
    monkeypatch.setattr(nvrtc, "compile_kernel", lambda *_: b"again")
    assert nvrtc.image(kernel, "sm_90") == b"again"
    assert nvrtc.image(kernel._replace(general=True), "sm_90") == b"again"
    assert len(list((tmp_path / "deep" / "cache").iterdir())) == 2


@needs_nvrtc
def test_unusable_cache_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, str(blocked))
    monkeypatch.setattr(nvrtc, "compile_kernel", lambda *_: b"image")
    assert nvrtc.image(nvrtc.Kernel(0, 0, 8, 128, 0, False, nvrtc.SMALL), "sm_90") == b"image"


CACHE_KERNEL = nvrtc.Kernel(0, 0, 8, 128, 0, False, nvrtc.SMALL)


@pytest.fixture
def cache_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the image of `CACHE_KERNEL` is kept; it is not there yet, and `nvrtc.image` compiles only "new"."""
    monkeypatch.setattr(nvrtc, "toolchain", lambda: ((12, 8), (90,)))
    monkeypatch.setattr(nvrtc, "compile_kernel", lambda *_: b"new")
    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, str(tmp_path / "above" / "cache"))
    path = nvrtc._cache_file(CACHE_KERNEL, "sm_90")
    assert path is not None
    return path


def plant(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(hashlib.sha256(b"planted").digest() + b"planted")


on_posix = pytest.mark.skipif(os.name == "nt", reason="owners and modes of POSIX")


@on_posix
@pytest.mark.parametrize(
    ("which", "mode", "used"),
    [
        ("file", 0o644, True),
        ("file", 0o600, True),
        ("file", 0o664, False),
        ("file", 0o646, False),
        ("folder", 0o755, True),
        ("folder", 0o700, True),
        ("folder", 0o775, False),
        ("folder", 0o757, False),
        ("folder", 0o1777, False),
        ("above", 0o775, True),
        ("above", 0o777, False),
        ("above", 0o1777, True),
    ],
)
def test_a_cache_that_others_may_write_to_is_none(cache_path: Path, which: str, mode: int, used: bool) -> None:
    plant(cache_path)
    for each, usual in ((cache_path, 0o644), (cache_path.parent, 0o755), (cache_path.parent.parent, 0o755)):
        each.chmod(usual)
    {"file": cache_path, "folder": cache_path.parent, "above": cache_path.parent.parent}[which].chmod(mode)
    assert nvrtc.image(CACHE_KERNEL, "sm_90") == (b"planted" if used else b"new")
    if which != "file":
        assert cache_path.read_bytes().endswith(b"planted")  # nothing is written there either
    else:
        assert nvrtc.image(CACHE_KERNEL, "sm_90") == (b"planted" if used else b"new")


@on_posix
@pytest.mark.parametrize("which", ["file", "folder"])
@pytest.mark.parametrize("theirs", [True, False])
def test_a_cache_of_another_user_is_none(
    cache_path: Path, which: str, theirs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the system says of owners, so that it needs no right to change them."""
    plant(cache_path)
    cache_path.parent.chmod(0o755)
    other = 65534 if theirs else 0
    real = os.stat

    def owned(path: object, status: os.stat_result) -> os.stat_result:
        fields = [*status]
        fields[stat.ST_UID] = other if stat.S_ISDIR(status.st_mode) == (which == "folder") else 1000
        return os.stat_result(fields)

    real_check = nvrtc._check_owner
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(nvrtc, "_check_owner", lambda path, status: real_check(path, owned(path, real(path))))
    assert nvrtc.image(CACHE_KERNEL, "sm_90") == (b"new" if theirs else b"planted")


@on_posix
@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o644), (0, 0o644)])
def test_the_cache_takes_what_it_wrote_under_any_umask(
    cache_path: Path, umask: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_path.parent.parent.mkdir()
    before = os.umask(umask)
    try:
        assert nvrtc.image(CACHE_KERNEL, "sm_90") == b"new"
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache_path.stat().st_mode) == expected and [*cache_path.parent.iterdir()] == [cache_path]
    monkeypatch.setattr(nvrtc, "compile_kernel", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.image(CACHE_KERNEL, "sm_90") == b"new"


def test_launches_fit_the_parameter_limits() -> None:
    assert ctypes.sizeof(cuda.launch_type(nvrtc.SMALL)) <= 4096
    assert ctypes.sizeof(cuda.launch_type(nvrtc.LARGE)) <= 32764


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_says_why_it_is_unavailable() -> None:
    reason = cuda.unavailable_reason()
    assert reason is not None
    assert "\n" not in reason
