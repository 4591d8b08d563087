"""Owns what must hold for any input that Python can reach: no crash, no write outside of the tensors, equal bits."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same, override_backend
from emulated import COMPILER, compile_once
from hypothesis import given, settings
from hypothesis import strategies as st

from lion8bit import Lion8bit
from lion8bit.backends import cpu, portable
from lion8bit.layout import DTYPES

ROOT = Path(__file__).parents[1]
DRIVER = ROOT / "tests" / "sanitizer" / "cpu_driver.cpp"
ARM_COMPILER, ARM_EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
ISA_FLAGS = {"baseline": "", "avx2": "-mavx2", "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl"}
SANITIZE = "-std=c++17 -O0 -g1 -ffp-contract=off -fno-math-errno -fopenmp -fsanitize=address,undefined"
SANITIZE += " -fno-sanitize=null,object-size --param asan-instrumentation-with-call-threshold=0"  # compiles faster
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs an operating system with fork")


# ---- Memory of any layout --------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], overlap: bool = False) -> tuple[list[int], int]:
    """Strides for a shape, with gaps or elements that share memory, and a distance from aligned memory in bytes."""
    strides, span = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        span *= draw(st.sampled_from([1, 1, 1, 2]))
        strides[dim] = span
        span *= max(1, shape[dim])
        if overlap and draw(st.booleans()):
            span = max(1, span // 2)
    return strides, draw(st.sampled_from([0, 0, 4, 1, 3]))


class View:
    """A tensor inside a larger buffer whose other bytes must stay as they are."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, layout: tuple[list[int], int], seed: int) -> None:
        strides, shift = layout
        needed = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        generator = torch.Generator().manual_seed(seed)
        self.bytes = torch.randint(0, 256, (max(1, needed) * 4 + 128,), dtype=torch.uint8, generator=generator)
        whole = torch.frombuffer(self.bytes.numpy(), dtype=dtype, count=max(1, needed), offset=64 + shift)
        self.tensor = whole.as_strided(shape, strides)
        self.tensor.copy_(torch.randn(shape, generator=generator) * 0.02)
        self.before = self.bytes.clone()

    def assert_surroundings_untouched(self) -> None:
        """Puts the tensor's own bytes back as they were, which must restore the whole buffer."""
        whole = torch.frombuffer(self.before.numpy(), dtype=torch.uint8)
        width = self.tensor.element_size()
        address = self.tensor.data_ptr() - self.bytes.data_ptr()
        own = torch.zeros_like(self.bytes, dtype=torch.bool)
        if self.tensor.numel():
            index = torch.arange(own.numel()).as_strided((1,), (1,), address)
            for size, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True):
                index = (index[:, None] + torch.arange(size) * stride * width).flatten()
            own[(index[:, None] + torch.arange(width)).flatten()] = True
        assert torch.equal(self.bytes[~own], whole[~own]), "memory beside the parameter was written"


SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 64, 129, 700]), max_size=3).map(tuple)
SHAPES = SIZES.filter(lambda shape: math.prod(shape) <= 20_000)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), shape=SHAPES, param_dtype=st.sampled_from([*DTYPES]), grad_dtype=st.sampled_from([*DTYPES]),
       options=st.fixed_dictionaries({
           "optim_bits": st.sampled_from([4, 8]), "block_size": st.sampled_from([64, 128, 256]),
           "min_8bit_size": st.sampled_from([0, 1, 4096]),
           "weight_rounding": st.sampled_from(["nearest", "stochastic"]), "cautious": st.booleans(),
           "maximize": st.booleans(), "decoupled_weight_decay": st.booleans(),
       }))  # fmt: skip
