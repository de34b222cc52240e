"""The one door to the native library: found without importing it, loaded late, run in a child process."""

from apex_quant.native.library import Ggml, LibraryInfo, ggml, library_info
from apex_quant.native.worker import Child, run_in_child
from apex_quant.native.workers import Finished, Job, Local, Workers

__all__ = [
    "Child", "Finished", "Ggml", "Job", "LibraryInfo", "Local", "Workers", "ggml", "library_info", "run_in_child",
]  # fmt: skip
