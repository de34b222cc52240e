"""Before installing: is there what the one native dependency needs to compile? One sentence when not.

Runs on any Python 3 without anything installed, so nothing newer than 3.6 is used here.
"""

import importlib.util
import os
import shutil
import sys


def missing():
    # type: () -> str
    """What is missing and how to get it, or ''."""
    if sys.version_info < (3, 11):
        return "Python 3.11 or newer is needed, this is %d.%d; set PYTHON=python3.12 or so." % sys.version_info[:2]
    if importlib.util.find_spec("ensurepip") is None:
        return "Python's venv is incomplete here; on Debian and Ubuntu: apt install python3-venv"
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if not any(name and shutil.which(name.split()[0]) for name in compilers):
        return (
            "No C++ compiler was found, and llama-cpp-python is compiled when it is installed; "
            "on Debian and Ubuntu: apt install g++ (macOS: xcode-select --install)"
        )
    return ""


if __name__ == "__main__":
    problem = missing()
    if problem:
        sys.stderr.write("error: " + problem + "\n")
        sys.exit(4)
