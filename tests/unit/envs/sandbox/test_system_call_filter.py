"""The filter of system calls, played through for both kinds of processors."""

import struct

import pytest

from megatron_spear.envs.sandbox.system_calls import call_filter, denied_calls
from megatron_spear.errors import ConfigError

ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL, EPERM, ENOSYS, EAFNOSUPPORT = 0x7FFF0000, 0x80000000, 0x50001, 0x50026, 0x50061
MACHINES = sorted(ARCHITECTURE)


def decide(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What the kernel would answer: the few instructions that the filter is made of."""
    values = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<IIQ6Q", number, architecture, 0, *values)
    held, position = 0, 0
    while True:
        code, if_true, if_false, operand = struct.unpack_from("<HBBI", program, 8 * position)
        position += 1
        if code == 0x20:
            (held,) = struct.unpack_from("<I", data, operand)
        elif code == 0x06:
            return int(operand)
        else:
            test = {0x15: held == operand, 0x35: held >= operand, 0x45: held & operand != 0}[code]
            position += if_true if test else if_false


@pytest.mark.parametrize("machine", MACHINES)
def test_each_call_of_the_table_is_refused(machine: str) -> None:
    program, calls = call_filter(machine), denied_calls(machine)
    assert len(calls) > 60 and len(set(calls.values())) == len(calls)
    for name, number in calls.items():
        assert decide(program, ARCHITECTURE[machine], number) == EPERM, name
    for number in set(range(463)) - set(calls.values()) - {435}:
        if number not in {41, 56, 16, 302} | {198, 220, 29, 261}:
            assert decide(program, ARCHITECTURE[machine], number, 99) == ALLOW, number
    assert decide(program, ARCHITECTURE[machine], 435) == ENOSYS  # clone3
    assert decide(program, ARCHITECTURE[machine], 463) == ENOSYS
    assert decide(program, ARCHITECTURE[machine], 0x40000000 + 39) == ENOSYS
    (other,) = set(MACHINES) - {machine}
    assert decide(program, ARCHITECTURE[other], 0) == KILL
    assert decide(program, 0x40000003, 11) == KILL  # a call of 32-bit x86


@pytest.mark.parametrize(
    ("machine", "socket", "clone", "ioctl", "prlimit"),
    [("x86_64", 41, 56, 16, 302), ("aarch64", 198, 220, 29, 261)],
)
def test_calls_that_depend_on_arguments(
    machine: str, socket: int, clone: int, ioctl: int, prlimit: int
) -> None:
    program = call_filter(machine)

    def answer(number: int, *arguments: int) -> int:
        return decide(program, ARCHITECTURE[machine], number, *arguments)

    for family in range(64):
        expected = ALLOW if family in (1, 2, 10) else EAFNOSUPPORT
        assert answer(socket, family, 1) == expected, family
    assert answer(clone, 17) == ALLOW  # fork
    assert answer(clone, 0x003D0F00) == ALLOW  # a thread
    for bit in (17, 25, 26, 27, 28, 29, 30):
        assert answer(clone, 17 | 1 << bit) == EPERM
    assert answer(ioctl, 0, 0x5412) == answer(ioctl, 0, 0x541C) == EPERM
    assert answer(ioctl, 0, 0x5401) == ALLOW
    assert answer(prlimit, 0, 7) == ALLOW and answer(prlimit, 1, 7) == EPERM
    assert answer(prlimit, 0, 4) == EPERM  # RLIMIT_CORE


def test_the_tables_differ_only_where_the_processors_do() -> None:
    x86, arm = (denied_calls(machine) for machine in ("x86_64", "aarch64"))
    assert x86.keys() - arm.keys() == {"inotify_init", "iopl", "ioperm", "modify_ldt"}
    assert arm.keys() <= x86.keys()
    assert all(x86[name] == arm[name] for name in arm if arm[name] >= 424)  # numbered alike


def test_another_processor_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"knows the system calls of x86_64, aarch64"):
        call_filter("riscv64")
