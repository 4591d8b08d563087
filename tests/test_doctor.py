"""The doctor: what it finds on this machine, on broken ones, and that its self-check can fail."""

from __future__ import annotations

import ctypes
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run_cli

from lion8bit import __version__
from lion8bit.backends import cpu, cuda, native_library, nvrtc, portable
from lion8bit.backends.native_library import BackendError
from lion8bit.tools import doctor
from lion8bit.tools.doctor import Finding


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def remedies(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.remedy for finding in findings if finding.status == "problem"}


# ---- The self-check -------------------------------------------------------------------------------------------------


def test_every_backend_of_this_machine_is_checked() -> None:
    findings = by_name(doctor.examine())
    checked = {name for name, finding in findings.items() if finding.found == "steps with the reference's bits"}
    gpus = {f"CUDA kernel, cuda:{index}" for index in range(torch.cuda.device_count())}
    assert checked == {"plain torch", *(f"CPU kernel, {kernel}" for kernel in cpu.available_kernels()), *gpus}
    assert str(torch.__version__) in findings["PyTorch"].found


@pytest.mark.parametrize(
    ("tensor", "bits"),
    [("param", 8), ("codes", 8), ("scales", 8), ("codes", 4), ("scales", 4), ("momentum", 32), ("residual", 8)],
)
def test_one_wrong_bit_is_found(tensor: str, bits: int) -> None:
    def update(batch: Any, hypers: Any, counter: torch.Tensor) -> None:
        portable.update_(batch, hypers, counter)
        entries = [entry for entry in batch.entries if entry.momentum_bits == bits]
        entry = next(entry for entry in entries if tensor == "param" or tensor in entry.state)
        if entry.state["step"] == doctor.STEPS - 1:
            place = entry.param if tensor == "param" else entry.state[tensor]
            place.view(torch.uint8)[-1, -1] ^= 1

    difference = doctor._difference(update, torch.device("cpu"))
    assert difference is not None and difference.startswith(f"{tensor} differs (torch.")


def test_a_wrong_count_and_an_error_are_found() -> None:
    def miscounting(batch: Any, hypers: Any, counter: torch.Tensor) -> None:
        portable.update_(batch, hypers, counter)
        counter += 1

    check = partial(doctor._difference, miscounting, torch.device("cpu"))
    assert doctor._checked("it", check).found.endswith("bad gradients counted instead of 162")

    def failing() -> None:
        raise BackendError("loading must succeed, got an old driver", "update the driver", "log")

    assert doctor._checked("it", failing) == Finding(
        "it", "problem", "loading must succeed, got an old driver\nlog", "update the driver"
    )


# ---- What is wrong, and its remedy ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("file", "install CMake and a C++17 compiler"),
        ("openmp", "apt install libgomp1"),
        ("version", "pip install --force-reinstall"),
    ],
)
def test_no_native_kernel(missing: str, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def without_openmp() -> None:
        raise OSError("libgomp.so.1: cannot open shared object file")

    if missing == "file":
        monkeypatch.setattr(native_library.resources, "files", lambda package: tmp_path)
    elif missing == "openmp":
        monkeypatch.setattr(native_library, "_provide_openmp", without_openmp)
    else:
        monkeypatch.setattr(native_library, "FORMAT_VERSION", 99)
    reason = native_library.load_library.__wrapped__()
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: reason)
    monkeypatch.setattr(doctor, "_difference", lambda *_: None)
    assert remedies(list(doctor._cpu()))["CPU kernel"].count(remedy) == 1


def test_a_forced_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available_kernels", lambda: ("baseline", "avx2"))
    monkeypatch.setattr(doctor, "_difference", lambda *_: None)
    for forced, wrong in (("baseline", True), ("avx2", False), ("mmx", True)):
        monkeypatch.setenv(cpu.ISA_VARIABLE, forced)
        assert ("CPU kernel" in remedies(list(doctor._cpu()))) == wrong


