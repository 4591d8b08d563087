"""`lion8bit demo`: fine-tunes one pretrained language model with several optimizers and compares them.

Every optimizer starts from the same weights, sees the same batches and takes the same number of steps.
Nothing here prints; `lion8bit.tools.cli` does.
"""

from lion8bit.tools.demo.report import FILES as FILES
from lion8bit.tools.demo.report import LABELS as LABELS
from lion8bit.tools.demo.report import Results as Results
from lion8bit.tools.demo.report import result_table as result_table
from lion8bit.tools.demo.report import save_results as save_results
from lion8bit.tools.demo.run import run_demo as run_demo
from lion8bit.tools.demo.task import DemoInputError as DemoInputError
from lion8bit.tools.demo.task import first_line as first_line
from lion8bit.tools.demo.task import read_text as read_text
from lion8bit.tools.demo.task import resolve_device as resolve_device
from lion8bit.tools.memory import limit_gpu_memory as limit_gpu_memory
from lion8bit.tools.memory import state_bytes as state_bytes
