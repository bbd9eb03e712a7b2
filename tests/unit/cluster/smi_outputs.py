"""What ``nvidia-smi`` prints for the queries of a preflight, in the format it documents: one line a
GPU or process, ``--format=csv,noheader,nounits``."""

from collections.abc import Callable, Sequence

from megatron_spear.cluster.preflight.gpus import SmiError

H100 = "NVIDIA H100 80GB HBM3"


def uuid(index: int) -> str:
    return f"GPU-{index:08x}-3f2a-11ee-be56-0242ac120002"


def gpu_line(index: int, *, free: object = 81004, ecc: object = 0, name: str = H100) -> str:
    return f"{index}, {uuid(index)}, {name}, 550.54.15, 81559, {free}, {ecc}"


def row_line(index: int, *, pending: object = 0, failure: object = 0) -> str:
    return f"{uuid(index)}, {pending}, {failure}"


def app_line(index: int, pid: int, name: str = "/usr/bin/python3") -> str:
    return f"{uuid(index)}, {pid}, {name}"


def healthy(count: int) -> list[str]:
    return [gpu_line(index) for index in range(count)]


def smi_of(
    gpus: Sequence[str], rows: Sequence[str] | None = None, apps: Sequence[str] = ()
) -> Callable[[Sequence[str]], str]:
    """An ``nvidia-smi`` that prints these lines; ``rows`` None: nothing is wrong with any."""
    if rows is None:
        rows = [row_line(index) for index in range(len(gpus))]
    outputs = {"gpu": gpus, "remapped-rows": rows, "compute-apps": apps}

    def smi(arguments: Sequence[str]) -> str:
        query, _, _ = arguments[0].removeprefix("--query-").partition("=")
        assert arguments[1] == "--format=csv,noheader,nounits"
        return "".join(line + "\n" for line in outputs[query])

    return smi


def broken_smi(said: str) -> Callable[[Sequence[str]], str]:
    def smi(arguments: Sequence[str]) -> str:
        raise SmiError(said)

    return smi
