"""System calls that code in the sandbox has no use for, as a filter for the kernel (seccomp).

Namespaces decide what code can reach; the filter keeps the parts of the kernel small that it can
talk to, and closes what namespaces do not cover: keyrings, sockets to the hypervisor, memory that
no limit counts. Classic BPF: instructions of 8 bytes (code, jump if true, jump if false, operand).
"""

import platform
import struct

from megatron_spear.errors import ConfigError

_DENIED = """
    ptrace 101 117            process_vm_readv 310 270  process_vm_writev 311 271
    kcmp 312 272              pidfd_getfd 438 438       process_madvise 440 440
    mount 165 40              umount2 166 39            pivot_root 155 41
    chroot 161 51             open_tree 428 428         move_mount 429 429
    fsopen 430 430            fsconfig 431 431          fsmount 432 432
    fspick 433 433            mount_setattr 442 442     swapon 167 224
    swapoff 168 225           quotactl 179 60           quotactl_fd 443 443
    unshare 272 97            setns 308 268             acct 163 89
    add_key 248 217           request_key 249 218       keyctl 250 219
    mq_open 240 180           shmget 29 194             shmat 30 196
    semget 64 190             msgget 68 186             memfd_create 319 279
    memfd_secret 447 447      userfaultfd 323 282       bpf 321 280
    perf_event_open 298 241   io_uring_setup 425 425    io_uring_enter 426 426
    io_uring_register 427 427 inotify_init1 294 26      inotify_init 253 -
    fanotify_init 300 262     name_to_handle_at 303 264 open_by_handle_at 304 265
    init_module 175 105       finit_module 313 273      delete_module 176 106
    kexec_load 246 104        kexec_file_load 320 294   reboot 169 142
    sethostname 170 161       setdomainname 171 162     syslog 103 116
    settimeofday 164 170      clock_settime 227 112     clock_adjtime 305 266
    adjtimex 159 171          personality 135 92        vhangup 153 58
    iopl 172 -                ioperm 173 -              modify_ldt 154 -
    setpriority 141 140       sched_setparam 142 118    sched_setscheduler 144 119
    sched_setattr 314 274     sched_setaffinity 203 122 ioprio_set 251 30
    migrate_pages 256 238     move_pages 279 239        process_mrelease 448 448
    setrlimit 160 164
"""
"""Name, number on x86_64, number on aarch64 ("-": there is none)."""

_CLONE3 = 435  # its flags are out of a filter's sight; C libraries fall back to clone
_LAST_KNOWN = 462  # what came into kernels later than mseal is refused
_SOME = {"x86_64": {"socket": 41, "clone": 56, "ioctl": 16, "prlimit64": 302}}
_SOME["aarch64"] = {"socket": 198, "clone": 220, "ioctl": 29, "prlimit64": 261}
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: on a network that has nobody else
_NEW_NAMESPACES = 0x7E020000
_RLIMIT_CORE = 4  # 1 keeps a crash from starting a handler on the machine, and must stay
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX

_LOAD, _EQUAL, _AT_LEAST, _ANY_OF, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _EAFNOSUPPORT = _ERRNO | 1, _ERRNO | 38, _ERRNO | 97


def denied_calls(machine: str) -> dict[str, int]:
    """Name -> number of what the filter refuses whatever its arguments are."""
    words = _DENIED.split()
    column = 1 if machine == "x86_64" else 2
    return {
        words[i]: int(words[i + column])
        for i in range(0, len(words), 3)
        if words[i + column] != "-"
    }


def call_filter(machine: str | None = None) -> bytes:
    """The filter's instructions for a kind of processor (default: this machine's).

    Raises ConfigError for one whose system calls are not in the table.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise ConfigError(
            f"the sandbox knows the system calls of {', '.join(_ARCHITECTURES)}, and this machine "
            f"is {machine}; use sandbox.backend=sandbox_fusion"
        )
    calls = _SOME[machine]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        *_refuse(_AT_LEAST, _LAST_KNOWN + 1, _ENOSYS),  # and the x32 calls, 0x40000000 and more
        *_refuse(_EQUAL, _CLONE3, _ENOSYS),
    ]
    for number in denied_calls(machine).values():
        program += _refuse(_EQUAL, number, _EPERM)
    program += _block(
        calls["socket"],
        _ARGUMENT_0,
        [(_EQUAL, len(_FAMILIES) - i, 0, family) for i, family in enumerate(_FAMILIES)],
        [(_RETURN, 0, 0, _EAFNOSUPPORT)],
    )
    program += _block(calls["clone"], _ARGUMENT_0, [], _refuse(_ANY_OF, _NEW_NAMESPACES, _EPERM))
    program += _block(
        calls["prlimit64"],
        _ARGUMENT_0,
        [(_EQUAL, 1, 0, 0)],  # the own limits; those of another process may be the worker's
        [
            (_RETURN, 0, 0, _EPERM),
            (_LOAD, 0, 0, _ARGUMENT_1),
            *_refuse(_EQUAL, _RLIMIT_CORE, _EPERM),
        ],
    )
    terminal = [x for request in _TERMINAL_INPUT for x in _refuse(_EQUAL, request, _EPERM)]
    program += _block(calls["ioctl"], _ARGUMENT_1, [], terminal)
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


_Instruction = tuple[int, int, int, int]


def _refuse(test: int, operand: int, answer: int) -> list[_Instruction]:
    """Answer so where the test holds, else go on."""
    return [(test, 0, 1, operand), (_RETURN, 0, 0, answer)]


def _block(
    number: int, argument: int, allowed: list[_Instruction], refused: list[_Instruction]
) -> list[_Instruction]:
    """For one call, tests of an argument; a test of ``allowed`` jumps to the end, an allow."""
    inner = [(_LOAD, 0, 0, argument), *allowed, *refused, (_RETURN, 0, 0, _ALLOW)]
    return [(_EQUAL, 0, len(inner), number), *inner]
