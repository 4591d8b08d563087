"""State in host memory: the bits of the ordinary step, in whatever order the device's queues get their work done."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import assert_same, override_backend
from emulated import needs_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ON_GPU, Place, assert_same_contents, contents, scaler_for, set_grads
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lion8bit import Lion8bit, convert_state_dict, export_state_dict, fuse_into_backward, paging
from lion8bit import state as state_module
from lion8bit.backends import cpu
from lion8bit.layout import BLOCK_SIZES, blocks_per_row
from lion8bit.paging import Load, Pager

SLOT = 4096  # bytes of a slot in these tests: many loads, and parameters that take several

# Rows shorter than a block, whole blocks, rows that end in short blocks or are longer than a slot, a vector, and one
# whose state stays.
SHAPES = [(90, 96), (33, 129), (2, 9000), (3, 6401), (5000,), (64, 128), (1300,), (4, 300), (30,)]


@pytest.fixture(autouse=True)
def small_slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every device counts as one with a separate memory; small tensors need one thread."""
    monkeypatch.setattr(state_module, "PAGED_DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr(state_module, "MIN_PAGED_SIZE", 1000)
    monkeypatch.setattr(paging, "SLOT_BYTES", SLOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


HOW = ("together", "alone", "one twice")
Twins = tuple[list[torch.Tensor], Lion8bit]


def twin(device: str = "cpu", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Twins:
    """Parameters in four groups, of momentum in 8, 4 and 32 bits, and their optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in SHAPES]
    image = torch.randn(40, 8, 3, 3, generator=generator).to(device, dtype)
    params.append(image.to(memory_format=torch.channels_last).requires_grad_())
    groups = [{"params": params[:2]}, {"params": params[2:4], "optim_bits": 4}]
    groups += [{"params": params[4:6], "optim_bits": 32}, {"params": params[6:], "lr": 3e-3}]
    return params, Lion8bit(groups, **{"lr": 1e-3, "weight_decay": 0.1, "min_8bit_size": 1000, **options})


def train(twins: Twins, steps: int, seed: int = 0, how: str = "together") -> None:
    """Steps all parameters together, or each ``alone`` and backwards, as a backward pass would, or ``one twice``."""
    params, optimizer = twins
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    for step in range(seed, seed + steps):
        set_grads(params, step)
        if how == "alone":
            for param in reversed(params):
                optimizer.step_param(param, groups[param])
                param.grad = None
        elif how == "one twice" and step % 2 == 0:  # unexpectedly, so that nothing has been fetched ahead
            optimizer.step_param(params[0], groups[params[0]])
        if how != "alone" and params[-1].dim() == 4:
            params[-1].grad = params[-1].grad.contiguous(memory_format=torch.channels_last)
        optimizer.step()


def loads_of(optimizer: Lion8bit) -> list[Load]:
    """Those of the last step of all parameters."""
    assert optimizer._stepper.plan is not None
    return [load for batch in optimizer._stepper.plan.tables for load in batch.loads or ()]


# ---- Bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", [1024, SLOT, 1 << 16])
@pytest.mark.parametrize("how", HOW)
def test_bits_are_those_of_the_ordinary_step(
    place: Place,
    slot: int,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paging, "SLOT_BYTES", slot)
    twins = [twin(place.device, is_paged=paged) for paged in (False, True)]
    for each in twins:
        train(each, 3, how=how)
    assert_same_contents(*(contents(optimizer) for _, optimizer in twins))
    paged = twins[1][1].memory_report()
    assert paged["buffer_bytes"] == 3 * slot and paged["paged_bytes"] > 60000
    if how != "alone":
        assert len(loads_of(twins[1][1])) > paged["paged_bytes"] // slot


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float32, "nearest"),
        (torch.bfloat16, "nearest"),
        (torch.bfloat16, "compensated"),
        (torch.float16, "stochastic"),
    ],
    ids=str,
)
def test_every_dtype_rounding_and_block_size(dtype: torch.dtype, rounding: str, block_size: int, bits: int) -> None:
    options = {"dtype": dtype, "weight_rounding": rounding, "block_size": block_size, "optim_bits": bits}
    options["cautious"] = block_size == 64
    twins = [twin(is_paged=paged, **options) for paged in (False, True)]
    for each in twins:
        train(each, 4)
    assert_same_contents(*(contents(optimizer) for _, optimizer in twins))
    for (a, b), optimizers in zip(zip(*(params for params, _ in twins)), itertools.repeat([o for _, o in twins])):
        assert_same(optimizers[0].momentum(a), optimizers[1].momentum(b), "momentum")


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_pieces_cover_every_block_once_and_fit(data: st.DataObject) -> None:
    size = st.integers(1, 700)
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 9), size), min_size=1, max_size=6))
    block_sizes = [data.draw(st.sampled_from(BLOCK_SIZES)) for _ in shapes]
    block_bytes = [block * data.draw(st.sampled_from([0.5, 1, 1.5, 2, 4])) + 4 for block in block_sizes]
    loads = paging.cut(shapes, block_sizes, block_bytes)
    assert all(sum(48 + p.blocks * block_bytes[p.entry] for p in load) <= SLOT for load in loads)
    for index, ((rows, cols), block_size) in enumerate(zip(shapes, block_sizes, strict=True)):
        pieces = [piece for load in loads for piece in load if piece.entry == index]
        assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        element = block = 0
        for piece in pieces:
            assert (piece.start, piece.first_block) == (element, block)
            assert piece.blocks == piece.rows * blocks_per_row(piece.cols, block_size)
            if cols % block_size:  # a piece starts in a row and ends it, or is cut between two blocks
                assert piece.start % cols + piece.cols == cols or piece.cols % block_size == 0
                assert piece.rows == 1 or piece.cols == cols
            element, block = element + piece.rows * piece.cols, block + piece.blocks
        assert (element, block) == (rows * cols, rows * blocks_per_row(cols, block_size))


def test_scaled_gradients_and_an_overflow(place: Place) -> None:
    """GradScaler's protocol with updates that the device counts: once for a parameter, not for each of its pieces."""
    results = []
    for paged in (False, True):
        params, optimizer = twin(place.device, torch.float32, fused=True, is_paged=paged, block_size=128)
        for param in params[4:6]:
            param.requires_grad_(False)
        scaler = scaler_for(place, 1024.0)
        for step in range(5):
            set_grads(params, step, scaler.get_scale(), inf=step == 2)
            scaler.step(optimizer)
            scaler.update()
        assert {state["step"] for state in optimizer.state_dict()["state"].values()} == {4}
        results.append(contents(optimizer))
    assert_same_contents(*results)


# ---- Order of waits --------------------------------------------------------------------------------------------------

NAMES = ("inward", "updates", "outward")


class Event:
    """What was recorded last, and what of it has happened."""

    def __init__(self) -> None:
        self.recorded = self.happened = 0
        self.queue: Queue | None = None


class Queue:
    """Does its work as soon as it may, or as late: when somebody waits for it."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.tasks: deque[tuple[str, Any, int]] = deque()
        self.waits = 0  # since the last work

    def run(self, work: Callable[[], None]) -> None:
        self.waits = 0
        self._put("work", work, 0)

    def record(self, event: Event) -> None:
        event.recorded += 1
        event.queue = self
        self._put("record", event, event.recorded)

    def wait(self, event: Event) -> None:
        self.waits += 1
        kind = "inward first" if self.name == "inward" and self.waits > 1 else self.name
        if kind != self.world.fault:
            self._put("wait", event, event.recorded)

    def finish(self) -> None:
        if self.world.fault != "settle":
            self.drain()

    def drain(self, event: Event | None = None, generation: int = 0) -> None:
        """Works until there is nothing left, or until the event has happened; makes others work where it must wait."""
        while self.tasks and (event is None or event.happened < generation):
            kind, thing, number = self.tasks[0]
            if kind == "wait" and thing.happened < number:
                thing.queue.drain(thing, number)
            self.advance()

    def advance(self) -> bool:
        """Does the next task, unless it has to wait."""
        if not self.tasks:
            return False
        kind, thing, number = self.tasks[0]
        if kind == "wait" and thing.happened < number:
            return False
        self.tasks.popleft()
        if kind == "work":
            with torch.no_grad():
                thing()
        elif kind == "record":
            thing.happened = max(thing.happened, number)
        return True

    def _put(self, kind: str, thing: Any, number: int) -> None:
        self.tasks.append((kind, thing, number))
        while any(self.world.queues[name].advance() for name in self.world.eager):
            pass


class World:
    """A device's three queues. The eager ones are always ahead, the first most; the others lag until waited for.

    Args:
        eager: names of queues.
        fault: whose waits are left out: a queue's, "inward first" for those before a batch's first load, or "settle".
    """

    def __init__(self, eager: tuple[str, ...], fault: str) -> None:
        self.eager, self.fault = eager, fault
        self.queues = {name: Queue(self, name) for name in NAMES}

    def make(self, device: torch.device, buffer: torch.Tensor) -> tuple[Queue, Queue, Queue, type[Event]]:
        buffer.random_()  # what is not loaded must not be taken for state
        return (*(self.queues[name] for name in NAMES), Event)  # type: ignore[return-value]


POLICIES = [eager for count in range(4) for eager in itertools.permutations(NAMES, count)]


def train_in(
    eager: tuple[str, ...], fault: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of tensors that are equal where all waits are right: parameters, and momentum read after each step."""
    world = World(eager, fault)
    run = Pager.run

    def run_and_read(self: Pager, *arguments: Any, **options: Any) -> None:
        run(self, *arguments, **options)
        world.queues["updates"].drain()  # as the next operation on parameters and gradients would

    with monkeypatch.context() as patch:
        patch.setattr(paging, "queues", world.make)
        patch.setattr(Pager, "run", run_and_read)
        twins = [twin(is_paged=paged) for paged in (False, True)]
        for step in range(3):
            for each in twins:
                train(each, 1, step, how)
            if step == 1:
                yield from ((a, b) for a, b in zip(*(map(optimizer.momentum, params) for params, optimizer in twins)))
        assert fault or not any(queue.tasks for queue in world.queues.values()) or eager != NAMES
        yield from zip(*(contents(optimizer) for _, optimizer in twins))


@pytest.mark.parametrize("eager", POLICIES, ids=str)
@pytest.mark.parametrize("how", HOW)
def test_bits_do_not_depend_on_who_is_first(eager: tuple[str, ...], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, (one, other) in enumerate(train_in(eager, "", how, monkeypatch)):
        assert_same(torch.as_tensor(one), torch.as_tensor(other), f"value {index}")


@pytest.mark.parametrize("fault", [*NAMES, "inward first", "settle"])
def test_a_missing_wait_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above fails without any one of the waits."""

    def differ(eager: tuple[str, ...], how: str, slot: int) -> bool:
        monkeypatch.setattr(paging, "SLOT_BYTES", slot)  # which decides what shares a slot, and so needs no wait
        pairs = train_in(eager, fault, how, monkeypatch)
        return any(not torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)

    assert any(differ(eager, how, slot) for slot in (SLOT, 2 * SLOT, 1 << 16) for eager in POLICIES for how in HOW)


@pytest.mark.parametrize("read", ["momentum", "state_dict", "frozen_fraction", "fp32_weights", "pickle", "deepcopy"])
def test_readers_wait_for_the_copies(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World((), "")
    monkeypatch.setattr(paging, "queues", world.make)
    torch.manual_seed(0)
    model = nn.Linear(90, 70).bfloat16()
    optimizer = Lion8bit(model.parameters(), weight_rounding="compensated", is_paged=True)
    set_grads(list(model.parameters()), 0)
    optimizer.step()
    assert world.queues["outward"].tasks
    readers: dict[str, Callable[[], object]] = {
        "momentum": lambda: optimizer.momentum(model.weight),
        "state_dict": optimizer.state_dict,
        "frozen_fraction": optimizer.frozen_fraction,
        "fp32_weights": lambda: optimizer.fp32_weights(model),
        "pickle": lambda: pickle.dumps(optimizer),
        "deepcopy": lambda: copy.deepcopy(optimizer),
    }
    readers[read]()
    assert not world.queues["outward"].tasks


# ---- Prefetching -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, use_backend: Callable[..., None]) -> list[Load]:
    """Loads in the order in which they were fetched and updated; an updated one appears as None."""
    log: list[Any] = []
    fetch = Load.fetch

    def logged_fetch(self: Load) -> None:
        log.append(self)
        fetch(self)

    def logged_update(batch: Any, *arguments: Any) -> None:
        if isinstance(batch, Load):
            log.append(None)
        cpu.update_(batch, *arguments)

    monkeypatch.setattr(Load, "fetch", logged_fetch)
    use_backend(logged_update)
    return log


def test_loads_are_fetched_before_the_update_that_precedes_them(fetched: list[Load]) -> None:
    twins = twin(is_paged=True)
    train(twins, 2)
    count = len(loads_of(twins[1]))
    second = fetched[len(fetched) // 2 :]
    assert [load is None for load in second] == [False, False, *[False, True] * (count - 2), True, True]
    assert [load for load in second if load] == loads_of(twins[1])


def test_the_next_parameters_of_a_backward_pass_are_fetched_ahead(fetched: list[Load]) -> None:
    twins = twin(is_paged=True)
    train(twins, 2, how="alone")
    del fetched[:]
    train(twins, 1, seed=2, how="alone")
    loads = [load for load in fetched if load]
    assert len(set(loads)) == len(loads) == fetched.count(None)  # none was fetched for nothing
    updates, known = 0, False
    for batch in dict.fromkeys(load._owner for load in loads):
        assert batch.loads is not None
        begun = fetched[: fetched.index(batch.loads[0])].count(None)
        assert begun < updates or not known, "it is fetched before the last update of the parameter before it"
        updates, known = updates + len(batch.loads), not batch.copied


def test_another_order_than_expected(fetched: list[Load]) -> None:
    twins = [twin(is_paged=paged) for paged in (False, True)]
    generator = torch.Generator().manual_seed(3)
    for step in range(6):
        order = torch.randperm(len(SHAPES) + 1, generator=generator).tolist()
        for params, optimizer in twins:
            set_grads(params, step)
            groups = {param: group for group in optimizer.param_groups for param in group["params"]}
            for index in order[: 4 + step]:
                optimizer.step_param(params[index], groups[params[index]])
                params[index].grad = None
            if step % 2:
                optimizer.step()  # with the rest of the gradients
    assert_same_contents(*(contents(optimizer) for _, optimizer in twins))
    assert len([load for load in fetched if load]) > fetched.count(None)  # some were fetched for nothing


def test_state_that_changes_after_it_was_fetched() -> None:
    params, optimizer = twins = twin(is_paged=True)
    train(twins, 2, how="alone")
    set_grads(params, 2)
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    optimizer.step_param(params[1], groups[params[1]])
    (pager,) = optimizer._stepper.pagers.values()
    ahead = pager._ahead[0][0]._owner.entries[0].source
    assert ahead is params[0]
    with torch.no_grad():
        optimizer.state[ahead]["codes"].zero_()
    before = ahead.detach().clone()
    ahead.grad = torch.zeros_like(ahead)
    optimizer.step_param(ahead, {**groups[ahead], "weight_decay": 0.0})
    assert_same(optimizer.momentum(ahead), torch.zeros_like(before, dtype=torch.float32), "momentum")


def test_a_failed_update_leaves_nothing_ahead() -> None:
    params, optimizer = twins = twin(is_paged=True)
    train(twins, 1)
    saved = copy.deepcopy((params, optimizer.state_dict()))

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no kernel")

    set_grads(params, 1)
    with override_backend(fail), pytest.raises(RuntimeError, match="no kernel"):
        optimizer.step()
    optimizer.load_state_dict(saved[1])
    other = twin()
    train(other, 1)
    for each in (twins, other):
        with torch.no_grad():
            for param, value in zip(each[0], saved[0]):
                param.copy_(value)
        train(each, 2, seed=2)
    assert_same_contents(contents(optimizer), contents(other[1]))


def test_gradient_release() -> None:
    results = []
    for paged in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(90, 64), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 90)).bfloat16()
        optimizer = Lion8bit(model.parameters(), lr=1e-3, is_paged=paged)
        fuse_into_backward(model, optimizer)
        for step in range(4):
            tokens = torch.randint(90, (4, 16), generator=torch.Generator().manual_seed(step))
            nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
        results.append(contents(optimizer))
    assert_same_contents(*results)


def test_a_warmed_step_only_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "in_thread", lambda work, device: work())  # modes belong to a thread

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(str(func))
            return func(*args, **(kwargs or {}))

    called: set[str] = set()
    twins = twin(is_paged=True)
    train(twins, 2)
    set_grads(twins[0][:-1], 3)
    with Recorder():
        twins[1].step()
    assert {name for name in called if not name.startswith("profiler")} == {"aten.copy_.default"}


# ---- State in and out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["auto", "compensated"])
@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (True, True)])
def test_checkpoints_of_either_kind_load(place: Place, before: bool, after: bool, rounding: str) -> None:
    params, optimizer = saved = twin(place.device, is_paged=before, weight_rounding=rounding)
    train(saved, 2)
    state_dict = pickle.loads(pickle.dumps(optimizer.state_dict()))
    resumed = twin(place.device, is_paged=after, weight_rounding=rounding)
    with torch.no_grad():
        for param, value in zip(resumed[0], params):
            param.copy_(value)
    resumed[1].load_state_dict(state_dict)
    assert [group["is_paged"] for group in resumed[1].param_groups] == [after] * 4
    for each in (saved, resumed):
        train(each, 2, seed=2)
    assert_same_contents(contents(optimizer), contents(resumed[1]))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_go_on(copied: Callable[[Any], Any]) -> None:
    twins = twin(is_paged=True)
    train(twins, 2)
    others = copied(twins)
    for each in (twins, others):
        train(each, 2, seed=2)
    assert_same_contents(contents(twins[1]), contents(others[1]))


def test_paging_may_be_switched(place: Place) -> None:
    twins = [twin(place.device), twin(place.device, is_paged=True)]
    for step in range(4):
        for each in twins:
            train(each, 1, seed=step, how="alone" if step == 2 else "together")
        for group in twins[1][1].param_groups[:2]:
            group["is_paged"] = not group["is_paged"]
    assert_same_contents(*(contents(optimizer) for _, optimizer in twins))


def test_conversion_and_export() -> None:
    twins = [twin(is_paged=paged) for paged in (False, True)]
    results = []
    for each in twins:
        train(each, 2)
        other = twin(is_paged=True, block_size=64)[1]
        other.load_state_dict(convert_state_dict(each[1].state_dict(), other))
        results.append([*contents(other)[len(SHAPES) + 1 :]])
        peer = Lion8bit(each[0])
        results[-1] += [state["exp_avg"] for state in export_state_dict(each[1])["state"].values()]
        assert peer.state_dict()["state"] == {}
    assert_same_contents(*results)


def test_full_precision_weights() -> None:
    results = []
    for paged in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(90, 70).bfloat16()
        optimizer = Lion8bit(model.parameters(), weight_rounding="compensated", is_paged=paged)
        for step in range(2):
            set_grads(list(model.parameters()), step)
            optimizer.step()
        weights = optimizer.fp32_weights(model)
        optimizer.load_fp32_weights(model, {name: value * 1.01 for name, value in weights.items()})
        set_grads(list(model.parameters()), 2)
        optimizer.step()
        results.append([*weights.values(), *contents(optimizer), optimizer.frozen_fraction()])
    assert_same_contents(*results)


def test_parameters_on_the_host_are_stepped_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "PAGED_DEVICES", {"cuda"})
    twins = twin(is_paged=True)
    train(twins, 2)
    report = twins[1].memory_report()
    assert (report["paged_bytes"], report["buffer_bytes"]) == (0, 0)


def test_tracing_is_refused() -> None:
    params, optimizer = twin(is_paged=True)
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match="is_paged must be False where torch"):
        optimizer._before_tracing()


@pytest.fixture
def mesh() -> Iterator[Any]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_parameters_are_refused(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    param = nn.Parameter(distribute_tensor(torch.randn(70, 90), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"is_paged must be False for DTensor .*CPUOffloadPolicy.*\(parameter 0 of"):
        Lion8bit([param], is_paged=True)


# ---- On a GPU --------------------------------------------------------------------------------------------------------


def large(device: str, **options: Any) -> Twins:
    """Parameters of several slots of the usual size, and small ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4096, 5000), (300, 257), (70_000,), (100,), (8192, 3000)]
    params = [torch.randn(shape, generator=generator).bfloat16().to(device).requires_grad_() for shape in shapes]
    return params, Lion8bit(params, lr=1e-3, weight_decay=0.1, **options)


@pytest.fixture
def usual_slots(monkeypatch: pytest.MonkeyPatch, small_slots: None) -> None:
    """As users have them."""
    monkeypatch.setattr(state_module, "PAGED_DEVICES", {"cuda"})
    monkeypatch.setattr(state_module, "MIN_PAGED_SIZE", 1 << 16)
    monkeypatch.setattr(paging, "SLOT_BYTES", 16 << 20)


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("how", ["together", "alone"])
def test_slots_of_full_size(usual_slots: None, how: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "PAGED_DEVICES", {device})
    twins = [large(device, is_paged=paged, weight_rounding="compensated") for paged in (False, True)]
    for each in twins:
        train(each, 2, how=how)
    assert_same_contents(*(contents(optimizer) for _, optimizer in twins))
    for param, state in twins[1][1].state.items():
        for value in state.values():
            if isinstance(value, torch.Tensor) and param.numel() >= 1 << 16:
                assert value.device.type == "cpu" and value.is_pinned() == (device == "cuda")


@needs_gpu
def test_gpu_pages_without_allocating_or_waiting(usual_slots: None) -> None:
    params, optimizer = twins = large("cuda", is_paged=True)
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]  # of what is allocated, some is rounding
    train(twins, 2)
    set_grads(params, 3)
    torch.cuda.synchronize()
    resident = sum(state["momentum"].nbytes for state in optimizer.state.values() if "momentum" in state)
    gradients = sum(param.nbytes for param in params)
    taken = torch.cuda.memory_stats()["requested_bytes.all.current"] - before
    assert taken - gradients <= paging.BUFFER_BYTES + resident + 4096
    count = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == count


@needs_gpu
def test_gpu_pages_on_the_current_stream_behind_slow_work(usual_slots: None) -> None:
    """Gradients that are written late: a copy from the host would wait for the slow work before the step is called."""
    twins = [large("cuda", is_paged=paged) for paged in (False, True)]
    train(twins[0], 4)
    params, optimizer = twins[1]
    for step in range(4):
        set_grads(params, step)
        late = [param.grad for param in params]
        for param in params:
            param.grad = torch.zeros_like(param)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)
            for param, grad in zip(params, late, strict=True):
                param.grad.copy_(grad)
            optimizer.step()
        torch.cuda.synchronize()
    assert_same_contents(*(contents(optimizer) for _, optimizer in twins))


@needs_gpu
def test_gpu_refuses_paging_during_capture(usual_slots: None) -> None:
    params, optimizer = twins = large("cuda", is_paged=True, capturable=True)
    train(twins, 1)
    set_grads(params, 1)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="is_paged must be False while"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
