"""The native CPU kernel equals the reference bit for bit, on every instruction set of this machine."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    MOMENTUM_BITS,
    OPTIONS,
    PARAM_DTYPES,
    SHAPES,
    RowsState,
    assert_same,
    extreme_hypers,
    hyper_for,
    make_gradient,
    roundings,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lion8bit import Lion8bit, reference
from lion8bit.backends import cpu, native_library, portable
from lion8bit.layout import BLOCK_SIZES, WEIGHT_ROUNDING, Hyper, TensorRow
from lion8bit.options import make_hyper
from lion8bit.reference import decode
from lion8bit.state import STATE_TENSORS
from lion8bit.table import hyper_array

ROOT = Path(__file__).parents[1]
AVAILABLE = cpu.available_kernels()
MIXED = [(torch.float32, "nearest"), (torch.bfloat16, "compensated"), (torch.float16, "stochastic")]
ROUNDINGS = [(dtype, rounding) for dtype in PARAM_DTYPES for rounding in roundings(dtype)]
COMPILER = os.environ.get("CXX") or shutil.which("c++")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
KERNELS = [
    pytest.param(kernel, marks=pytest.mark.skipif(kernel not in AVAILABLE, reason=f"needs a processor with {kernel}"))
    for kernel in cpu.KERNELS
]


def test_library_was_built() -> None:
    assert cpu.unavailable_reason() is None
    assert AVAILABLE[0] == "baseline"


def native_update(rows: list[TensorRow], hypers: list[Hyper], kernel: str, threads: int) -> int:
    library = cpu.load_library()
    assert isinstance(library, ctypes.CDLL)
    table = (TensorRow * len(rows))(*rows)
    return int(library.lion8bit_update(table, len(table), hyper_array(hypers), cpu.KERNELS.index(kernel), threads))


def check(shape: tuple[int, int], param_dtype: torch.dtype, grad_dtype: torch.dtype, block_size: int, *,
          option: str, rounding: str, bits: int, kernels: Sequence[str] = AVAILABLE, threads: int = 1,
          steps: int = 3, seed: int = 0, lr: float = 1e-3) -> None:  # fmt: skip
    """Steps by each kernel equal those of the reference."""
    hyper = hyper_for(option, block_size, rounding, lr)
    states = [RowsState(shape, param_dtype, block_size, bits, seed, rounding) for _ in range(1 + len(kernels))]
    generator, (expected, *ours) = torch.Generator().manual_seed(seed), states
    for step in range(1, steps + 1):
        grad = make_gradient(shape, grad_dtype, generator, bad=True)
        skipped = expected.reference_step(grad, hyper, step)
        for state, kernel in zip(ours, kernels, strict=True):
            assert native_update([state.descriptor(grad, step)], [hyper], kernel, threads) == skipped, kernel
            for name, tensor in state.tensors().items():
                assert_same(tensor, expected.tensors()[name], f"{name} after step {step}, {kernel}")


@pytest.mark.parametrize("bits", MOMENTUM_BITS)
@pytest.mark.parametrize("param_dtype", PARAM_DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", PARAM_DTYPES, ids=str)
def test_kernels_equal_reference(bits: int, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    cases = itertools.product(SHAPES, BLOCK_SIZES if bits < 32 else [128], roundings(param_dtype))
    options = itertools.cycle(OPTIONS)  # every option meets every shape over the parametrised runs
    for seed, (shape, block_size, rounding) in enumerate(cases):
        check(shape, param_dtype, grad_dtype, block_size, option=next(options), rounding=rounding,
              bits=bits, seed=seed, steps=2)  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_options_equal_reference(option: str) -> None:
    for param_dtype, rounding in [
        (torch.float32, "nearest"),
        (torch.bfloat16, "stochastic"),
        (torch.bfloat16, "compensated"),
    ]:
        for bits in (4, 8):
            check((5, 301), param_dtype, param_dtype, 128, option=option, rounding=rounding, bits=bits, steps=6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    cols=st.integers(0, 700),
    param_dtype=st.sampled_from(PARAM_DTYPES),
    grad_dtype=st.sampled_from(PARAM_DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    option=st.sampled_from(list(OPTIONS)),
    rounding=st.sampled_from(list(WEIGHT_ROUNDING)),
    bits=st.sampled_from(MOMENTUM_BITS),
    kernels=st.sampled_from(AVAILABLE).map(lambda kernel: [kernel]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31 - 1),
    lr=st.sampled_from([0.0, 1e-8, 1e-4, 1.0, 1e30]),
)
def test_any_case_equals_reference(rows: int, cols: int, **case) -> None:
    shape = (rows, cols) if rows and cols else (0, 0)
    check(shape, case.pop("param_dtype"), case.pop("grad_dtype"), case.pop("block_size"), **case)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_at_the_border_of_the_ordinary(dtype: torch.dtype, bits: int) -> None:
    """Blocks whose elements need no tests take a shorter path; these are close to its limits, on both sides.

    Momenta of 2^-99 to 2^9; gradients that cancel them exactly or nearly, too large, bad, tiny or zero; many lr.
    """
    rows, generator = 11, torch.Generator().manual_seed(0)
    for power, lr, beta1, beta2 in itertools.product(
        (-99, -75, -57, -56, -55, 7, 8), (0.0, 1e-42, 1e-4, 1.0, 2.0**40), (0.5, 0.0, 2.0**-6, 0.9), (0.5, 0.99)
    ):
        hyper = make_hyper(lr=lr, betas=(beta1, beta2), weight_decay=0.5, weight_rounding="nearest")
        expected, *ours = (RowsState((rows, 128), dtype, 128, bits, 0) for _ in range(1 + len(AVAILABLE)))
        momentum = torch.randn(rows, 128, generator=generator).clamp(-1, 1) * 2.0**power
        momentum[0, 5] = 0.0
        codes, scales = reference.encode(momentum, 128, bits)
        decoded = decode(codes, scales, 128, 128)
        grad = torch.randn(rows, 128, generator=generator) * 2.0**power
        grad[1, ::2] = -decoded[1, ::2]
        grad[2] = -decoded[2]
        grad[3] = -decoded[3] * (1 + 2.0**-22)
        grad[4, 7], grad[5, 7], grad[6, 7], grad[7, 7] = 2.0**121, -256.0, float("inf"), 2.0**119
        grad[8] = 0.0
        grad[9] *= 1e-42 / 2.0**power
        for state in (expected, *ours):
            state.param[:, ::3] = -0.0
            state.momentum, state.scales = codes.clone().contiguous(), scales.clone()
        for step in (1, 2):
            given = grad.to(dtype)
            skipped = expected.reference_step(given, hyper, step)
            what = f"after step {step}, momenta of 2^{power}, lr {lr}, betas {beta1} and {beta2}"
            for state, kernel in zip(ours, AVAILABLE, strict=True):
                assert native_update([state.descriptor(given, step)], [hyper], kernel, 1) == skipped, (kernel, what)
                for name, tensor in state.tensors().items():
                    assert_same(tensor, expected.tensors()[name], f"{name} {what}, {kernel}")


def test_many_tensors_over_threads() -> None:
    """One call for tensors of all kinds and two groups, work split inside tensors, equals a reference step each."""
    hypers = [hyper_for("plain", 64), hyper_for("everything", 256, "stochastic")]
    generator = torch.Generator().manual_seed(3)
    ours: dict[str, list[RowsState]] = {kernel: [] for kernel in AVAILABLE}
    expected, grads, groups = [], [], []
    for seed, (shape, dtype) in enumerate(itertools.product([(1, 1), (0, 0), (300, 130), (1, 70000)], PARAM_DTYPES)):
        group = seed % 2
        for states in (expected, *ours.values()):
            states.append(RowsState(shape, dtype, hypers[group].block_size, MOMENTUM_BITS[seed % 3], seed))
        grads.append(make_gradient(shape, dtype, generator, bad=True))
        groups.append(group)
    for threads in (1, 2, 5):
        step = threads
        skipped = sum(
            s.reference_step(g, hypers[group], step) for s, g, group in zip(expected, grads, groups, strict=True)
        )
        assert skipped > 0
        for kernel, states in ours.items():
            rows = [s.descriptor(g, step, group) for s, g, group in zip(states, grads, groups, strict=True)]
            assert native_update(rows, hypers, kernel, threads) == skipped, kernel
            for one, other in zip(states, expected, strict=True):
                for name, tensor in one.tensors().items():
                    assert_same(tensor, other.tensors()[name], f"{name}: {kernel}")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_shard_is_the_part_of_the_whole(kernel: str) -> None:
    """Stepping rows [3:], or columns, from where they lie in the whole gives what stepping the whole gives there."""
    hyper, shape = hyper_for("decay", 64, "stochastic", lr=1e-4), (8, 200)
    grad = make_gradient(shape, torch.bfloat16, torch.Generator().manual_seed(1), bad=False)
    parts = [(bits, slice(3, 8), slice(0, 200)) for bits in (4, 8)]
    parts += [(bits, slice(0, 8), slice(64, 128)) for bits in (4, 8)]
    parts += [(32, slice(2, 8), slice(33, 142)), (32, slice(7, 8), slice(199, 200))]
    for bits, rows, cols in parts:
        whole, shard = (RowsState(shape, torch.bfloat16, 64, bits, 5) for _ in range(2))
        whole.first, whole.row_stride = 0, shape[1]
        shard.first, shard.row_stride = rows.start * shape[1] + cols.start, shape[1]
        codes_cols = slice(cols.start // 2, cols.stop // 2) if bits == 4 else cols
        shard.param, shard.momentum = (
            shard.param[rows, cols].contiguous(),
            shard.momentum[rows, codes_cols].contiguous(),
        )
        if shard.scales is not None:
            shard.scales = shard.scales[rows, cols.start // 64 : -(-cols.stop // 64)].contiguous()
        part = grad[rows, cols].contiguous()
        native_update([whole.descriptor(grad, 1)], [hyper], kernel, 1)
        native_update([shard.descriptor(part, 1)], [hyper], kernel, 1)
        assert_same(shard.param, whole.param[rows, cols].contiguous(), "param")
        assert_same(shard.momentum, whole.momentum[rows, codes_cols].contiguous(), "momentum")


def test_environment_variable_selects_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    select = cpu.selected_kernel.__wrapped__  # without its cache
    for kernel in AVAILABLE:
        monkeypatch.setenv("LION8BIT_ISA", kernel)
        assert cpu.KERNELS[select()] == kernel
    monkeypatch.setenv("LION8BIT_ISA", "mmx")
    with pytest.raises(RuntimeError, match="LION8BIT_ISA must be one of"):
        select()


@linux
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
def test_instruction_sets_are_those_of_the_processor() -> None:
    text = Path("/proc/cpuinfo").read_text()
    flags = set(next(line for line in text.splitlines() if line.startswith("flags")).split())
    needed = {"avx2": {"avx2"}, "avx512": {"avx2", "avx512f", "avx512dq", "avx512bw", "avx512vl"}}
    assert ("baseline", *(name for name, features in needed.items() if features <= flags)) == AVAILABLE


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("flag", ["-fopenmp", "-pthread"])
def test_each_block_goes_to_one_thread(flag: str, tmp_path: Path) -> None:
    """With OpenMP, as on Linux, and with separate threads, as elsewhere."""
    sources = [str(ROOT / "tests/sanitizer/threads_driver.cpp"), str(ROOT / "csrc/cpu_api.cpp")]
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", flag, f"-I{ROOT / 'csrc'}"]
    subprocess.run([str(COMPILER), *options, *sources, "-o", str(tmp_path / "driver")], check=True)
    done = subprocess.run([str(tmp_path / "driver")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "sound\n"), done.stderr


LOAD = """
import ctypes, sys
library, runtime = sys.argv[1:]
try:
    ctypes.CDLL(library)
