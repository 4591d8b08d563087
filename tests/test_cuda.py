"""The CUDA kernel equals the reference bit for bit, on an emulator and on a GPU where there is one."""

from __future__ import annotations

import copy
import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import (
    MOMENTUM_BITS,
    OPTIONS,
    PARAM_DTYPES,
    assert_same,
    extreme_hypers,
    hyper_for,
    make_gradient,
    roundings,
)
from emulated import (
    COMBINATIONS,
    COMPILER,
    DEFAULT,
    EMULATOR,
    FLAGS,
    SANITIZE,
    SOURCES,
    Batch,
    Emulated,
    Pair,
    compile_once,
    defined,
    many_pairs,
    needs_compiler,
    needs_gpu,
    needs_nvrtc,
    on,
    run_steps,
)

from lion8bit import Lion8bit, reference
from lion8bit.backends import cuda, nvrtc
from lion8bit.layout import BLOCK_SIZES, WEIGHT_ROUNDING, TensorRow
from lion8bit.table import hyper_array

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- On the emulator -----------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("order", [0, 1, 7])
def test_emulator_reports_faults(library: ctypes.CDLL, order: int) -> None:
    assert [library.emulate_example(which, order) for which in range(5)] == [0, 1, 1, 2, 3]


@needs_compiler
def test_branch_free_roots_and_divisions_are_exact(library: ctypes.CDLL) -> None:
    library.inexact_results.restype = ctypes.c_int64
    assert library.inexact_results() == 0


@needs_compiler
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("param_dtype", "grad_dtype", "rounding"), COMBINATIONS)
def test_equals_reference(
    library: ctypes.CDLL, param_dtype: torch.dtype, grad_dtype: torch.dtype, rounding: str, block_size: int
) -> None:
    hypers = [hyper_for("plain", block_size, rounding), hyper_for("everything", block_size, rounding)]
    run_steps(many_pairs(param_dtype, grad_dtype, block_size, rounding), hypers, on(Emulated(library)))


@needs_compiler
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_equals_reference(library: ctypes.CDLL, option: str) -> None:
    for param_dtype, rounding in [
        (torch.float32, "nearest"),
        (torch.bfloat16, "stochastic"),
        (torch.bfloat16, "compensated"),
    ]:
        pairs = [
            Pair((3, 1001), param_dtype, torch.float32, 128, bits=bits, rounding=rounding) for bits in MOMENTUM_BITS
        ]
        run_steps(pairs, [hyper_for(option, 128, rounding)], on(Emulated(library)), steps=6)


@needs_compiler
@pytest.mark.parametrize(("param_dtype", "rounding"), [(p, r) for p in PARAM_DTYPES for r in roundings(p)])
def test_parameters_that_are_not_finite(library: ctypes.CDLL, param_dtype: torch.dtype, rounding: str) -> None:
    pair, largest = Pair((3, 500), param_dtype, torch.float32, 128, rounding=rounding), torch.finfo(param_dtype).max
    for state in (pair.expected, pair.actual):
        state.param[0, ::7], state.param[1, ::7], state.param[2, ::7] = float("nan"), float("inf"), -largest
        state.param[2, 1::7] = torch.finfo(param_dtype).smallest_normal / 4
    run_steps([pair], [hyper_for("decay", 128, rounding)], on(Emulated(library)))


@needs_compiler
@pytest.mark.parametrize("lr", [1e-3, 3.0, float("nan")])
@pytest.mark.parametrize(("param_dtype", "rounding"), [(p, r) for p in PARAM_DTYPES for r in roundings(p)])
def test_elements_that_need_tests_of_their_own(
    library: ctypes.CDLL, param_dtype: torch.dtype, rounding: str, lr: float
) -> None:
    """Threads whose 8 elements are all of usual size take a shorter path; here neighbours are not."""
    pair = Pair((4, 1000), param_dtype, torch.float32, 128, rounding=rounding)
    for state in (pair.expected, pair.actual):
        state.param[1, ::13] *= 1000
        state.param[2, ::11] = 0.0
    grads = make_gradient((4, 1000), torch.float32, pair.generator, False)
    grads[0, ::17], grads[3, ::9] = 1e6, 0.0
    pair.next_grad = lambda: None  # type: ignore[method-assign]
    pair.expected_grad, pair.grad = grads, grads.clone()
    hyper = hyper_for("decay", 128, rounding)
    hyper.lr = lr
    run_steps([pair], [hyper], on(Emulated(library)), steps=4)


