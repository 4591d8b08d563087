"""GradScaler, plain and fused, and capturable steps: what device memory decides has the bits of what the host does.

Each test runs on the CPU, in plain torch, through the CUDA kernel on the emulator, and on a GPU where there is one.
"""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same
from emulated import Emulated, needs_gpu
from places import ON_EMULATOR, ON_GPU, Place, assert_same_contents, contents, scaler_for, set_grads
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lion8bit import Lion8bit
from lion8bit.backends import cpu
from lion8bit.device_scalars import UpdateCounts
from lion8bit.stepper import Stepper

on_device = pytest.mark.parametrize("place", [ON_EMULATOR, ON_GPU], indirect=True)


def parameters(place: Place, *dtypes: torch.dtype) -> list[torch.Tensor]:
    """Quantized and small ones of each dtype, and one without elements."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(70, 90), (30,), (0, 5)]
    return [
        torch.randn(shape, generator=generator).to(place.device, dtype).requires_grad_()
        for dtype in dtypes
        for shape in shapes
    ]


# ---- GradScaler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtypes", "scale"),
    [((torch.float32, torch.bfloat16), 2.0**16), ((torch.float32,), 1000.0), ((torch.float32,), 3.7e-3)],
    ids=["power of two", "1000", "0.0037"],
)
def test_fused_unscaling_equals_gradscalers(place: Place, dtypes: tuple[torch.dtype, ...], scale: float) -> None:
    """Any scale with fp32 gradients, powers of two with others; an overflow in between halves the scale of both."""
    if place.name == "cuda":  # where torch's GradScaler takes no bf16 gradients
        dtypes = (torch.float32,)
    results = []
    for fused in (False, True):
        params = parameters(place, *dtypes)
        optimizer = Lion8bit(params, lr=1e-3, weight_decay=0.1, fused=fused, maximize=True)
        scaler = scaler_for(place, scale)
        for step in range(6):
            set_grads(params, step, scaler.get_scale(), inf=step == 2)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == torch.tensor(scale).item()  # halved once, doubled once
        assert optimizer.nonfinite_count() == 0
        results.append(contents(optimizer))
        assert optimizer.state[params[0]]["step"] == 5
        assert optimizer.state_dict()["state"][2]["step"] == 5  # no elements
    assert_same_contents(*results)


FOUR_BITS = {"optim_bits": 4, "block_size": 128}  # the emulator has no smaller block that reads device memory


@pytest.mark.parametrize(
    "options",
    [{}, {"optim_bits": 32}, {"weight_rounding": "compensated"}, {"weight_rounding": "compensated", **FOUR_BITS}],
    ids=str,
)
def test_an_overflow_changes_nothing(place: Place, options: dict[str, Any]) -> None:
    """Not the parameters, the state, the update counts, nor what comes after."""
    params, copies = parameters(place, torch.bfloat16), parameters(place, torch.bfloat16)
    optimizer = Lion8bit(params, lr=1e-3, weight_decay=0.1, fused=True, **options)
    undisturbed = Lion8bit(copies, lr=1e-3, weight_decay=0.1, **options)
    scaler = scaler_for(place, 2.0**10)
    for step in range(4):
        for overflow in (True, False) if step != 1 else (False,):
            before = contents(optimizer)
            set_grads(params, step, scaler.get_scale(), inf=overflow)
            if place.name == "cuda":  # where GradScaler takes no bf16 gradients: what it would hand over
                optimizer.grad_scale = torch.full((), scaler.get_scale(), device=place.device)
                optimizer.found_inf = torch.full((), float(overflow), device=place.device)
                optimizer.step()
            else:
                scaler.step(optimizer)
            if overflow and step:
                assert_same_contents(contents(optimizer), before)
            if place.name != "cuda":
                scaler.update()
        set_grads(copies, step)
        undisturbed.step()
        assert_same_contents(contents(optimizer), contents(undisturbed))
    assert optimizer.nonfinite_count() == 0


def test_bad_elements_are_still_skipped_where_there_is_no_overflow_check(place: Place) -> None:
    """found_inf of 0 with an infinite gradient, as where one sets `grad_scale` by hand: it is skipped and counted."""
    params = parameters(place, torch.float32)
    optimizer = Lion8bit(params, lr=1e-3, fused=True)
    before = params[0].detach().clone()
    set_grads(params, 0, 8.0, inf=True)
    optimizer.grad_scale = torch.full((), 8.0, device=place.device)
    optimizer.found_inf = torch.zeros((), device=place.device)
    optimizer.step()
    assert optimizer.nonfinite_count() == 2
    changed = (params[0].detach() != before).view(-1)
    assert not bool(changed[3]) and int(changed.sum()) == before.numel() - 1
    assert torch.allclose(optimizer.momentum(params[1]).cpu()[:3], params[1].grad.cpu()[:3] / 8 * 0.01, rtol=1e-6)


@pytest.mark.parametrize("grad_scale", [0.0, 1e-45, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["step", "step_param", "compiled"])
def test_a_useless_scale_skips_elements_and_no_padding(place: Place, name: str, grad_scale: float) -> None:
    """A scale that has been backed off too often: its reciprocal is infinite."""
    params = parameters(place, torch.float32, torch.float16)
    optimizer = Lion8bit(params, fused=True)
    optimizer.grad_scale, optimizer.found_inf = (torch.tensor(value, device=place.device) for value in (grad_scale, 0))
    set_grads(params, 0)
    if name == "step_param":
        for param in params:
            optimizer.step_param(param, optimizer.param_groups[0])
    else:
        step = torch.compile(optimizer.step, backend="eager") if name == "compiled" else optimizer.step
        step()
    finite = grad_scale == float("inf")  # its reciprocal is 0
    assert optimizer.nonfinite_count() == (0 if finite else sum(param.numel() for param in params))


def test_explicit_unscaling_and_clipping(place: Place) -> None:
    results = []
    for fused in (False, True):
        params = parameters(place, torch.float32)
        optimizer, scaler = Lion8bit(params, lr=1e-3, fused=fused), scaler_for(place, 256.0)
        for step in range(4):
            set_grads(params, step, scaler.get_scale(), inf=step == 2)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
        results.append(contents(optimizer))
    assert_same_contents(*results)


def test_a_disabled_scaler_and_none_at_all(place: Place) -> None:
    results = []
    for scaler in (torch.amp.GradScaler(place.device, enabled=False), None):
        params = parameters(place, torch.bfloat16)
        optimizer = Lion8bit(params, lr=1e-3, fused=scaler is None)
        for step in range(2):
            set_grads(params, step)
            optimizer.step() if scaler is None else scaler.step(optimizer)
        results.append(contents(optimizer))
    assert_same_contents(*results)


def test_gradients_are_let_go_of_after_an_overflow(place: Place) -> None:
    params = parameters(place, torch.float32)
    optimizer, scaler = Lion8bit(params, fused=True), scaler_for(place, 4.0)
    set_grads(params, 0, inf=True)
    grads = [weakref.ref(param.grad) for param in params]
    scaler.step(optimizer)
    optimizer.zero_grad()
    scaler.update()
    assert [grad() for grad in grads] == [None] * len(grads)
    scaler.scale(torch.zeros((), device=place.device))
    scaler.step(optimizer)  # without any gradient


@pytest.mark.parametrize("name", ["step_param", "step"])
def test_every_way_to_step_unscales(place: Place, name: str) -> None:
    params = parameters(place, torch.float32)
    optimizer = Lion8bit(params, lr=1e-3, fused=True)
    set_grads(params, 0, 8.0)
    optimizer.grad_scale = torch.full((), 8.0, device=place.device)
    optimizer.found_inf = torch.zeros((), device=place.device)
    if name == "step":
        optimizer.step()
    for param in params if name == "step_param" else []:
        optimizer.step_param(param, optimizer.param_groups[0])
    twins = parameters(place, torch.float32)
    twin = Lion8bit(twins, lr=1e-3)
    set_grads(twins, 0)
    twin.step()
    assert_same_contents(contents(optimizer), contents(twin))


def test_fused_in_one_group_is_fused_in_all(place: Place) -> None:
    """GradScaler either unscales an optimizer's gradients or leaves that to it."""
    assert not Lion8bit(parameters(place, torch.float32))._step_supports_amp_scaling
    first, second = parameters(place, torch.float32)[:2]
    optimizer = Lion8bit([{"params": [first], "fused": True}, {"params": [second]}], lr=1e-3)
    assert optimizer._step_supports_amp_scaling
    scaler = scaler_for(place, 4.0)
    set_grads([first, second], 0, 4.0)
    scaler.step(optimizer)
    expected = second.grad.cpu() / 4 * torch.tensor(1 - 0.99)
    assert torch.equal(optimizer.momentum(second).cpu(), expected)