except OSError as error:
    assert "undefined symbol" in str(error), error
ctypes.CDLL(runtime, ctypes.RTLD_GLOBAL)
assert ctypes.CDLL(library).lion8bit_update(None, ctypes.c_int64(0), None, 0, 1) == 0
assert "libgomp.so.1" not in open("/proc/self/maps").read()
"""
MAPS = """
from lion8bit import reference
from lion8bit.backends import cpu, native_library
cpu.load_library()
print(open("/proc/self/maps").read())
"""


@linux
def test_the_library_takes_the_openmp_that_torch_has_loaded(tmp_path: Path) -> None:
    """Under any name: wheels of torch rename theirs, and a machine may have no other."""
    library = cpu.load_library()
    assert isinstance(library, ctypes.CDLL)
    # In a separate process, because other packages such as scikit-learn load another one.
    alone = subprocess.run([sys.executable, "-c", MAPS], capture_output=True, text=True, check=True)
    loaded = {line.split()[-1] for line in alone.stdout.splitlines() if "libgomp" in line}
    assert len(loaded) == 1  # one pool of threads
    renamed = tmp_path / "libgomp-1.so"
    renamed.write_bytes(Path(*loaded).read_bytes().replace(b"libgomp.so.1\0", b"libgomp-1.so\0"))
    subprocess.run([sys.executable, "-S", "-c", LOAD, library._name, str(renamed)], check=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cols", [1, 3, 7, 13, 129, 141])
def test_padding_of_a_short_block_counts_as_zero(kernel: str, cols: int) -> None:
    """Gradients cancel the momentum: whatever stood in a vector's padding would be the largest element of the block."""
    hyper, shape = hyper_for("plain", 128), (50, cols)
    ours, expected = (RowsState(shape, torch.float32, 128, 8, 0) for _ in range(2))
    grad = make_gradient(shape, torch.float32, torch.Generator().manual_seed(0), bad=False)
    for step in (1, 2):
        native_update([ours.descriptor(grad, step)], [hyper], kernel, 1)
        expected.reference_step(grad, hyper, step)
        assert ours.scales is not None
        assert expected.scales is not None
        assert_same(ours.scales, expected.scales, f"scales after step {step}")
        decoded = decode(expected.momentum, expected.scales, 128)
        grad = (decoded * (-hyper.beta / hyper.one_minus_beta)).contiguous()


