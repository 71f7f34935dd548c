"""Chooses the modules of the package `kgraph` that run saved models; all else is in pyproject.toml."""

from setuptools import setup
from setuptools.command.build_py import build_py

MODULES = frozenset("__init__ decisions dims errors loading report structure types".split())


class BuildRuntime(build_py):
    """Leaves out what needs Keras or the compiler."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if package != "kgraph" or module[1] in MODULES]


# Nothing is written beside the sources.
setup(cmdclass={"build_py": BuildRuntime}, options={"egg_info": {"egg_base": "."}})