@needs_compiler
@pytest.mark.parametrize("cols", [3, 20, 131])
def test_padding_of_a_short_block_counts_as_zero(library: ctypes.CDLL, cols: int) -> None:
    # Gradients that cancel the momentum: whatever stood in the padding would be the largest element of the block.
    pair, hyper = Pair((2, cols), torch.float32, torch.float32, 128, bad=False), hyper_for("plain", 128)
    run_steps([pair], [hyper], on(Emulated(library)), steps=1)
    codes, scales = pair.expected.momentum, pair.expected.scales
    assert scales is not None
    pair.expected_grad = reference.decode(codes, scales, 128) * (-hyper.beta / hyper.one_minus_beta)
    pair.grad, pair.steps = pair.expected_grad.clone(), 2
    pair.expected.reference_step(pair.expected_grad, hyper, 2)
    batch = Batch(torch.device("cpu"), (TensorRow * 1)(pair.row()))
    cuda.step_(batch, hyper_array([hyper]), torch.zeros(1, dtype=torch.int64), Emulated(library))
    for name, tensor in pair.actual.tensors().items():
        assert_same(tensor, pair.expected.tensors()[name], name)


@needs_compiler
@pytest.mark.parametrize("cols", [5, 200])
def test_padding_of_a_short_block_is_not_counted(library: ctypes.CDLL, cols: int) -> None:
    """Where factors are infinite or NaN, zeros times them are bad gradients; only those of elements are counted."""
    for (dtype, rounding), bits in itertools.product(
        [(torch.float32, "nearest"), (torch.bfloat16, "compensated"), (torch.float16, "stochastic")], MOMENTUM_BITS
    ):
        first = Pair((7, cols), dtype, dtype, 128, bits=bits, bad=False, rounding=rounding)
        run_steps([first], [hyper_for("plain", 128, rounding)], on(Emulated(library)), steps=1)
        for _, hyper in extreme_hypers(128, rounding):
            run_steps([copy.deepcopy(first)], [hyper], on(Emulated(library)), steps=1)


@needs_compiler
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_threads_changes_nothing(library: ctypes.CDLL, order: int) -> None:
    hypers = [hyper_for("plain", 128, "stochastic"), hyper_for("everything", 128, "nearest")]
    run_steps(many_pairs(torch.bfloat16, torch.bfloat16, 128), hypers, on(Emulated(library, order)))


@needs_compiler
@pytest.mark.parametrize("grid", [1, 3])
def test_long_tiles_equal_reference(library: ctypes.CDLL, grid: int) -> None:
    shapes = ((1, 2048 * 8 + 5), (1, 2048 * 17), (700, 130), (1, 1), (64, 256), (9, 4099))
    pairs = [Pair(shape, torch.bfloat16, torch.bfloat16, 128, seed=i) for i, shape in enumerate(shapes)]
    emulated = Emulated(library, tuning=nvrtc.Tuning(grid=grid))
    run_steps(pairs, [hyper_for("decay", 128, "stochastic")], on(emulated), steps=2)
    assert len(emulated.log) == 2


def small_model(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Embedding(50, 100), torch.nn.Conv2d(8, 70, 3), torch.nn.LayerNorm(90), torch.nn.Linear(90, 130)]
    layers[1].to(memory_format=torch.channels_last)
    return torch.nn.Sequential(*layers).to(dtype)


def train_alike(model: torch.nn.Module, optimizer: Lion8bit, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype).to(param.device)
            param.grad.view(-1)[:1] = float("inf")
        optimizer.step()


def assert_same_training(one: Lion8bit, other: Lion8bit) -> None:
    for group, twin in zip(one.param_groups, other.param_groups, strict=True):
        for a, b in zip(group["params"], twin["params"], strict=True):
            assert_same(a.detach().cpu(), b.detach().cpu(), "parameter")
            for name, value in one.state[a].items():
                mate = other.state[b][name]
                if isinstance(value, torch.Tensor):
                    assert_same(value.cpu(), mate.cpu(), name)
                else:
                    assert value == mate
    assert one.nonfinite_count() == other.nonfinite_count() > 0


@needs_compiler
@pytest.mark.parametrize("dtype", PARAM_DTYPES, ids=str)
def test_optimizer_through_the_kernel_equals_cpu(
    library: ctypes.CDLL, dtype: torch.dtype, use_backend: Callable[..., None]
) -> None:
    models = [small_model(dtype) for _ in range(2)]
    optimizers = [Lion8bit(model.parameters(), lr=1e-3, weight_decay=0.1) for model in models]
    train_alike(models[0], optimizers[0], 3, seed=1)
    emulated = Emulated(library)
    use_backend(lambda *arguments: cuda.step_(*arguments, emulated))
    train_alike(models[1], optimizers[1], 3, seed=1)
    assert len(emulated.log) == 3 * 2  # each step: the quantized parameters and the small
    assert_same_training(*optimizers)