@pytest.mark.parametrize("cols", [5, 200])
@pytest.mark.parametrize(("dtype", "rounding"), MIXED, ids=str)
def test_padding_of_a_short_block_is_not_counted(dtype: torch.dtype, rounding: str, cols: int) -> None:
    """Where factors are infinite or NaN, zeros times them are bad gradients; only those of elements are counted."""
    for bits, (name, hyper) in itertools.product(MOMENTUM_BITS, extreme_hypers(128, rounding)):
        expected, *ours = (RowsState((7, cols), dtype, 128, bits, 0, rounding) for _ in range(1 + len(AVAILABLE)))
        generator = torch.Generator().manual_seed(0)
        for step, constants in ((1, hyper_for("plain", 128, rounding)), (2, hyper)):
            grad = make_gradient((7, cols), dtype, generator, bad=False)
            skipped = expected.reference_step(grad, constants, step)
            for state, kernel in zip(ours, AVAILABLE, strict=True):
                assert native_update([state.descriptor(grad, step)], [constants], kernel, 1) == skipped, (kernel, name)
        for state, kernel in zip(ours, AVAILABLE, strict=True):
            for part, tensor in state.tensors().items():
                assert_same(tensor, expected.tensors()[part], f"{part}: {kernel}, {name}")


# ---- The floating-point environment ---------------------------------------------------------------------------------

