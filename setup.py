"""The two import packages. kernels/ is a folder, not a package: `kernels` is the import name of
another project.
"""

from setuptools import find_packages, setup

TEST = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3",
    "hypothesis>=6.100",
    "ruff>=0.6",
    "mypy>=1.13",
    "kernels>=0.10",
    "matplotlib>=3.8",
]

SERVE = [
    "fastapi>=0.115",
    "jinja2>=3.1",
    "prometheus-client>=0.20",
    "sse-starlette>=3.3",
    "uvicorn>=0.30",
]

setup(
    name="fastdllm",
    version="0.1.0",
    description="Fast decoding of diffusion language models (LLaDA, Dream): Triton kernels, "
    "block-wise caches, parallel decoding",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["fastdllm_kernels", *find_packages(include=["fastdllm", "fastdllm.*"])],
    package_dir={"fastdllm_kernels": "kernels/fastdllm_kernels"},
    package_data={
        "fastdllm": ["py.typed", "assets/*.txt", "assets/*/*", "serve/page.html"],
        "fastdllm_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.6",
        "triton>=3.4,<4; platform_system == 'Linux'",
        "numpy",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.25",
        "tokenizers>=0.20",
        "transformers>=4.57,<6",
        "rich>=13",
    ],
    extras_require={
        "test": TEST,
        "bench": ["matplotlib>=3.8", "pytest>=8", "pytest-benchmark>=5"],
        "eval": ["lm-eval>=0.4.13"],
        "serve": SERVE,
        "ray": [*SERVE, "ray[data,serve]>=2.50"],
        "serve-test": [*SERVE, "openai>=1.60"],
        "web-test": [*SERVE, "playwright>=1.48"],
        "flash-attn": ["flash-attn"],
    },
    entry_points={"console_scripts": ["fastdllm = fastdllm.__main__:main"]},
)
