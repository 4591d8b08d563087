"""Every variant that `benchmarks/gpu_tune.py` compares has the reference's bits; the default spills nothing."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import hyper_for
from emulated import ALIGNED, SHIFTS, Batch, Emulated, Pair, build_emulator, needs_compiler, on, run_steps

from lion8bit.backends import cuda, nvrtc
from lion8bit.layout import BLOCK_SIZES, WEIGHT_ROUNDING, TensorRow
from lion8bit.table import hyper_array

pytest.importorskip("rich", reason="needs the extra named demo")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import gpu_tune  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
needs_disassembler = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("cuda", "nvidia")), reason="needs NVRTC and cuobjdump"
)
SPILLED = {80: 0, 89: 0, 90: 16, 120: 0}  # bytes at most; on an H200 three CUDA blocks that spill were measured faster
VARIANTS = {  # that differ in an emulator: by threads, elements and what is loaded ahead
    (tuning.threads, tuning.per_thread, tuning.ahead): tuning
    for tuning in [gpu_tune.changed(nvrtc.Tuning(), name) for name in ("base", *gpu_tune.NAMES)]
}


def test_variants_differ_in_what_their_names_say() -> None:
    """Each GPU is compared with choices that differ from its own, and all kinds of choice occur."""
    for base in {tuning for tunings in nvrtc.TUNINGS.values() for tuning in tunings}:
        tunings = {name: gpu_tune.changed(base, name, 100) for name in gpu_tune.NAMES}
        assert set(tunings.values()) - {base}
        assert {
            name for tuning in tunings.values() for name in base._fields if getattr(tuning, name) != getattr(base, name)
        } == set(nvrtc.Tuning._fields)
        wave = tunings["one wave"]
        assert 0.98 * 100 * base.resident < wave.grid < 100 * base.resident
        passes = [(1 << 29) // (wave.threads * wave.per_thread)]
        packed = cuda._Packed(gpu_tune.CASES["fp32"].kernel(wave), [0], passes, [0])
        assert 0.98 * 100 * base.resident < packed.grid <= 100 * base.resident, "one more would be a second wave"
    changed = gpu_tune.changed(nvrtc.Tuning(), "16 elements, resident 3, load no_allocate 256B, store cs, cache ahead")
    assert changed == nvrtc.Tuning(
        per_thread=16, resident=3, load=".L1::no_allocate.L2::256B", store=".cs", ahead="cache"
    )
    assert gpu_tune.changed(nvrtc.Tuning(), "128 threads, passes 3") == nvrtc.Tuning(threads=128, passes=3)
    for wrong in ("resident", "passes x", "load", "load fast", "16 bytes", "far ahead", ""):
        with pytest.raises(ValueError, match="a change must be as in"):
            gpu_tune.changed(nvrtc.Tuning(), wrong)


def test_every_gpu_has_tunings_that_the_emulator_runs() -> None:
    assert min(nvrtc.TUNINGS) == 75
    assert nvrtc.tunings_for(75) == nvrtc.tunings_for(70) == nvrtc.TUNINGS[75]
    assert nvrtc.tunings_for(100) == nvrtc.TUNINGS[90]
    assert nvrtc.tunings_for(max(nvrtc.TUNINGS) + 1) == nvrtc.TUNINGS[max(nvrtc.TUNINGS)]
    for tuning in itertools.chain(*nvrtc.TUNINGS.values()):
        assert (tuning.threads, tuning.per_thread, tuning.ahead) in VARIANTS


@pytest.mark.parametrize("capability", nvrtc.TUNINGS)
def test_kernels_take_the_tuning_of_their_dtype(capability: int) -> None:
    """Also where both are in one batch: passes are counted by each tensor's own."""
    tunings = nvrtc.tunings_for(capability)

    class Recorder:
        def __init__(self) -> None:
            self.tunings = tunings
            self.launches: list[tuple[int, nvrtc.Tuning, int]] = []

        def capacity(self, tensors: int) -> nvrtc.Capacity:
            return nvrtc.SMALL

        def run(self, kernel: nvrtc.Kernel, grid: int, launch: ctypes.Structure, done: list[Any]) -> None:
            self.launches.append((kernel.param_dtype, kernel.tuning, grid))

    pairs = [Pair((1, 9 * 4096), dtype, dtype, 128) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    recorder = Recorder()
    batch = Batch(torch.device("cpu"), (TensorRow * len(pairs))(*(pair.row() for pair in pairs)))
    cuda.step_(batch, hyper_array([hyper_for("decay", 128)]), torch.zeros(1, dtype=torch.int64), recorder)
    assert recorder.launches == [
        (dtype, tuning, 9 * 4096 // (tuning.threads * tuning.per_thread))
        for dtype, tuning in enumerate([tunings.fp32, tunings.half, tunings.half])
    ]


def variant_library(cache: Path, tuning: nvrtc.Tuning) -> ctypes.CDLL:
    """The emulator built for a tuning."""
    seen = nvrtc.Tuning(threads=tuning.threads, per_thread=tuning.per_thread, ahead=tuning.ahead)  # by an emulator
    return build_emulator(cache, seen)


@needs_compiler
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def test_every_variant_equals_reference(
    variant: tuple[int, int, str], block_size: int, request: pytest.FixtureRequest
) -> None:
    """Rows that end in every place of a pass, over one and several passes of a CUDA block, at any alignment."""
    library = variant_library(request.config.cache.mkdir("emulator"), VARIANTS[variant])
    step = variant[0] * variant[1]  # elements of a pass
    rows = [
        (1, 3 * step),
        (1, 5 * step + 5),
        (3, step + block_size),
        (9, 2 * step - 8),
        (40, 1000),
        (70, 136),
        (70, 130),
    ]
    shifts = itertools.cycle(SHIFTS)
    roundings = [(torch.float32, "nearest"), *((torch.bfloat16, each) for each in WEIGHT_ROUNDING)]
    for (dtype, rounding), passes in itertools.product(roundings, (1, 4)):
        hypers = [hyper_for("decay", block_size, rounding), hyper_for("everything", block_size, rounding)]
        pairs = [
            Pair(shape, dtype, dtype, block_size, rounding=rounding, seed=i, hyper=i % 5 // 4, shifts=shift)
            for i, (shape, shift) in enumerate((shape, each) for shape in rows for each in (ALIGNED, next(shifts)))
        ]
        emulated = Emulated(library, order=2, tuning=VARIANTS[variant]._replace(grid=1, passes=passes))
        run_steps(pairs, hypers, on(emulated), steps=2)


@needs_disassembler
def test_dry_run_compiles_variants(tmp_path: Path) -> None:
    target = tmp_path / "tune.json"
    names = ["16 elements, resident 3", "registers ahead, load no_allocate, store cs", "cache ahead"]
    command = [sys.executable, BENCHMARKS / "gpu_tune.py", "--dry", "--json", target, "--case", "fp32", "stochastic"]
    environment = {**os.environ, "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8", nvrtc.CACHE_VARIABLE: str(tmp_path)}
    done = subprocess.run(
        [*command, "--variant", *names], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    rows = json.loads(target.read_text())["kernels"]
    assert {row["variant"] for row in rows} == {"base", *names}
    assert {row["capability"] for row in rows} == set(gpu_tune.DRY_CAPABILITIES)
    assert all(row["registers"] > 30 for row in rows)
    assert all(row["spilled_bytes"] <= SPILLED[row["capability"]] for row in rows if row["variant"] == "base")


@needs_disassembler
@pytest.mark.parametrize("capability", gpu_tune.DRY_CAPABILITIES)
def test_kernels_that_need_the_most_registers_spill_little(capability: int) -> None:
    """Flags, device memory, mixed dtypes, residuals beside fp32 momentum: what `Kernel.resident` is about."""
    tuning = nvrtc.tunings_for(capability).half
    for kernel in (
        nvrtc.Kernel(1, 0, 8, 128, 1, True, nvrtc.LARGE, True, tuning),
        nvrtc.Kernel(1, 1, 8, 128, 2, True, nvrtc.LARGE, True, tuning),
        nvrtc.Kernel(1, 0, 8, 256, 1, True, nvrtc.LARGE, False, tuning),
        nvrtc.Kernel(1, 2, 8, 256, 2, False, nvrtc.LARGE, True, tuning),
        nvrtc.Kernel(1, 1, 32, 128, 1, False, nvrtc.LARGE, False, tuning),
        nvrtc.Kernel(1, 2, 32, 128, 2, True, nvrtc.LARGE, True, tuning),
    ):
        image = nvrtc.compile_kernel(kernel, f"sm_{capability}")
        assert gpu_tune.sass.resources(image)["spilled_bytes"] <= SPILLED[capability], kernel


@needs_disassembler
@pytest.mark.parametrize("case", gpu_tune.CASES)
def test_all_of_a_pass_is_asked_for_before_the_first_wait(case: str) -> None:
    """In the machine code all loads come before the first use of any, the scale's first of all."""
    sass, kind = gpu_tune.sass, gpu_tune.CASES[case]
    tuning = nvrtc.tunings_for(90).of(kind.dtype)
    loads = kind.accesses(tuning.per_thread)
    image = nvrtc.compile_kernel(kind.kernel(tuning), "sm_90")
    path = sass.hot_path(sass.parse(sass.inspect(image, "nvdisasm", "-c")), loads)
    accesses = [access for name, access in path if name in ("LDG", "I2F", "SHFL", "STG")]
    count = sum(amount for (name, _), amount in loads.items() if name == "LDG")
    assert accesses[0] == ("LDG", 4)
    assert Counter(accesses[:count]) == Counter({key: amount for key, amount in loads.items() if key[0] == "LDG"})


class StandIn:
    """What `cuda.Device` is to `gpu_tune.py`, on the emulator; one tuning may have other bits."""

    def __init__(self, cache: Path, wrong: nvrtc.Tuning | None = None) -> None:
        self.cache, self.wrong = cache, wrong
        self.seen: set[nvrtc.Tuning] = set()
        self.tunings = nvrtc.Tunings(nvrtc.Tuning(), nvrtc.Tuning())

    def capacity(self, tensors: int) -> nvrtc.Capacity:
        return nvrtc.SMALL

    def run(self, kernel: nvrtc.Kernel, grid: int, launch: ctypes.Structure, done: list[Any]) -> None:
        assert kernel.tuning == self.tunings.half == self.tunings.fp32
        self.seen.add(kernel.tuning)
        library = variant_library(self.cache, kernel.tuning)
        Emulated(library, tuning=kernel.tuning).run(kernel, grid, launch, done)
        if kernel.tuning == self.wrong:
            ctypes.c_uint16.from_address(launch.tensors[0].param).value ^= 1  # type: ignore[attr-defined]


@needs_compiler
def test_other_bits_are_found_and_times_compared(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, use_backend: Callable[..., None]
) -> None:
    """All that runs on a GPU, except its clock."""
    names = ["base", "passes 4", "128 threads", "registers ahead", "load no_allocate, store cs"]
    tunings = {name: gpu_tune.changed(nvrtc.Tuning(grid=1), name) for name in names}
    cpu = torch.device("cpu")
    gpu = StandIn(request.config.cache.mkdir("emulator"), wrong=tunings["128 threads"])
    use_backend(lambda *arguments: cuda.step_(*arguments, gpu))
    monkeypatch.setattr(gpu_tune, "SHAPES", ((64, 512), (5, 1000), (1, 5003)))
    monkeypatch.setattr(gpu_tune, "FLUSH_BYTES", {"cuda": 1 << 20})
    for case in ("fp32", "compensated"):
        gpu.seen.clear()
        assert gpu_tune.differing(tunings, case, gpu, cpu) == ["128 threads"]
        assert gpu.seen == set(tunings.values())

    def milliseconds(work: Callable[[], object], times: int) -> float:
        work()
        return 1.0 + len(gpu.tunings.half.load)

    monkeypatch.setattr(gpu_tune, "milliseconds", milliseconds)
    sound = {name: tuning for name, tuning in tunings.items() if name != "128 threads"}
    optimizer = gpu_tune.optimizer_of("stochastic", (1, 2**15), cpu)
    timed = gpu_tune.time_case(sound, "stochastic", gpu, optimizer, rounds=3, end=float("inf"))
    rows = {row["variant"]: row for row in timed["rows"]}
    assert rows.keys() == sound.keys()
    assert [row["ms"]["repeats"] for row in rows.values()] == [3] * 4
    assert rows["passes 4"]["speed_over_base"] == 1.0
    assert rows["load no_allocate, store cs"]["speed_over_base"] == 1 / (1 + len(".L1::no_allocate"))
    assert list(rows)[-1] == "load no_allocate, store cs"
    assert rows["base"]["gb_per_s"] == pytest.approx(8.0625 * 2**15 / 1e6)
    timed = gpu_tune.time_case(sound, "stochastic", gpu, optimizer, rounds=3, end=0.0)
    assert timed["rows"][0]["ms"]["repeats"] == 1, "the time was up"
