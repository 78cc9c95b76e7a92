"What this machine can do: its device, whether it has bfloat16 units, and how many threads are fastest."

import os
import sys
import time

import torch


def pick_device() -> str:
    "cuda, mps or cpu, whichever is there"
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


# values of ONEDNN_MAX_CPU_ISA that hide the bfloat16 units: with them a fast machine plays a slow one
WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


def has_bf16(
    device: str = "cpu",  # where training runs
) -> bool:
    "Does it multiply bfloat16 in hardware? Read from its capabilities, not timed: the same answer every time"
    kind = device.split(":")[0]
    if kind == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and later
    if kind != "cpu" or sys.platform == "darwin" or not torch.backends.mkldnn.is_available():
        return False
    masked = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if masked in WITHOUT_BF16 or os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2"):
        return False
    try:
        found = torch.cpu.get_capabilities()
    except AttributeError:  # an older torch
        found = dict(
            avx512_bf16=torch.cpu._is_avx512_bf16_supported(), amx_bf16=torch.cpu._is_amx_tile_supported()
        )
    return any(found.get(k, False) for k in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


class Threads:
    """One thread or all of them? Both are tried on real steps and the faster stays;
    they are tried again when steps take twice as long"""

    def __init__(
        self,
        most: int = None,  # threads of the machine; torch's own number when left out
        tries: int = 4,  # steps with each number
    ):
        self.most, self.tries = most or torch.get_num_threads(), tries
        self.restart()

    def restart(self):
        "Plan the trials"
        self.todo = [n for n in dict.fromkeys((self.most, 1)) for _ in range(self.tries)]
        self.seen, self.recent, self.best = {}, [], None
        if len(set(self.todo)) == 1:
            self.todo = []

    def before(self):
        "Set the number of threads of the trial that comes next"
        if self.todo:
            torch.set_num_threads(self.todo[0])

    def after(
        self,
        seconds: float,  # what the step took
    ):
        "Note a trial and choose after the last one; later, watch whether steps have become slow"
        if self.todo:
            self.seen.setdefault(self.todo.pop(0), []).append(seconds)
            if self.todo:
                return
            best = {n: min(s[1:]) for n, s in self.seen.items()}  # the first step after a change is a warm-up
            n = min(best, key=best.get)
            self.best = best[n]
            torch.set_num_threads(n)
        elif self.best:
            self.recent = (self.recent + [seconds])[-8:]
            if len(self.recent) == 8 and min(self.recent) > 2 * self.best:
                self.restart()


class Stopwatch:
    "Times the steps of a run; where time is the clock, it also lets `Threads` choose"

    def __init__(
        self,
        state,  # a State of core.training
        seconds,  # planned time, or None
        ranks,  # the processes that share the work; the first one's time counts
    ):
        self.state, self.ranks = state, ranks
        # the number of threads decides the order of sums, and so the bytes: chosen only where time is a clock
        chosen = seconds and state.device.type == "cpu" and ranks.size == 1
        self.threads = Threads() if chosen else None

    def start(self):
        "A step begins"
        self.began = time.perf_counter()

    def plan(
        self,
        new: bool,  # is it the first step of a stage? Then its speed is another
    ):
        "The threads of this step"
        if self.threads is None:
            return
        if new:
            self.threads.restart()
        self.threads.before()

    def stop(self):
        "The step is done"
        used = self.ranks.first(time.perf_counter() - self.began)
        self.state.seconds += used
        if self.threads:
            self.threads.after(used)
