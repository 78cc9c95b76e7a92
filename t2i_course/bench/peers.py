"""Two published recipes, trained as they stand."""

import time

import torch
import torch.nn.functional as F
from torch import nn

from t2i_course.core.counting import parameters
from t2i_course.core.data import Draws
from t2i_course.core.files import CourseError


BATCH = 128  # of both published recipes


class Unit2:
    "Hugging Face's diffusion course, unit 2: UNet2DModel, the label as channels, DDPMScheduler, Adam 1e-3"

    steps = "DDIM, 50 steps"

    def __init__(self):
        from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

        self.label = nn.Embedding(10, 4)
        self.unet = UNet2DModel(
            sample_size=28,
            in_channels=1 + 4,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
        self.net = nn.ModuleList([self.label, self.unet])
        table = dict(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
        self.chain, self.ddim = DDPMScheduler(**table), DDIMScheduler(**table)

    def predict(self, x, i, y):
        planes = self.label(y)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.unet(torch.cat([x, planes], 1), i).sample

    def loss(self, x0, y):
        noise, i = torch.randn_like(x0), torch.randint(0, 999, (len(x0),))
        return F.mse_loss(self.predict(self.chain.add_noise(x0, noise, i), i, y), noise)

    @torch.no_grad()
    def draw(self, y, x):
        self.ddim.set_timesteps(50)
        for i in self.ddim.timesteps:
            x = self.ddim.step(self.predict(x, i, y), i, x).prev_sample
        return x


class TorchCFM:
    "torchcfm's conditional MNIST example: its U-Net of 32 channels, straight paths, Adam 1e-3"

    steps = "Euler, 50 steps"

    def __init__(self):
        try:
            from torchcfm.models.unet import UNetModel
        except ImportError as e:
            raise CourseError(
                f"this arm needs torchcfm ({e}): pip install torchcfm, or leave it out with --peers diffusers"
            ) from e
        self.net = UNetModel(
            dim=(1, 28, 28), num_channels=32, num_res_blocks=1, num_classes=10, class_cond=True
        )

    def loss(self, x1, y):  # time runs from noise to data here
        s, noise = torch.rand(len(x1)), torch.randn_like(x1)
        at = s[:, None, None, None]
        return F.mse_loss(self.net(s, at * x1 + (1 - at) * noise, y), x1 - noise)

    @torch.no_grad()
    def draw(self, y, x):
        for k in range(50):
            x = x + self.net(torch.full((len(x),), k / 50), x, y) / 50
        return x


PEERS = dict(diffusers=Unit2, torchcfm=TorchCFM)


def train_peer(
    peer,  # see PEERS
    data,  # digits
    seconds: float,  # wall time of the training steps, data included
    seed: int = 0,
    say=lambda s: None,
) -> dict:  # what it took
    "The published recipe as it stands: float32, batch 128, constant learning rate"
    torch.manual_seed(seed)
    opt = torch.optim.Adam(peer.net.parameters(), 1e-3)
    used, cpu, steps, losses = 0.0, 0.0, 0, []
    while used < seconds:
        start, start_cpu = time.perf_counter(), time.process_time()
        b = data.batch("train", Draws(seed, torch.arange(steps * BATCH, (steps + 1) * BATCH)))
        loss = peer.loss(b.x, b.attrs[data.attribute])
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
        used, cpu, steps = (
            used + time.perf_counter() - start,
            cpu + time.process_time() - start_cpu,
            steps + 1,
        )
        if steps % 20 == 0:
            say(f"  step {steps}, {used:.0f} s, loss {losses[-1]:.3f}")
    tail = losses[-max(1, len(losses) // 10) :]
    return dict(
        params=parameters(peer.net),
        steps=steps,
        images=steps * BATCH,
        train_seconds=used,
        cpu_seconds=cpu,
        steps_per_second=steps / used,
        loss=sum(tail) / len(tail),
        batch=BATCH,
        precision_mode="fp32",
    )


def draw_peer(peer, data, captions, seed):
    "50 pictures at a time"
    y = torch.tensor([data.demands(c)[data.attribute] for c in captions])
    noise = Draws(seed, torch.arange(len(y))).normal("start", *data.shape)
    peer.net.eval()
    return torch.cat([peer.draw(*part) for part in zip(y.split(50), noise.split(50))])
