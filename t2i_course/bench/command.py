"""`t2i bench`: which of the benches, and with what."""

from t2i_course.bench.digits import BUDGETS, digits
from t2i_course.bench.painted import painted
from t2i_course.bench.peers import PEERS
from t2i_course.bench.speed import speed
from t2i_course.core.files import CourseError, say
from t2i_course.core.training import pick_device
from t2i_course.run.stamp import result_file, stamp


def bench(
    what="painted",  # painted, digits or speed
    seconds=None,  # training times; painted: 60 180, digits: BUDGETS
    seeds=None,  # of the runs; painted: 0 1, digits: 0 1 2
    peers=None,  # digits: which published recipes to run beside ours
    out=None,  # file to write; default results/bench_WHAT.json
):
    "Quality against training time, or the speed of single steps"
    seeds = seeds or ((0, 1) if what == "painted" else (0, 1, 2))
    peers = tuple(PEERS) if peers is None else tuple(filter(None, peers))
    if set(peers) - set(PEERS):
        raise CourseError(f"--peers may be {', '.join(PEERS)}; got {', '.join(peers)}")
    path, head = result_file(out, f"bench_{what}"), stamp("bench", seeds)
    if what == "speed":
        return speed(head, path, pick_device(), say)
    if what == "digits":
        budgets = dict.fromkeys(BUDGETS, tuple(seconds)) if seconds else None
        return digits(head, path, budgets, seeds, peers, say=say)
    return painted(head, path, seconds or (60, 180), seeds)
