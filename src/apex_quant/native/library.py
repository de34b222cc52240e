"""ggml's encoders, decoders and checks, called through the library that llama-cpp-python was built with.

Only libggml-base is loaded here: encoding needs no llama context, and loading it by ctypes takes 2 ms where
importing the bindings takes 300 ms. Nothing of this module touches the library until `ggml()` is called.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from apex_quant.errors import ResourceError
from apex_quant.gguf.types import TYPES_BY_ID, GGMLType
from apex_quant.version import LIBRARY as PACKAGE
from apex_quant.version import LIBRARY_VERSION as REQUIRED

Pointer = int | None

# Who builds the grid table of an IQ type: (exported builder, its argument); types that share a table share the
# argument. Slowest first: 5.3, 2.4, 1.2, 0.5, 0.1 and 0.05 s on one core of the development machine, which is
# most of the time that a small job takes.
_GRIDS: dict[str, tuple[str, int]] = {
    "IQ1_S": ("iq2xs_init_impl", 19),
    "IQ1_M": ("iq2xs_init_impl", 19),
    "IQ2_S": ("iq2xs_init_impl", 22),
    "IQ2_XS": ("iq2xs_init_impl", 17),
    "IQ2_XXS": ("iq2xs_init_impl", 16),
    "IQ3_S": ("iq3xs_init_impl", 512),
    "IQ3_XXS": ("iq3xs_init_impl", 256),
}


@dataclass(frozen=True)
class LibraryInfo:
    """What can be said of the installed library without loading it."""

    version: str | None
    folder: Path | None
    backends: tuple[str, ...]

    @property
    def problem(self) -> str | None:
        """Why the library cannot be used, or None."""
        if self.version is None or self.folder is None:
            return f"{PACKAGE} is not installed"
        if self.version != REQUIRED:
            return f"{PACKAGE} {self.version} is installed, this version works with {REQUIRED} only"
        if os.environ.get("LLAMA_CPP_LIB_PATH"):
            return "LLAMA_CPP_LIB_PATH points the bindings at another library"
        return None

    @property
    def cure(self) -> str:
        """What to do about `problem`."""
        if self.version == REQUIRED and self.folder is not None:
            return "unset LLAMA_CPP_LIB_PATH"
        return f"pip install {PACKAGE}=={REQUIRED}   (needs a C++ compiler; 7 to 14 minutes)"


def library_info() -> LibraryInfo:
    """Version, folder and compiled-in backends of llama-cpp-python's libraries. Loads nothing."""
    from importlib import metadata  # here: it takes 20 ms, and a child that encodes does not need it

    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return LibraryInfo(None, None, ())
    try:
        spec = importlib.util.find_spec("llama_cpp")
    except (ImportError, ValueError):  # a finder that refuses it, or a stub put in its place
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return LibraryInfo(version, None, ())
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    found = {path.name.split(".")[0].split("ggml-", 1)[1] for path in folder.glob("*ggml-*")}
    return LibraryInfo(version, folder, tuple(sorted(found - {"base"})))


def _library_file(folder: Path, stem: str) -> Path:
    names = {"win32": [f"{stem}.dll"], "darwin": [f"lib{stem}.dylib", f"lib{stem}.so"]}
    for name in names.get(sys.platform, [f"lib{stem}.so"]):
        if (folder / name).exists():
            return folder / name
    raise ResourceError(
        f"{PACKAGE} is installed without {stem} in {folder}",
        hint=f"pip install --force-reinstall --no-deps {PACKAGE}=={REQUIRED}",
    )


