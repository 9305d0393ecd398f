"""The engine's tests on AArch64, by cross-compiler and emulator: ``make test-arm``, or ``python tests/aarch64.py``.

    python tests/aarch64.py [--cpu neoverse-n1] [--] [pytest's arguments; default: tests/engine]

Everything is made in ``build/aarch64`` and nothing on the system changes:

    root/       an AArch64 Python of this Debian release and its libraries, unpacked from Debian's packages; torch,
                transformers and what else the tests need, from the package index; this package, copied on every call
    python      runs that Python in qemu
    core/       the build of the engine core

The emulated CPU has the dot product instructions and none of later extensions, so that code which needs more than the
room declares would fail. What an emulator cannot show is speed.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "build" / "aarch64"
SYSROOT = HERE / "root"
PACKAGES = SYSROOT / "usr" / "lib" / "python3" / "dist-packages"  # on the path of Debian's Python
PYTHON = HERE / "python"
MIRROR = "http://deb.debian.org/debian"

TOOLS = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
}

REQUIREMENTS = (
    "torch==2.6.0",  # wheels of later versions bring hundreds of megabytes for GPUs
    "numpy",
    "tokenizers",
    "safetensors",
    "jinja2",
    "typer",
    "rich",
    "transformers",
    "accelerate",
    "scipy",
    "pytest",
    "hypothesis",
    "nanobind",
)

DESELECTED = (
    # A value of 30.500006 steps of its code, 1 of 23,040: torch's AArch64 sums round it to 31, and 32 codes follow.
    "tests/engine/test_decoder.py::test_logits_and_codes_are_torchs[scalar-qwen3-ternary4-changes4]",
    # The memory is the emulator's, and the kernel's figure of its peak may lag behind what is resident.
    "tests/engine/test_session.py::test_memory_figures",
)


def call(*command: str | Path, **options: object) -> None:
    done = subprocess.run([str(word) for word in command], check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(str(word) for word in command[:4])} ... failed with exit code {done.returncode}")


def output(*command: str | Path, **options: object) -> str:
    return subprocess.run(  # type: ignore[call-overload]
        [str(word) for word in command], check=True, capture_output=True, text=True, **options
    ).stdout


def release() -> str:
    """The code name of this Debian. Another system's compiler may want a newer libc than Debian's Python brings."""
    path = Path("/etc/os-release")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    known = dict(line.split("=", 1) for line in lines if "=" in line)
    if known.get("ID") != "debian" or "VERSION_CODENAME" not in known:
        sys.exit("the AArch64 tests take their Python from Debian's packages, and this system is not Debian")
    return known["VERSION_CODENAME"].strip('"')


def need_tools() -> None:
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        sys.exit(f"the AArch64 tests need packages that are not here: apt-get install -y {' '.join(missing)}")


def make_sysroot(codename: str) -> None:
    """Unpacks Python and what it needs. apt keeps its lists in ``build/aarch64/apt``, not in the system's."""
    apt, archives = HERE / "apt", HERE / "apt" / "archives"
    for folder in (apt / "lists" / "partial", apt / "cache" / "archives" / "partial", archives):
        folder.mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (apt / "sources.list").write_text(f"deb [signed-by={key}] {MIRROR} {codename} main\n", encoding="utf-8")
    (apt / "apt.conf").write_text(
        'APT::Architecture "arm64"; APT::Architectures { "arm64"; }; APT::Sandbox::User "root";\n'
        f'Dir::State "{apt}"; Dir::State::status "{apt}/status"; Dir::Cache "{apt}/cache";\n'
        f'Dir::Etc::sourcelist "{apt}/sources.list"; Dir::Etc::sourceparts "/dev/null";\n',
        encoding="utf-8",
    )
    own = {"env": os.environ | {"APT_CONFIG": f"{apt}/apt.conf"}}
    call("apt-get", "-qq", "update", **own)
    python = next(
        line.split()[1].removesuffix("-minimal")
        for line in output("apt-cache", "depends", "python3-minimal", **own).splitlines()
        if "Depends: python3." in line
    )
    wanted = (f"{python}-minimal", f"lib{python}-stdlib", "libstdc++6")
    quiet = [
        f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    ]
    needed = output("apt-cache", "depends", "--recurse", *quiet, *wanted, **own).splitlines()
    names = {line for line in needed if line[:1].isalnum()} | {f"lib{python}-dev"}
    call("apt-get", "-qq", "download", *sorted(names), cwd=archives, **own)
    for archive in sorted(archives.glob("*.deb")):
        call("dpkg-deb", "--extract", archive, SYSROOT)


