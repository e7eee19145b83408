"""Compile this package's C++ for this machine, once, and load it.

Code for the machine's own instruction set is several times faster than portable code, so nothing is
built beforehand. The library is kept in the user's cache folder; its name is a hash of sources,
compiler, flags and processor.

:func:`torch.utils.cpp_extension.load` (tried with torch 2.15) is as fast, 5 s to compile and 0.03 s
afterwards. It is not used because it needs ninja, which torch does not install; because its folder
is the same for all processors, so that machines that share a home load code that some of them
cannot run; and because it loads a library whoever wrote it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from itertools import islice
from pathlib import Path

from .cache import cache_folder

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fvisibility=hidden")
SECONDS = 120

_lock = threading.Lock()
_loaded: ctypes.CDLL | CompileError | None = None


class CompileError(RuntimeError):
    """Reason why there is no library."""


def library() -> ctypes.CDLL:
    """The library, compiled if there is none; a process tries once.

    Raises:
        CompileError: no compiler, or it failed.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            try:
                _loaded = _load()
            except CompileError as error:
                _loaded = error
            except (OSError, subprocess.SubprocessError) as error:
                _loaded = CompileError(f"could not be compiled or loaded: {error}")
        if isinstance(_loaded, CompileError):
            raise _loaded
        return _loaded


def compiler() -> list[str]:
    """The command that compiles: ``$CXX``, or the first of c++, g++, clang++ that exists.

    Raises:
        CompileError: there is none.
    """
    chosen = os.environ.get("CXX", "").split()
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path:
            return [path, *command[1:]]
    what = (
        f"CXX={' '.join(chosen)} is not there" if chosen else "none of c++, g++, clang++ is there"
    )
    raise CompileError(f"needs a C++ compiler, and {what}")


def _load() -> ctypes.CDLL:
    if sys.platform == "win32":
        raise CompileError("is not built on Windows")
    command = compiler()
    sources = sorted(SOURCES.iterdir())
    # x86 has the first, older ARM compilers only the second.
    flags = (flag for flag in ("-march=native", "-mcpu=native") if _accepts(command, flag))
    target = list(islice(flags, 1))
    system = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    arguments = [*command, *FLAGS, *target, *system]
    version = subprocess.run([*command, "--version"], capture_output=True, timeout=SECONDS).stdout
    digest = hashlib.sha256("\0".join([*arguments, _processor()]).encode() + version)
    for source in sources:
        digest.update(source.read_bytes())
    name = f"native-{digest.hexdigest()[:20]}.so"
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / name
    # Who can write a file there can run code in this process (docs/security.md).
    is_there = os.access(path, os.R_OK)
    if (_is_ours(path) if is_there else os.access(folder, os.W_OK)) and _is_ours(folder):
        if not is_there:
            _compile(arguments, path)
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(prefix="kernelwarehouse-") as own:  # for this process only
        _compile(arguments, Path(own, name))
        return ctypes.CDLL(str(Path(own, name)))


def _is_ours(path: Path) -> bool:
    """Whether nobody but this user, root, and a group that the user chose could have written it."""
    found = path.stat()
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & stat.S_IWOTH


def _accepts(command: list[str], flag: str) -> bool:
    arguments = [*command, flag, "-x", "c++", "-fsyntax-only", os.devnull]
    return not subprocess.run(arguments, capture_output=True, timeout=SECONDS).returncode


def _compile(arguments: list[str], path: Path) -> None:
    """Compile under another name first: processes that compile at once never load half a file."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*arguments, "-o", temporary, str(SOURCES / "native.cpp")],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            why = lines[0] if lines else f"exit status {done.returncode}"
            raise CompileError(f"is not there: {arguments[0]} could not compile it, {why}")
        # The first stays: a machine that has loaded it from a shared disk would crash if another
        # one replaced it (https://github.com/sgl-project/sglang/pull/31725).
        try:
            os.link(temporary, path)
        except OSError:  # there is one, or there are no hard links
            if not os.access(path, os.R_OK):
                os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _processor() -> str:
    """What ``-march=native`` depends on: a cache folder may be shared by unlike machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(
            next((line for line in lines if line.startswith(key)), "")
            for key in ("vendor_id", "cpu family", "model\t", "flags", "CPU part", "Features")
        )
    return f"{platform.machine()} {platform.processor()}"
