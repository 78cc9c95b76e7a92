"""MNIST's measure."""

import time

import torch

from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError
from t2i_course.core.metrics import (
    broken_strokes,
    frechet,
    judge_for,
    obedience,
    precision_recall,
    real_floor,
)


class Ruler:
    "MNIST's measure: accuracy, Frechet distance in floors, recall and broken strokes of the same drawings"

    def __init__(
        self,
        data,  # MNIST or another set of single digits
        n: int = 1000,  # drawings, and real pictures of a floor
    ):
        self.data, self.judge = data, judge_for(data)
        real = [
            data.batch(k, Draws(0, torch.arange(min(10_000, len(data.labels[k]))))) for k in ("train", "test")
        ]
        self.train = self.judge.features(real[0].x)
        every = torch.cat([self.train, self.judge.features(real[1].x)])
        if n > len(every) // 4:
            raise CourseError(
                f"{data.name} has {len(every):,} pictures: a floor needs four times n, which is {n:,}"
            )
        self.n = n
        self.floors = real_floor(every, self.n, len(self.train))  # of the same sizes as a row
        self.floor = self.floors["fd_floor"]
        self.broken_real = broken_strokes(torch.cat([r.x for r in real]))
        self.ceiling = obedience(self.judge, real[1].x, data, real[1].captions)["all"]

    def about(self) -> dict:
        "How every row is measured"
        return dict(
            data=self.data.name,
            source=self.data.source,
            n=self.n,
            judge="digits read by the shipped judge",
            captions="the ten digits in turn",
            reference=f"{len(self.train):,} training digits",
            **self.floors,
            floor="mean over random cuts of training and test digits, of the sizes of a row",
            accuracy_real=self.ceiling,
            broken_real=self.broken_real,
            k=5,
        )

    def row(
        self,
        draw,  # draw(captions, seed) -> (n c h w)
        seed: int = 0,  # of the start noise
        n: int = None,  # drawings; a distance is given only for the full number
    ) -> dict:  # the four numbers, and what drawing costs
        "One measured row"
        captions = [self.data.sayings[i % len(self.data.sayings)] for i in range(n or self.n)]
        start, cpu = time.perf_counter(), time.process_time()
        x = draw(captions, seed).float().clamp(-1, 1)
        took = [1000 / len(x) * v for v in (time.perf_counter() - start, time.process_time() - cpu)]
        f = self.judge.features(x)
        fd, (precision, recall) = frechet(f, self.train), precision_recall(self.train, f)
        return dict(
            accuracy=obedience(self.judge, x, self.data, captions)["all"],
            fd=fd,
            fd_floors=fd / self.floor,
            precision=precision,
            recall=recall,
            broken=broken_strokes(x),
            n=len(x),
            seconds_per_1000=took[0],
            cpu_seconds_per_1000=took[1],
        )