def make_python(cpu: str) -> None:
    interpreter = next((SYSROOT / "usr" / "bin").glob("python3.*[0-9]"))
    PYTHON.write_text(
        f'#!/bin/sh\nexec qemu-aarch64-static -cpu {cpu} -L "{SYSROOT}" "{interpreter}" "$@"\n',
        encoding="utf-8",
    )
    PYTHON.chmod(0o755)
    PACKAGES.mkdir(parents=True, exist_ok=True)
    # Tests start Python again. The kernel cannot run the emulated one by itself.
    (PACKAGES / "aarch64.pth").write_text(f"import sys; sys.executable = {str(PYTHON)!r}\n", encoding="utf-8")


def install_packages() -> None:
    """From the package index. uv, and not pip: it resolves for a machine other than the one it runs on."""
    tools = HERE / "tools"
    call(sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", tools, "uv")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = HERE / "constraints.txt"
    constraints.write_text("\n".join(pin for pin in pins if not pin.startswith("torch==")), encoding="utf-8")
    version = output(PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    where = ["--target", PACKAGES, "--python-version", version, "--python-platform", "aarch64-manylinux_2_28"]
    only = ["--only-binary", ":all:", "--constraint", constraints]
    call(tools / "bin" / "uv", "pip", "install", "--quiet", *where, *only, *REQUIREMENTS)


def prepare(cpu: str) -> None:
    """Python and packages, again when the versions change."""
    codename, pins = release(), (ROOT / "constraints.txt").read_text(encoding="utf-8")
    stamp, wanted = HERE / "prepared", "\n".join((codename, *REQUIREMENTS, pins))
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        make_python(cpu)
        return
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir(parents=True)
    make_sysroot(codename)
    make_python(cpu)
    install_packages()
    stamp.write_text(wanted, encoding="utf-8")


def build() -> Path:
    """Cross-compiles the core and puts it beside a copy of this package. Returns the core."""
    core = HERE / "core"
    # Debian's pyconfig.h includes the architecture's own from there.
    include = f'-isystem "{SYSROOT}/usr/include"'
    tools = {"env": os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}}
    call(
        *("cmake", "-G", "Ninja", "-S", ROOT, "-B", core, "-Wno-dev", "-DCMAKE_SYSTEM_NAME=Linux"),
        *("-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++"),
        *(f"-DCMAKE_CXX_FLAGS={include}", f"-DPython_EXECUTABLE={PYTHON}"),
        f"-DPython_ROOT_DIR={SYSROOT}/usr",
        stdout=subprocess.DEVNULL,
        **tools,
    )
    call("cmake", "--build", core, **tools)
    package = PACKAGES / "bitdistill"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(
        ROOT / "src" / "bitdistill", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    call("cmake", "--install", core, "--prefix", PACKAGES, stdout=subprocess.DEVNULL, **tools)
    return next(core.glob("_core*.so"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cpu", default="neoverse-n1", help="a CPU that qemu-aarch64-static -cpu help lists")
    parser.add_argument("tests", nargs="*", help="pytest's arguments")
    arguments = parser.parse_args()
    need_tools()
    prepare(arguments.cpu)
    core = build()
    print(f"AArch64 in qemu, {arguments.cpu}", flush=True)
    # This machine's own packages are of no use there.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    deselected = [f"--deselect={test}" for test in DESELECTED]
    call(
        *(PYTHON, "-m", "pytest", *deselected, *(arguments.tests or ["tests/engine"])),
        cwd=ROOT,
        env=environment | {"BITDISTILL_CORE": str(core)},
    )


if __name__ == "__main__":
    main()