def test_any_layout(
    data: st.DataObject,
    shape: tuple[int, ...],
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    """Native steps equal portable ones and write nothing beside the parameter, wherever tensors and state lie."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        grad_dtype = param_dtype  # in PyTorch 2.6 `grad` takes no other
    param_layout, grad_layout = data.draw(layouts(shape)), data.draw(layouts(shape, overlap=True))
    threads, shift = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 4))
    before = torch.get_num_threads()
    finals = []
    for backend in (None, portable.update_):
        param, grad = View(shape, param_dtype, param_layout, 1), View(shape, grad_dtype, grad_layout, 2)
        with override_backend(backend):
            leaf = torch.nn.Parameter(param.tensor)
            leaf.grad_dtype = grad_dtype
            leaf.grad = grad.tensor
            assert leaf.data_ptr() == param.tensor.data_ptr()
            torch.set_num_threads(threads)
            try:
                optimizer = Lion8bit([leaf], lr=1e-3, weight_decay=0.1, **options)
                optimizer.step()
                state = optimizer.state[leaf]
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and value.numel():
                        moved = torch.empty(value.nbytes + 8, dtype=torch.uint8)
                        at = torch.frombuffer(moved.numpy(), dtype=value.dtype, count=value.numel(), offset=shift)
                        state[name] = at.as_strided(value.shape, value.stride()).copy_(value)
                optimizer.step()
            finally:
                torch.set_num_threads(before)
        param.assert_surroundings_untouched()
        assert torch.equal(grad.bytes, grad.before), "the gradient was written"
        finals.append({"param": param.tensor, **{k: v for k, v in state.items() if isinstance(v, torch.Tensor)}})
    for name, tensor in finals[0].items():
        assert_same(tensor, finals[1][name], name)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=SHAPES.filter(lambda shape: math.prod(shape) > 0), dtype=st.sampled_from([*DTYPES]))
def test_parameters_that_share_memory(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What a step computes there is nobody's contract; it stays in the tensors' own memory or is refused."""
    views = View(shape, dtype, data.draw(layouts(shape, overlap=True)), 1)
    flat = views.tensor.detach()
    params = [torch.nn.Parameter(flat), torch.nn.Parameter(flat[: max(1, shape[0] // 2)] if shape else flat)]
    for param in params:
        param.grad = torch.ones_like(param) if data.draw(st.booleans()) else param.detach()
    with contextlib.suppress(ValueError, RuntimeError):
        Lion8bit(params, lr=1e-3, min_8bit_size=data.draw(st.sampled_from([0, 4096]))).step()
    views.assert_surroundings_untouched()


# ---- State from a checkpoint -----------------------------------------------------------------------------------------

DAMAGES = {
    "shorter": lambda t: t.flatten()[:-1].clone(),
    "longer": lambda t: torch.cat([t.flatten(), t.flatten()]),
    "one row less": lambda t: t[:-1].clone(),
    "another shape": lambda t: t.reshape(-1, 1).clone(),
    "empty": lambda t: t[:0].clone(),
    "scalar": lambda t: t.flatten()[0].clone(),
    "expanded": lambda t: t.flatten()[:1].expand(t.shape),
    "transposed": lambda t: t.t(),
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "double": lambda t: t.double(),
    "bytes": lambda t: t.to(torch.uint8),
    "half": lambda t: t.half(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.float().to_sparse(),
    "complex": lambda t: t.to(torch.complex64),
    "none": lambda t: None,
    "text": lambda t: "codes",
    "list": lambda t: t.tolist(),
    "missing": None,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("shape", [(16, 300), (300, 16), (4097,)], ids=str)
@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("name", ["codes", "scales", "shape", "residual", "momentum"])
def test_damaged_state_is_refused(
    name: str, bits: int, shape: tuple[int, ...], damage: str, dtype: torch.dtype
) -> None:
    """Loading or the next step raises and leaves the parameter alone, or the state was as good as whole."""
    compensated = dtype == torch.bfloat16
    options = {
        "optim_bits": bits,
        "weight_rounding": "compensated" if compensated else "auto",
    }
    param = torch.nn.Parameter(torch.randn(shape).to(dtype))
    param.grad = torch.randn(shape).to(dtype)
    optimizer = Lion8bit([param], lr=0.1, **options)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    if name not in saved["state"][0]:
        return
    tensor = saved["state"][0].pop(name)
    change = DAMAGES[damage]
    if change is not None:
        if len(shape) == 1 and damage == "transposed":
            return
        saved["state"][0][name] = change(tensor)
    before = param.detach().clone()
    fresh = Lion8bit([param], lr=0.1, **options)
    try:
        fresh.load_state_dict(saved)
        fresh.step()
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError):
        assert torch.equal(param.detach(), before)
    else:
        same = fresh.state[param][name]
        assert same.shape == tensor.shape and same.dtype == tensor.dtype
        assert not torch.equal(param.detach(), before)


# ---- Threads and processes -------------------------------------------------------------------------------------------


def make_job(seed: int) -> tuple[Lion8bit, list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in [(64, 300), (100,), (8191,)]:
        param = torch.nn.Parameter(torch.randn(shape, generator=generator).to(torch.bfloat16))
        param.grad = torch.randn(shape, generator=generator).to(torch.bfloat16)
        params.append(param)
    return Lion8bit(params, lr=1e-2, weight_decay=0.1), params


def test_threads_step_different_optimizers_at_once() -> None:
    """Every thread gets the parameters that it gets alone."""

    def work(params: list[torch.nn.Parameter], optimizer: Lion8bit, wait: threading.Barrier | None) -> None:
        if wait is not None:
            torch.set_num_threads(2)
            wait.wait()
        for _ in range(40):
            optimizer.step()

    expected = []
    for seed in range(4):
        optimizer, params = make_job(seed)
        work(params, optimizer, None)
        expected.append(params)
    jobs = [make_job(seed) for seed in range(4)]
    barrier = threading.Barrier(len(jobs))
    threads = [threading.Thread(target=work, args=(params, optimizer, barrier)) for optimizer, params in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (_, params), others in zip(jobs, expected, strict=True):
        for one, other in zip(params, others, strict=True):
            assert_same(one.detach(), other.detach(), "param")


FORK = """
import os, sys, signal, torch
from lion8bit import Lion8bit
torch.set_num_threads(int(sys.argv[1]))
def make():
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(512, 300))
    param.grad = torch.randn(512, 300)
    return param, Lion8bit([param], lr=1e-2)
param, optimizer = make()
optimizer.step()
child = os.fork()
if not child:
    signal.alarm(20)  # ends a child that waits for threads it does not have
for _ in range(3):
    optimizer.step()
if not child:
    torch.set_num_threads(1)  # torch's own operations would wait for the threads
same, other = make()
for _ in range(4):
    other.step()
result = 0 if torch.equal(same, param) else 1
if not child:
    os._exit(result)
sys.exit(result or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_fork
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_steps_on(threads: int) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, str(threads)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- The C interface under the sanitizers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver with every kernel of this machine, kept from run to run while the sources are the same."""
    folder = tmp_path_factory.mktemp("sanitizer")
    (folder / "empty.cpp").write_text("int main() { return 0; }")
    probe = [str(COMPILER), *SANITIZE.split(), str(folder / "empty.cpp"), "-o", str(folder / "empty")]
    if COMPILER is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("needs g++ with the address and undefined behaviour sanitizers")
    csrc, x86 = ROOT / "csrc", platform.machine() in ("x86_64", "AMD64")
    flags = [*SANITIZE.split(), "-fno-sanitize-recover=all", "-Wno-psabi", f"-I{csrc}", *["-DLION8BIT_X86"] * x86]
    units = [
        [str(csrc / "cpu_kernel.cpp"), *flags, f"-DLION8BIT_ISA={isa}", *ISA_FLAGS[isa].split()]
        for isa in (ISA_FLAGS if x86 else ["baseline"])
    ]
    units += [[str(path), *flags] for path in (DRIVER, csrc / "cpu_api.cpp")]
    link = ["-fopenmp", "-fsanitize=address,undefined"]
    cache = request.config.cache.mkdir("sanitizer")
    return compile_once(
        cache, "cpu_driver", units, link, [DRIVER, *sorted(csrc.glob("*.h")), *sorted(csrc.glob("*.cpp"))]
    )


@pytest.mark.parametrize("fault", ["", "param", "grad", "momentum", "scales", "residual"])
def test_c_interface_stays_within_its_buffers(sanitized: Path, fault: str) -> None:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sanitized, *filter(None, [fault])], capture_output=True, text=True, env=environment)
    if not fault:
        assert (done.returncode, done.stdout) == (0, "sound\n"), done.stderr[-2000:]
    else:
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr


def digest(program: Sequence[str | Path], kernel: int, *float_environment: str) -> str:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [*program, "digest", str(kernel), *float_environment]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


def test_every_kernel_gives_the_same_results(sanitized: Path) -> None:
    digests = [digest([sanitized], kernel) for kernel in range(len(cpu.available_kernels()))]
    assert len(digests[0].strip()) == 16 and len({*digests}) == 1


@pytest.mark.skipif(not (ARM_COMPILER and ARM_EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64")
def test_arm_gives_the_same_results(sanitized: Path, tmp_path: Path) -> None:
    sources = ["tests/sanitizer/cpu_driver.cpp", "csrc/cpu_api.cpp", "csrc/cpu_kernel.cpp"]
    options = ["-O2", "-std=c++17", "-ffp-contract=off", "-Wno-psabi", "-Icsrc", "-DLION8BIT_ISA=baseline", "-pthread"]
    command = [str(ARM_COMPILER), *options, "-static", *sources, "-o", str(tmp_path / "driver")]
    subprocess.run(command, check=True, cwd=ROOT)
    arm = [str(ARM_EMULATOR), tmp_path / "driver"]
    assert digest(arm, 0) == digest(arm, 0, "0x1400000") == digest([sanitized], 0)  # FPCR: flush to zero, round up
