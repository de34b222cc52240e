"""Build llama.cpp's own tools (llama-imatrix and others) to compare with. Optional; 3 to 6 minutes on one core.

    python tools/build_stock_tools.py build/stock-tools                     # llama-imatrix
    python tools/build_stock_tools.py build/stock-tools imatrix perplexity quantize gguf-split server
    APEX_STOCK_TOOLS=build/stock-tools/bin python -m pytest -m slow tests/calibration

The sources are those in llama-cpp-python's sdist of the pinned version. The tools are linked against the libraries
that are installed already, so that a comparison runs the very same code. (Building everything once more, with
CMAKE_ARGS="-DLLAMA_BUILD_TOOLS=ON -DLLAMA_TOOLS_INSTALL=ON -DLLAVA_BUILD=OFF" pip install --no-cache-dir
--no-binary :all: llama-cpp-python, takes three times as long, and those tools lack an RPATH.)

Needs cmake, a C++ compiler, and pip with network access unless --sdist names the file or its unpacked folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from apex_quant.native import library_info
from apex_quant.version import LIBRARY, LIBRARY_VERSION

# llama.cpp's own CMakeLists.txt would build the libraries too; only what the tools need is taken from it
CMAKE = """\
cmake_minimum_required(VERSION 3.21)
project(stock_tools C CXX)
set(LLAMA ${SDIST}/vendor/llama.cpp)
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT sdist)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_SOURCE_DIR}/bin)
set(CMAKE_BUILD_RPATH ${LIBS})
function(llama_add_compile_flags)
endfunction()
function(license_add_file)
endfunction()
foreach(name ggml-base ggml llama)
  add_library(${name} SHARED IMPORTED GLOBAL)
  set_target_properties(${name} PROPERTIES IMPORTED_LOCATION ${LIBS}/lib${name}${CMAKE_SHARED_LIBRARY_SUFFIX})
  target_include_directories(${name} INTERFACE ${LLAMA}/include ${LLAMA}/ggml/include)
endforeach()
target_link_libraries(ggml INTERFACE ggml-base)
target_link_libraries(llama INTERFACE ggml)
set(BUILD_SHARED_LIBS OFF)
add_subdirectory(${LLAMA}/vendor vendor)
if(NOT TARGET cpp-httplib)
  add_subdirectory(${LLAMA}/vendor/cpp-httplib cpp-httplib)
endif()
add_subdirectory(${LLAMA}/common common)
if(server IN_LIST TOOLS)
  # its own CMakeLists.txt takes these from the whole project's; without the browser's pages, which are downloaded
  set(PROJECT_SOURCE_DIR ${LLAMA})
  set(LLAMA_BUILD_UI OFF)
  set(LLAMA_USE_PREBUILT_UI OFF)
  add_subdirectory(${LLAMA}/tools/ui ui)
  add_subdirectory(${LLAMA}/tools/mtmd mtmd)
endif()
foreach(tool ${TOOLS})
  add_subdirectory(${LLAMA}/tools/${tool} ${tool})
endforeach()
"""


def unpacked(given: Path | None, folder: Path) -> Path:
    """The sdist as a folder, downloaded or unpacked where needed."""
    if given is not None and given.is_dir():
        return given.resolve()
    name = f"{LIBRARY.replace('-', '_')}-{LIBRARY_VERSION}"
    if (folder / name).is_dir():
        return folder / name
    if given is None:
        wanted = [f"{LIBRARY}=={LIBRARY_VERSION}", "--no-binary", LIBRARY, "--no-deps", "-d", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", *wanted], check=True)
        given = folder / f"{name}.tar.gz"
    with tarfile.open(given) as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def build(folder: Path, tools: list[str], sdist: Path | None, jobs: int) -> list[Path]:
    """Build the tools into folder/bin."""
    info = library_info()
    if info.problem is not None or info.folder is None:
        raise SystemExit(f"error: {info.problem}\nhint: {info.cure}")
    if shutil.which("cmake") is None:
        raise SystemExit("error: cmake is needed\nhint: apt install cmake, or pip install cmake")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "CMakeLists.txt").write_text(CMAKE)
    defined = {
        "CMAKE_BUILD_TYPE": "Release",
        "LLAMA_BUILD_TOOLS": "ON",
        "LLAMA_OPENSSL": "OFF",
        "SDIST": unpacked(sdist, folder),
        "LIBS": info.folder,
        "TOOLS": ";".join(tools),
    }
    subprocess.run(
        ["cmake", "-S", folder, "-B", folder / "build", *(f"-D{key}={value}" for key, value in defined.items())],
        check=True,
    )
    names = [f"llama-{tool}" for tool in tools]
    subprocess.run(["cmake", "--build", folder / "build", "-j", str(jobs), "--target", *names], check=True)
    return [folder / "bin" / name for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("tools", nargs="*", help="folders of llama.cpp/tools (default: imatrix)")
    parser.add_argument("--sdist", type=Path, help="the sdist, or the folder it is unpacked in")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    for path in build(given.folder, given.tools or ["imatrix"], given.sdist, given.jobs):
        print(path)


if __name__ == "__main__":
    main()
