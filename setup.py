"""What pyproject.toml cannot say: configs/ is installed as the package's folder configs; all else is found."""

from setuptools import find_namespace_packages, setup

PACKAGES = find_namespace_packages(include=["project*"], exclude=["*.__pycache__"])  # benchmarks/ is not installed
setup(packages=[*PACKAGES, "project.configs"], package_dir={"project.configs": "configs"})
