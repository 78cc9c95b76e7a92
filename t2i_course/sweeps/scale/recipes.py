"Sizes of the published networks, counted: parameters, multiply-adds, memory of a training step."

from functools import partial

from t2i_course.core.counting import macs
from t2i_course.scale.recipes import PEAKS, PRICES, count, memory, n_params, of_published


def experiments(
    scale: str = "demo",  # smoke, demo or full
    seeds=(0, 1, 2),  # unused: counting has no luck in it
):  # yields ('key.path', make), and make() gives the value
    "Published networks, counted with fake tensors: parameters, multiply-adds, memory of a training step"

    def published(name):
        make, call = of_published(name)
        c = count(make, call, ("bf16",))
        found = dict(params=n_params(c), macs=macs(make, call), kept=c["bf16"])
        for shard, world, ckpt in (
            ("none", 1, False),
            ("none", 1, True),
            ("fsdp", 8, True),
            ("fsdp", 64, True),
        ):
            found[f"{shard}.{world}.{'checkpointed' if ckpt else 'kept'}"] = memory(
                c, world, world, shard, "bf16", ckpt
            )
        return found

    yield "setting", lambda: dict(peaks=PEAKS, prices=list(PRICES), precision="bf16")
    for name in ("sd15",) if scale == "smoke" else ("sd15", "sdxl", "sd3", "flux"):
        yield f"published.{name}", partial(published, name)
