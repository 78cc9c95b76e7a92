"""A trained run, ready to draw."""

from pathlib import Path

import torch

from t2i_course.core.files import CourseError, between, load_tensors, say
from t2i_course.core.guards import undisturbed
from t2i_course.core.runs import belongs, codec_run, read_config
from t2i_course.core.sources import is_path
from t2i_course.core.training import pick_device
from t2i_course.run.places import missing_folder, place
from t2i_course.run.register import module
from t2i_course.run.stamp import in_hardware


# options of t2i sample: lowest value, highest value, a whole number?
OPTIONS = dict(
    steps=(1, 1000, True),
    guidance=(0, 50, False),
    temperature=(0, 10, False),
    truncation=(0, 10, False),
    candidates=(1, 1000, True),
)


KEYS = dict(steps="sample_steps")  # where the config calls an option by another name


class Model:
    "A trained run, ready to draw"

    def __init__(
        self,
        run,  # run folder
        data=None,  # where its pictures lie now, if their folder was moved
    ):
        self.run, self.config = Path(run), read_config(run)
        if data:
            old = self.config["data"]
            if not is_path(old):
                raise CourseError(f"{run} was trained on {old}: leave --data out")
            if not is_path(data):
                raise CourseError(f"--data names the new place of a folder: write it as ./{data}")
        path = self.run / "model.safetensors"
        if not path.exists():
            raise CourseError(
                f"{run} is not trained to the end yet: go on with t2i train --resume --out {run}"
            )
        tensors, note = load_tensors(path)
        if not belongs(note, self.config):
            raise CourseError(
                f"{path} belongs to other settings than {run}/config.json. Train again into another folder."
            )
        if data:
            self.config["data"] = place(data)
        self.module, self.device = module(self.config["recipe"]), pick_device()
        try:
            with undisturbed():
                self.tok, self.den = self.module.build(self.config)
        except CourseError as e:
            raise missing_folder(self.run, self.config) or e
        own = lambda p: {k[len(p) :]: v for k, v in tensors.items() if k.startswith(p)}
        self.den.net.load_state_dict(own("net."))
        self.den.net.to(self.device).eval()
        if getattr(self.den, "skip", None) is not None:
            self.den.skip.tables = own("skip.")
        self.den.to(self.device)
        codec = codec_run(self.run, self.config)
        self.codec = Model(codec).den.codec if codec else None

    def draw(
        self,
        captions,  # n texts; '' draws without condition
        seed=0,  # of the noise
        steps=None,  # network evaluations; default the recipe's
        guidance=None,  # scale; default the recipe's; 0 draws as if the captions were empty
        each=None,  # each(k) hears of every k pictures that are drawn
        **others,  # further options of the recipe, see OPTIONS
    ) -> torch.Tensor:  # (n c h w) in [-1,1]
        "Pictures of captions; the noise of a picture depends on the seed and its place alone"
        c, given = self.config, dict(others, steps=steps, guidance=guidance)
        c = c | {KEYS.get(k, k): v for k, v in self.asked(given).items()}
        if (
            c.get("guidance") == 0
        ):  # outside the guidance interval, in retrieval and in the choice among candidates too
            captions, c = [""] * len(captions), c | dict(guidance=self.config["guidance"] or 1.0)
        low = torch.float16 if c["precision"] == "fp16" else torch.bfloat16
        draw = self.den.painter(self.tok, c)
        with torch.autocast(
            torch.device(self.device).type,
            low,
            enabled=c["precision"] != "fp32" and in_hardware(c["precision"], self.device),
        ):
            x = draw(captions, seed, each)
        if self.codec is not None:
            with torch.no_grad():
                x = torch.cat([self.codec.decode(z.to(self.device)).cpu() for z in x.float().split(250)])
        return x.clamp(-1, 1)

    def asked(
        self,
        given: dict,  # option -> value, None where it was not given
    ) -> dict:  # those that this recipe has a use for
        "Check the ranges; say which options are left aside"
        given = {
            k: between(v, *OPTIONS[k][:2], f"--{k.replace('_', '-')}", whole=OPTIONS[k][2])
            for k, v in given.items()
            if v is not None
        }
        idle = [f"--{k.replace('_', '-')}" for k in given if k not in self.den.options]
        if idle:
            say(f"{self.config['recipe']} has no use for {', '.join(idle)}: left aside")
        return {k: v for k, v in given.items() if k in self.den.options}
