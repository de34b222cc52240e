"""Every bound of the GGUF reader and writer, in one place.

The counts hold for a whole model, all its shards together, so that no set of files keeps the reader busy
for more than about a second or makes it hold more than 200 MB. What real files need is named beside each;
the bounds of llama.cpp itself are marked as such.
"""

from __future__ import annotations

from dataclasses import dataclass

from apex_quant.errors import GGUFError

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_HEADER_BYTES = 48 << 20  # 16 MB: 260k tokens with scores and types, 520k merges

# What takes time and memory draws on one sum, so that a file of many tensors may have few strings and the
# other way round: at most 100,000 tensors or 1.5 million strings. The largest vocabularies (260k tokens,
# 520k merges) cost 1.6 million, a model of 2,000 tensors 0.06 million.
MAX_WORK = 3_000_000
WORK = {"strings": 2, "keys": 60, "tensors": 30}

MAX_SHARDS = 512  # 163; one open file each

MAX_KEY_BYTES = 255  # 40; the format allows 65,535, of which 1,000 with one wide character take 260 MB
MAX_NAME_BYTES = 63  # GGML_MAX_NAME - 1
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_ELEMENTS = (1 << 63) - 1  # as ggml: an int64
MAX_ALIGNMENT = 1 << 20  # 32; anything larger only makes padding

FIRST_READ = 64 << 10
LARGEST_READ = 4 << 20


@dataclass(slots=True)
class Budget:
    """What one model may still use; every shard spends from the same one."""

    header_bytes: int = MAX_HEADER_BYTES
    work: int = MAX_WORK

    def spend_bytes(self, count: int, path: str) -> None:
        """Takes the bytes of a header that was read. GGUFError when fewer are left."""
        if count > self.header_bytes:
            raise GGUFError(f"headers of more than {MAX_HEADER_BYTES} bytes", path, count, "header")
        self.header_bytes -= count

    def spend(self, what: str, count: int, path: str, offset: int, field: str) -> None:
        """Takes what `count` strings, keys or tensors cost. GGUFError when that is more than is left."""
        if count * WORK[what] > self.work:
            raise GGUFError(f"claims {count} {what}, {self.work // WORK[what]} allowed", path, offset, field)
        self.work -= count * WORK[what]
