"""Packaging: folders keep short names, and no top-level ``tf`` or ``torch_ext`` is installed."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSIONS = runpy.run_path(str(HERE / "hvd_ext" / "versions.py"))

FOLDERS = {"hvd_ext": "hvd_ext", "hvd_ext.torch": "torch_ext", "hvd_ext.tensorflow": "tf"}


def packages() -> list[str]:
    """Every import name, with the packages nested in each mapped folder."""
    names = []
    for name, folder in FOLDERS.items():
        names.append(name)
        names += [f"{name}.{inner}" for inner in find_packages(str(HERE / folder))]
    return names


setup(
    name="hvd-ext",
    version=VERSIONS["HVD_EXT"],
    description="Natural gradient, delay compensation and TopK with error feedback for Horovod",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=VERSIONS["PYTHON"],
    packages=packages(),
    package_dir=FOLDERS,
    package_data={**{name: ["py.typed"] for name in FOLDERS},
                  "hvd_ext.cli.horovod_patches": ["diffs/**/*.diff", "files/**/*.py.in"]},
    install_requires=["numpy", "rich"],
    extras_require={
        "torch": [f"torch=={VERSIONS['TORCH']}"],
        "tensorflow": [
            f"tensorflow-cpu=={VERSIONS['TENSORFLOW']}",
            f"keras=={VERSIONS['KERAS']}.*",
        ],
        # For hvd_ext.async_ps. MPI itself is the system's, or comes with `hvd-ext install-horovod`.
        "mpi": [f"mpi4py=={VERSIONS['MPI4PY']}"],
        "fast": ["numba"],  # hvd_ext.kernels: loops compiled for the CPU
        "triton": ["triton"],  # comes with the CUDA build of torch; here to run its kernels without a GPU
        "lightning": ["lightning>=2.6"],
        "examples": ["scikit-learn", "matplotlib"],
        # For benchmarks.seng_race: SOAP and Shampoo; K-FAC, whose package asks for any torchvision and would
        # get that of another torch.
        "race": ["pytorch_optimizer>=4.1", "curvlinops-for-pytorch==3.0.1", "torchvision==0.28.*"],
        "zoo": ["timm", "transformers", "torchvision==0.28.*"],  # the torchvision of this torch
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"],
        "dev": [f"mpi4py=={VERSIONS['MPI4PY']}", "numba", "hypothesis", "pytest", "pytest-timeout",
                "pytest-xdist", "ruff", "mypy", "scikit-learn", "matplotlib", "tensorboard"],
    },
    entry_points={"console_scripts": ["hvd-ext = hvd_ext.cli.main:main"]},
)
