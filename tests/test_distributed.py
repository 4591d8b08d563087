"""Lion8bit on the engines for distributed training: DDP, FSDP2, tensor parallel, checkpoints, ZeRO, FSDP1; gloo, CPU.

As a script this file is one of four worker processes, which go through all `CHECKS` together. As a test file it starts
them once and reports each check as a test.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.distributed as dist
from cases import assert_same
from torch import nn

from lion8bit import Lion8bit, convert_state_dict
from lion8bit.state import STATE_TENSORS

WORKERS = 4
CHECKS: dict[str, Callable[[], None]] = {}


# ---- The test file ---------------------------------------------------------------------------------------------------


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What went wrong in each check, rank by rank."""
    folder = tmp_path_factory.mktemp("workers")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # the host's name need not resolve
    workers = []
    for rank in range(WORKERS):
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, __file__, str(folder), str(rank)]
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    deadline = time.monotonic() + 600
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(timeout=max(0.0, deadline - time.monotonic()))
        worker.kill()
    errors: dict[str, list[str]] = {name: [] for name in CHECKS}
    for rank in range(WORKERS):
        path = folder / f"{rank}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        for name in CHECKS:
            error = found.get(name, f"not run; the worker said:\n{(folder / f'{rank}.log').read_text()}")
            if error is not None:
                errors[name].append(f"rank {rank}: {error}")
    return errors


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", CHECKS)


def test_distributed(results: dict[str, list[str]], name: str) -> None:
    without_gpu = "AttributeError: 'Stream' object has no attribute 'record_event'"  # what torch.cpu's lacks in 2.6
    if results[name] and all(error.rstrip().endswith(without_gpu) for error in results[name]):
        assert not hasattr(torch.cpu.Stream, "record_event")
        pytest.skip("this PyTorch's FSDP2 needs a GPU")
    assert not results[name], "\n".join(results[name])


# ---- What the checks share -------------------------------------------------------------------------------------------


class Worker:
    """This process's place among the workers, set by `main`."""

    folder = Path()
    rank = 0
    check = ""
    worlds = 0
    groups: ClassVar[list[Any]] = []
    store: dist.Store


def world(size: int) -> Iterator[int]:
    """Yields the rank once in the first `size` workers, which then form a separate process group."""
    Worker.worlds += 1
    if Worker.rank >= size:
        return
    store = dist.PrefixStore(f"{Worker.check}/{Worker.worlds}", Worker.store)
    dist.init_process_group("gloo", store=store, rank=Worker.rank, world_size=size, timeout=timedelta(seconds=60))
    try:
        yield Worker.rank
    finally:
        Worker.groups.append(dist.group.WORLD)  # for good: its destructor may wait for a thread that waits for the GIL
        dist.destroy_process_group()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, plain."""
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def placed_as(param: Any, whole: torch.Tensor) -> torch.Tensor:
    """A tensor of the parameter's shape, sharded as the parameter."""
    if not hasattr(param, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, param.device_mesh, param.placements)


def gradient(index: int, step: int, param: torch.Tensor) -> torch.Tensor:
    """The same gradient on every rank and however the parameter is sharded."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randn(param.shape, generator=generator).to(param.dtype)


def train(optimizer: Lion8bit, steps: Sequence[int]) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
    for step in steps:
        for index, param in enumerate(params):
            param.grad = placed_as(param, gradient(index, step, param))
        optimizer.step()
    optimizer.zero_grad()


def contents(optimizer: Lion8bit) -> dict[str, torch.Tensor]:
    """Every parameter and all of its state, whole, by name."""
    found: dict[str, torch.Tensor] = {}
    for index, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
        found[f"{index} param"] = full(param).clone()
        for name, value in optimizer.state.get(param, {}).items():
            found[f"{index} {name}"] = full(value).clone() if isinstance(value, torch.Tensor) else torch.tensor(value)
    return found


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert_same(tensor, expected[name], name)


class Net(nn.Module):
    """An embedding of uneven and odd rows, a convolution, and a matrix and a bias too short for four ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(90, 131)
        self.conv = nn.Conv1d(131, 10, 8)
        self.norm = nn.LayerNorm(150)
        self.head = nn.Linear(1500, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(self.conv(self.embedding(tokens).mT)).flatten(1))
        return result

    @staticmethod
    def tokens(seed: int) -> torch.Tensor:
        return torch.randint(90, (2, 157), generator=torch.Generator().manual_seed(seed))