# ---- Capturable -----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "decoupled": {"weight_decay": 0.1},
    "coupled": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "decouple_lr": {"weight_decay": 1e-3, "decouple_lr": True},
    "4 bits": {"weight_decay": 0.1, **FOUR_BITS},
}


def schedule(step: int) -> float:
    return 1e-3 / (1 + step)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_tensor_lr_gives_the_bits_of_a_number(place: Place, name: str) -> None:
    results = []
    for capturable in (False, True):
        params = parameters(place, torch.float32, torch.bfloat16)
        lr = torch.tensor(schedule(0), device=place.device)
        optimizer = Lion8bit(params, lr=lr if capturable else float(lr), capturable=capturable, **OPTIONS[name])
        for step in range(4):
            lr.fill_(schedule(step))
            if not capturable:
                optimizer.param_groups[0]["lr"] = float(lr)
            set_grads(params, step)
            optimizer.step()
        results.append(contents(optimizer))
    assert_same_contents(*results)


def test_the_decay_is_the_hosts_for_any_numbers(place: Place) -> None:
    """A parameter of ones without gradient becomes its group's decay, formed from lr on the device."""
    generator = torch.Generator().manual_seed(0)
    results = []
    draws = torch.rand(60, 3, generator=generator, dtype=torch.float64)
    for capturable in (False, True):
        groups, lrs = [], []
        for i, (rate, decay, peak) in enumerate(draws.tolist()):
            lrs.append(torch.tensor(rate, device=place.device))
            extra: dict[str, Any] = {"weight_decay": decay}
            if i % 2:
                extra = {"weight_decay": decay * peak, "decouple_lr": True, "peak_lr": peak if i % 3 else 0.0}
            lr = lrs[-1] if capturable else float(lrs[-1])
            groups.append({"params": [torch.ones(3, device=place.device)], "lr": lr, **extra})
        optimizer = Lion8bit(groups, capturable=capturable)
        for group in groups:
            group["params"][0].grad = torch.zeros(3, device=place.device)
        optimizer.step()
        results.append(contents(optimizer))
    assert_same_contents(*results)


