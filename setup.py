"""Builds the C++ side with the one CMakeLists.txt and puts what it built into the package.

``pip install .`` fetches what the build needs, a second copy of PyTorch among it, and builds in ``build-isolated/``.
With ``--no-build-isolation`` the packages of the environment serve (scripts/build_backend.py names those that are
missing) and the build is the one in ``build/``, like ``cmake --build build``. ``-e`` goes only with it.
CMake options go through the environment: ``CMAKE_ARGS="-DMIXTRAL_CUDA=OFF"``.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCE_PACKAGE = ROOT / "python" / "mixtral"
LIBRARIES = ("libmixtral_ops.so", "libmixtral.so")


def is_isolated() -> bool:
    """Whether torch comes from an environment that pip made for this build, through PYTHONPATH, and will delete."""
    find = "import importlib.util as u; spec = u.find_spec('torch'); print(spec and spec.origin)"
    own, outside = (
        subprocess.run([sys.executable, *flags, "-c", find], capture_output=True, text=True, check=True).stdout
        for flags in ([], ["-I"])
    )
    return own != outside


def set_rpath(file: Path, rpath: str) -> None:
    """Where ``file`` looks for the libraries it needs."""
    script = ROOT / "csrc" / "cmake" / "SetRpath.cmake"
    subprocess.run(["cmake", f"-DFILE={file}", f"-DRPATH={rpath}", "-P", script], check=True)


class CMakeExtension(Extension):
    """An extension that CMake builds: it has a name and no sources."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Runs CMake; for a wheel, copies the libraries, the binary and the bundled model into it."""

    def build_extension(self, ext: CMakeExtension) -> None:
        extension = Path(self.get_ext_fullpath(ext.name)).resolve()
        package, editable = extension.parent, extension.parent == SOURCE_PACKAGE
        build, libraries, options, isolated = ROOT / "build", SOURCE_PACKAGE, [], is_isolated()
        if isolated:  # never in the folders of a build that goes on
            if editable:
                sys.exit("mixtral: an editable installation needs pip install --no-build-isolation -e .")
            build = ROOT / "build-isolated"
            libraries = build / "package"
            options = [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={libraries}"]
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", *options]
        subprocess.run(configure + shlex.split(os.environ.get("CMAKE_ARGS", "")), check=True)
        subprocess.run(["cmake", "--build", build, "--target", "python_package"], check=True)

        if editable:  # everything lies where Python and the command look for it
            return
        (package / "bin").mkdir(parents=True, exist_ok=True)
        for name in LIBRARIES:
            shutil.copy2(libraries / name, package)
        shutil.copy2(libraries / extension.name, extension)
        shutil.copytree(ROOT / "models" / "demo", package / "models" / "demo", dirs_exist_ok=True)
        binary = build / "bin" / "mixtral"
        if binary.exists():  # CMake makes none without CLI11, and says so; the `mixtral` command then explains itself
            shutil.copy2(binary, package / "bin")
        if isolated:  # torch's folder of the build will be gone: it is found beside the package
            for file in (*(package / name for name in LIBRARIES), extension):
                set_rpath(file, "$ORIGIN:$ORIGIN/../torch/lib")
            if binary.exists():
                set_rpath(package / "bin" / "mixtral", "$ORIGIN/..:$ORIGIN/../../torch/lib")


setup(
    ext_modules=[CMakeExtension("mixtral._C")],
    cmdclass={"build_ext": CMakeBuild},
    options={"build": {"build_base": "build/python"}},  # scripts/build_backend.py empties it before a wheel
)
