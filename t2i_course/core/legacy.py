"""Recipes that have no Config class yet. This file goes when the last of them has one."""
from importlib import import_module

OPTIONS = dict(steps=(1, 1000, True, "sampler steps"), guidance=(0, 50, False, "guidance scale"), temperature=(0, 10, False, "of the softmax"),
               truncation=(0, 10, False, "how far from the mean"), candidates=(1, 1000, True, "draw N"))
OLD = "gan.adversarial gan.stylegan2 gan.biggan gan.text_gan codec.vae codec.vqvae codec.vqvae2 codec.dvae diffusion.ddpm transformer.dit flow.flow_matching ar.pixelcnn ar.dalle ar.parti ar.cm3leon"


class Loose(dict):
    def __getattr__(self, name):
        try: return self[name]
        except KeyError: raise AttributeError(name) from None
    def __or__(self, other): return Loose(dict(self) | dict(other))


class Legacy:
    Config = None
    def __init__(self, name): self.__dict__.update({k: v for k, v in vars(import_module(name)).items() if not k.startswith("__")}); self.__name__ = name; self.__doc__ = import_module(name).__doc__
    def read(self, values): return Loose(values)
    def __getattribute__(self, name):
        return object.__getattribute__(self, "recipe_" if name == "recipe_for" else "build_" if name == "build" else name)
    def recipe_(self, data, scale="demo", seconds=None):
        mod = import_module(self.__name__)
        c = mod.recipe_for(data, scale, seconds) if hasattr(mod, "recipe_for") else mod.recipe(data.shape[0], data.words, data.size, scale)
        c = dict(c)
        if "sample_steps" in c: c["steps"] = c.pop("sample_steps")
        if c.get("skip") and data.shape[1] * data.shape[2] > 64 * 64:
            from t2i_course.core.files import say
            say(f"pictures of {data.shape[2]} x {data.shape[1]} are too large for the closed-form head start: training begins without it")
            c["skip"] = False
        return Loose(c | dict(recipe=self.__name__.rpartition(".")[2], shape=list(data.shape), uses={}))
    def build_(self, config, codec=None):
        uses = dict(codec=codec) if codec else {}
        mod = import_module(self.__name__)
        def old(c): return dict(c) | ({"sample_steps": c["steps"]} if "steps" in c else {}) | ({"clamp": 4.} if "codec" in c["uses"] else {})
        tok, model = mod.build(old(config))
        kind = type(model)
        def prepare(self, data, tok, config):
            if getattr(self, "skip", None) is None: return
            from t2i_course.diffusion.preconditioning import fit_skip
            fit_skip(self, data, tok, config["fit_images"], config["seed"])
        def get(self): return dict(self.skip.tables) if getattr(self, "skip", None) is not None else {}
        def put(self, tensors):
            if tensors: self.skip.tables = tensors
        def painter(self, tok, config):
            draw = kind.painter(self, tok, old(config))
            if "codec" not in uses: return draw
            def f(captions, seed=0, each=None):
                import torch
                codec = uses["codec"].model.codec
                dev = next(codec.parameters()).device
                with torch.no_grad(): return torch.cat([codec.decode(z.to(dev)).cpu() for z in draw(captions, seed, each).float().split(250)])
            return f
        space = dict(prepare=prepare, extra=property(get, put), painter=painter, options={k: OPTIONS[k] for k in getattr(kind, "options", ())}, measure=None)
        space["calls"] = lambda self, config: kind.calls(self, old(config))
        model.__class__ = type(kind.__name__, (kind,), space)
        return tok, model


def legacy():
    out = {}
    for k in OLD.split():
        try: mod = import_module("t2i_course." + k)
        except ImportError: continue
        if not hasattr(mod, "Config") and hasattr(mod, "build"): out[k.split(".")[1]] = "t2i_course." + k
    return out