@on_device
@pytest.mark.parametrize("lr, decay, expected", [(-3e-21, 0.0, 1.0), (-0.5, 0.1, 1.0), (0.75, 2.0, -0.75)])
def test_the_device_refuses_no_rate(place: Place, lr: float, decay: float, expected: float) -> None:
    """It cannot raise: a rate below 0 counts as 0, and so does a factor on the parameter."""
    param = torch.ones(100, device=place.device, requires_grad=True)
    rate = torch.tensor(0.0, device=place.device)
    optimizer = Lion8bit([param], lr=rate, weight_decay=decay, capturable=True)
    rate.fill_(lr)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert_same(param.detach(), torch.full_like(param, expected), "parameter")


@pytest.mark.parametrize("options", [{}, FOUR_BITS], ids=str)
def test_counts_survive_everything(place: Place, options: dict[str, Any]) -> None:
    """Gradients that come and go, checkpoints, copies, counts set by hand, flags switched: as where the host counts."""
    results = []
    for flags in ({}, {"capturable": True}, {"fused": True}):
        params = parameters(place, torch.bfloat16)
        extra = torch.randn(80, 80, generator=torch.Generator().manual_seed(9)).bfloat16().to(place.device)
        lr = torch.tensor(1e-3, device=place.device) if "capturable" in flags else float(torch.tensor(1e-3))
        optimizer = Lion8bit(params, lr=lr, **flags, **options)
        values = []
        for step in range(12):
            set_grads(params, step)
            if step % 3 == 1:
                params[0].grad = None
            if step == 3:
                saved = copy.deepcopy(optimizer.state_dict())
                assert all(type(state["step"]) is int for state in saved["state"].values())
            if step == 5:
                optimizer.load_state_dict(saved)
            if step == 6:
                params, optimizer = pickle.loads(pickle.dumps((params, optimizer)))
                set_grads(params, step)
            if step == 7:
                optimizer.state_dict()  # a count set by hand holds from there on
                optimizer.state[params[0]]["step"] = 100
            if step in (8, 9):
                for name in flags:
                    optimizer.param_groups[0][name] = step == 9
            if step == 10:
                params.append(extra.requires_grad_())
                optimizer.add_param_group({"params": [extra]})
                set_grads(params, step)
            optimizer.step()
            values += contents(optimizer) if step in (2, 6, 11) else []
        results.append(values)
    assert_same_contents(results[0], results[1])
    assert_same_contents(results[0], results[2])


