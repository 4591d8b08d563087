"""Checks an installation: what is there, what is wrong and how to fix it, and whether each backend computes right."""

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
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import lion8bit
from lion8bit.backends import cpu, cuda, nvrtc, portable
from lion8bit.backends.native_library import REINSTALL, BackendError
from lion8bit.layout import Hyper
from lion8bit.options import make_hyper
from lion8bit.reference import lion_step_
from lion8bit.state import STATE_TENSORS, quantized
from lion8bit.table import DeviceTable, hyper_array, make_entry

OLDEST_TORCH = (2, 6)
BUILDS = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    status: Literal["ok", "note", "problem"]  # a note: something is absent, and not needed here
    found: str
    remedy: str = ""  # how to fix a problem


def examine() -> list[Finding]:
    """Checks everything that lion8bit uses, and lets every backend of this machine step a small case.

    Returns:
        Findings in the order in which one depends on another; no exception, whatever is broken.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [_python, _package, _pytorch, _cpu, _cuda, _other_devices]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # a check that fails is a finding itself
            what = f"{type(error).__name__}: {error}".partition("\n")[0]
            findings.append(Finding(check.__name__.strip("_"), "problem", what, "report it with this message"))
    return findings


def healthy(findings: list[Finding]) -> bool:
    """Whether nothing is wrong."""
    return all(finding.status != "problem" for finding in findings)


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


def _cpu() -> Iterator[Finding]:
    yield _checked("plain torch", partial(_difference, portable.update_, torch.device("cpu")))
    reason = cpu.unavailable_reason()
    if reason is not None:
        found = f"{reason.problem}; CPU parameters are stepped in plain torch, slowly"
        yield Finding("CPU kernel", "problem", found, reason.fix)
        return
    available, forced = cpu.available_kernels(), os.environ.get(cpu.ISA_VARIABLE)
    if forced is None or forced == available[-1]:
        count = torch.get_num_threads()
        threads = f"{count} thread{'s' * (count != 1)} (torch.get_num_threads)"
        yield Finding("CPU kernel", "ok", f"{available[-1]}, {threads}")
    else:
        found = f"{cpu.ISA_VARIABLE}={forced}, where the best of {', '.join(available)} would be used"
        yield Finding("CPU kernel", "problem", found, f"unset {cpu.ISA_VARIABLE}")
    for index, name in enumerate(available):
        update = partial(cpu.update_, kernel=index)
        yield _checked(f"CPU kernel, {name}", partial(_difference, update, torch.device("cpu")))


def _cuda() -> Iterator[Finding]:
    driver, gpus = _driver()
    if driver is None:
        yield Finding("NVIDIA driver", "note", "none, so there is no GPU to use")
    else:
        offered = f"for CUDA {driver[0]}.{driver[1]}, {gpus} GPU{'s' * (gpus != 1)}"
        yield Finding("NVIDIA driver", "ok", offered)
    wrong = _unusable(driver) if gpus and torch.version.hip is None else None
    if wrong is not None:
        yield wrong
    needed = gpus > 0 and wrong is None and torch.version.hip is None
    try:
        (major, minor), architectures = nvrtc.toolchain()
        known, bindings = ", ".join(f"sm_{each}" for each in architectures), metadata.version("cuda-bindings")
        yield Finding("NVRTC", "ok", f"{major}.{minor} by cuda-bindings {bindings}, compiles for {known}")
    except (ImportError, RuntimeError, OSError) as error:
        no_bindings = isinstance(error, ImportError)
        missing, remedy = ("cuda-bindings", cuda.INSTALL) if no_bindings else ("NVRTC", cuda.install_nvrtc())
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
        kernel = nvrtc.Kernel(0, 0, 8, BLOCK_SIZE, 0, False, nvrtc.SMALL)

        def compiles() -> None:
            nvrtc.compile_kernel(kernel, arch)

        yield _checked("CUDA kernel", compiles, f"compiles for {arch}")


def _gpu(index: int) -> Iterator[Finding]:
    major, minor = torch.cuda.get_device_capability(index)
    name = f"cuda:{index}"
    try:
        arch = nvrtc.architecture(10 * major + minor)
    except BackendError as error:
        yield Finding(name, "problem", error.problem, error.fix)
        return
    how = arch if arch.startswith("sm_") else f"PTX for {arch}, which the driver translates"
    yield Finding(name, "ok", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, as {how}")
    yield _checked(f"CUDA kernel, {name}", partial(_difference, cuda.update_, torch.device("cuda", index)))


def _driver() -> tuple[tuple[int, int] | None, int]:
    """The CUDA version that the NVIDIA driver offers, None without one, and its number of GPUs; without torch."""
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


Update = Callable[[DeviceTable, "ctypes.Array[Hyper]", Tensor], None]

STEPS = 3
ROWS, COLS, BLOCK_SIZE = 4, 300, 128  # the last block of a row is short
DTYPES = (  # of parameter and gradient, and how weights are rounded
    (torch.float32, torch.float32, ("nearest",)),
    (torch.bfloat16, torch.bfloat16, ("nearest", "stochastic", "compensated")),
    (torch.bfloat16, torch.float32, ("nearest", "stochastic", "compensated")),
    (torch.float16, torch.float16, ("nearest", "stochastic")),
)
CASES = [(param, grad, how, bits) for param, grad, roundings in DTYPES for how in roundings for bits in (4, 8, 32)]


class _Case(NamedTuple):
    label: str
    hyper: Hyper
    param: Tensor  # [ROWS, COLS]
    grads: list[Tensor]  # one for each step
    state: dict[str, Any]


def _cases(device: torch.device) -> list[_Case]:
    """Small parameters, gradients and state, the same in each call: every dtype, rounding and width of the momentum."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for param_dtype, grad_dtype, rounding, bits in CASES:
        param = torch.randn(ROWS, COLS, generator=generator).to(device, param_dtype)
        grads = [torch.randn(ROWS, COLS, generator=generator) * 1e-3 for _ in range(STEPS)]
        for grad in grads:
            grad[0] = 0.0  # idle blocks
            grad[1, :2] = torch.tensor([torch.nan, torch.inf])
        state = {"momentum": torch.zeros(ROWS, COLS)}
        if bits < 32:
            state = quantized(state["momentum"], BLOCK_SIZE, bits)
        if rounding == "compensated":
            state["residual"] = torch.zeros(ROWS, COLS, dtype=torch.int8)
        label = f"{param_dtype} parameter, {grad_dtype} gradient, {rounding}, {bits} bits"
        hyper = make_hyper(lr=1e-3, weight_decay=0.1, block_size=BLOCK_SIZE, weight_rounding=rounding)
        tensors = {name: value.to(device) for name, value in state.items() if isinstance(value, Tensor)}
        on_device = {"step": 0, **state, **tensors}
        cases.append(_Case(label, hyper, param, [grad.to(device, grad_dtype) for grad in grads], on_device))
    return cases


