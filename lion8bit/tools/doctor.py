"""Owns the examination of an installation: what is there, what is wrong and its remedy, and a self-check of backends.

It prints nothing: `lion8bit doctor` shows what it finds.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import lion8bit
from lion8bit.backends import cpu, cuda, nvrtc, portable
from lion8bit.layout import Hyper
from lion8bit.options import make_hyper
from lion8bit.reference import encode, lion_step_
from lion8bit.table import STATE_TENSORS, DeviceTable, hyper_array, make_entry

OLDEST_TORCH = (2, 6)
REINSTALL = "reinstall it in a checkout (pip install --force-reinstall --no-deps .)"
OPENMP = "install GNU's OpenMP runtime (Debian and Ubuntu: apt install libgomp1)"
COMPILER = f"install CMake and a C++17 compiler (g++ or clang), then {REINSTALL}"
BUILDS = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: Literal["ok", "note", "problem"]  # a note tells of something that is absent and not needed here
    found: str
    remedy: str = ""  # of a problem


def examine() -> list[Finding]:
    """Looks at everything that lion8bit uses, and lets every backend of this machine step a small case.

    Returns:
        Findings in the order in which one depends on another; no exception, whatever is broken.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [_python, _package, _pytorch, _cpu, _cuda, _other_devices]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # a check that fails is a finding itself
            what = f"{type(error).__name__}: {_first_line(error)}"
            findings.append(Finding(check.__name__.strip("_"), "problem", what, "report it with this message"))
    return findings


def healthy(findings: list[Finding]) -> bool:
    """Whether nothing is wrong."""
    return all(finding.status != "problem" for finding in findings)


# ---- What is installed ----------------------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    where = f"{platform.python_implementation()} {platform.python_version()}, {platform.platform()}"
    yield Finding("Python", "ok", f"{where}, {sys.executable}")


def _package() -> Iterator[Finding]:
    here, version = Path(lion8bit.__file__).resolve().parent, lion8bit.__version__
    copies = {Path(entry or ".").resolve() / "lion8bit" for entry in sys.path}
    others = sorted(str(copy) for copy in copies - {here} if (copy / "__init__.py").is_file())
    installed = {distribution.version for distribution in metadata.distributions(name="lion8bit")}
    found = f"{version} in {here}"
    if others:
        remedy = "remove the others, or start Python in another directory, if it is the current one that is in the way"
        yield Finding("lion8bit", "problem", f"{found}; also in {', '.join(others)}", remedy)
    elif installed - {version}:
        remedy = f"pip uninstall lion8bit (repeat it until none is left), then {REINSTALL}"
        yield Finding("lion8bit", "problem", f"{found}, installed as {', '.join(sorted(installed))}", remedy)
    else:
        yield Finding("lion8bit", "ok", found)


def _pytorch() -> Iterator[Finding]:
    version = str(torch.__version__)
    if torch.version.hip is not None:
        built = f"for ROCm {torch.version.hip}"
    else:
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        yield Finding("PyTorch", "problem", f"{version}, older than {needed}", f'pip install "torch>={needed}"')
    else:
        yield Finding("PyTorch", "ok", f"{version}, built {built}")


# ---- The CPU --------------------------------------------------------------------------------------------------------


def _cpu() -> Iterator[Finding]:
    yield _checked("plain torch", partial(_difference, portable.update_, torch.device("cpu")))
    reason = cpu.unavailable_reason()
    if reason is not None:
        remedies = {"without a C++ compiler": COMPILER, "libgomp": OPENMP, "": REINSTALL}
        remedy = next(remedy for sign, remedy in remedies.items() if sign in reason)
        yield Finding("CPU kernel", "problem", f"{reason}; CPU parameters are stepped in plain torch, slowly", remedy)
        return
    available, forced = cpu.available_kernels(), os.environ.get(cpu.ISA_VARIABLE)
    if forced is None or forced == available[-1]:
        yield Finding("CPU kernel", "ok", f"{available[-1]}, {_threads()}")
    else:
        found = f"{cpu.ISA_VARIABLE}={forced}, where the best of {', '.join(available)} would be used"
        yield Finding("CPU kernel", "problem", found, f"unset {cpu.ISA_VARIABLE}")
    for index, name in enumerate(available):
        update = partial(cpu.update_, kernel=index)
        yield _checked(f"CPU kernel, {name}", partial(_difference, update, torch.device("cpu")))


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count != 1)} (torch.get_num_threads)"


