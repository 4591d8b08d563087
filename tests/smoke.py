"""Owns the check of an installed lion8bit; it needs torch alone: python -I smoke.py cpu|portable [--without-torch]."""

from __future__ import annotations

import compileall
import ctypes
import importlib.util
import io
import os
import sys
import warnings
from pathlib import Path


def check_files(backend: str) -> None:
    """Without torch: this Python compiles every module, and the library can be loaded and called."""
    found = importlib.util.find_spec("lion8bit")
    assert found is not None and found.origin is not None
    package = Path(found.origin).parent
    assert compileall.compile_dir(package, quiet=1, force=True)
    library = package / ("_cpu.dll" if os.name == "nt" else "_cpu.so")
    assert library.exists() == (backend == "cpu"), library
    if backend == "cpu":
        if sys.platform == "linux":
            ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)
        assert ctypes.CDLL(str(library)).lion8bit_kernels() >= 1


def check_steps(backend: str) -> None:
    """Every backend gives the reference's bits, and a run that goes through a checkpoint ends where another does."""
    import torch

    import lion8bit
    from lion8bit.backends.select import select
    from lion8bit.tools.doctor import examine

    assert not {"typer", "rich", "matplotlib", "transformers"} & set(sys.modules)
    assert select("cpu")[0] == backend
    wrong = [finding for finding in examine() if finding.status == "problem"]
    assert [finding.name for finding in wrong] == ["CPU kernel"] * (backend == "portable"), wrong

    def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()

    params = [torch.ones(70, 90), torch.ones(5000, dtype=torch.bfloat16), torch.ones(5)]
    for optimizer_class in (lion8bit.Lion8bit, lion8bit.Lion4bit):
        optimizer = optimizer_class(params, lr=1e-2, weight_decay=0.1)
        step(optimizer, 0)
        twins, saved = [param.clone() for param in params], io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
        saved.seek(0)
        resumed = optimizer_class(twins)
        resumed.load_state_dict(torch.load(saved, weights_only=True))
        for seed in (1, 2):
            step(optimizer, seed)
            step(resumed, seed)
        assert all(torch.equal(param, twin) for param, twin in zip(params, twins))


if __name__ == "__main__":
    expected, *options = sys.argv[1:]
    check_files(expected)
    if not options:
        warnings.simplefilter("ignore", UserWarning)  # the pure wheel says that it is slow
        check_steps(expected)
    print("sound")