def make_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def fsdp2(net: Net, size: int, **options: Any) -> Net:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    fully_shard(net.conv, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    return net


def make_optimizer(net: nn.Module, **options: Any) -> Lion8bit:
    """The first parameter's momentum has 4 bits, unless an option says otherwise."""
    return Lion8bit(groups_of(net, **options), **{"lr": 1e-3, "weight_decay": 0.1, **options})


def groups_of(net: nn.Module, optim_bits: int = 4, **options: Any) -> list[dict[str, Any]]:
    first, *others = net.parameters()
    groups: list[dict[str, Any]] = [{"params": [first], "optim_bits": optim_bits}, {"params": others}]
    return groups if others else groups[:1]


def params_of(optimizer: Lion8bit) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


# ---- DDP -------------------------------------------------------------------------------------------------------------


@check
def ddp_replicas_stay_bit_identical() -> None:
    for size in (2, 4):
        for rank in world(size):
            net = make_net(seed=rank)  # DDP broadcasts rank 0's
            replica = nn.parallel.DistributedDataParallel(net)
            optimizer = make_optimizer(net)
            alone = copy.deepcopy(net)
            follower = make_optimizer(alone)
            for step in range(3):
                replica(Net.tokens(10 * step + rank)).float().square().mean().backward()
                for param, other in zip(net.parameters(), alone.parameters(), strict=True):
                    other.grad = param.grad.clone()
                optimizer.step()
                follower.step()
                optimizer.zero_grad()
            mine = contents(optimizer)
            assert_equal(mine, contents(follower))
            for name, tensor in mine.items():
                rows = [torch.empty_like(tensor) for _ in range(size)]
                dist.all_gather(rows, tensor)
                for row in rows:
                    assert_same(row, tensor, name)


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


def follow(net: Net, alone: Net, rank: int) -> Lion8bit:
    """Trains a sharded net and, fed the same gradients, an unsharded one; they must agree after each step."""
    optimizer, follower = make_optimizer(net), make_optimizer(alone)
    for step in range(3):
        net(Net.tokens(10 * step + rank)).float().square().mean().backward()
        for param, other in zip(net.parameters(), alone.parameters(), strict=True):
            other.grad = full(param.grad)
        optimizer.step()
        follower.step()
        optimizer.zero_grad()
        assert_equal(contents(optimizer), contents(follower))
    return optimizer


@check
def fsdp2_equals_unsharded() -> None:
    for rank in world(4):
        for dtype in (torch.float32, torch.bfloat16):
            net = make_net(dtype)
            alone = copy.deepcopy(net)
            optimizer = follow(fsdp2(net, 4), alone, rank)
            assert optimizer.state[net.head.weight]["codes"].to_local().shape == ((1, 1500) if rank < 3 else (0, 1500))


@check
def fsdp2_with_cpu_offload() -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    for rank in world(4):
        net = make_net()
        alone = copy.deepcopy(net)
        sharded = fsdp2(net, 4, offload_policy=CPUOffloadPolicy(pin_memory=False))
        follow(sharded, alone, rank)


@check
def fsdp2_with_mixed_precision() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    for rank in world(4):
        net = make_net(torch.float32)
        alone = copy.deepcopy(net)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        follow(fsdp2(net, 4, mp_policy=policy), alone, rank)


@check
def fsdp2_takes_the_bytes_of_the_plan() -> None:
    from lion8bit import estimate

    options: dict[str, dict[str, Any]] = {"lion8bit": {}, "lion8bit-compensated": {"weight_rounding": "compensated"}}
    options = {key: {"optim_bits": 8, **choice} for key, choice in options.items()}
    options["lion8bit-4bit"] = {"optim_bits": 4, "block_size": 64}
    for size in (2, 3, 4):
        for _ in world(size):
            net = make_net(torch.bfloat16)
            plan = estimate(net, gpus=size)
            fsdp2(net, size)
            for key, choice in options.items():
                optimizer = make_optimizer(net, **choice)
                train(optimizer, [0])
                for index, param in enumerate(net.parameters()):
                    param.grad = placed_as(param, gradient(index, 0, param))
                report = optimizer.memory_report()
                mine = [report[f"{kind}_bytes"] for kind in ("parameter", "gradient", "state")]
                everyone: list[Any] = [None] * size
                dist.all_gather_object(everyone, mine)
                row = plan.rows[key]
                largest = [max(column) for column in zip(*everyone, strict=True)]
                assert largest == everyone[0] == [row.weights, row.gradients, row.state]
                optimizer.zero_grad()


@check
def fsdp2_with_gradient_release() -> None:
    from lion8bit import fuse_into_backward

    for rank in world(2):
        nets = [fsdp2(make_net(torch.bfloat16), 2) for _ in range(2)]
        ordinary, released = (make_optimizer(net) for net in nets)
        fuse_into_backward(nets[1], released)
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ordinary, released)]
        for step in range(3):
            for net, optimizer, scheduler in zip(nets, (ordinary, released), schedulers, strict=True):
                net(Net.tokens(10 * step + rank)).float().square().mean().backward()
                assert all((param.grad is None) == (optimizer is released) for param in net.parameters())
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            assert_equal(contents(released), contents(ordinary))


