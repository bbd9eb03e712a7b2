"""What a node finds out about itself: GPUs that are not there, room, checks that hang."""

import time
from pathlib import Path

import pytest
from smi_outputs import app_line, broken_smi, gpu_line, healthy, row_line, smi_of

from megatron_spear.cluster.preflight.gpus import SmiError, gpu_checks, read_gpus, run_smi
from megatron_spear.cluster.preflight.node import Facts, begun, look_at_node, package_versions
from megatron_spear.config.cluster import ClusterSection, PreflightSection

GPUS = ClusterSection(gpus_per_node=2)
GIB = 1 << 30


def _checks(smi, cluster=GPUS, visible=None):
    checks = gpu_checks(read_gpus(smi, visible), cluster)
    return {check.name: check for check in checks}


def test_healthy_gpus_are_good():
    checks = _checks(smi_of(healthy(2)))
    assert all(check.good for check in checks.values())
    assert checks["GPUs"].found == "2 NVIDIA H100 80GB HBM3"
    assert checks["free GPU memory"].found == "99%"


def test_what_a_gpu_does_not_have_is_no_fault():
    gpus = [gpu_line(0, ecc="[N/A]"), gpu_line(1, ecc="[Not Supported]")]
    rows = [row_line(0, pending="[N/A]", failure="[N/A]")]
    assert all(check.good for check in _checks(smi_of(gpus, rows)).values())
    rows = [row_line(0, pending="No", failure="No"), row_line(1, pending="No", failure="No")]
    assert all(check.good for check in _checks(smi_of(healthy(2), rows)).values())


@pytest.mark.parametrize(
    ("smi", "name", "found"),
    [
        (smi_of(healthy(1)), "GPUs", "1 NVIDIA H100"),
        (smi_of([]), "GPUs", "0"),
        (smi_of([gpu_line(0), gpu_line(1, free=40000)]), "free GPU memory", "GPU 1: 49%"),
        (smi_of([gpu_line(0), gpu_line(1, ecc=3)]), "GPU memory errors", "GPU 1: 3 uncorrected"),
        (smi_of(healthy(2), [row_line(1, pending=1)]), "GPU memory errors", "GPU 1: row remapping"),
        (smi_of(healthy(2), [row_line(0, pending="Yes")]), "GPU memory errors", "pending (Yes)"),
        (smi_of(healthy(2), [row_line(0, failure=1)]), "GPU memory errors", "failed (1)"),
        (
            smi_of(healthy(2), apps=[app_line(1, 4711), app_line(1, 4712, "a, b")]),
            "processes on GPUs",
            "GPU 1: /usr/bin/python3 (4711), a, b (4712)",
        ),
    ],
)
def test_a_bad_gpu_is_found(smi, name, found):
    checks = _checks(smi)
    assert found in checks[name].found
    assert [check.name for check in checks.values() if not check.good] == [name]


def test_more_gpus_than_needed_are_good_and_hidden_ones_are_not_looked_at():
    smi = smi_of([gpu_line(0, ecc=1), *healthy(4)[1:]])
    assert _checks(smi, visible="1,2")["GPU memory errors"].good
    assert _checks(smi, visible="GPU-00000003,1")["GPUs"].found.startswith("2 ")
    assert not _checks(smi, visible="")["GPUs"].good
    assert _checks(smi)["GPUs"].good


@pytest.mark.parametrize(
    "lines", [["no devices were found"], [gpu_line(0, free="[Unknown Error]")], ["0, GPU-1"]]
)
def test_what_cannot_be_read_is_an_error(lines):
    with pytest.raises(SmiError, match="nvidia-smi printed"):
        read_gpus(smi_of(lines))


def test_the_real_command_that_is_missing_or_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SmiError, match="is not on this node"):
        run_smi(["-L"])
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU is lost. Reboot the system'\nexit 15\n")
    program.chmod(0o755)
    with pytest.raises(SmiError, match=r"status 15 and said: GPU is lost\. Reboot"):
        run_smi(["-L"])
    program.write_text("#!/bin/sh\necho $1\n")
    assert run_smi(["-L"]) == "-L\n"


def _look(cluster, limit_s=5.0, **facts):
    return look_at_node(cluster, Path("/run"), "n0", 0, Facts(**facts), limit_s)


def _bad(result):
    return {check.name: check.found for check in result.checks if not check.good}


def test_a_node_without_gpus_is_asked_for_room_only():
    room = {Path("/dev/shm"): GIB, Path("/run"): GIB}
    result = _look(ClusterSection(), smi=broken_smi("not asked"), free_bytes=room.__getitem__)
    assert [check.name for check in result.checks] == ["free /dev/shm", "free disk of the run"]
    assert not _bad(result)
    assert "GPU driver" not in result.versions


@pytest.mark.parametrize(
    ("path", "name"), [("/dev/shm", "free /dev/shm"), ("/run", "free disk of the run")]
)
def test_too_little_room_is_found(path, name):
    result = _look(ClusterSection(), free_bytes=lambda p: GIB - (p == Path(path)))
    assert _bad(result) == {name: "1.0 GiB"}

    def gone(p):
        raise OSError("Stale file handle")

    assert set(_bad(_look(ClusterSection(), free_bytes=gone)).values()) == {"Stale file handle"}


def test_limits_are_the_settings():
    section = PreflightSection(min_shm_bytes=3, min_disk_bytes=5, min_free_gpu_fraction=0.5)
    cluster = ClusterSection(gpus_per_node=1, preflight=section)
    smi = smi_of([gpu_line(0, free=41000)])
    assert not _bad(_look(cluster, smi=smi, free_bytes=lambda p: 5))
    assert set(_bad(_look(cluster, smi=smi, free_bytes=lambda p: 4))) == {"free disk of the run"}


def test_a_check_that_cannot_be_made_is_bad():
    result = _look(GPUS, smi=broken_smi("nvidia-smi is not on this node"))
    assert _bad(result) == {"GPUs": "nvidia-smi is not on this node"}
    assert _look(GPUS, smi=smi_of(healthy(2))).versions["GPU driver"] == "550.54.15"


def test_a_check_that_hangs_is_bad_in_time():
    began = time.monotonic()
    result = _look(ClusterSection(), limit_s=0.1, free_bytes=lambda p: time.sleep(3))
    assert time.monotonic() - began < 1.0
    assert list(_bad(result).values()) == ["no answer within 0.1 s"] * 2


def test_what_is_begun_gives_back_what_there_is():
    soon = time.monotonic() + 5.0
    assert begun(lambda: 3)(soon) == 3
    assert begun(lambda: None)(soon) is None
    with pytest.raises(ZeroDivisionError):
        begun(lambda: 1 // 0)(soon)

    def late():
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        begun(late)(soon)


def test_versions_name_what_is_installed():
    versions = package_versions()
    assert versions["python"].startswith("3.")
    assert versions["numpy"][0].isdigit()