def test_two_copies_and_two_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lion8bit").mkdir()
    (tmp_path / "lion8bit" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = doctor._package()
    assert found.status == "problem" and str(tmp_path / "lion8bit") in found.found
    (tmp_path / "lion8bit" / "__init__.py").unlink()
    assert by_name(list(doctor._package()))["lion8bit"].status == "ok"
    (tmp_path / "lion8bit-0.0.9.dist-info").mkdir()
    (tmp_path / "lion8bit-0.0.9.dist-info" / "METADATA").write_text("Name: lion8bit\nVersion: 0.0.9\n")
    (found,) = doctor._package()
    assert found.found.endswith(f"installed as 0.0.9, {__version__}") and "pip uninstall" in found.remedy


def test_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    assert remedies(list(doctor._pytorch())) == {"PyTorch": 'pip install "torch>=2.6"'}


@pytest.mark.parametrize(
    ("built", "driver", "available", "remedy"),
    [
        (None, (13, 0), False, "install one for CUDA"),
        ("13.0", (12, 4), False, "update the NVIDIA driver"),
        ("12.8", (13, 0), False, "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_torch_cannot_use(
    built: str | None, driver: tuple[int, int], available: bool, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_driver", lambda: (driver, 1))
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    found = remedies(list(doctor._cuda()))
    assert list(found) == ["GPU"] and remedy in found["GPU"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("error", "remedy"),
    [(ImportError("no module named cuda"), cuda.INSTALL), (RuntimeError("dlopen"), '"nvidia-cuda-nvrtc-cu12==12.4.*"')],
)
def test_no_bindings_and_no_nvrtc(error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.4")

    def toolchain() -> None:
        raise error

    monkeypatch.setattr(nvrtc, "toolchain", toolchain)
    assert remedies(list(doctor._cuda())) == {}  # nothing needs it here
    monkeypatch.setattr(doctor, "_driver", lambda: ((13, 0), 1))
    monkeypatch.setattr(doctor, "_unusable", lambda _: None)
    found = remedies(list(doctor._cuda()))
    assert list(found) == ["NVRTC"] and remedy in found["NVRTC"]


def test_a_gpu_is_named_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU that only seems to be there, the launch fails and is reported; one too old for NVRTC is refused."""
    monkeypatch.setattr(doctor, "_driver", lambda: ((13, 0), 1))
    monkeypatch.setattr(doctor, "_unusable", lambda _: None)
    monkeypatch.setattr(nvrtc, "toolchain", lambda: ((13, 0), (75, 120)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (13, 0))
    monkeypatch.setattr(doctor, "_difference", lambda update, device: f"param differs on {device}")
    monkeypatch.setattr(doctor.metadata, "version", lambda _: "13.0")
    found = by_name(list(doctor._cuda()))
    assert (
        found["cuda:0"].found
        == "Some GPU, compute capability 13.0, as PTX for compute_120, which the driver translates"
    )
    assert "param differs on cuda:0" in found["CUDA kernel, cuda:0"].found
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (5, 2))
    found = by_name(list(doctor._cuda()))
    assert found["cuda:0"].remedy == "use a PyTorch built for an older CUDA"


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("no such thing")

    broken.__name__ = "_pytorch"
    monkeypatch.setattr(doctor, "_pytorch", broken)
    monkeypatch.setattr(doctor, "_difference", lambda *_: None)
    found = by_name(doctor.examine())["pytorch"]
    assert (found.status, found.found) == ("problem", "OSError: no such thing")


def test_driver_of_this_machine() -> None:
    version, gpus = doctor._driver()
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert (version, gpus) == (None, 0)
    else:
        assert version is not None and version >= (12, 0) and gpus >= torch.cuda.device_count()


# ---- The command ----------------------------------------------------------------------------------------------------


def test_command_reports_and_exits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_cli(capsys, "doctor", "--json")
    report = json.loads(done.stdout)
    problems = [finding for finding in report["findings"] if finding["status"] == "problem"]
    assert report["healthy"] == (not problems) and done.exit_code == (1 if problems else 0)
    assert all(finding["remedy"] for finding in problems)
    assert run_cli(capsys, "doctor", "--nonsense").exit_code == 2
    monkeypatch.setenv(cpu.ISA_VARIABLE, "none")
    monkeypatch.setitem(sys.modules, "rich", None)  # it needs no extra
    forced = run_cli(capsys, "doctor")
    assert forced.exit_code == 1 and re.search(
        r"^wrong  CPU kernel .*\n +fix: unset LION8BIT_ISA$", forced.stdout, re.M
    )
    assert by_name([Finding(**finding) for finding in report["findings"]]).keys() >= {"Python", "NVRTC"}