@needs_compiler
def test_one_call_takes_every_kind_of_tensor(library: ctypes.CDLL) -> None:
    hypers = [
        hyper_for(option, block_size, rounding)
        for option, block_size, rounding in itertools.product(("plain", "cautious"), BLOCK_SIZES, WEIGHT_ROUNDING)
    ]
    dtypes = itertools.cycle(itertools.product(PARAM_DTYPES, PARAM_DTYPES))
    pairs = []
    for i, (param, grad) in enumerate(itertools.islice(dtypes, 60)):
        hyper = i % len(hypers)
        options = {"rounding": [*WEIGHT_ROUNDING][hypers[hyper].weight_rounding], "hyper": hyper, "seed": i}
        pairs.append(Pair((2, 300), param, grad, hypers[hyper].block_size, bits=(32, 8, 8, 4, 4)[i % 5], **options))
    run_steps(pairs, hypers, on(Emulated(library)))


@needs_compiler
def test_more_tensors_than_one_launch_holds(library: ctypes.CDLL) -> None:
    emulated = Emulated(library)
    pairs = [Pair((1, 1 + i % 300), torch.bfloat16, torch.bfloat16, 128, seed=i) for i in range(101)]
    pairs.insert(50, Pair((0, 0), torch.bfloat16, torch.bfloat16, 128))
    run_steps(pairs, [hyper_for("plain", 128)], on(emulated), steps=1)
    held = nvrtc.SMALL.tensors
    assert [count for _, count, _ in emulated.log] == [held, held, 101 - 2 * held]
    large = Emulated(library, large=True)
    pairs = [Pair((1, 1 + i % 300), torch.bfloat16, torch.bfloat16, 128, seed=i) for i in range(400)]
    run_steps(pairs, [hyper_for("decay", 128)], on(large), steps=1)
    assert [count for _, count, _ in large.log] == [nvrtc.LARGE.tensors, 400 - nvrtc.LARGE.tensors]


@needs_compiler
def test_more_groups_than_one_launch_holds(library: ctypes.CDLL) -> None:
    emulated = Emulated(library)
    hypers = [hyper_for("decay", 128, lr=1e-3 * (1 + i)) for i in range(37)]
    pairs = [Pair((1, 150), torch.float32, torch.float32, 128, hyper=i, seed=i) for i in range(37)]
    run_steps(pairs, hypers, on(emulated), steps=2)
    held = nvrtc.SMALL.hypers
    assert [count for _, count, _ in emulated.log] == [held, held, 37 - 2 * held] * 2


@needs_compiler
def test_a_cached_batch_takes_new_options(library: ctypes.CDLL) -> None:
    emulated = Emulated(library)
    pair = Pair((2, 500), torch.bfloat16, torch.bfloat16, 128)
    batch = Batch(torch.device("cpu"), (TensorRow * 1)())
    counter = torch.zeros(1, dtype=torch.int64)
    hypers = [
        hyper_for("plain", 128, lr=1e-2),
        hyper_for("plain", 128, lr=3e-3),
        hyper_for("cautious", 128),
        hyper_for("plain", 128, "stochastic"),
    ]
    for hyper in hypers:
        pair.next_grad()
        pair.steps += 1
        batch.rows[0] = pair.row()
        pair.expected.reference_step(pair.expected_grad, hyper, pair.steps)
        cuda.step_(batch, hyper_array([hyper]), counter, emulated)
        for name, tensor in pair.actual.tensors().items():
            assert_same(tensor, pair.expected.tensors()[name], name)
    assert len({kernel for kernel, _, _ in emulated.log}) == 3


@needs_compiler
def test_an_empty_batch_launches_nothing(library: ctypes.CDLL) -> None:
    emulated = Emulated(library)
    batch = Batch(torch.device("cpu"), (TensorRow * 0)())
    cuda.step_(batch, hyper_array([]), torch.zeros(1, dtype=torch.int64), emulated)
    run_steps([Pair((0, 0), torch.bfloat16, torch.bfloat16, 128)], [hyper_for("plain", 128)], on(emulated))
    assert emulated.log == []


