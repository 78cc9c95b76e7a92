"""How fast one training run is, alone and beside busy processes, with the short spin of the package and with libgomp's own.

    python tools/spin.py            two to three minutes; four numbers, images a second
    python tools/spin.py --busy 4   beside four busy processes
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES, LIMIT, WARM = 1920, 20., 2   # of a run; seconds, after which it is slow enough to know; steps that do not count

# The package comes before torch, or torch before the package: then the package's setting is too late.
CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "default": import torch
import t2i_course, torch, json
from t2i_course.core.sources import load
from t2i_course.core.training import State, feed, has_bf16, train
from t2i_course.flow.flow_matching import build, recipe_for
images, limit, warm = int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])
data = load("painted")
config = recipe_for(data, "demo") | dict(skip=False, shape=list(data.shape))
torch.manual_seed(0)
tok, den = build(config)
precision = "bf16" if has_bf16() else "fp32"
state, steps = State(den.net, lr=config["lr"], precision=precision), []
for r in train(state, den.loss, feed(data, tok), images=images, batch=config["batch"]):
    steps.append((r.images, r.seconds))
    if r.seconds > limit and len(steps) > warm + 1: break
(i, s), (j, t) = steps[warm], steps[-1]
print(json.dumps(dict(rate=(j - i) / (t - s), images=j, threads=torch.get_num_threads(), precision=precision)))
"""


def measure(spin, busy):
    "One run in a process of its own, beside so many that count for ever."
    env = {name: value for name, value in os.environ.items() if name not in
           ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "T2I_SCALE")}
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        command = [sys.executable, "-c", CHILD, ROOT, spin, IMAGES, LIMIT, WARM]
        run = subprocess.run([*map(str, command)], env=env, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        for process in beside: process.kill()
        for process in beside: process.wait()
    return json.loads(run.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--busy", type=int, default=2, metavar="N", help="busy processes beside the run (default 2)")
    busy, rates = parser.parse_args().busy, {}
    for others in (0, busy):
        for spin in ("short", "default"):
            found = measure(spin, others)
            rates[others, spin] = found["rate"]
            where = f"beside {others} busy processes" if others else "alone"
            print(f"{where:24} {spin:8} spin {found['rate']:7.1f} images/s   "
                  f"({found['images']} images, {found['threads']} threads, {found['precision']})", flush=True)
    alone, beside = (rates[others, "short"] / rates[others, "default"] for others in (0, busy))
    print(f"short over default spin: alone {alone:.2f}, beside {busy} busy processes {beside:.2f}")


if __name__ == "__main__": main()
