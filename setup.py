"""Builds the C++ side with the one CMakeLists.txt and puts what it built into the package.

``pip install --no-build-isolation -e .`` or ``pip install --no-build-isolation .``; isolation would compile against a
second copy of torch. Both build in ``build/``, like ``cmake --build build``. CMake options go through the environment:
``CMAKE_ARGS="-DMIXTRAL_CUDA=OFF"``.
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
BUILD = ROOT / "build"
SOURCE_PACKAGE = ROOT / "python" / "mixtral"  # where CMake writes the shared libraries


class CMakeExtension(Extension):
    """An extension that CMake builds: it has a name and no sources."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Runs CMake; for a wheel, copies the libraries, the binary and the bundled model out of the source tree."""

    def build_extension(self, ext: CMakeExtension) -> None:
        configure = ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        subprocess.run(configure + shlex.split(os.environ.get("CMAKE_ARGS", "")), check=True)
        subprocess.run(["cmake", "--build", BUILD, "--target", "python_package"], check=True)

        extension = Path(self.get_ext_fullpath(ext.name)).resolve()
        package = extension.parent
        if package == SOURCE_PACKAGE:  # editable: everything lies where Python and the command look for it
            return
        (package / "bin").mkdir(parents=True, exist_ok=True)
        for file in (SOURCE_PACKAGE / "libmixtral_ops.so", SOURCE_PACKAGE / "libmixtral.so"):
            shutil.copy2(file, package)
        shutil.copy2(SOURCE_PACKAGE / extension.name, extension)
        shutil.copytree(ROOT / "models" / "demo", package / "models" / "demo", dirs_exist_ok=True)
        binary = BUILD / "bin" / "mixtral"
        if binary.exists():  # CMake makes none without CLI11, and says so; the `mixtral` command then explains itself
            shutil.copy2(binary, package / "bin")


setup(ext_modules=[CMakeExtension("mixtral._C")], cmdclass={"build_ext": CMakeBuild})