class Ggml:
    """libggml-base's functions with Python types. Pointers are plain addresses (`array.ctypes.data`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lib = ctypes.CDLL(str(path))
        size, i64, ptr = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p

        def function(name: str, result: type | None, *arguments: type) -> Callable[..., int]:
            found = getattr(lib, name)
            found.restype, found.argtypes = result, list(arguments)
            return found  # type: ignore[no-any-return]

        self.quantize_chunk = function("ggml_quantize_chunk", size, ctypes.c_int, ptr, ptr, i64, i64, i64, ptr)
        self.requires_imatrix = function("ggml_quantize_requires_imatrix", ctypes.c_bool, ctypes.c_int)
        self.row_size = function("ggml_row_size", size, ctypes.c_int, i64)
        self._validate = function("ggml_validate_row_data", ctypes.c_bool, ctypes.c_int, ptr, size)
        self._init = function("ggml_quantize_init", None, ctypes.c_int)
        self._to_float: dict[str, Callable[..., int]] = {
            "F16": function("ggml_fp16_to_fp32_row", None, ptr, ptr, i64),
            "BF16": function("ggml_bf16_to_fp32_row", None, ptr, ptr, i64),
        }
        traits = lib.ggml_get_type_traits
        traits.restype, traits.argtypes = ctypes.POINTER(_TypeTraits), [ctypes.c_int]
        self._traits = traits
        self._builders = {name: getattr(lib, name, None) for name, _ in _GRIDS.values()}
        for builder in self._builders.values():
            if builder is not None:
                builder.restype, builder.argtypes = None, [ctypes.c_int]
        self._grid_lock = threading.Lock()
        self._grids: dict[tuple[str, int], threading.Thread] = {}
        self.version = self._text(lib, "ggml_version")
        self.commit = self._text(lib, "ggml_commit")

    @staticmethod
    def _text(lib: ctypes.CDLL, name: str) -> str:
        found = getattr(lib, name, None)
        if found is None:
            return "unknown"
        found.restype, found.argtypes = ctypes.c_char_p, []
        raw = found()
        return raw.decode("ascii", "replace") if raw else "unknown"

    def to_float(self, kind: GGMLType) -> Callable[..., int]:
        """The decoder (src address, dst float32 address, n) of a type; raises ResourceError without one."""
        known = self._to_float.get(kind.name)
        if known is None:
            row = self._traits(kind.id).contents
            if not row.to_float:
                raise ResourceError(f"this build of ggml cannot decode {kind.name}")
            known = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(row.to_float)
            self._to_float[kind.name] = known
        return known

    def to_cache(self, kind: GGMLType) -> Callable[..., int]:
        """The reference encoder (src float32 address, dst address, n) that writes KV caches; not every type has one.

        For IQ4_NL it searches less than ggml_quantize_chunk. Raises ResourceError without one.
        """
        encoder = self._traits(kind.id).contents.from_float_ref
        if not encoder:
            raise ResourceError(f"this build of ggml has no reference encoder of {kind.name}")
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(encoder)

    def validate(self, kind: GGMLType, address: int, nbytes: int) -> bool:
        """ggml_validate_row_data: whole blocks with finite scales (and known codes where a type has them)."""
        return bool(self._validate(kind.id, address, nbytes))

    def start_grids(self, kinds: Iterable[GGMLType]) -> None:
        """Begin building the tables the IQ encoders need, each in a thread of its own, slowest first.

        ggml builds them one after another under its global lock, which every ggml_quantize_chunk call takes
        too, so that all threads stand still meanwhile. The builders write to separate tables; calling them
        side by side is safe as long as nobody encodes that type before `wait_grid` returns.
        """
        wanted = {kind.name for kind in kinds}
        for name, key in _GRIDS.items():
            builder = self._builders[key[0]]
            if name not in wanted or builder is None:
                continue
            with self._grid_lock:
                if key not in self._grids:
                    self._grids[key] = threading.Thread(target=builder, args=(key[1],), daemon=True)
                    self._grids[key].start()

    def wait_grid(self, kind: GGMLType) -> None:
        """Return once `kind` can be encoded; builds its table first if nobody has begun."""
        if kind.name not in _GRIDS:
            return
        self.start_grids([kind])
        thread = self._grids.get(_GRIDS[kind.name])
        if thread is not None:
            thread.join()
        else:
            self._init(kind.id)


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h; checked against the type table when the library is loaded."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


@functools.cache
def compiled_with_amx() -> bool:
    """Whether the library's processor backend contains AMX tile code. False without the library."""
    folder = library_info().folder
    try:
        lib = ctypes.CDLL(str(_library_file(folder, "ggml-cpu"))) if folder is not None else None
        has = lib.ggml_cpu_has_amx_int8 if lib is not None else None
    except (OSError, AttributeError, ResourceError):  # a build with one backend file for each processor has no such
        return False
    return bool(has()) if has is not None else False


@functools.cache
def ggml() -> Ggml:
    """The loaded library. Raises ResourceError when it is missing or not the version this tool is made for."""
    info = library_info()
    if info.problem is not None or info.folder is None:
        raise ResourceError(
            f"{info.problem}, so nothing can be encoded or run",
            hint=f"{info.cure}; `apex doctor` says more",
        )
    found = Ggml(_library_file(info.folder, "ggml-base"))
    # a layout that moved under our feet would be silent memory corruption: look before the first call
    for kind in TYPES_BY_ID.values():
        row = found._traits(kind.id).contents
        if (row.blck_size, row.type_size) != (kind.block, kind.bytes):
            raise ResourceError(
                f"the installed ggml {found.version} disagrees about {kind.name}: "
                f"blocks of {row.blck_size} in {row.type_size} bytes, not {kind.block} in {kind.bytes}"
            )
    return found