@needs_compiler
@pytest.mark.parametrize("cols", [2**31 + 2**12 + 5, 1000])
def test_tensors_beyond_32_bits(library: ctypes.CDLL, cols: int) -> None:
    # Memory that is reserved, not used: only the last CUDA blocks of the grid run.
    rows = 1 if cols > 2**31 else 2**32 // cols + 3
    total, per_row = rows * cols, -(-cols // 128)
    blocks = rows * per_row

    def reserve(bytes_: int) -> torch.Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        return torch.frombuffer(mmap.mmap(-1, bytes_, flags=flags), dtype=torch.uint8)

    param, grad = (reserve(total * 2).view(torch.bfloat16) for _ in range(2))
    codes, scales = reserve(total).view(torch.int8), reserve(blocks * 4).view(torch.float32)
    tensor = TensorRow(
        param=param.data_ptr(), grad=grad.data_ptr(), momentum=codes.data_ptr(), scales=scales.data_ptr(), rows=rows,
        cols=cols, first=2**31 + 9, row_stride=cols, seed=3, step=5, param_dtype=1, grad_dtype=1,
        momentum_bits=8,
    )  # fmt: skip
    batch, hyper = Batch(torch.device("cpu"), (TensorRow * 1)(tensor)), hyper_for("decay", 128, "stochastic")
    grid = -(-blocks // 16)
    first_block = (grid - 2) * 16  # the first that runs
    first_row, in_row = divmod(first_block, per_row)
    if rows == 1:
        shape, start, first_scale = (1, cols - in_row * 128), in_row * 128, first_block
    else:  # compare whole rows from the next one on
        shape, start, first_scale = (rows - first_row - 1, cols), (first_row + 1) * cols, (first_row + 1) * per_row
    tail = slice(start, total)
    grad[tail] = torch.randn(shape[0] * shape[1])
    param[tail] = torch.randn(shape[0] * shape[1])
    expected = param[tail].view(shape).clone()
    codes_, scales_ = reference.encode(torch.zeros(shape), 128)
    reference.lion_step_(
        expected, grad[tail].view(shape), codes_, scales_, hyper, seed=3, step=5, first=2**31 + 9 + start
    )
    emulated = Emulated(library, first=grid - 2, tuning=nvrtc.Tuning(passes=1))
    cuda.step_(batch, hyper_array([hyper]), torch.zeros(1, dtype=torch.int64), emulated)
    assert_same(param[tail].view(shape), expected, "param")
    assert_same(codes[tail].view(shape), codes_.contiguous(), "codes")
    assert_same(scales[first_scale:].view(scales_.shape), scales_, "scales")


@needs_compiler
@needs_nvrtc
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without NVIDIA's own driver")
def test_calls_arrive_at_the_driver(
    library: ctypes.CDLL, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, source = request.config.cache.mkdir("emulator"), EMULATOR / "fake_driver.cpp"
    link = ["-shared", "-ldl", "-Wl,-soname,libcuda.so.1"]
    driver = compile_once(folder, "fake_driver", [[str(source), "-std=c++17", "-fPIC"]], link, [source])
    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, str(tmp_path))
    program = [sys.executable, str(Path(__file__).parent / "through_driver.py"), str(driver), library._name]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "sound\n"), done.stderr[-3000:]


@pytest.fixture(scope="session")
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    probe = tmp_path_factory.mktemp("probe")
    (probe / "empty.cpp").write_text("int main() { return 0; }")
    flags = ["-fsanitize=address,undefined", str(probe / "empty.cpp"), "-o", str(probe / "empty")]
    if subprocess.run([str(COMPILER), *flags], capture_output=True).returncode:
        pytest.skip("this g++ has no sanitizers")
    unit = [str(EMULATOR / "sanitized.cpp"), *FLAGS, *SANITIZE, *defined(DEFAULT)]
    folder = request.config.cache.mkdir("emulator")
    return compile_once(folder, "sanitized", [unit], ["-fsanitize=address,undefined"], SOURCES)


@needs_compiler
@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("", None),
        ("cols", "heap-buffer-overflow"),
        ("scales", "heap-buffer-overflow"),
        ("unaligned", "misaligned address"),
    ],
)
def test_stays_within_its_buffers(sanitized: Path, fault: str, report: str | None) -> None:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sanitized, *filter(None, [fault])], capture_output=True, text=True, env=environment)
    if report is None:
        assert (done.returncode, done.stdout) == (0, "sound\n"), done.stderr[-2000:]
    else:
        assert done.returncode != 0
        assert report in done.stderr


# ---- On a GPU ------------------------------------------------------------------------------------------------------


@needs_gpu
def test_gpu_is_used() -> None:
    assert cuda.unavailable_reason() is None


@needs_gpu
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("param_dtype", "grad_dtype", "rounding"), COMBINATIONS)
def test_gpu_equals_reference(
    param_dtype: torch.dtype, grad_dtype: torch.dtype, rounding: str, block_size: int
) -> None:
    hypers = [hyper_for("plain", block_size, rounding), hyper_for("everything", block_size, rounding)]
    run_steps(many_pairs(param_dtype, grad_dtype, block_size, rounding, "cuda"), hypers, cuda.update_)