@check
def fsdp2_with_a_compiled_step() -> None:
    for rank in world(2):
        net = make_net(torch.bfloat16)
        alone = copy.deepcopy(net)
        optimizer, follower = (make_optimizer(n, weight_rounding="compensated") for n in (fsdp2(net, 2), alone))
        step = torch.compile(optimizer.step, backend="eager" if rank else "aot_eager", fullgraph=True)
        for seed in range(3):
            net(Net.tokens(10 * seed + rank)).float().square().mean().backward()
            for param, other in zip(net.parameters(), alone.parameters(), strict=True):
                other.grad = full(param.grad)
            step()
            follower.step()
            optimizer.zero_grad()
            assert_equal(contents(optimizer), contents(follower))


# ---- Placements ------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A parameter, how it is sharded, and whether its state then is quantized."""

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    placements: str  # a dimension that is sharded, or R for a replica, per dimension of the mesh
    quantized: bool
    rounding: str = "auto"


CASES = {
    "rows": Case((70, 131), (4,), "0", True),
    "fewer_rows_than_ranks": Case((3, 2000), (4,), "0", True),
    "convolution": Case((10, 16, 5, 7), (4,), "0", True),
    "narrow_rows": Case((512, 16), (4,), "0", False),
    "uneven_narrow_rows": Case((601, 9), (4,), "0", False),
    "narrow_columns": Case((601, 9), (4,), "1", False),
    "replicated_narrow_rows": Case((512, 16), (4,), "R", False),
    "columns": Case((33, 1024), (4,), "1", True),
    "columns_that_cut_blocks": Case((33, 600), (4,), "1", False),
    "uneven_columns": Case((33, 1000), (4,), "1", False),
    "channels": Case((20, 8, 64), (4,), "1", True),
    "uneven_channels_of_whole_blocks": Case((9, 6, 256), (4,), "1", False),
    "third_dimension": Case((8, 4, 515), (4,), "2", False),
    "second_and_third_dimension": Case((8, 4, 512), (2, 2), "12", False, "nearest"),
    "rows_and_third_dimension": Case((8, 4, 515), (2, 2), "02", False),
    "vector": Case((5001,), (4,), "0", False),
    "scalar": Case((), (4,), "R", False),
    "small": Case((10, 10), (4,), "0", False),
    "replica": Case((70, 131), (4,), "R", True),
    "replicated_vector": Case((5001,), (4,), "R", False),
    "hybrid": Case((70, 131), (2, 2), "R0", True),
    "rows_and_columns": Case((35, 512), (2, 2), "01", True),
    "columns_and_rows": Case((35, 512), (2, 2), "10", True),
    "rows_twice": Case((71, 131), (2, 2), "00", True),
    "columns_twice": Case((9, 1024), (2, 2), "11", True),
}