def test_the_host_reads_what_it_needs_itself(monkeypatch: pytest.MonkeyPatch, use_backend: Callable[..., None]) -> None:
    """Parameters on the CPU beside others on a GPU, where lr and the scale are: here the GPU's part is left out."""
    results = []
    for elsewhere in (False, True):
        place = Place("cpu")
        params = parameters(place, torch.float32)
        use_backend(cpu.update_, decides=elsewhere)
        monkeypatch.setattr(Stepper, "_counts_on", lambda *arguments: None)
        optimizer = Lion8bit(params, lr=torch.tensor(1e-3), weight_decay=0.1, capturable=True, fused=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
        results.append(contents(optimizer))
    assert_same_contents(*results)


@needs_gpu
def test_gpu_and_cpu_parameters_in_one_optimizer() -> None:
    """The scale and the verdict are on the GPU, the learning rate on either; the overflow is skipped everywhere.

    Without a GradScaler: for gradients on the CPU, torch's copies its own scale there and does not wait for the copy.
    """
    results = []
    for device in ("cpu", "cuda"):
        params = [*parameters(Place("cpu"), torch.bfloat16), *parameters(Place("cuda"), torch.bfloat16)]
        lr = torch.tensor(1e-3, device=device)
        optimizer = Lion8bit(params, lr=lr, weight_decay=0.1, capturable=device == "cuda", fused=True)
        for step, scale in enumerate((1024.0, 1024.0, 512.0, 512.0)):
            set_grads(params, step, scale, inf=step == 1)
            optimizer.grad_scale = torch.full((), scale, device="cuda")
            optimizer.found_inf = torch.full((), float(step == 1), device="cuda")
            optimizer.step()
        results.append(contents(optimizer))
        assert {state["step"] for state in optimizer.state_dict()["state"].values()} == {3}
        assert optimizer.nonfinite_count() == 0
    assert_same_contents(*results)


def test_counts_move_to_a_larger_table() -> None:
    """Counts on the device are kept, those that were set from outside are used, and no two states share one."""
    counts = UpdateCounts(torch.device("cpu"))
    states: list[dict[str, Any]] = [{"step": n} for n in range(5)]
    first = counts.indices(states[:3], 3)
    table = counts.table
    assert [state["step"].data_ptr() for state in states[:3]] == [table[index].data_ptr() for index in first]
    table[first, 0] += 10
    assert counts.indices(states[:3], 3) == first and counts.table is table
    more = [*states[1:], *({"step": 50 + n} for n in range(20))]
    indices = counts.indices(more, len(more))
    assert counts.table is not table and len({*indices}) == len(more)
    assert [int(state["step"]) for state in more] == [11, 12, 3, 4, *range(50, 70)]
    assert counts.table[indices, 0].tolist() == [int(state["step"]) for state in more]
    assert int(states[0]["step"]) == 10
    more[0]["step"], more[2]["step"], more[3] = 7, torch.tensor([8.0]), dict(more[4])
    indices = counts.indices(more, len(more))
    assert len({*indices}) == len(more)
    assert counts.table[indices, 0].tolist() == [7, 12, 8, 50, 50, *range(51, 70)]
    more[1]["step"] = 1.5
    with pytest.raises(ValueError, match="step must be a whole number of updates"):
        counts.indices(more, len(more))


@on_device
def test_counts_let_go_of_state_that_was_replaced(place: Place) -> None:
    params = parameters(place, torch.float32)
    optimizer = Lion8bit(params, lr=1e-3, fused=True)
    set_grads(params, 0)
    optimizer.step()
    replaced = [
        weakref.ref(tensor)
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and name != "step"  # counts outlive it, for captured graphs
    ]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(replaced) == 4 and not any(each() is not None for each in replaced)
    set_grads(params, 1)
    optimizer.step()
    assert {state["step"] for state in optimizer.state_dict()["state"].values()} == {2}


class NoWaiting(TorchDispatchMode):
    """Fails where a value is read from a tensor, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func) and "_to_copy" not in str(func), func
        return func(*args, **(kwargs or {}))


@on_device
def test_the_device_is_not_waited_for(place: Place) -> None:
    params = parameters(place, torch.float32, torch.bfloat16)
    lr = torch.tensor(1e-3, device=place.device)
    optimizer = Lion8bit(params, lr=lr, weight_decay=0.1, capturable=True, fused=True)
    optimizer.grad_scale = torch.full((), 8.0, device=place.device)
    optimizer.found_inf = torch.zeros((), device=place.device)
    set_grads(params, 0)
    optimizer.step()
    with NoWaiting():
        if place.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            if place.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(AssertionError), NoWaiting():
        float(lr)


def replayed(place: Place, optimizer: Lion8bit, request: pytest.FixtureRequest) -> Callable[[], None]:
    """One step of the optimizer as a CUDA graph: captured, or on the emulator its launches as they were."""
    if place.name == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        return graph.replay
    emulator = Emulated(request.getfixturevalue("library"))
    place.launches.clear()
    optimizer.step()
    recorded = [*place.launches]

    def replay() -> None:
        for kernel, grid, launch in recorded:
            emulator.run(kernel, grid, launch, [])

    return replay


@on_device
@pytest.mark.parametrize(("fused", "options"), [(False, {}), (True, {}), (True, FOUR_BITS)], ids=str)
def test_a_graph_replays_with_a_changing_lr(
    place: Place, fused: bool, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Also with overflows in between, and with eager steps of some parameters: as the host deciding everything."""
    params, twins = (parameters(place, torch.float32, torch.bfloat16) for _ in range(2))
    lr = torch.tensor(1e-3, device=place.device)
    optimizer = Lion8bit(params, lr=lr, weight_decay=0.1, capturable=True, fused=fused, **options)
    twin = Lion8bit(twins, lr=0.0, weight_decay=0.1, **options)
    if fused:
        optimizer.grad_scale = torch.full((), 8.0, device=place.device)
        optimizer.found_inf = torch.zeros((), device=place.device)
    scale = 8.0 if fused else 1.0
    set_grads(params, 0, scale)
    static = [param.grad for param in params]
    replay = None
    for step in range(8):
        overflow = fused and step in (3, 4)
        lr.fill_(schedule(step))
        set_grads(twins, step)
        for grad, other in zip(static, twins, strict=True):
            grad.copy_(other.grad * scale)
        if fused:
            optimizer.found_inf.fill_(float(overflow))
        alone = step == 6
        if alone:
            for param in params[1:]:
                param.grad = None
            optimizer.step()
            for param, grad in zip(params, static, strict=True):
                param.grad = grad
            for other in twins[1:]:
                other.grad = None
        elif step < 2:
            optimizer.step()  # the state must exist
        elif replay is None:
            replay = replayed(place, optimizer, request)
            if place.name == "cuda":
                replay()  # capturing does not run
        else:
            replay()
        if not overflow:
            twin.param_groups[0]["lr"] = float(lr)
            twin.step()
        assert_same_contents(contents(optimizer), contents(twin))


def test_capturable_options_are_checked() -> None:
    param = torch.randn(10, requires_grad=True)
    with pytest.raises(ValueError, match="1-element"):
        Lion8bit([param], lr=torch.ones(2), capturable=True)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        Lion8bit([param], lr=torch.tensor(-1.0), capturable=True)


@on_device
def test_the_kernel_reads_rates_in_single_precision(place: Place) -> None:
    with pytest.raises(ValueError, match=r"lr must be a float32 tensor with capturable=True, got torch.float64; pass"):
        Lion8bit(
            parameters(place, torch.float32),
            lr=torch.tensor(1e-3, dtype=torch.float64, device=place.device),
            capturable=True,
        )


@needs_gpu
@pytest.mark.parametrize("fault", ["capturable", "lr", "first step"])
def test_gpu_captures_that_would_go_wrong_are_refused(fault: str) -> None:
    place = Place("cuda")
    params = parameters(place, torch.bfloat16)
    lr = torch.tensor(1e-3, device="cpu" if fault == "lr" else "cuda")
    optimizer = Lion8bit(params, lr=lr, capturable=fault != "capturable")
    set_grads(params, 0)
    if fault != "first step":
        optimizer.step()
    message = {"capturable": "capturable must be True", "lr": "got a CPU tensor", "first step": "must exist before"}
    with pytest.raises(RuntimeError, match=message[fault]), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_a_rate_on_the_gpu_is_not_read_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it would end the capture with an error that does not say what to do."""

    class OnGpu(torch.Tensor):
        device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]

        @classmethod
        def __torch_function__(cls, function: Any, *rest: Any) -> Any:
            raise AssertionError(f"the rate was read by {function}")

    optimizer = Lion8bit([torch.ones(3, requires_grad=True)])
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones(3)
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3).as_subclass(OnGpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for step in (optimizer.step, lambda: optimizer.step_param(param, optimizer.param_groups[0])):
        with pytest.raises(RuntimeError, match="capturable must be True"):
            step()
