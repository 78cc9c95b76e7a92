"What is saved of a run so that it goes on to the same bytes, and what is not, because it does not learn."

import torch
from torch import nn

from t2i_course.core.files import CourseError


def frozen(
    net: nn.Module,  # any network
) -> set:  # names in its state_dict
    "What does not learn: weights without a gradient, and buffers of modules whose weights are all so"

    def still(name):  # of a buffer: it belongs to the nearest module around it that has weights
        parent = name.rpartition(".")[0]
        weights = list((net.get_submodule(parent) if parent else net).parameters())
        if weights or not parent:
            return bool(weights) and not any(p.requires_grad for p in weights)
        return still(parent)

    weights = dict(net.named_parameters(remove_duplicate=False))
    return {k for k in net.state_dict() if (not weights[k].requires_grad if k in weights else still(k))}


def learning(
    net: nn.Module,  # any network
) -> list:  # its weights that have a gradient
    "What the optimizer moves; raises CourseError where nothing does"
    found = [p for p in net.parameters() if p.requires_grad]
    if not found:
        raise CourseError("nothing of this network learns: all of its weights are frozen")
    return found


def load_trained(
    net: nn.Module,  # what is frozen in it stays as it is
    tensors: dict,  # name -> tensor, of all that learned
    still: set = None,  # names of what is frozen, if it is known already
):
    "Take up trained weights; raises RuntimeError when they belong to another network"
    still = frozen(net) if still is None else still
    wrong = (net.state_dict().keys() - still) ^ tensors.keys()
    if wrong:
        raise RuntimeError(f"of what was trained, {', '.join(sorted(wrong)[:3])} is here or there alone")
    net.load_state_dict(tensors, strict=False)


def load_optimizer(
    opt,  # fresh, of the same weights
    tensors: dict,  # '0.exp_avg' -> tensor: which weight, and which of its averages
):
    "Take up what an optimizer remembers of each weight"
    state, params = {}, [p for g in opt.param_groups for p in g["params"]]
    for k, v in tensors.items():
        # a copy, because the optimizer goes on in it; laid out in memory as its weight is
        i, name = k.split(".", 1)
        like = params[int(i)]
        own = torch.empty_like(like).copy_(v) if v.shape == like.shape else v.clone()
        state.setdefault(int(i), {})[name] = own
    opt.load_state_dict(dict(state=state, param_groups=opt.state_dict()["param_groups"]))


class Resumable:
    "What `State` of core.training is saved by, and taken up again"

    def ready(self):
        "In training mode; a frozen module stays as it is in use, or its running means would move"
        self.net.train()
        if not self.frozen:
            return
        for m in self.net.modules():
            weights = list(m.parameters())
            if weights and not {*map(id, weights)} & {*map(id, self.learning)}:
                m.eval()

    def tensors(self) -> dict:
        "Every tensor of the run under a flat name; they live on in training, so save or clone them"
        out = {f"net.{k}": v for k, v in self.net.state_dict().items() if k not in self.frozen}
        if self.ema is not None:
            out |= {f"ema.{k}": v for k, v in self.ema.shadow.items()}
        for part, opt in self.opts.items():
            for i, s in opt.state_dict()["state"].items():
                out |= {f"opt{part and ':' + part}.{i}.{k}": v for k, v in s.items()}
        return out

    def numbers(self) -> dict:
        "The rest of the run, as JSON values"
        return dict(
            step=self.step,
            images=self.images,
            seconds=self.seconds,
            begun=list(self.begun),
            scaler=self.scaler.state_dict(),
        )

    def load(
        self,
        tensors: dict,  # as from `tensors`
        numbers: dict,  # as from `numbers`
    ):
        "Take up a saved run; raises KeyError or RuntimeError when it belongs to another network"

        def own(start):
            return {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}

        load_trained(self.net, own("net."), self.frozen)
        if self.ema is not None:
            self.ema.load(own("ema."))
        for part, opt in self.opts.items():
            load_optimizer(opt, own(f"opt{part and ':' + part}."))
        if numbers["scaler"]:
            self.scaler.load_state_dict(numbers["scaler"])
        self.begun = list(numbers.get("begun", []))
        self.step, self.images, self.seconds = numbers["step"], numbers["images"], numbers["seconds"]
        return self
