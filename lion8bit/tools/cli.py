"""The command line: parses arguments, calls the functions that do the work, and prints their results.

rich comes with the extra `cli`, matplotlib with `demo`; both are imported only where they are needed. The help of a
command is the docstring of its function, then its options from `COMMANDS`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lion8bit import __version__

SOMETHING_WRONG = 1
USAGE_ERROR = 2


def demo(out: Path, as_json: bool, **settings: Any) -> None:
    """Fine-tune a small pretrained language model with AdamW, Lion and 8-bit Lion.

    All start from the same weights and see the same batches. Prints a table
    of optimizer memory, checkpoint size, time per step and held-out loss,
    and writes a figure and a JSON file. Takes about a minute on a CPU with the
    default model, a byte-level transformer of 1 M parameters.

    Examples:
      lion8bit demo
      lion8bit demo --text novel.txt --steps 200 --seeds 3
      lion8bit demo --model ./SmolLM-135M --device cuda
      lion8bit demo --steps 10 --json > result.json
    """
    require_packages(["rich", "matplotlib"], "demo")
    from rich.console import Console

    from lion8bit.tools import demo as lion8bit_demo

    writable = f"out must be a folder that can be written to, got {out}"
    with usage_errors(OSError, requirement=writable):
        for name in lion8bit_demo.FILES:
            try_to_write(out / name)
    with (
        usage_errors(lion8bit_demo.DemoInputError),
        contextlib.redirect_stdout(sys.stderr),
        progress_bars(settings["steps"] * settings["seeds"]) as report,
    ):
        results = lion8bit_demo.run_demo(**settings, on_progress=report)
    console = Console()
    if as_json:
        print(json.dumps(results.to_dict(), indent=2))
    else:
        console.print(lion8bit_demo.result_table(results))
        console.print(results.conclusion)
    with usage_errors(OSError, requirement=writable):
        figure, record = lion8bit_demo.save_results(results, out)
    if not as_json:
        console.print(f"{results.seconds:.0f} s. Wrote {figure} and {record}.", highlight=False)


def doctor(as_json: bool) -> None:
    """Examine the installation, and say how to fix what is wrong.

    Lists what is installed and which backends this machine has. Each backend
    steps a small case, which must give the same bits as the reference.
    Exit code 0: everything works. 1: something is wrong.

    Examples:
      lion8bit doctor
      lion8bit doctor --json > report.json
    """
    from lion8bit.tools.doctor import examine, healthy

    findings = examine()
    if as_json:
        print(json.dumps({"healthy": healthy(findings), "findings": [*map(vars, findings)]}, indent=2))
    else:
        marks = {"ok": "ok", "note": "-", "problem": "wrong"}
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            lines = finding.found.splitlines() + ([f"fix: {finding.remedy}"] if finding.remedy else [])
            print(f"{marks[finding.status]:<5}  {finding.name:<{width}}  " + f"\n{'':{width + 9}}".join(lines))
    if not healthy(findings):
        raise SystemExit(SOMETHING_WRONG)


def estimate(plot: Path | None, as_json: bool, **settings: Any) -> None:
    """Will it fit? Plan the memory of training with each optimizer.

    MODEL is a name from the list below; a count such as 7B, taken as a Llama;
    a local Hugging Face folder or config.json (needs transformers; no
    download); or package.module:factory, called on the meta device.

    Examples:
      lion8bit estimate llama-3-8b --vram 24 --chunked-loss
      lion8bit estimate ./model --lora 16 --gpus 4
      lion8bit estimate 8.03B --sequence 8192 --plot memory.png
    """
    from lion8bit import planner
    from lion8bit.planner import report

    drawable = f"plot must be a .png, .svg or .pdf to write, got {plot}"
    if plot is not None:
        require_packages(["matplotlib"], "demo")
        with usage_errors(OSError, ValueError, requirement=drawable):
            report.check_suffix(plot)
            try_to_write(plot)
    if not as_json:
        require_packages(["rich"], "cli")
    with usage_errors(planner.PlanError):
        plan = planner.estimate(**settings)
    if plot is not None:
        with usage_errors(OSError, requirement=drawable):
            report.plot_plan(plan, plot)
    if as_json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        report.print_plan(plan)


def convert(as_json: bool, **settings: Any) -> None:
    """Convert a checkpoint from one library's Lion to another's; no model is needed.

    The state may be the whole file (as Trainer's optimizer.pt) or be stored
    under "optimizer", "optimizer_state_dict" or "optimizer_states"; everything
    else in the file stays. Momentum is exact, except where it is encoded to
    8 or 4 bits again.

    Examples:
      lion8bit convert optimizer.pt ours.pt
      lion8bit convert ours.pt theirs.pt --to bitsandbytes
      lion8bit convert ours.pt finer.pt --block-size 64
    """
    from lion8bit.tools.convert import ConversionError, convert_file

    with usage_errors(ConversionError):
        summary = convert_file(**settings)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        before, after = (summary[name] / 1e6 for name in ("bytes_before", "bytes_after"))
        print(
            f"{settings['target']}: the momentum of {summary['with_state']} parameters, {summary['elements']:,} "
            f"elements, from {summary['from']} ({before:.2f} MB) to {summary['to']} ({after:.2f} MB)"
        )


def at_least_1(text: str) -> int:
    """The type of options that count something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


Option = tuple[str, Callable[[str], Any], Any, str]  # name, type, default, help
TRUST: Option = ("--trust-remote-code", bool, False, "Execute Python code that the model's folder brings.")
JSON: Option = ("--json", bool, False, "Print JSON, and nothing else, to standard output.")
DEMO: list[Option] = [
    ("--text", Path, None, "Text to fine-tune on. Default: Python's own help topics (pydoc_data/topics.py)."),
    ("--model", Path, None, "Folder of a Hugging Face causal language model (needs transformers; no download)."),
    ("--device", str, None, "torch device, such as cpu or cuda:1. Default: a GPU if there is one."),
    ("--seeds", at_least_1, 1, "Batch orders to repeat every run with."),
    ("--steps", at_least_1, 80, "Optimizer steps per run."),
    ("--batch-size", at_least_1, 4, "Windows of text per step."),
    ("--eval-windows", at_least_1, 48, "Held-out windows per evaluation."),
    ("--adamw-lr", float, None, "AdamW's learning rate. Default: by model."),
    ("--lion-lr", float, None, "Learning rate of the three Lions. Default: by model."),
    ("--out", Path, Path("demo-results"), "Folder for demo.png and demo.json."),
]
ESTIMATE: list[Option] = [
    ("model", str, None, "Name, count, folder, config.json or factory; see above."),
    ("--vram", float, None, "Memory of one GPU in GiB: does it fit?"),
    ("--gpus", int, 1, "Shard over that many GPUs with FSDP2."),
    ("--lora", int, None, "Rank of adapters at all linear layers except the output layer."),
    ("--batch", int, 1, "Sequences per GPU and step."),
    ("--sequence", int, None, "Tokens per sequence. Default: an image's, else 2048 or the model's maximum."),
    ("--checkpointing", bool, True, "Compute activations again in the backward pass."),
    ("--chunked-loss", bool, False, "Logits exist for 256 tokens at a time, as in the example; see above."),
    ("--dtype", str, "bf16", "Of weights and gradients: bf16, fp16 or fp32."),
    ("--reserve", float, 1.0, "GiB for the CUDA context, workspaces and fragmentation."),
    ("--plot", Path, None, "Draw the totals into this file (.png, .svg, .pdf)."),
]
CONVERT: list[Option] = [
    ("source", Path, None, "File of torch.save with an optimizer's state."),
    ("target", Path, None, "File to write."),
    ("--to", str, "lion8bit", "lion8bit, lion-pytorch, timm, flashoptim, torch-optimi or bitsandbytes: who loads it."),
    ("--block-size", int, None, "Elements per scale of lion8bit: 64, 128 or 256. Default: 128, or 64 with 4 bits."),
    ("--min-8bit-size", int, 4096, "Smaller parameters keep fp32 momentum in lion8bit."),
    ("--optim-bits", int, 8, "Bits of the momentum in lion8bit: 8, 4, or 32 for fp32."),
    ("--force", bool, False, "Overwrite the target."),
]
COMMANDS: dict[str, tuple[Callable[..., None], list[Option]]] = {
    "demo": (demo, [*DEMO, TRUST, JSON]),
    "doctor": (doctor, [JSON]),
    "estimate": (estimate, [*ESTIMATE, TRUST, JSON]),
    "convert": (convert, [*CONVERT, JSON]),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `run` of its result is the function of the command."""
    from lion8bit.planner import formulas, named

    text = "Lion8bit: the Lion optimizer with its momentum in one byte per parameter."
    end = "lion8bit COMMAND --help explains a command and shows examples."
    parser = argparse.ArgumentParser("lion8bit", description=text, epilog=end, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"lion8bit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (run, options) in COMMANDS.items():
        text, _, examples = (inspect.getdoc(run) or "").partition("Examples:")
        equations = ""
        if run is estimate:
            equations = "\n".join(
                ["names:", *textwrap.wrap(", ".join(named.NAMES), 78, break_on_hyphens=False), "", ""]
            )
            equations += (formulas.__doc__ or "").partition("\n\n")[2]
        command = commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text + equations,
            epilog=f"examples:{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for option in options:
            add_option(command, *option)
        command.set_defaults(run=run)
    return parser


def add_option(parser: argparse.ArgumentParser, name: str, kind: Callable[[str], Any], default: Any, text: str) -> None:
    """Declares an option; its help ends with its default, where it has one."""
    flag = {"action": argparse.BooleanOptionalAction if default else "store_true"}
    how: dict[str, Any] = flag if kind is bool else {"type": kind}
    option = parser.add_argument(name, default=default, help=text, **how)
    if default not in (None, False) and "(default: " not in str(option.help):  # some versions of Python have added it
        option.help = f"{option.help} (default: %(default)s)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; the entry point of the `lion8bit` script and of `python -m lion8bit`."""
    parser = build_parser()
    settings = vars(parser.parse_args(arguments))
    if not settings:
        parser.print_help()
        raise SystemExit(USAGE_ERROR)
    run = settings.pop("run")
    run(as_json=settings.pop("json"), **settings)


@contextlib.contextmanager
def usage_errors(*errors: type[Exception], requirement: str = "") -> Iterator[None]:
    """Ends the process with exit code 2 and the message of such an error, after what the arguments must fulfil."""
    try:
        yield
    except errors as error:
        print("error:", f"{requirement} ({error})" if requirement else error, file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from error


def require_packages(names: Sequence[str], extra: str) -> None:
    """Ends the process with exit code 2 and the command that installs an extra, if one of its modules is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        print(f'error: {", ".join(missing)} not found; run: pip install "lion8bit[{extra}]"', file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def try_to_write(path: Path) -> None:
    """Creates the folder of a file, and raises OSError if the file cannot be written; its content stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file() and not path.is_dir():
        return  # opening a pipe would wait for a reader
    new = not path.exists()
    with path.open("ab"):
        pass
    if new:
        path.unlink()


@contextlib.contextmanager
def progress_bars(steps: int) -> Iterator[Callable[[str, int, str], None]]:
    """Yields the callback for `run_demo`, which shows a bar per optimizer on standard error, ``steps`` long."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from lion8bit.tools.demo import LABELS

    label, note = TextColumn("{task.fields[label]}", style="bold"), TextColumn("{task.description}")
    columns = (label, BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(), note)
    progress = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def report(key: str, done: int, note: str) -> None:
        if key == "none":
            return
        progress.start()
        if key not in tasks:
            tasks[key] = progress.add_task("", total=steps, label=LABELS[key])
        progress.update(tasks[key], completed=done, description=note)

    try:
        yield report
    finally:
        if tasks:
            progress.stop()
