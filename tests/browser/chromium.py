"The browser that the tests drive: find one; on Debian as root, install it."
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
APPS = ["/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        "/Applications/Chromium.app/Contents/MacOS/Chromium"]


def find():
    "The path of a Chromium or Chrome, or None; T2I_CHROMIUM names one."
    candidates = [os.environ.get("T2I_CHROMIUM"), *map(shutil.which, NAMES), *APPS]
    return next((path for path in candidates if path and Path(path).exists()), None)


def install():
    "Install Debian's Chromium."
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-q"], env=env, check=True)
    subprocess.run(["apt-get", "install", "-y", "-q", "chromium"], env=env, check=True)


def main():
    on_debian = shutil.which("apt-get") and Path("/etc/debian_version").exists()
    if not find() and on_debian and os.geteuid() == 0: install()
    if not find():
        sys.exit("The browser tests need Chromium or Chrome: install one, or name it in T2I_CHROMIUM.")


if __name__ == "__main__":
    main()
