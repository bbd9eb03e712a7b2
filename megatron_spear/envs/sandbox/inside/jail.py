"""What a process does to itself before it runs code: own mounts, no rights, few system calls."""

from __future__ import annotations

import ctypes
import os
import resource
from typing import Any

_CLONE_NEWNS = 0x00020000
_SYS_PIDFD_OPEN = 434
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 0x4000, 0x40000
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 4, 38, 22
_PR_SET_CHILD_SUBREAPER = 36
_SECCOMP_MODE_FILTER = 2
_CAPABILITIES_V3 = 0x20080522
_MAX_FILES = 10_000
"""Files and folders that code may make; each takes about a kilobyte of the kernel's memory."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


class Filter:
    """Instructions of ``system_calls.call_filter`` as the kernel takes them."""

    def __init__(self, instructions: bytes) -> None:
        self._held = ctypes.create_string_buffer(instructions, len(instructions))
        self.program = _Program(len(instructions) // 8, ctypes.addressof(self._held))


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def be_unreadable() -> None:
    """No process of the same user may look into this one or its children, or trace them."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def be_readable() -> None:
    """Undo it, for a program that opens /proc/self."""
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def process_file(pid: int) -> int:
    """A file that can be read from once the process has ended (Linux 5.3)."""
    file: int = _libc.syscall(_SYS_PIDFD_OPEN, pid, 0)
    _check(min(file, 0), "pidfd_open")
    return file


def new_mounts(disk_bytes: int) -> None:
    """Mounts of our own: an empty /tmp, which is /dev/shm as well, and a /proc of processes alone.
    They are gone when the processes are that have them."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE, None)
    safe = _MS_NOSUID | _MS_NODEV
    try:
        _mount("proc", "/proc", "proc", safe | _MS_NOEXEC, "subset=pid")
    except OSError:  # before Linux 5.8
        _mount("proc", "/proc", "proc", safe | _MS_NOEXEC, None)
    _mount("tmpfs", "/tmp", "tmpfs", safe, f"size={disk_bytes},nr_inodes={_MAX_FILES},mode=700")
    _mount("/tmp", "/dev/shm", None, _MS_BIND, None)


def _mount(source: str, target: str, kind: Any, flags: int, options: Any) -> None:
    kind, options = (x.encode() if x is not None else None for x in (kind, options))
    result = _libc.mount(source.encode(), target.encode(), kind, ctypes.c_ulong(flags), options)
    _check(result, f"mount {target}")


def give_up_rights() -> None:
    """No capability, none to be had by what is executed later."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def filter_calls(calls: Filter) -> None:
    """Have the kernel refuse the system calls that ``system_calls`` lists."""
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    _check(_libc.prctl(_PR_SET_SECCOMP, mode, ctypes.byref(calls.program), 0, 0), "prctl(SECCOMP)")


def limit(config: dict[str, Any]) -> None:
    """Limits of each process, which none of its children gets rid of."""
    cpu_s = int(config["timeout_s"]) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))  # SIGXCPU, then SIGKILL
    limits = {
        resource.RLIMIT_AS: config["memory_bytes"],
        resource.RLIMIT_FSIZE: config["disk_bytes"],
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_NPROC: config["max_processes"],
        resource.RLIMIT_CORE: 1,  # of 0, a handler of crashes outside of the sandbox hears
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