# ---- NVIDIA GPUs ----------------------------------------------------------------------------------------------------


def _cuda() -> Iterator[Finding]:
    driver, gpus = _driver()
    yield Finding("NVIDIA driver", "ok" if driver else "note", _describe_driver(driver, gpus))
    wrong = _unusable(driver) if gpus and torch.version.hip is None else None
    if wrong is not None:
        yield wrong
    needed = gpus > 0 and wrong is None and torch.version.hip is None
    try:
        (major, minor), architectures = nvrtc.toolchain()
        known = ", ".join(f"sm_{each}" for each in architectures)
        with_bindings = f"by cuda-bindings {metadata.version('cuda-bindings')}"
        yield Finding("NVRTC", "ok", f"{major}.{minor} {with_bindings}, compiles for {known}")
    except (ImportError, RuntimeError, OSError) as error:
        missing, remedy = "NVRTC", cuda.install_nvrtc()
        if isinstance(error, ImportError):
            missing, remedy = "cuda-bindings", cuda.INSTALL
        found = f"{missing} cannot be loaded ({str(error).partition(':')[0]})"
        if needed:
            yield Finding("NVRTC", "problem", f"{found}; CUDA parameters are stepped in plain torch, slowly", remedy)
        else:
            yield Finding("NVRTC", "note", f"{found}; without a GPU it is not needed")
        return
    if needed:
        for index in range(torch.cuda.device_count()):
            yield from _gpu(index)
    else:
        arch = f"sm_{architectures[-1]}"
        yield _checked("CUDA kernel", partial(_compiles, arch), f"compiles for {arch}")