def place_on(mesh: Any, placements: str) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate() if where == "R" else Shard(int(where)) for where in placements]


def placed_case(case: Case) -> None:
    """State of the right kind, sharded as the parameter; steps equal to those of the whole parameter, bit for bit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    for _ in world(4):
        mesh = init_device_mesh("cpu", case.mesh)
        cases = [(torch.float32, "auto", 8), (torch.bfloat16, case.rounding, 8), (torch.bfloat16, "compensated", 8)]
        cases += [(torch.bfloat16, case.rounding, 4), (torch.bfloat16, "compensated", 4)] * case.quantized
        for dtype, rounding, bits in cases:
            whole = torch.randn(case.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            param = nn.Parameter(distribute_tensor(whole, mesh, place_on(mesh, case.placements)))
            options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "weight_rounding": rounding, "block_size": 128}
            optimizer = Lion8bit([param], **options, optim_bits=bits)
            # Momentum that is not quantized here is not to be quantized there.
            follower = Lion8bit([nn.Parameter(whole.clone())], **options, optim_bits=bits if case.quantized else 32)
            train(optimizer, range(3))
            train(follower, range(3))
            expected = contents(follower)
            assert_equal(contents(optimizer), expected)
            assert ("0 codes" in expected) == case.quantized
            for tensor in [value for name, value in optimizer.state[param].items() if name in STATE_TENSORS]:
                assert tensor.placements == param.placements and tensor.device_mesh == param.device_mesh
                assert tensor.stride() == torch.empty(tensor.shape).stride()
            assert_same(
                full(optimizer.momentum(param)), follower.momentum(follower.param_groups[0]["params"][0]), "momentum()"
            )
            plan = optimizer._stepper.plan
            train(optimizer, [3])
            assert plan is not None and optimizer._stepper.plan is plan, "the table was built again"


for _name, _case in CASES.items():
    CHECKS[f"placement_{_name}"] = partial(placed_case, _case)


@check
def bits_change_alike_in_a_sharded_optimizer() -> None:
    """By the group's option and by `convert_state_dict`, as in an unsharded one; uneven rows, and columns."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    for _ in world(4):
        mesh = init_device_mesh("cpu", (4,))
        for shape, placements in (((70, 131), "0"), ((9, 1024), "1")):
            whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
            param = nn.Parameter(distribute_tensor(whole, mesh, place_on(mesh, placements)))
            options: dict[str, Any] = {"lr": 1e-3, "weight_rounding": "compensated", "block_size": 128}
            pair = [Lion8bit([each], **options) for each in (param, nn.Parameter(whole.clone()))]
            for step, bits in enumerate((8, 4, 32, 4, 8, 32, 8)):
                for optimizer in pair:
                    if step % 2:
                        optimizer.param_groups[0]["optim_bits"] = bits
                    else:
                        target = Lion8bit(params_of(optimizer), **options, optim_bits=bits)
                        optimizer.load_state_dict(convert_state_dict(optimizer.state_dict(), target))
                    train(optimizer, [step])
                assert_equal(*map(contents, pair))
                assert pair[0].state[param].keys() == pair[1].state[params_of(pair[1])[0]].keys()