@needs_gpu
def test_gpu_takes_many_tensors_and_large_ones() -> None:
    pairs = [Pair((1, 1 + i % 700), torch.bfloat16, torch.bfloat16, 128, seed=i, device="cuda") for i in range(800)]
    pairs += [Pair((2048, 4100), torch.bfloat16, torch.bfloat16, 128, device="cuda")]
    pairs += [Pair((1, 20_000_003), torch.bfloat16, torch.bfloat16, 128, device="cuda")]
    run_steps(pairs, [hyper_for("decay", 128, "stochastic")], cuda.update_, steps=2)


@needs_gpu
def test_gpu_launches_on_the_current_stream() -> None:
    pair, hyper = Pair((64, 4096), torch.bfloat16, torch.bfloat16, 128, device="cuda"), hyper_for("plain", 128)
    late, pair.grad = pair.grad, torch.zeros_like(pair.grad)
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    batch, hypers = Batch(torch.device("cuda"), (TensorRow * 1)(pair.row())), hyper_array([hyper])
    cuda.prepare(batch, hypers)  # compiling would outlast the sleep
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        pair.grad.copy_(late)  # a launch on any other stream would read the gradient before this
        cuda.update_(batch, hypers, counter)
    torch.cuda.synchronize()
    assert int(counter) == pair.expected.reference_step(pair.expected_grad, hyper, pair.steps)
    for name, tensor in pair.actual.tensors().items():
        assert_same(tensor.cpu(), pair.expected.tensors()[name], name)


@needs_gpu
def test_gpu_step_is_captured_in_a_graph() -> None:
    pair = Pair((64, 4096), torch.bfloat16, torch.bfloat16, 128, device="cuda")
    hyper = hyper_for("decay", 128)
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    batch = Batch(torch.device("cuda"), (TensorRow * 1)(pair.row()))
    cuda.prepare(batch, hyper_array([hyper]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.update_(batch, hyper_array([hyper]), counter)
    for _ in range(3):
        pair.expected.reference_step(pair.expected_grad, hyper, pair.steps)
        graph.replay()
    torch.cuda.synchronize()
    for name, tensor in pair.actual.tensors().items():
        assert_same(tensor.cpu(), pair.expected.tensors()[name], name)


@needs_gpu
def test_gpu_refuses_to_compile_during_capture() -> None:
    pair = Pair((4, 4096), torch.bfloat16, torch.float16, 256, device="cuda")
    hypers = hyper_array([hyper_for("everything", 256)])
    batch = Batch(torch.device("cuda"), (TensorRow * 1)(pair.row()))
    gpu = cuda.device_of(batch)
    gpu._functions.clear()
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="before CUDA graph capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        cuda.update_(batch, hypers, counter)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_steps_a_device_that_is_not_current() -> None:
    pair = Pair((4, 4096), torch.bfloat16, torch.bfloat16, 128, device="cuda:1")
    run_steps([pair], [hyper_for("plain", 128)], cuda.update_)
    assert torch.cuda.current_device() == 0


@needs_gpu
@pytest.mark.parametrize("dtype", PARAM_DTYPES, ids=str)
def test_gpu_optimizer_equals_cpu_and_takes_over_its_checkpoint(dtype: torch.dtype) -> None:
    models = [small_model(dtype), small_model(dtype).cuda()]
    optimizers = [Lion8bit(model.parameters(), lr=1e-3, weight_decay=0.1) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train_alike(model, optimizer, 3, seed=1)
    assert_same_training(*optimizers)
    moved = small_model(dtype).cuda()
    moved.load_state_dict(models[0].state_dict())
    resumed = Lion8bit(moved.parameters())
    resumed.load_state_dict(optimizers[0].state_dict())
    for model, optimizer in zip([models[1], moved], [optimizers[1], resumed], strict=True):
        train_alike(model, optimizer, 2, seed=2)
    for a, b in zip(models[1].parameters(), moved.parameters(), strict=True):
        assert_same(a.detach().cpu(), b.detach().cpu(), "parameter")


@needs_gpu
def test_gpu_steps_allocate_nothing_and_do_not_synchronise() -> None:
    model = small_model(torch.bfloat16).cuda()
    optimizer = Lion8bit(model.parameters(), lr=1e-3)
    train_alike(model, optimizer, 1, seed=1)
    for param in model.parameters():  # one in another memory order would be copied
        param.grad = torch.empty_like(param).copy_(param.grad)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
