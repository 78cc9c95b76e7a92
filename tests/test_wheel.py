"The wheel stands alone: built, installed in an empty folder, it imports, trains and samples."
import os
import subprocess
import sys
import zipfile

import pytest
from tree import LIB, ROOT, copy_to, files


def run(*command, cwd, **env):
    "Run a command; what it printed, or a failed test that shows it."
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel of the repository, built in a copy."
    copy = copy_to(tmp_path_factory.mktemp("source"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", ".", cwd=copy)
    return next((copy / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "The folder the wheel was installed in."
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=site)
    return site


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {LIB}
    ours = [path.relative_to(ROOT).as_posix() for path in files() if path.is_relative_to(ROOT / LIB)]
    assert not set(ours) - set(names)
    assert [name for name in names if name.endswith("LICENSE")]


def test_wheel_imports_trains_and_samples(installed, tmp_path):
    env = {"PYTHONPATH": str(installed), "T2I_SCALE": "smoke", "CUDA_VISIBLE_DEVICES": ""}
    work = """
import sys
import t2i_course.core.data
from t2i_course.cli import main
print(t2i_course.__file__)
for words in ('train flow_matching --data painted --scale smoke --images 512 --out run'.split(),
              ['sample', 'run', '--prompt', 'a red seven', '--out', 'a.png']):
    if code := main(words): sys.exit(code)
"""
    where = run(sys.executable, "-c", work, cwd=tmp_path, **env)
    assert where.startswith(str(installed))
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
