"Packaging, read from settings.ini."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
LICENSES = {"apache2": "Apache-2.0"}
STATUSES = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}


def settings():
    "The [DEFAULT] section of settings.ini as a mapping."
    parser = ConfigParser(delimiters=["="])
    parser.read(HERE / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def classifiers(cfg):
    "Status, audience, language and one line for each minor version of Python."
    first, last = (int(cfg[key].split(".")[1]) for key in ("min_python", "max_python"))
    return [
        f"Development Status :: {STATUSES[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(first, last + 1)),
    ]


def read(name):
    "The text of a file beside this one; empty while it is not there yet."
    path = HERE / name
    return path.read_text(encoding="utf-8") if path.exists() else ""


cfg = settings()
lib = cfg["lib_name"]
setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    license=LICENSES[cfg["license"]],
    license_files=["LICENSE"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    classifiers=classifiers(cfg),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[lib, f"{lib}.*"]),
    package_data={lib: ["weights/*.safetensors", "weights/*.json"]},
    include_package_data=False,
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={"dev": shlex.split(cfg["dev_requirements"])},
    entry_points={
        "console_scripts": shlex.split(cfg["console_scripts"]),
        "nbdev": [f"{lib}={lib}._modidx:d"],
    },
    zip_safe=False,
)
