"""What this machine offers, and what is missing."""

import platform
from importlib import metadata

import torch

from t2i_course.core.downloads import data_root
from t2i_course.core.files import CourseError
from t2i_course.core.training import has_bf16, pick_device
from t2i_course.run.stamp import hardware


def doctor():
    "What this machine offers, and what is missing"
    from t2i_course.core.metrics import load_judge

    device = pick_device()
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {hardware()}, "
        f"device {device}, {torch.get_num_threads()} threads"
    )
    print(
        f"bfloat16 units: {'yes, runs train with bf16' if has_bf16(device) else 'no, runs train with fp32'}"
    )
    try:
        print(f"data folder: {data_root()}")
    except CourseError as e:
        print(f"data folder: {e}")
    for p in (
        "torchvision",
        "diffusers",
        "transformers",
        "scikit-learn",
        "jupyterlab",
        "nbdev",
        "torchmetrics",
    ):
        try:
            print(f"{p:14} {metadata.version(p)}")
        except metadata.PackageNotFoundError:
            print(f"{p:14} missing: pip install {p}")
    for name in ("digits", "painted", "mnist"):
        try:
            load_judge(name)
            print(f"judge {name:8} ok")
        except CourseError as e:
            print(f"judge {name:8} {e}")
