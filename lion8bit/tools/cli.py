"""The command line: parses arguments, shows progress and prints; the work itself is done elsewhere.

typer and rich come with the extra `cli`, matplotlib with `demo`; all are imported only where they are needed.
Annotations here are evaluated at once: typer could not look up names inside `build_app` from postponed ones.
"""

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lion8bit import __version__

if TYPE_CHECKING:
    import typer
    from rich.table import Table

    from lion8bit.tools.doctor import Finding

SOMETHING_WRONG = 1
USAGE_ERROR = 2
EXTRAS = {"demo": "demo", "bench": "bench"}  # of the commands; of all others `cli`
BENCHMARKS = {  # name: (script, help)
    "fidelity": ("fidelity", "Momentum formats against fp32 Lion, same gradients."),
    "convergence": ("convergence", "Final losses of optimizers; bf16 weights at small rates."),
    "speed": ("step_time", "Time of a step on real models' shapes, beside others."),
    "overhead": ("overhead", "What a step costs beside its kernel."),
    "memory": ("memory", "What training takes, by part, moment and optimizer."),
    "footprint": ("footprint", "Bytes of state, allocations, import and installation."),
}


@contextlib.contextmanager
def told(*errors: type[Exception], requirement: str = "") -> Iterator[None]:
    """Ends the process with the message alone of an error that is the fault of what was asked.

    Args:
        errors: such errors.
        requirement: what was not met, for errors that do not say it.

    Raises:
        SystemExit: code 2, there was one.
    """
    try:
        yield
    except errors as error:
        print("error:", f"{requirement} ({error})" if requirement else error, file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from error


def try_to_write(path: Path) -> None:
    """Makes the folder of a file, and opens the file as a writer will; what it holds stays, and a new one goes again.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file() and not path.is_dir():
        return  # a pipe waits for its reader
    new = not path.exists()
    with path.open("ab"):
        pass
    if new:
        path.unlink()


def require_packages(names: Sequence[str], extra: str = "demo") -> None:
    """Ends the process, naming the remedy, if a package of an extra is missing.

    Args:
        names: modules that are about to be imported.
        extra: what to install.

    Raises:
        SystemExit: code 2, one is missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        print(f'error: {", ".join(missing)} not found; run: pip install "lion8bit[{extra}]"', file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


@contextlib.contextmanager
def progress_bars(steps: int) -> Iterator[Callable[[str, int, str], None]]:
    """Shows one progress bar per contender on standard error, from the first report on.

    Args:
        steps: steps per contender, over all seeds.

    Yields:
        The callback for `run_demo`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from lion8bit.tools.demo import LABELS

    columns = (
        TextColumn("{task.fields[label]}", style="bold"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    tasks = {
        key: progress.add_task("", total=steps, label=label, start=False)
        for key, label in LABELS.items()
        if key != "none"
    }

    def report(key: str, done: int, note: str) -> None:
        if key not in tasks:
            return
        progress.start()
        progress.start_task(tasks[key])
        progress.update(tasks[key], completed=done, description=note)
        if done >= steps:
            progress.stop_task(tasks[key])

    try:
        yield report
    finally:
        if progress.live.is_started:
            progress.stop()


def run_benchmark(name: str, arguments: Sequence[str]) -> None:
    """Runs a benchmark's script, which an installation keeps within the package and a checkout beside it.

    Args:
        name: a key of `BENCHMARKS`.
        arguments: the script's own command line.
    """
    if "--help" not in arguments:
        drawing = any(argument.startswith("--plot") for argument in arguments)
        require_packages(["matplotlib"] * drawing + ["sklearn"] * (name in ("fidelity", "convergence")), "bench")
    script = BENCHMARKS[name][0]
    package = Path(__file__).parents[1]
    folders = (package / "benchmarks", package.parent / "benchmarks")
    sys.path.insert(0, next(str(folder) for folder in folders if (folder / f"{script}.py").is_file()))
    sys.argv[:] = [f"lion8bit bench {name}", *arguments]  # the first is what its help calls it
    importlib.import_module(script).main()


def findings_table(findings: "Sequence[Finding]") -> "Table":
    """Shows what the doctor found, each problem with its remedy.

    Args:
        findings: what `lion8bit.tools.doctor.examine` returned.

    Returns:
        A rich table, a row for each finding.
    """
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": ("ok", "green"), "note": ("-", "dim"), "problem": ("wrong", "bold red")}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        found = Text(finding.found)
        if finding.remedy:
            found.append(f"\nremedy: {finding.remedy}", style="bold")
        table.add_row(Text(*marks[finding.status]), finding.name, found)
    return table


def build_app() -> "typer.Typer":
    """Declares the commands.

    Returns:
        The typer application.
    """
    import typer

    app = typer.Typer(
        name="lion8bit",
        help="Lion8bit: the Lion optimizer with its momentum in one byte per parameter.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"lion8bit {__version__}")
            raise typer.Exit

    @app.callback()
    def group(
        version: Annotated[
            bool,
            typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit."),
        ] = False,
    ) -> None:
        pass

    @app.command()
    def demo(
        text: Annotated[
            Path | None,
            typer.Option(help="Text to fine-tune on. Default: Python's own help topics (pydoc_data/topics.py)."),
        ] = None,
        model: Annotated[
            Path | None,
            typer.Option(
                help="Folder of a Hugging Face causal language model (needs transformers; no download). "
                "Default: the byte-level transformer of 1 M parameters that ships with lion8bit."
            ),
        ] = None,
        device: Annotated[
            str | None,
            typer.Option(help="torch device, such as cpu or cuda:1. Default: a GPU if there is one."),
        ] = None,
        seeds: Annotated[int, typer.Option(min=1, help="Batch orders to repeat every run with.")] = 1,
        steps: Annotated[int, typer.Option(min=1, help="Optimizer steps per run.")] = 80,
        batch_size: Annotated[int, typer.Option(min=1, help="Windows of text per step.")] = 4,
        eval_windows: Annotated[int, typer.Option(min=1, help="Held-out windows per evaluation.")] = 48,
        adamw_lr: Annotated[float | None, typer.Option(help="AdamW's learning rate. Default: by model.")] = None,
        lion_lr: Annotated[
            float | None, typer.Option(help="Learning rate of the three Lions. Default: by model.")
        ] = None,
        out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("demo-results"),
        trust_remote_code: Annotated[
            bool, typer.Option("--trust-remote-code", help="Execute Python code that the model's folder brings.")
        ] = False,
        as_json: Annotated[
            bool,
            typer.Option("--json", help="Print JSON, and nothing else, to standard output."),
        ] = False,
    ) -> None:
        """Fine-tune a small pretrained language model with AdamW, Lion and
        8-bit Lions, side by side.

        All start from the same weights and see the same batches. Prints a table
        of optimizer memory, checkpoint size, time per step and held-out loss,
        and writes a figure and a JSON file. Takes about a minute on a CPU.

        Examples:

        lion8bit demo
        lion8bit demo --text novel.txt --steps 200 --seeds 3
        lion8bit demo --model ./SmolLM-135M --device cuda
        lion8bit demo --steps 10 --json > result.json
        """
        require_packages(["matplotlib"])
        from rich.console import Console

        from lion8bit.tools import demo as lion8bit_demo

        writable = f"out must be a folder that can be written to, got {out}"
        with told(OSError, requirement=writable):
            for name in lion8bit_demo.FILES:
                try_to_write(out / name)
        with (
            told(lion8bit_demo.DemoInputError),
            contextlib.redirect_stdout(sys.stderr),
            progress_bars(steps * seeds) as report,
        ):
            results = lion8bit_demo.run_demo(
                text=text,
                model=model,
                device=device,
                seeds=seeds,
                steps=steps,
                batch_size=batch_size,
                eval_windows=eval_windows,
                adamw_lr=adamw_lr,
                lion_lr=lion_lr,
                trust_remote_code=trust_remote_code,
                on_progress=report,
            )
        console = Console()
        if as_json:
            typer.echo(json.dumps(results.to_dict(), indent=2))
        else:
            console.print(lion8bit_demo.result_table(results))
            console.print(results.conclusion)
        with told(OSError, requirement=writable):
            figure, record = lion8bit_demo.save_results(results, out)
        if not as_json:
            console.print(f"{results.seconds:.0f} s. Wrote {figure} and {record}.", highlight=False)

    @app.command()
    def doctor(
        as_json: Annotated[
            bool,
            typer.Option("--json", help="Print JSON, and nothing else, to standard output."),
        ] = False,
    ) -> None:
        """Examine the installation, and tell how to mend what is wrong.

        Lists what is installed and which backends this machine has, and lets
        each of them step a small case, which has to give the reference's bits.
        Exit code 0: all is well. 1: something is wrong.

        Examples:

        lion8bit doctor
        lion8bit doctor --json > report.json
        """
        from rich.console import Console

        from lion8bit.tools.doctor import examine, healthy

        findings = examine()
        if as_json:
            typer.echo(json.dumps({"healthy": healthy(findings), "findings": [*map(vars, findings)]}, indent=2))
        else:
            Console(highlight=False).print(findings_table(findings))
        if not healthy(findings):
            raise typer.Exit(SOMETHING_WRONG)

    @app.command()
    def estimate(
        model: Annotated[
            str,
            typer.Argument(
                help="A count such as 7B, taken as a Llama; a local Hugging Face folder or config.json (needs "
                "transformers; no download); or package.module:factory, called on the meta device."
            ),
        ],
        vram: Annotated[float | None, typer.Option(help="Memory of one GPU in GiB: does it fit?")] = None,
        gpus: Annotated[int, typer.Option(help="Shard over that many GPUs with FSDP2.")] = 1,
        lora: Annotated[
            int | None, typer.Option(help="Rank of adapters at all linear layers but the output's.")
        ] = None,
        batch: Annotated[int, typer.Option(help="Sequences per GPU and step.")] = 1,
        sequence: Annotated[
            int | None,
            typer.Option(help="Tokens per sequence. Default: an image's, else 2048 or the most that the model takes."),
        ] = None,
        checkpointing: Annotated[bool, typer.Option(help="Compute activations anew in the backward pass.")] = True,
        dtype: Annotated[str, typer.Option(help="Of weights and gradients: bf16, fp16 or fp32.")] = "bf16",
        reserve: Annotated[float, typer.Option(help="GiB for the CUDA context, workspaces and fragmentation.")] = 1.0,
        plot: Annotated[Path | None, typer.Option(help="Draw the totals into this file (.png, .svg, .pdf).")] = None,
        trust_remote_code: Annotated[
            bool, typer.Option("--trust-remote-code", help="Execute Python code that the model's folder brings.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes, and nothing else.")] = False,
    ) -> None:
        """Will it fit? Plan the memory of training with each optimizer.

        Weights, gradients and state are the exact bytes of the tensors.
        Activations of a transformer are what each layer saves for its backward
        pass, counted as by Korthikanti et al. (arXiv 2205.05198) for attention
        that stores no scores, without dropout. With t = batch * sequence tokens,
        width h, queries q, keys k, inner width f, a heads, e bytes per number:

        layer = t * (norms + e*(h + 2q + 2k) + 4a + e*(h + 4f)),
        2f for a feed-forward with GELU or SiLU and no gate; norms = n*e for each
        of width n, or n*(e + 4) for an RMSNorm; gradients inside = t*e*(h + 2f);
        logits = t * vocabulary * (e + 12). Together all layers and the larger
        of gradients inside and logits; with checkpointing t*h*e per layer, and
        the larger of one layer with the gradients inside, and the logits.

        The total is that of the worst moment: gradients grow while activations
        shrink. Activations are known for decoders and encoders with one stack of
        equal layers; for other models (experts, several towers) the total is
        what is needed at least, and never "fits".

        "release" is lion8bit.fuse_into_backward, "24-bit" compensated weights,
        "host" momentum in the host's memory; "transient" is the largest gradient
        that lives for a moment, and what FSDP2 gathers.

        Examples:

        lion8bit estimate 7B --vram 24
        lion8bit estimate ./model --lora 16 --gpus 4
        lion8bit estimate 8.03B --sequence 8192 --plot memory.png
        """
        from lion8bit import planner

        drawable = f"plot must be a .png, .svg or .pdf to write, got {plot}"
        if plot is not None:
            require_packages(["matplotlib"])
            with told(OSError, ValueError, requirement=drawable):
                planner.check_suffix(plot)
                try_to_write(plot)
        with told(planner.PlanError):
            plan = planner.estimate(
                model,
                dtype=dtype,
                batch=batch,
                sequence=sequence,
                checkpointing=checkpointing,
                lora=lora,
                gpus=gpus,
                vram=vram,
                reserve=reserve,
                trust_remote_code=trust_remote_code,
            )
        if plot is not None:
            with told(OSError, ValueError, requirement=drawable):
                planner.plot_plan(plan, plot)
        if as_json:
            typer.echo(json.dumps(plan.to_dict(), indent=2))
            return
        from rich.console import Console

        console = Console()
        console.print(planner.plan_table(plan))
        console.print(planner.plan_bars(plan, console.width))

    @app.command()
    def convert(
        source: Annotated[Path, typer.Argument(metavar="IN", help="File of torch.save with an optimizer's state.")],
        target: Annotated[Path, typer.Argument(metavar="OUT", help="File to write.")],
        to: Annotated[
            str,
            typer.Option(
                help="lion8bit, or who shall load it: lion-pytorch, timm, flashoptim, torch-optimi, bitsandbytes."
            ),
        ] = "lion8bit",
        block_size: Annotated[int, typer.Option(help="Elements per scale of lion8bit: 64, 128 or 256.")] = 128,
        min_8bit_size: Annotated[int, typer.Option(help="Smaller parameters keep fp32 momentum in lion8bit.")] = 4096,
        optim_bits: Annotated[int, typer.Option(help="8, or 32 for fp32 momentum in lion8bit.")] = 8,
        force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
        as_json: Annotated[
            bool,
            typer.Option("--json", help="Print JSON, and nothing else, to standard output."),
        ] = False,
    ) -> None:
        """Convert a checkpoint from one library's Lion to another's; no model is needed.

        The state may be the whole file (as Trainer's optimizer.pt) or lie under
        "optimizer", "optimizer_state_dict" or "optimizer_states"; all else in
        the file stays. Momentum is exact but where it is encoded to 8 bits anew.

        Examples:

        lion8bit convert optimizer.pt ours.pt
        lion8bit convert ours.pt theirs.pt --to bitsandbytes
        lion8bit convert ours.pt finer.pt --block-size 64
        """
        from lion8bit.tools.convert import ConversionError, convert_file

        options = {"block_size": block_size, "min_8bit_size": min_8bit_size, "optim_bits": optim_bits}
        with told(ConversionError):
            summary = convert_file(source, target, to, **options, force=force)
        if as_json:
            typer.echo(json.dumps(summary, indent=2))
        else:
            before, after = (summary[name] / 1e6 for name in ("bytes_before", "bytes_after"))
            typer.echo(
                f"{target}: the momentum of {summary['with_state']} parameters, {summary['elements']:,} elements, from "
                f"{summary['from']} ({before:.2f} MB) to {summary['to']} ({after:.2f} MB)"
            )

    bench = typer.Typer()

    @bench.callback()
    def benchmarks() -> None:
        """Run a benchmark; what follows its name is its own, --help included.

        Examples:

        lion8bit bench speed --quick
        lion8bit bench memory --help
        """

    app.add_typer(bench, name="bench", no_args_is_help=True)

    def run(context: typer.Context) -> None:
        run_benchmark(str(context.info_name), context.args)

    for name, (_, text) in BENCHMARKS.items():
        own_arguments = {"allow_extra_args": True, "ignore_unknown_options": True}
        bench.command(name, help=text, add_help_option=False, context_settings=own_arguments)(run)
    return app


def main() -> None:
    """Runs the command line; the entry point of the `lion8bit` script and of `python -m lion8bit`."""
    require_packages(("typer", "rich"), EXTRAS.get("".join(sys.argv[1:2]), "cli"))
    build_app()(prog_name="lion8bit")  # also what `python -m lion8bit` completes by
