"""Counts the instructions that `jinn._native` takes from one reading of the clock to the next.

Only on Linux and x86-64. A forked child runs at full speed to a hardware breakpoint on `clock_gettime`, which
`_native.profile` calls before the first stage and after each. From there the parent lets it go step by step.
Steps in libc are left out: they depend on where memory lies and on when the kernel's clock ticks.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from jinn import _native

IS_SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"

TRACEME, PEEKUSER, POKEUSER, CONT, SINGLESTEP = 0, 3, 6, 7, 9  # <sys/ptrace.h>
RIP, DEBUG_ADDRESS, DEBUG_CONTROL = 16 * 8, 848, 848 + 7 * 8  # places in <sys/user.h>'s struct user
STOPPED, TRAPPED = 19 << 8 | 0x7F, 5 << 8 | 0x7F  # what waitpid gives for SIGSTOP and SIGTRAP
BEFORE_EXECUTION = 1  # debug control: trap when the instruction at the debug address comes next

libc = ctypes.CDLL(None, use_errno=True)


def count_instructions(run: Callable[[], object], reading: int) -> int:
    """Instructions of `jinn._native` from the `reading`th time that `run` reads the clock to the next.

    Raises OSError where a process may not trace its child.
    """
    clock = ctypes.cast(libc.clock_gettime, ctypes.c_void_p).value
    addresses = native_addresses()
    with one_cpu(), stopped_child(run) as child:
        ptrace(POKEUSER, child, DEBUG_ADDRESS, clock)
        ptrace(POKEUSER, child, DEBUG_CONTROL, BEFORE_EXECUTION)
        for _ in range(reading):
            ptrace(CONT, child)
            wait_for(child, TRAPPED)
        return sum(address in addresses for address in steps(child, clock))


def steps(child: int, last: int) -> Iterator[int]:
    """The addresses of the instructions that come next, to `last`."""
    address = 0
    while address != last:
        libc.ptrace(SINGLESTEP, child, 0, 0)  # without `ptrace`'s checks, since there are a million steps
        if os.waitpid(child, 0)[1] != TRAPPED:
            raise RuntimeError("expected the child to read the clock once more")
        address = libc.ptrace(PEEKUSER, child, RIP, 0)
        yield address


@cache
def compiler() -> str:
    """What compiled `jinn._native`, by name and major version; empty if its file does not say."""
    found = re.search(rb"(GCC): \([^)]*\) (\d+)|(clang) version (\d+)", Path(_native.__file__).read_bytes())
    return b" ".join(filter(None, found.groups())).decode() if found else ""


@cache
def native_addresses() -> range:
    """Where the code of `jinn._native` lies in this process."""
    path = os.path.realpath(_native.__file__)
    (mapping,) = (
        line for line in Path("/proc/self/maps").read_text().splitlines() if path in line and " r-xp " in line
    )
    first, last = mapping.split()[0].split("-")
    return range(int(first, 16), int(last, 16))


@contextmanager
def one_cpu() -> Iterator[None]:
    """This thread and the children it forks share a CPU, which makes a step half as long."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cpus)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)


@contextmanager
def stopped_child(run: Callable[[], object]) -> Iterator[int]:
    """The id of a traced process that is about to call `run`, and does not outlive the context."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads' locks: the child takes none
        child = os.fork()
    if child == 0:
        try:
            ptrace(TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            run()
        except OSError as error:
            os._exit(error.errno)
        finally:
            os._exit(0)
    try:
        wait_for(child, STOPPED)
        yield child
    finally:
        with suppress(ChildProcessError):  # it has ended
            if os.waitpid(child, os.WNOHANG)[0] == 0:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def wait_for(child: int, expected: int) -> None:
    _, status = os.waitpid(child, 0)
    if status == expected:
        return
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise OSError(os.WEXITSTATUS(status), os.strerror(os.WEXITSTATUS(status)))
    raise RuntimeError(f"expected the child to stop with {expected:#x}, got {status:#x}")


def ptrace(request: int, process: int, address: int = 0, data: int = 0) -> int:
    ctypes.set_errno(0)
    result = libc.ptrace(request, process, address, data)
    if result == -1 and (error := ctypes.get_errno()):
        raise OSError(error, os.strerror(error))
    return result


if IS_SUPPORTED:
    libc.ptrace.argtypes = ctypes.c_long, ctypes.c_long, ctypes.c_size_t, ctypes.c_size_t
    libc.ptrace.restype = ctypes.c_long
