"""Packaging of megalard.

The Triton kernels live in the repository's top-level ``kernels/`` and are installed as
``megalard.kernels.<name>``. A top-level ``kernels`` package would shadow the PyPI package of that
name, which transformers imports, so none is installed and ``kernels/__init__.py`` must not exist.
"""

from setuptools import find_packages, setup

kernel_packages = find_packages("kernels")

setup(
    name="megalard",
    version="0.1.0",
    description="Tensor- and sequence-parallel trainer for LinearARD RoPE restoration",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["megalard", "megalard.*"])]
    + [f"megalard.kernels.{name}" for name in kernel_packages],
    package_dir={
        f"megalard.kernels.{name}": f"kernels/{name.replace('.', '/')}" for name in kernel_packages
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.8; platform_system == 'Linux'",
        "transformers>=5.17,<6",
        "numpy>=2.1,<2.6",
        "safetensors>=0.5,<1",
        "sentencepiece>=0.2,<0.3",
        "protobuf>=5",
        "tensorboard>=2.18,<3",
        "matplotlib>=3.9,<4",
        "rich>=13,<16",
        "pyyaml>=6,<7",
    ],
    extras_require={
        "dev": [
            "pytest>=8,<10",
            "pytest-xdist>=3.8,<4",
            "peft>=0.21,<0.22",
            "ruff>=0.15,<0.18",
            "pre-commit>=4,<5",
        ],
        "flash-attn": ["flash-attn>=2.7,<3"],
    },
    entry_points={"console_scripts": ["megalard=megalard.train:main"]},
)