def _difference(update: Update, device: torch.device) -> str | None:
    """The first difference between a backend and the reference; None where every bit is the same."""
    ours, expected = _cases(device), _cases(torch.device("cpu"))
    hypers = hyper_array([case.hyper for case in ours])
    counter, skipped = torch.zeros(1, dtype=torch.int64, device=device), 0
    for step in range(STEPS):
        grads = [case.grads[step] for case in ours]
        entries = [
            make_entry(case.param, grad, case.state, block_size=BLOCK_SIZE, seed=i, hyper=i)
            for i, (case, grad) in enumerate(zip(ours, grads, strict=True))
        ]
        table = DeviceTable(entries, grads)
        table.begin()
        update(table, hypers, counter)
        table.finish()
        for i, (_, hyper, param, grads, state) in enumerate(expected):
            momentum = state["codes"] if "codes" in state else state["momentum"]
            counted = {"residual": state.get("residual"), "seed": i, "step": step + 1}
            skipped += int(lion_step_(param, grads[step], momentum, state.get("scales"), hyper, **counted))
    for one, other in zip(ours, expected, strict=True):
        for name in ("param", *(name for name in other.state if name in STATE_TENSORS)):
            actual, wanted = (case.param if name == "param" else case.state[name] for case in (one, other))
            if not torch.equal(actual.cpu().view(torch.uint8), wanted.view(torch.uint8)):
                return f"{name} differs ({one.label})"
    return None if int(counter) == skipped else f"{int(counter)} bad gradients counted instead of {skipped}"


def _checked(name: str, check: Callable[[], str | None], fine: str = "steps with the reference's bits") -> Finding:
    """The finding of a check, which returns what is wrong or raises it."""
    try:
        difference = check()
    except BackendError as error:
        return Finding(name, "problem", "\n".join(filter(None, (error.problem, error.log))), error.fix or REINSTALL)
    except Exception as error:
        return Finding(name, "problem", str(error) or type(error).__name__, REINSTALL)
    if difference is None:
        return Finding(name, "ok", fine)
    return Finding(name, "problem", f"not the reference's bits: {difference}", f"{REINSTALL}; if it stays, report it")
