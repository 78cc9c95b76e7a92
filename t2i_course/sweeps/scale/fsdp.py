"One, two and four processes: how far apart their runs are, what each holds, and resharding."

import tempfile
from functools import cache, partial
from pathlib import Path

from t2i_course.scale.fsdp import apart, launch, shard_bytes

# sweeps whose arms may come out the same: they say how far runs are apart that ought to be equal
MAY_AGREE = ("apart",)


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # not used: equality is a matter of one run
):  # yields ('key.path', make), and make() gives the value
    "One, two and four processes: how far apart the runs are, what each process holds, resharding"
    sizes = (2,) if scale == "smoke" else (2, 4)
    arms = dict(
        fp32=dict(),
        float64=dict(double=True),
        bf16=dict(precision="bf16"),
        accumulate=dict(accumulate=2),
        checkpointing=dict(checkpointing=True),
    )

    @cache  # a launch makes all arms
    def ends(n, how=None):
        with tempfile.TemporaryDirectory() as f:
            return dict(
                zip(
                    arms,
                    launch(
                        n,
                        *(
                            dict(out=Path(f) / k, **dict(how=how) if how else {}, **o)
                            for k, o in arms.items()
                        ),
                    ),
                )
            )

    def distance(n, how, k):
        return apart(ends(1)[k], ends(n, how)[k])

    def held(n, how):
        found = ends(n, how)["fp32"]["held"]
        measured = [{k: v for k, v in h.items() if k != "shapes"} for h in found]
        shares = [(n, r) if how == "fsdp" else (1, 0) for r in range(n)]
        return dict(measured=measured, weights=[shard_bytes(found[0]["shapes"], *s) for s in shares])

    def reshard():
        n = max(sizes)
        with tempfile.TemporaryDirectory() as f:  # saved by 4, read by 2, saved by 2, read by 1
            run = Path(f) / "reshard"
            launch(n, dict(out=run, how="fsdp", stop=8))
            launch(2, dict(out=run, how="fsdp", stop=14, resume=True))
            (end,) = launch(1, dict(out=run, resume=True))
        one = ends(1)["fp32"]
        return dict(sizes=[n, 2, 1], **apart(one | dict(log=one["log"][14:]), end))

    for n in sizes:
        for how in ("ddp", "fsdp"):
            for k in arms:
                yield f"apart.{how}.{n}.{k}", partial(distance, n, how, k)
            yield f"held.{how}.{n}", partial(held, n, how)
    yield "reshard", reshard
