"""What each process does in test_processes.py: runs of the command, one after the other, and what they leave behind.

    torchrun --standalone --nproc-per-node 2 tests/processes.py trials.json
"""
import hashlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from t2i_course.run.settings import settings
from t2i_course.run import fit as command
from t2i_course.run.train import train_run
from t2i_course.core.files import CourseError
from t2i_course.core.guards import Stopped
from t2i_course.scale import fsdp


def watched(found, stop=None):
    "run.fit.follow, noting losses and the weights at the end; after `stop` steps the process gets a SIGTERM"
    real = command.follow
    def follow(state, records, run, config, extra=None, every=20., *more):
        for i, record in enumerate(real(state, records, run, config, extra, 1e9, *more), 1):
            found["losses"].append(record.loss)
            found["norms"].append(record.grad_norm)
            if i == stop: os.kill(os.getpid(), signal.SIGTERM)
            yield record
        own = {k: fsdp.whole(v).detach().cpu() for k, v in state.net.state_dict().items()}
        found["weights"] = own
        found["hash"] = hashlib.sha256(b"".join(v.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                                                for _, v in sorted(own.items()))).hexdigest()
    return follow


def trial(recipe, out, data="digits", batches=4, extra=1, stop=None, resume=False, precision="fp32", **how):
    "One run of the command: full batches, and a last one of `extra` pictures"
    found, real = dict(recipe=recipe, losses=[], norms=[]), command.follow
    config = settings(recipe, data, "smoke", None, 1, 0, "fp32")
    command.follow = watched(found, stop)
    try:
        train_run(recipe, data, scale="smoke", images=batches * config["batch"] + extra, out=out, resume=resume,
                  precision=precision, quiet=True, **how)
    except Stopped: found["stopped"] = True
    except CourseError as e: found["refused"] = str(e)
    except Exception: found["crashed"] = traceback.format_exc()
    finally: command.follow = real
    return found


def main():
    torch.set_num_threads(1)
    real, fsdp.Ranks.close = fsdp.Ranks.close, lambda self: self.wait() # they stay together for the next run
    ranks = fsdp.Ranks()
    for options in json.loads(Path(sys.argv[1]).read_text()):
        found = trial(**options)
        torch.save(found, f"{options['out']}-{'resumed' if options.get('resume') else 'end'}-{ranks.rank}.pt")
    real(ranks)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
