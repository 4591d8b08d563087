"""`lion8bit demo`: fine-tunes one pretrained language model with several optimizers and compares them.

Every optimizer starts from the same weights, sees the same batches and takes the same number of steps.
Nothing here prints; `lion8bit.tools.cli` does.
"""

import json
from pathlib import Path

from lion8bit.tools.demo.report import FILES as FILES
from lion8bit.tools.demo.report import LABELS as LABELS
from lion8bit.tools.demo.report import Results as Results
from lion8bit.tools.demo.report import result_table as result_table
from lion8bit.tools.demo.run import run_demo as run_demo
from lion8bit.tools.demo.task import DemoInputError as DemoInputError
from lion8bit.tools.demo.task import first_line as first_line
from lion8bit.tools.demo.task import read_text as read_text
from lion8bit.tools.demo.task import resolve_device as resolve_device
from lion8bit.tools.memory import limit_gpu_memory as limit_gpu_memory
from lion8bit.tools.memory import state_bytes as state_bytes


def save_results(results: Results, folder: Path) -> tuple[Path, Path]:
    """Writes `demo.png` and `demo.json` into a folder, which is made if missing, and returns their paths."""
    from lion8bit.tools.demo.picture import plot

    folder.mkdir(parents=True, exist_ok=True)
    picture, record = (folder / name for name in FILES)
    plot(results, picture)
    record.write_text(json.dumps(results.to_dict(), indent=2, allow_nan=False) + "\n")
    return picture, record