@check
def state_is_inspected_locally() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    for rank in world(4):
        mesh = init_device_mesh("cpu", (4,))
        whole = torch.cat([torch.zeros(66, 128), torch.full((4, 128), 1e9)])
        param = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        optimizer = Lion8bit([param], lr=1e-3)
        assert full(optimizer.momentum(param)).count_nonzero() == 0
        grad = torch.ones(70, 128)
        grad[5, 7] = torch.nan
        param.grad = placed_as(param, grad)
        optimizer.step()
        rows = 18 if rank < 3 else 16  # as torch.chunk cuts 70
        report = optimizer.memory_report()
        assert report["parameters"] == rows * 128
        assert report["parameter_bytes"] == report["gradient_bytes"] == rows * 128 * 4
        assert report["state_bytes"] == rows * (128 + 4)
        assert report["state_bytes_per_parameter"] == 1 + 4 / 128
        assert optimizer.frozen_fraction() == (0.25 if rank == 3 else 0.0)
        assert optimizer.nonfinite_count() == (rank == 0)


@check
def gradients_that_are_partial_sums_are_reduced() -> None:
    """As sequence parallelism leaves those of replicated norms."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    for rank in world(4):
        mesh = init_device_mesh("cpu", (4,))
        whole = torch.randn(70, 131, generator=torch.Generator().manual_seed(0))
        param = nn.Parameter(distribute_tensor(whole, mesh, [Replicate()]))
        plain = nn.Parameter(whole.clone())
        optimizer, follower = Lion8bit([param], lr=1e-3), Lion8bit([plain], lr=1e-3)
        for step in range(3):
            pieces = [torch.randn(70, 131, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(4)]
            param.grad = DTensor.from_local(pieces[rank], mesh, [Partial()])
            plain.grad = param.grad.full_tensor()
            optimizer.step()
            follower.step()
            assert_equal(contents(optimizer), contents(follower))
        partial_sum = nn.Parameter(DTensor.from_local(whole, mesh, [Partial()]))
        partial_sum.grad = DTensor.from_local(whole, mesh, [Partial()])
        with pytest.raises(ValueError, match="partial sum"):
            Lion8bit([partial_sum]).step()


@check
def tensor_parallel_with_fsdp2() -> None:
    """Columnwise and rowwise linear layers under FSDP2 on the other dimension of the mesh, and a checkpoint of them."""
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def build(seed: int) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(seed)
        alone = nn.Sequential(nn.Linear(192, 512), nn.GELU(), nn.Linear(512, 40))
        net = copy.deepcopy(alone)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(net, mesh=mesh["data"])
        return net, alone

    for rank in world(4):
        net, alone = build(0)
        optimizer, follower = make_optimizer(net), make_optimizer(alone)
        for step in range(3):
            inputs = torch.randn(8, 192, generator=torch.Generator().manual_seed(10 * step + rank // 2))
            net(inputs).float().square().mean().backward()
            for param, other in zip(net.parameters(), alone.parameters(), strict=True):
                other.grad = full(param.grad)
            optimizer.step()
            follower.step()
            assert_equal(contents(optimizer), contents(follower))
        assert "codes" in optimizer.state[net[0].weight] and "codes" in optimizer.state[net[2].weight]
        optimizer.zero_grad()
        save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=Worker.folder / "tensor_parallel")
        other, _ = build(0)
        resumed = make_optimizer(other)
        state = {"optimizer": get_optimizer_state_dict(other, resumed)}
        load(state, checkpoint_id=Worker.folder / "tensor_parallel")
        set_optimizer_state_dict(other, resumed, state["optimizer"])
        with torch.no_grad():
            for param, trained in zip(other.parameters(), net.parameters(), strict=True):
                param.copy_(trained)
        train(optimizer, [7])
        train(resumed, [7])
        assert_equal(contents(resumed), contents(optimizer))


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


@check
def checkpoints_reshard_bit_for_bit() -> None:
    """4 ranks, 3, 2, 1, one without FSDP2, 4 again: the same momentum, and two steps from each are the same.

    Once with bf16 weights, rounded stochastically, whose shards begin anywhere in a block.
    """
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    for flat, dtype in ((False, torch.float32), (True, torch.float32), (False, torch.bfloat16)):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        saved = Path()
        for number, (size, shard) in enumerate([(4, True), (3, True), (2, True), (1, True), (1, False), (4, True)]):
            source, saved = saved, Worker.folder / f"{Worker.check} {flat} {dtype} {number}"
            for rank in world(size):
                net = make_net(dtype, seed=number)
                optimizer = make_optimizer(fsdp2(net, size) if shard else net)
                if number == 0:
                    train(optimizer, range(3))
                else:
                    model, state = get_state_dict(net, optimizer, options=options)
                    loaded = {"model": model, "optimizer": state}
                    load(loaded, checkpoint_id=source)
                    set_state_dict(
                        net,
                        optimizer,
                        model_state_dict=loaded["model"],
                        optim_state_dict=loaded["optimizer"],
                        options=options,
                    )
                model, state = get_state_dict(net, optimizer, options=options)
                save({"model": model, "optimizer": state}, checkpoint_id=saved)
                resumed = contents(optimizer)
                train(optimizer, range(3, 5))
                after = contents(optimizer)
                if number == 0 and rank == 0:
                    torch.save((resumed, after), Worker.folder / f"{Worker.check} {flat} {dtype}.pt")
                elif number > 0:
                    at_load, later = torch.load(Worker.folder / f"{Worker.check} {flat} {dtype}.pt")
                    assert_equal(resumed, at_load)
                    assert_equal(after, later)


@check
def a_matrix_of_narrow_rows_reshards() -> None:
    """In fp32, so that its blocks need not fit any mesh; an unsharded one has 8 bits, and refuses the checkpoint."""
    from torch.distributed.checkpoint import CheckpointException, load, save
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    saved = Path()
    for number, (size, shard) in enumerate([(4, True), (3, True), (1, True), (2, True), (1, False)]):
        source, saved = saved, Worker.folder / f"{Worker.check} {number}"
        for _ in world(size):
            torch.manual_seed(0)
            net: nn.Module = nn.Linear(16, 301, bias=False)
            if shard:
                fully_shard(net)
            optimizer = make_optimizer(net)
            if number == 0:
                train(optimizer, range(3))
            state = {"optimizer": get_optimizer_state_dict(net, optimizer)}
            before = contents(optimizer)
            if not shard:
                with pytest.raises(CheckpointException, match="Missing key"):
                    load(state, checkpoint_id=source)
                assert_equal(contents(optimizer), before)
                continue
            if number > 0:
                load(state, checkpoint_id=source)
                set_optimizer_state_dict(net, optimizer, state["optimizer"])
            save(state, checkpoint_id=saved)
            momentum = {"momentum": full(optimizer.momentum(net.weight))}
            if number == 0 and Worker.rank == 0:
                torch.save(momentum, Worker.folder / f"{Worker.check}.pt")
            elif number > 0:
                assert_equal(momentum, torch.load(Worker.folder / f"{Worker.check}.pt"))


@check
def narrow_rows_of_version_2_enter_a_sharded_optimizer() -> None:
    from lion8bit import dequantize, reference

    for _ in world(3):
        param = nn.Parameter(torch.randn(301, 16, generator=torch.Generator().manual_seed(0)))
        mesh_param = nn.Parameter(shard_rows(param.detach(), 3))
        optimizer = Lion8bit([mesh_param], lr=1e-3)
        codes, scales = reference.encode(param.detach(), 128)
        state = {"step": 4, "codes": placed_as(mesh_param, codes), "scales": placed_as(mesh_param, scales)}
        group = {**optimizer.state_dict()["param_groups"][0], "format_version": 2}
        optimizer.load_state_dict({"state": {0: state}, "param_groups": [group]})
        assert sorted(optimizer.state[mesh_param]) == ["momentum", "step"]
        assert_same(full(optimizer.momentum(mesh_param)), dequantize(codes.contiguous(), scales), "momentum")
        train(optimizer, [5])


def shard_rows(whole: torch.Tensor, size: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(whole, init_device_mesh("cpu", (size,)), [Shard(0)])


@check
def full_state_dict_round_trips() -> None:
    """Gathered on rank 0, sent from there into a new sharded optimizer, and read by an unsharded one."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    for rank in world(4):
        net = fsdp2(make_net(), 4)
        optimizer = make_optimizer(net)
        train(optimizer, range(3))
        whole = get_optimizer_state_dict(
            net, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        assert bool(whole) == (rank == 0)
        expected = contents(optimizer)

        other = fsdp2(make_net(), 4)
        with torch.no_grad():
            for param, trained in zip(other.parameters(), net.parameters(), strict=True):
                param.copy_(trained)
        resumed = make_optimizer(other)
        set_optimizer_state_dict(
            other,
            resumed,
            copy.deepcopy(whole),
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
        assert_equal(contents(resumed), expected)
        train(resumed, [3])
        train(optimizer, [3])
        assert_equal(contents(resumed), contents(optimizer))

        if rank == 0:
            alone = make_net()
            plain = make_optimizer(alone)
            set_optimizer_state_dict(alone, plain, whole, options=StateDictOptions(full_state_dict=True))
            for name, tensor in contents(plain).items():
                assert name.endswith("param") or torch.equal(tensor, expected[name])


@check
def state_initialised_for_a_checkpoint_changes_no_parameter() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for _ in world(4):
        net = make_net()
        net.norm.requires_grad_(False)
        with torch.no_grad():
            net.head.weight[:, ::3] = -0.0
        fsdp2(net, 4)
        for options in ({}, {"decoupled_weight_decay": False}, {"decouple_lr": True, "lr": torch.tensor(0.1)}):
            optimizer = make_optimizer(net, **{"weight_decay": 0.3, **options})
            before = contents(optimizer)
            state = get_optimizer_state_dict(net, optimizer)["state"]
            after = contents(optimizer)
            assert_equal({name: after[name] for name in before}, before)
            assert state.keys() == {name for name, param in net.named_parameters() if param.requires_grad}
            assert all("codes" in state[f"{name}.weight"] for name in ("embedding", "conv", "head"))


@check
def state_of_another_placement_is_refused() -> None:
    for _ in world(4):
        sharded, plain = make_optimizer(fsdp2(make_net(), 4)), make_optimizer(make_net())
        train(sharded, [0])
        train(plain, [0])
        for one, other in ((sharded, plain), (plain, sharded)):
            before = contents(one)
            with pytest.raises(ValueError, match="set_optimizer_state_dict"):
                one.load_state_dict(other.state_dict())
            assert_equal(contents(one), before)
        resumed = make_optimizer(fsdp2(make_net(), 4))
        resumed.load_state_dict(sharded.state_dict())
        train(sharded, [1])
        with torch.no_grad():
            for one, other in zip(params_of(resumed), params_of(sharded), strict=True):
                one.copy_(other)
        train(sharded, [2])
        train(resumed, [1, 2])
        state = [{k: v for k, v in contents(o).items() if not k.endswith("param")} for o in (sharded, resumed)]
        assert_equal(*state)


# ---- ZeRO, FSDP1 -----------------------------------------------------------------------------------------------------


@check
def zero_redundancy_optimizer() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for rank in world(4):
        net, alone = make_net(torch.float32), make_net(torch.float32)
        sharded = ZeroRedundancyOptimizer(groups_of(net), optimizer_class=Lion8bit, lr=1e-3, weight_decay=0.1)
        follower = make_optimizer(alone)
        train(sharded, range(3))
        train(follower, range(3))
        for param, other in zip(net.parameters(), alone.parameters(), strict=True):
            assert_same(param.detach(), other.detach(), "parameter")
        sharded.consolidate_state_dict(to=0)
        sent = [sharded.state_dict() if rank == 0 else None]
        dist.broadcast_object_list(sent, src=0)
        plain = make_optimizer(make_net(torch.float32))
        plain.load_state_dict(copy.deepcopy(sent[0]))
        state = [{k: v for k, v in contents(o).items() if not k.endswith("param")} for o in (plain, follower)]
        assert_equal(*state)
        resumed = ZeroRedundancyOptimizer(groups_of(net), optimizer_class=Lion8bit, lr=1.0)
        resumed.load_state_dict(sent[0])
        train(resumed, [3])
        train(follower, [3])
        for param, other in zip(net.parameters(), alone.parameters(), strict=True):
            assert_same(param.detach(), other.detach(), "parameter after loading")


@check
def fsdp1_needs_32_bits() -> None:
    """Its checkpoints cannot hold scales: 8 bits are refused, 32 train, save and load."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrap(use_orig_params: bool) -> nn.Module:
        net = make_net(torch.float32)
        return FullyShardedDataParallel(net, use_orig_params=use_orig_params, device_id=torch.device("cpu"))

    def step(net: nn.Module, optimizer: Lion8bit, seed: int) -> None:
        net(Net.tokens(seed)).square().mean().backward()  # the same on every rank, so the mean is exact
        optimizer.step()
        optimizer.zero_grad()

    for _ in world(2):
        for use_orig_params in (False, True):
            net, alone = wrap(use_orig_params), make_net(torch.float32)
            with pytest.raises(TypeError, match="fully_shard"):
                make_optimizer(net)
            optimizer, follower = make_optimizer(net, optim_bits=32), make_optimizer(alone, optim_bits=32)
            for seed in range(3):
                step(net, optimizer, seed)
                step(alone, follower, seed)
            saved = FullyShardedDataParallel.optim_state_dict(net, optimizer)
            if dist.get_rank() == 0:
                for name, param in alone.named_parameters():
                    assert_same(saved["state"][name]["momentum"], follower.state[param]["momentum"], name)
            resumed = make_optimizer(net, optim_bits=32)
            resumed.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(net, resumed, saved))
            assert_equal(contents(resumed), contents(optimizer))


# ---- The worker ------------------------------------------------------------------------------------------------------


def connect(port: Path) -> dist.TCPStore:
    """The store of rank 0, which writes the number of its port to a file."""
    if Worker.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port.with_suffix(".new").write_text(str(store.port))
        port.with_suffix(".new").rename(port)
        return store
    while not port.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(port.read_text()), is_master=False)


def main() -> None:
    Lion8bit.__init__.__kwdefaults__["seed"] = 0  # as the fixture `same_seed`, in this process
    Worker.folder, Worker.rank = Path(sys.argv[1]), int(sys.argv[2])
    Worker.store = connect(Worker.folder / "port")
    only = sys.argv[3:]
    outcome: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        if only and name not in only:
            continue
        Worker.check, Worker.worlds = name, 0
        try:
            function()
            outcome[name] = None
        except BaseException:
            outcome[name] = traceback.format_exc()
        (Worker.folder / f"{Worker.rank}.json").write_text(json.dumps(outcome))
        Worker.store.add(f"{name}/done", 1)
        while Worker.store.add(f"{name}/done", 0) < WORKERS:  # or a worker whose check failed would run ahead
            time.sleep(0.01)
    Worker.store.add("left", 1)
    while Worker.rank == 0 and Worker.store.add("left", 0) < WORKERS:  # the store goes with rank 0
        time.sleep(0.01)
    os._exit(0)  # without destructors, see `world`


if __name__ == "__main__":
    main()