MACHINE = {"x86_64": 0, "AMD64": 0, "aarch64": 1, "arm64": 1}.get(platform.machine())
ENVIRONMENTS = {  # what a caller may have set: MXCSR, FPCR
    "flush": (0x9FC0, 1 << 24),
    "down": (0x3F80, 2 << 22),
    "flush, towards zero": (0xFFC0, 1 << 24 | 3 << 22),
}
needs_register = pytest.mark.skipif(MACHINE is None, reason="needs an x86-64 or ARM64 processor")


@contextlib.contextmanager
def float_environment(name: str) -> Iterator[None]:
    """The calling thread in one of `ENVIRONMENTS`, and at the end a check that it still is."""
    assert MACHINE is not None
    library, wanted = cpu.load_library(), ENVIRONMENTS[name][MACHINE]
    assert isinstance(library, ctypes.CDLL)
    native = native_library._locked(library)
    before = native.lion8bit_environment()
    native.lion8bit_set_environment(wanted)
    try:
        yield
        found = native.lion8bit_environment()
    finally:
        native.lion8bit_set_environment(before)
    assert found & ~0x3F == wanted  # without the exceptions that have occurred, which x86 keeps in the same register


def in_new_threads(threads: int, environment: str, work: Callable[[], None]) -> None:
    """Calls ``work`` on a thread whose OpenMP team, which torch and the kernel share, has inherited an environment."""

    def starts_the_team() -> None:
        torch.set_num_threads(threads)
        with float_environment(environment):
            torch.ones(1 << 20).add_(1.0)
        work()

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(starts_the_team).result()
    finally:
        torch.set_num_threads(before)


