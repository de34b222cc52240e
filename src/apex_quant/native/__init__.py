"""The one door to the native library: found without importing it, loaded late, run in a child process."""

from apex_quant.native.library import Ggml, LibraryInfo, ggml, library_info
from apex_quant.native.worker import Child, run_in_child

__all__ = ["Child", "Ggml", "LibraryInfo", "ggml", "library_info", "run_in_child"]
