"""Put the kernels of the repository's top-level ``kernels/`` into the package ``megalard.kernels``.

All other metadata of the package is in pyproject.toml. There must be no ``kernels/__init__.py``:
a top-level package ``kernels`` would shadow the PyPI package ``kernels``, which transformers
imports.
"""

from setuptools import find_packages, setup

kernels = {
    f"megalard.kernels.{name}": f"kernels/{name.replace('.', '/')}"
    for name in find_packages("kernels")
}

setup(
    packages=sorted({*find_packages(include=["megalard", "megalard.*"]), *kernels}),
    package_dir=kernels,
)