def _gpu(index: int) -> Iterator[Finding]:
    major, minor = torch.cuda.get_device_capability(index)
    name = f"cuda:{index}"
    try:
        arch = nvrtc.architecture(10 * major + minor)
    except RuntimeError as error:
        message, _, remedy = str(error).rpartition("; ")
        yield Finding(name, "problem", message, remedy)
        return
    how = f"{arch}" if arch.startswith("sm_") else f"PTX for {arch}, which the driver translates"
    yield Finding(name, "ok", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, as {how}")
    yield _checked(f"CUDA kernel, {name}", partial(_difference, cuda.update_, torch.device("cuda", index)))


def _driver() -> tuple[tuple[int, int] | None, int]:
    """The CUDA version that the NVIDIA driver offers, None without one, and how many GPUs it has; asks no torch."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None, 0
    version, count = ctypes.c_int(), ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)):
        return None, 0
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        count.value = 0
    return (version.value // 1000, version.value % 1000 // 10), count.value


def _describe_driver(driver: tuple[int, int] | None, gpus: int) -> str:
    if driver is None:
        return "none, so there is no GPU to use"
    return f"for CUDA {driver[0]}.{driver[1]}, {gpus} GPU{'s' * (gpus != 1)}"


def _unusable(driver: tuple[int, int] | None) -> Finding | None:
    """Why torch cannot use the GPUs that are there, or None where it can."""
    built = torch.version.cuda
    if built is None:
        return Finding("GPU", "problem", "this PyTorch is built without CUDA", f"install one for CUDA: {BUILDS}")
    if driver is not None and int(built.split(".")[0]) > driver[0]:
        found = f"PyTorch is built for CUDA {built}, the driver for {driver[0]}.{driver[1]}"
        return Finding("GPU", "problem", found, f"update the NVIDIA driver, or install an older build: {BUILDS}")
    if not torch.cuda.is_available():
        remedy = "see whether nvidia-smi lists one, and unset CUDA_VISIBLE_DEVICES"
        return Finding("GPU", "problem", "PyTorch finds no GPU", remedy)
    return None


def _other_devices() -> Iterator[Finding]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and (accelerator.type != "cuda" or torch.version.hip is not None):
        yield Finding(accelerator.type, "note", "has no kernel: its parameters are stepped in plain torch")


# ---- Self-checks ----------------------------------------------------------------------------------------------------

Update = Callable[[DeviceTable, "ctypes.Array[Hyper]", Tensor], None]

STEPS = 3
ROWS, COLS, BLOCK_SIZE = 4, 300, 128  # the last block of a row is short
CASES = (  # parameter, gradient, how weights are rounded
    (torch.float32, torch.float32, ("nearest",)),
    (torch.bfloat16, torch.bfloat16, ("nearest", "stochastic", "compensated")),
    (torch.bfloat16, torch.float32, ("nearest", "stochastic", "compensated")),
    (torch.float16, torch.float16, ("nearest", "stochastic")),
)


@dataclass
class _Case:
    label: str
    hyper: Hyper
    param: Tensor  # [ROWS, COLS]
    grads: list[Tensor]  # one for each step
    state: dict[str, Any]

    @property
    def kind(self) -> str:
        return "codes" if "codes" in self.state else "momentum"


def _cases(device: torch.device) -> list[_Case]:
    """The same small parameters, gradients and state each time: every dtype, rounding and width of the momentum."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for param_dtype, grad_dtype, roundings in CASES:
        for rounding in roundings:
            for bits in (8, 32):
                param = torch.randn(ROWS, COLS, generator=generator).to(param_dtype)
                grads = [torch.randn(ROWS, COLS, generator=generator) * 1e-3 for _ in range(STEPS)]
                for grad in grads:
                    grad[0] = 0.0  # idle blocks
                    grad[1, :2] = torch.tensor([torch.nan, torch.inf])
                momentum = torch.zeros(ROWS, COLS)
                state: dict[str, Any] = {"momentum": momentum}
                if bits == 8:
                    codes, scales = encode(momentum, BLOCK_SIZE)
                    state = {"codes": codes.contiguous(), "scales": scales}
                if rounding == "compensated":
                    state["residual"] = torch.zeros(ROWS, COLS, dtype=torch.int8)
                cases.append(
                    _Case(
                        f"{param_dtype} parameter, {grad_dtype} gradient, {rounding}, {bits} bits",
                        make_hyper(lr=1e-3, weight_decay=0.1, block_size=BLOCK_SIZE, weight_rounding=rounding),
                        param.to(device),
                        [grad.to(device, grad_dtype) for grad in grads],
                        {"step": 0, **{name: tensor.to(device) for name, tensor in state.items()}},
                    )
                )
    return cases


def _difference(update: Update, device: torch.device) -> str | None:
    """What a backend computes otherwise than the reference, the first of it; None where every bit is the same."""
    ours, expected = _cases(device), _cases(torch.device("cpu"))
    hypers = hyper_array([case.hyper for case in ours])
    counter, skipped = torch.zeros(1, dtype=torch.int64, device=device), 0
    for step in range(STEPS):
        made = [
            make_entry(case.param, case.grads[step], case.state, block_size=BLOCK_SIZE, seed=i, hyper=i)
            for i, case in enumerate(ours)
        ]
        batch = DeviceTable(device, [entry for entry, _ in made], [grad for _, grad in made])
        batch.begin()
        update(batch, hypers, counter)
        batch.finish()
        for i, case in enumerate(expected):
            momentum, scales, residual = (case.state.get(name) for name in (case.kind, "scales", "residual"))
            assert momentum is not None
            counted = {"seed": i, "step": step + 1}
            bad = lion_step_(case.param, case.grads[step], momentum, scales, case.hyper, residual=residual, **counted)
            skipped += int(bad)
    for one, other in zip(ours, expected, strict=True):
        for name in ("param", *STATE_TENSORS):
            if name != "param" and name not in one.state:
                continue
            actual, wanted = (case.param if name == "param" else case.state[name] for case in (one, other))
            if not torch.equal(actual.cpu().view(torch.uint8), wanted.view(torch.uint8)):
                return f"{name} differs ({one.label})"
    return None if int(counter) == skipped else f"{int(counter)} bad gradients counted instead of {skipped}"


def _compiles(arch: str) -> None:
    nvrtc.compile_kernel(nvrtc.Kernel(0, 0, True, BLOCK_SIZE, 0, False, nvrtc.SMALL), arch)


def _checked(name: str, check: Callable[[], str | None], fine: str = "steps with the reference's bits") -> Finding:
    """The finding of a check that returns what is wrong, or raises with the remedy after the last semicolon."""
    try:
        difference = check()
    except Exception as error:
        message, newline, log = str(error).partition("\n")
        message, _, remedy = message.rpartition("; ")
        return Finding(name, "problem", (message or remedy) + newline + log, remedy if message else REINSTALL)
    if difference is None:
        return Finding(name, "ok", fine)
    return Finding(name, "problem", f"not the reference's bits: {difference}", f"{REINSTALL}; if it stays, report it")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
