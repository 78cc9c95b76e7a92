"The processes that share the work of one run. Here there is one; `scale.fsdp.Ranks` is the same for many."

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError, load_tensors, save_tensors


class Alone:
    """One process: it takes every image and has nobody to ask.
    `scale.fsdp.Ranks` answers the same questions for many"""

    rank, size = 0, 1

    def mine(self, part: Tensor) -> Tensor:
        "Its share of a micro-batch"
        return part

    def sum(self, *values) -> list:
        "Over all processes"
        return list(values)

    def first(self, value):
        "What process 0 says, a number"
        return value

    def tell(self, value):
        "The same, of any JSON value"
        return value

    def same(self, tensors: dict):
        "In place: those of process 0, for all"

    def whole(self, t: Tensor) -> Tensor:
        "A tensor put together from its shards"
        return t

    def wait(self):
        "Until all have come so far"

    def close(self):
        "The last call"

    def micro(self, last: bool):
        "Around a micro-batch; gradients meet after the last"
        return nullcontext()

    def save(
        self,
        state,  # State of a run
        run: Path,  # its folder
        note: dict,  # JSON values: which settings the run has
        extra: dict = None,  # further tensors of the run
    ):
        "One file, written whole"
        tensors = state.tensors() | {f"extra.{k}": v for k, v in (extra or {}).items()}
        save_tensors(run / "checkpoint.safetensors", tensors, **note, **state.numbers())

    def load(
        self,
        state,  # fresh State of the same network
        run: Path,  # its folder
        fits,  # fits(note): was it saved with these settings?
    ) -> dict:  # the extra tensors; None when there is no checkpoint yet
        "Take up the checkpoint of a run"
        path = run / "checkpoint.safetensors"
        if not path.exists():
            return None
        tensors, note = load_tensors(path)
        if not fits(note):
            raise CourseError(
                f"{path} belongs to a run with other settings. Resume with the settings in "
                f"{run}/config.json, or train into another folder."
            )
        try:
            state.load(tensors, note)
        except (KeyError, RuntimeError, ValueError) as e:
            why = str(e).splitlines()[0]
            raise CourseError(f"{path} belongs to another network ({why}). Train into another folder.") from e
        return {k[6:]: v for k, v in tensors.items() if k.startswith("extra.")}


ALONE = Alone()


def share_of(
    ranks,  # the processes of the run
    part: Tensor,  # indices of the images of a micro-batch
) -> tuple:  # those of this process, and 1.; or the first image and 0., where it has none
    "What this process computes: one without an image computes the first and does not count it, to keep step"
    own = ranks.mine(part)
    return (own, 1.0) if len(own) else (part[:1], 0.0)


def everyone(
    draws: Draws,  # random numbers of the images that this process has
    *rows: Tensor,  # (b ...) something of each of these images
) -> tuple:  # the same for all images of the micro-batch, whoever has them; alone: what was given
    "For what looks at a whole batch, not at one image: a codebook that follows all the vectors of a step"
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return draws, *rows
    sizes = [torch.zeros(1, dtype=torch.int64, device=draws.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(draws)], device=draws.device))
    most = int(max(sizes))

    def gathered(t):  # all processes have to send equally many rows: filled up, and cut again
        parts = [t.new_zeros(most, *t.shape[1:]) for _ in sizes]
        dist.all_gather(parts, torch.cat([t, t.new_zeros(most - len(t), *t.shape[1:])]))
        return torch.cat([p[: int(n)] for p, n in zip(parts, sizes)])

    index = gathered(draws.index.to(draws.device))
    new = index.diff(prepend=index[:1] - 1) > 0  # who has no image repeats the first: it counts once
    return (
        Draws(draws.seed, index[new].to(draws.index.device), draws.device, draws.progress),
        *(gathered(t)[new] for t in rows),
    )
