"""Pack what a GPU machine without a network lacks: SGLang, FlashInfer and their small dependencies.

    python -m benchmarks.gpu.stage                     # for Python 3.12, into benchmarks/gpu/bundle
    python -m benchmarks.gpu.stage --python 3.11 --limit-mib 40

Such a machine is expected to bring Python, PyTorch with Triton, transformers, a CUDA compiler and
ninja; `run.sh` compiles FlashInfer's and SGLang's kernels there. Left out is what no benchmark or
test of ours reaches and what cannot fit: `sglang-kernel`'s libraries (373 MB, 1.1 GB unpacked, and
built for one PyTorch version). Its Python part is packed with a stand-in for them. SGLang 0.5.23's
CUDA path compiles most of its kernels itself, and then serves dense, window and state models, with
experts or without; what else calls into `sgl_kernel` fails there by name, FlashAttention 3 among
it. Kernels in CuTe's language, for Blackwell, are replaced by the answer that they do not apply.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from shutil import copyfile

HERE = Path(__file__).parent
BUNDLE = HERE / "bundle"
ARCHIVE = "site.tar.xz"
# Every manylinux level up to a glibc that today's images have; pip matches them one by one.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "any"]


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution, and what of its files stays behind: a regular expression from the start."""

    requirement: str
    drop: str = "$^"

    def takes(self, path: str) -> bool:
        return not path.endswith("/") and not re.match(self.drop, path)


WHEELS = (
    # Its compiled extensions are made for one PyTorch; without them SGLang has its Python ones.
    Package(
        "sglang==0.5.23",
        r"sglang/(multimodal_gen|benchmark)/|sglang/.*\.so$|.*/configs/.*device_name=",
    ),
    # Attention, norms, rope and sampling lie right in csrc; its folders are mixtures of experts and
    # linear attention by the hundred.
    Package(
        "flashinfer-python==0.7.2",
        r"flashinfer/data/csrc/[^/]+/|flashinfer/(?!data/).*\.(cu|cuh|cc|cpp|h|hpp|json)$",
    ),
    Package("apache-tvm-ffi==0.1.11", r"tvm_ffi/3rdparty/libbacktrace/"),
    Package("annotated-types"),
    Package("cffi"),
    Package("compressed-tensors==0.18.0"),
    Package("dill"),
    Package("distro"),
    Package("fastapi"),
    Package("gguf"),
    Package("httpx2"),
    Package("ipython"),
    Package("jiter"),
    Package("jsonschema"),
    Package("jsonschema-specifications"),
    Package("loguru"),
    Package("msgspec"),
    Package("openai==2.8.0"),
    Package("opentelemetry-api"),
    Package("orjson"),
    Package("partial_json_parser"),
    Package("pybase64"),
    Package("pycparser"),
    Package("pydantic"),
    Package("python-multipart"),
    Package("pyzmq"),
    Package("referencing"),
    Package("rpds-py"),
    Package("setproctitle"),
    Package("sniffio"),
    Package("soundfile==0.13.1"),
    Package("starlette"),
    Package("traitlets"),
    Package("typing-inspection"),
    Package("uvicorn"),
    Package("xgrammar==0.2.7"),
)
PINNED_TO = {"pydantic-core": "pydantic"}
"""Packages whose version another one's metadata names exactly."""
STAND_INS = {
    "common_ops.py": "common_ops.py",
    "cutedsl_dual_gemm.py": "sglang/kernels/ops/gemm/cutedsl_dual_gemm.py",
}
"""Files of ``stand_ins`` and what they are in the bundle."""


def download(requirements: list[str], python: str, folder: Path) -> None:
    """Wheels for that Python on x86-64 Linux, without what they depend on."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    subprocess.run([*command, *platforms, *requirements], check=True)


def wheel_of(requirement: str, folder: Path) -> Path:
    name = re.match(r"[\w-]+", requirement).group().replace("-", "_")
    (wheel,) = folder.glob(f"{name}-*.whl")
    return wheel


def pinned_version(name: str, wheel: Path) -> str:
    """``name==version`` from the metadata of a wheel that depends on it exactly."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    (line,) = (line for line in lines if line.startswith(f"Requires-Dist: {name}=="))
    return line.removeprefix("Requires-Dist: ").split(";")[0].strip()


def unpack(wheel: Path, package: Package, site: Path) -> None:
    """Extract what the package takes; RECORD, by which some find their libraries, lists that."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if not package.takes(info.filename):
                continue
            archive.extract(info, site)
            if info.filename.endswith(".dist-info/RECORD"):
                lines = archive.read(info).decode().splitlines(keepends=True)
                kept = [line for line in lines if package.takes(next(csv.reader([line]))[0])]
                (site / info.filename).write_text("".join(kept))


def copy_sgl_kernel(site: Path) -> None:
    """The Python files of the installed ``sglang-kernel``, and its metadata: SGLang asks for a
    version of it."""
    for path in distribution("sglang-kernel").files:
        if ".dist-info" in path.parts[0]:
            taken = path.name == "METADATA"
        else:
            taken = path.suffix in (".py", "") and path.parts[0] != ".."
        if taken:
            target = site / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.locate().read_bytes())


def pack(site: Path, archive: Path) -> None:
    """A reproducible tar.xz: sorted, without owners and times."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(archive, "w:xz", preset=2) as tar:
        tar.add(site, arcname="site", filter=plain)


def stage(python: str, bundle: Path) -> dict[str, float]:
    """Write the archive and its manifest; megabytes of each package before compression."""
    sizes = {}
    with tempfile.TemporaryDirectory(prefix="stage-") as scratch:
        wheels, site = Path(scratch) / "wheels", Path(scratch) / "site"
        wheels.mkdir()
        site.mkdir()
        download([package.requirement for package in WHEELS], python, wheels)
        pins = [pinned_version(name, wheel_of(owner, wheels)) for name, owner in PINNED_TO.items()]
        download(pins, python, wheels)
        for package in (*WHEELS, *map(Package, pins)):
            before = _megabytes(site)
            wheel = wheel_of(package.requirement, wheels)
            unpack(wheel, package, site)
            sizes[wheel.name] = _megabytes(site) - before
        copy_sgl_kernel(site)
        for name, path in STAND_INS.items():
            copyfile(HERE / "stand_ins" / name, site / path)
        bundle.mkdir(parents=True, exist_ok=True)
        pack(site, bundle / ARCHIVE)
    (bundle / "manifest.json").write_text(
        json.dumps({"python": python, "wheels": sorted(sizes)}, indent=1) + "\n"
    )
    return sizes


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="3.12", help="of the GPU machine (default 3.12)")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, metavar="FOLDER")
    parser.add_argument("--limit-mib", type=float, default=60, help="fail above that (default 60)")
    options = parser.parse_args(argv)
    sizes = stage(options.python, options.bundle)
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size:8.1f} MB  {name}")
    mib = (options.bundle / ARCHIVE).stat().st_size / 2**20
    print(f"{options.bundle / ARCHIVE}: {mib:.1f} MiB")
    if mib > options.limit_mib:
        print(f"above the limit of {options.limit_mib} MiB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