@needs_register
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_kernels_do_not_depend_on_the_float_environment(environment: str) -> None:
    """Neither on the caller's nor on that of the team's threads, down to the smallest subnormal numbers."""
    shape, threads, generator = (100, 141), 3, torch.Generator().manual_seed(0)
    grads = torch.randn(2, *shape, generator=generator) * 10.0 ** -torch.randint(46, (shape[0], 1), generator=generator)
    for (dtype, rounding), bits, option in itertools.product(ROUNDINGS, MOMENTUM_BITS, ("plain", "everything")):
        hyper = hyper_for(option, 128, rounding)
        expected, *ours = (RowsState(shape, dtype, 128, bits, 0, rounding) for _ in range(1 + len(AVAILABLE)))
        first, second = (grad.to(dtype) for grad in grads)
        for state in (expected, *ours):
            state.param.copy_(first)
        for step, grad in ((1, first), (2, second)):
            expected.reference_step(grad, hyper, step)

        def steps(hyper: Hyper, states: list[RowsState], first: torch.Tensor, second: torch.Tensor) -> None:
            with float_environment(environment):
                for state, kernel in zip(states, AVAILABLE, strict=True):
                    native_update([state.descriptor(first, 1)], [hyper], kernel, threads)
            for state, kernel in zip(states, AVAILABLE, strict=True):  # the team's other threads are still in it
                native_update([state.descriptor(second, 2)], [hyper], kernel, threads)

        in_new_threads(threads, environment, partial(steps, hyper, ours, first, second))
        for state, kernel in zip(ours, AVAILABLE, strict=True):
            for name, tensor in state.tensors().items():
                assert_same(tensor, expected.tensors()[name], f"{name}: {kernel}, {dtype}, {rounding}, {option}")


@needs_register
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_optimizer_does_not_depend_on_the_float_environment(environment: str) -> None:
    """Constants of the groups, which Python derives, are rounded to nearest too; a subnormal rate is one."""

    def train(lr: float | torch.Tensor, context: contextlib.AbstractContextManager[None], threads: int) -> list[Any]:
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, 141, generator=generator)) for n in (10, 300)]
        optimizer = Lion8bit(params, lr=lr, betas=(0.87, 0.993), weight_decay=0.3, fused=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        with context:
            for _ in range(3):
                optimizer.step()
        return [*params, *(value for state in optimizer.state.values() for value in state.values())]

    before = torch.get_num_threads()
    try:
        for lr in (1e-3, torch.tensor(1e-3), 1e-40, torch.tensor(1e-40)):
            expected = train(lr, contextlib.nullcontext(), 1)
            for threads in (1, 2):
                actual = train(lr, float_environment(environment), threads)
                for one, other in zip(actual, expected, strict=True):
                    assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), (lr, threads)
    finally:
        torch.set_num_threads(before)


TRAPS = """
import ctypes, torch
from cases import RowsState, hyper_for, make_gradient
from lion8bit.backends import cpu, native_library
from lion8bit.table import hyper_array
library, shape = cpu.load_library(), (300, 141)
for kernel in range(library.lion8bit_kernels()):
    state, hyper = RowsState(shape, torch.float32, 128, 8, 0), hyper_for("everything", 128)
    grad = make_gradient(shape, torch.float32, torch.Generator().manual_seed(0), bad=True)
    arguments = (ctypes.pointer(state.descriptor(grad, 1)), 1, hyper_array([hyper]), kernel, 2)
    native_library._locked(library).lion8bit_set_environment(0)  # every exception traps
    library.lion8bit_update(*arguments)
    native_library._locked(library).lion8bit_set_default_environment()
    assert state.param.isfinite().all()
"""


@pytest.mark.skipif(MACHINE != 0, reason="needs an x86-64 processor")
def test_exceptions_do_not_trap() -> None:
    """For example after feenableexcept. In a separate process, because a trap ends it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, "-c", TRAPS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or done.returncode


@pytest.mark.parametrize("threads", [1, 2])
def test_plain_torch_where_subnormals_are_flushed(threads: int, use_backend: Callable[..., None]) -> None:
    """It keeps its bits among numbers that are normal in fp32, as every fp16 number is."""
    before = torch.get_num_threads()
    for dtype, rounding in ROUNDINGS:
        finals = []
        for flush, update in ((False, cpu.update_), (True, portable.update_)):
            generator = torch.Generator().manual_seed(0)
            param = torch.nn.Parameter((torch.randn(300, 1000, generator=generator) * 1e-5).to(dtype))
            param.grad = (torch.randn(param.shape, generator=generator) * 1e-6).to(dtype)
            optimizer = Lion8bit([param], lr=1e-6, weight_rounding=rounding)
            use_backend(update)
            torch.set_num_threads(threads)
            supported = torch.set_flush_denormal(flush)
            try:
                for _ in range(3):
                    optimizer.step()
            finally:
                torch.set_flush_denormal(False)
                torch.set_num_threads(before)
            if flush and not supported:
                pytest.skip("needs a processor that can flush subnormal numbers")
            finals.append({"param": param.detach(), **optimizer.state[param]})
        for name in ("param", *STATE_TENSORS):
            if name in finals[0]:
                assert_same(finals[1][name], finals[0][name], f"{name}: {dtype}, {rounding}")
