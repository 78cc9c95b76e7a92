"""`t2i bench digits`: MNIST against the clock, beside published recipes. `t2i bench speed`: the same work in two libraries."""
import json, time
from functools import partial
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from t2i_course.core.conditioning import Cond
from t2i_course.core.data import Draws, scale
from t2i_course.core.files import CourseError, write_json
from t2i_course.core.sources import load
from t2i_course.core.metrics import broken_strokes, frechet, judge_for, obedience, precision_recall
from t2i_course.core.ema import EMA
from t2i_course.core.training import State, feed, has_bf16, train
from t2i_course.diffusion.ddpm import UNet

BAR = dict(accuracy=.98, fd_floors=4.4) # what "good" is, for the time it takes to get there
BUDGETS = dict(ours=(2.5, 5., 15., 60., 240.), plain=(15., 25., 60.)) # seconds
BATCH = 128 # of both published recipes

def precisions(
    device:str='cpu',
)->tuple:       # names of the precisions that are worth a measurement
    "float32, and bfloat16 where the device has units for it"
    return ('fp32','bf16') if has_bf16(device) else ('fp32',)

def left_out(device:str='cpu')->dict:
    "What a result says of bfloat16 where it was not measured"
    return {} if has_bf16(device) else dict(bf16='not measured: no bfloat16 units')

# ---- the measuring instrument ----
class Ruler:
    "MNIST's measure: accuracy, Frechet distance in floors, recall and broken strokes of the same drawings"
    def __init__(self,
        data,         # MNIST or another set of single digits
        n:int=1000,   # drawings, and real pictures of a floor
    ):
        self.data,self.judge = data,judge_for(data)
        real = [data.batch(k, Draws(0, torch.arange(min(10_000, len(data.labels[k]))))) for k in ('train','test')]
        self.train = self.judge.features(real[0].x)
        every = torch.cat([self.train, self.judge.features(real[1].x)])
        self.n = min(n, len(every)//4)
        folds = torch.arange(len(every))//self.n
        self.floors = [frechet(every[folds==i], every[folds!=i]) for i in range(len(every)//self.n)]
        self.floor = sum(self.floors)/len(self.floors)
        self.broken_real = broken_strokes(torch.cat([r.x for r in real]))
        self.ceiling = obedience(self.judge, real[1].x, data, real[1].captions)['all']
    def about(self)->dict:
        "How every row is measured"
        return dict(data=self.data.name, source=self.data.source, n=self.n, judge='digits read by the shipped judge',
                    captions='the ten digits in turn', reference=f'{len(self.train):,} training digits',
                    fd_floor=self.floor, fd_floors_of_folds=[round(f, 4) for f in self.floors],
                    floor=f'mean over {len(self.floors)} disjoint sets of {self.n:,} real digits, each against all the others',
                    accuracy_real=self.ceiling, broken_real=self.broken_real, k=5)
    def row(self,
        draw,        # draw(captions, seed) -> (n c h w)
        seed:int=0,  # of the start noise
        n:int=None,  # drawings; a distance is given only for the full number
    )->dict:         # the four numbers, and what drawing costs
        "One measured row"
        captions = [self.data.sayings[i%len(self.data.sayings)] for i in range(n or self.n)]
        start,cpu = time.perf_counter(),time.process_time()
        x = draw(captions, seed).float().clamp(-1, 1)
        took = [1000/len(x)*v for v in (time.perf_counter()-start, time.process_time()-cpu)]
        f = self.judge.features(x)
        fd,(precision,recall) = frechet(f, self.train),precision_recall(self.train, f)
        return dict(accuracy=obedience(self.judge, x, self.data, captions)['all'], fd=fd, fd_floors=fd/self.floor,
                    precision=precision, recall=recall, broken=broken_strokes(x), n=len(x),
                    seconds_per_1000=took[0], cpu_seconds_per_1000=took[1])

# ---- two published recipes ----
class Unit2:
    "The Hugging Face diffusion course, unit 2: UNet2DModel with the label as input channels, DDPMScheduler, Adam 1e-3"
    steps = 'DDIM, 50 steps'
    def __init__(self):
        from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
        self.label = nn.Embedding(10, 4)
        self.unet = UNet2DModel(
            sample_size=28, in_channels=1+4, out_channels=1, layers_per_block=2, block_out_channels=(32,64,64),
            down_block_types=('DownBlock2D','AttnDownBlock2D','AttnDownBlock2D'),
            up_block_types=('AttnUpBlock2D','AttnUpBlock2D','UpBlock2D'))
        self.net = nn.ModuleList([self.label, self.unet])
        table = dict(num_train_timesteps=1000, beta_schedule='squaredcos_cap_v2')
        self.chain,self.ddim = DDPMScheduler(**table),DDIMScheduler(**table)
    def predict(self, x, i, y):
        planes = self.label(y)[:,:,None,None].expand(-1, -1, *x.shape[2:])
        return self.unet(torch.cat([x, planes], 1), i).sample
    def loss(self, x0, y):
        noise,i = torch.randn_like(x0),torch.randint(0, 999, (len(x0),))
        return F.mse_loss(self.predict(self.chain.add_noise(x0, noise, i), i, y), noise)
    @torch.no_grad()
    def draw(self, y, x):
        self.ddim.set_timesteps(50)
        for i in self.ddim.timesteps: x = self.ddim.step(self.predict(x, i, y), i, x).prev_sample
        return x

class TorchCFM:
    "torchcfm's conditional MNIST example: its U-Net of 32 channels, straight paths, Adam 1e-3"
    steps = 'Euler, 50 steps'
    def __init__(self):
        try: from torchcfm.models.unet import UNetModel
        except ImportError as e:
            raise CourseError(f'this arm needs torchcfm ({e}): pip install torchcfm, '
                              'or leave it out with --peers diffusers') from e
        self.net = UNetModel(dim=(1,28,28), num_channels=32, num_res_blocks=1, num_classes=10, class_cond=True)
    def loss(self, x1, y): # time runs from noise to data here
        s,noise = torch.rand(len(x1)),torch.randn_like(x1)
        at = s[:,None,None,None]
        return F.mse_loss(self.net(s, at*x1+(1-at)*noise, y), x1-noise)
    @torch.no_grad()
    def draw(self, y, x):
        for k in range(50): x = x+self.net(torch.full((len(x),), k/50), x, y)/50
        return x

PEERS = dict(diffusers=Unit2, torchcfm=TorchCFM)

def train_peer(
    peer,          # see PEERS
    data,          # digits
    seconds:float, # wall time of the training steps, data included
    seed:int=0,
    say=lambda s: None,
)->dict:           # what it took
    "The published recipe as it stands: float32, batch 128, constant learning rate"
    torch.manual_seed(seed)
    opt = torch.optim.Adam(peer.net.parameters(), 1e-3)
    used,cpu,steps,losses = 0.,0.,0,[]
    while used<seconds:
        start,start_cpu = time.perf_counter(),time.process_time()
        b = data.batch('train', Draws(seed, torch.arange(steps*BATCH, (steps+1)*BATCH)))
        loss = peer.loss(b.x, b.attrs[data.attribute])
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
        used,cpu,steps = used+time.perf_counter()-start,cpu+time.process_time()-start_cpu,steps+1
        if steps%20==0: say(f'  step {steps}, {used:.0f} s, loss {losses[-1]:.3f}')
    tail = losses[-max(1, len(losses)//10):]
    return dict(params=count(peer.net), steps=steps, images=steps*BATCH, train_seconds=used, cpu_seconds=cpu,
                steps_per_second=steps/used, loss=sum(tail)/len(tail), batch=BATCH, precision_mode='fp32')

def draw_peer(peer, data, captions, seed):
    "50 pictures at a time"
    y = torch.tensor([data.demands(c)[data.attribute] for c in captions])
    noise = Draws(seed, torch.arange(len(y))).normal('start', *data.shape)
    peer.net.eval()
    return torch.cat([peer.draw(*part) for part in zip(y.split(50), noise.split(50))])

# ---- speed alone ----
# the UNet of this course with about as many parameters and multiply-adds as the other one (a test holds them within 10%)
TWINS = dict(diffusers=dict(widths=(16,288), depths=(2,1), patch=1), torchcfm=dict(widths=(48,192), depths=(2,1), patch=1))

def count(net)->int: return sum(p.numel() for p in net.parameters())

def multiply_adds(run)->int:
    "Of all convolutions and matrix products that a call makes"
    with FlopCounterMode(display=False) as f: run()
    return f.get_total_flops()//2

def bare_cond(n:int, dim:int=96)->Cond:
    "A condition of n random vectors"
    ids = torch.zeros(n, 1, dtype=torch.int64)
    return Cond(torch.zeros(n, 1, dim), torch.randn(n, dim), ids==0, ids)

def our_step(net, size:int, bf16:bool):
    "One step of plain flow matching with a given network: a function without arguments"
    opt = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)
    x0,t,cond = torch.randn(size, 1, 28, 28),torch.rand(size),bare_cond(size)
    def step():
        noise = torch.randn_like(x0)
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            out = net((1-t)[:,None,None,None]*x0+t[:,None,None,None]*noise, t, cond)
        opt.zero_grad(); F.mse_loss(out.float(), noise-x0).backward(); opt.step()
    return step

def peer_step(peer, size:int):
    "One step of a published recipe: a function without arguments"
    opt = torch.optim.Adam(peer.net.parameters(), 1e-4)
    x0,y = torch.randn(size, 1, 28, 28),torch.randint(0, 10, (size,))
    def step(): opt.zero_grad(); peer.loss(x0, y).backward(); opt.step()
    return step

def in_turns(
    steps:dict, # name -> function
    rounds:int, # of all of them
)->dict:        # name -> sorted seconds of a call
    "Interleaved, so that a slow minute of the machine is slow for all; the first round does not count"
    took = {k:[] for k in steps}
    for i in range(rounds+1):
        for k,f in steps.items():
            start = time.perf_counter(); f()
            if i: took[k].append(time.perf_counter()-start)
    return {k:sorted(v) for k,v in took.items()}

def median(v)->float: return sorted(v)[len(v)//2]

def equal_size(
    name:str,     # of a peer
    rounds:int=8,
)->dict:          # seconds a step, and ratios of seconds
    "Training steps of batch 128 at about equal parameters and multiply-adds"
    torch.manual_seed(0)
    peer,net = PEERS[name](),UNet(1, 96, d_emb=128, **TWINS[name]).to(memory_format=torch.channels_last)
    one = torch.zeros(1, 1, 28, 28)
    with torch.no_grad():
        theirs = multiply_adds(lambda: peer.loss(one, torch.zeros(1, dtype=torch.int64)))
        ours = multiply_adds(lambda: net(one, torch.zeros(1), bare_cond(1)))
    took = in_turns({'peer fp32':peer_step(peer, BATCH)}|{f'ours {p}':our_step(net, BATCH, p=='bf16') for p in precisions()}, rounds)
    took = {k:median(v) for k,v in took.items()}
    return dict(params=[count(peer.net), count(net)], multiply_adds=[theirs, ours], seconds_a_step=took,
                times_faster={k:took['peer fp32']/v for k,v in took.items() if k!='peer fp32'})|left_out()

def conv_peak(
    bf16:bool,    # or float32
    rounds:int=6,
)->dict:          # GFLOP/s of each shape; the largest is the peak
    "The fastest 3x3 convolution of this machine: forward and backward, several shapes, the best of several calls"
    found = {}
    for batch,c,s in ((64,64,14), (64,128,14), (128,64,28), (64,256,7), (128,96,7), (32,128,28)):
        conv = nn.Conv2d(c, c, 3, padding=1).to(memory_format=torch.channels_last)
        x = torch.randn(batch, c, s, s).contiguous(memory_format=torch.channels_last).requires_grad_()
        if bf16: conv,x = conv.bfloat16(),x.detach().bfloat16().requires_grad_()
        g = torch.ones_like(x)
        took = min(in_turns({0:lambda conv=conv, x=x, g=g: conv(x).backward(g)}, rounds)[0])
        found[f'{batch}x{c}x{s}x{s}'] = 3*2*batch*c*c*9*s*s/took/1e9
    return found

def roofline(
    config:dict,     # of flow matching, as from `recipe`
    data,            # digits
    rounds:int=30,
)->dict:             # GFLOP/s of the whole step and its share of the peak
    "The arithmetic of the convolutions and matrix products of a training step, over its time and over the machine's peak"
    from t2i_course.flow.flow_matching import build
    from t2i_course.diffusion.preconditioning import fit_skip
    from torch.profiler import ProfilerActivity, profile
    before,out = torch.get_num_threads(),{}
    try:
        for threads in sorted({1, before}):
            torch.set_num_threads(threads)
            peak = {p:max(conv_peak(p=='bf16').values()) for p in precisions()}
            for precision in precisions():
                torch.manual_seed(0)
                tok,den = build(config)
                fit_skip(den, data, tok, config['fit_images'])
                state = State(den.net, config['lr'], EMA(den.net, config['half_life']), precision=precision)
                steps = train(state, den.loss, feed(data, tok), images=(rounds+15)*config['batch'], batch=config['batch'])
                for _ in range(4): next(steps)
                macs = multiply_adds(lambda steps=steps: next(steps))
                took = median(in_turns({0:lambda steps=steps: next(steps)}, rounds)[0])
                speed = 2*macs/took/1e9
                out[f'{precision}, {threads} thread{"s"*(threads>1)}'] = row = dict(
                    conv_peak=peak, gflop_a_step=2*macs/1e9, seconds_a_step=took, gflops=speed,
                    share_of_peak=speed/peak[precision])
                if 'bf16' in peak: row['share_of_bf16_peak'] = speed/peak['bf16']
                if precision==precisions()[-1]: # the one that trains here
                    with profile(activities=[ProfilerActivity.CPU]) as p:
                        for _ in range(5): next(steps)
                    ops = sorted(((e.key, e.self_cpu_time_total) for e in p.key_averages()), key=lambda e: -e[1])
                    whole = sum(v for _,v in ops)
                    row['profile'] = {k:round(v/whole, 4) for k,v in ops[:14]}
    finally: torch.set_num_threads(before)
    return out|left_out()

# ---- the command ----
def bar_reached(rows:list)->bool:
    "The bar, by the mean over seeds"
    mean = lambda k: sum(r[k] for r in rows)/len(rows)
    return mean('accuracy')>=BAR['accuracy'] and mean('fd_floors')<=BAR['fd_floors']

def time_to_bar(arm:dict)->dict:
    "The shortest budget that reaches the bar, and the longest shorter one, which does not"
    budgets = sorted(arm, key=float)
    good = [i for i,b in enumerate(budgets) if bar_reached(arm[b]['rows'])]
    if not good: return dict(reached='not reached', longest=float(budgets[-1]))
    i = good[0]
    return dict(reached=float(budgets[i]), missed=float(budgets[i-1]) if i else None)

def summary(rows:list)->dict:
    "Mean and spread over the seeds"
    keys = ('accuracy','fd_floors','recall','precision','broken','train_seconds','cpu_seconds','images')
    return dict(rows=rows, **{k:dict(mean=sum(r[k] for r in rows)/len(rows),
                                     spread=max(r[k] for r in rows)-min(r[k] for r in rows)) for k in keys})

def own_settings(arm:str, seconds:float, seed:int, ruler:Ruler)->dict:
    "What the run of such a row has in its config"
    from t2i_course.cli import settings
    return settings('flow_matching', ruler.data.name, scale(), seconds, None, seed, 'auto', dict(skip=arm=='ours'))

def own_row(arm:str, seconds:float, seed:int, ruler:Ruler, work:Path)->dict:
    "Train and measure flow matching with (ours) or without (plain) the closed-form skip"
    from t2i_course.cli import Model, cleared, train_run
    run = work/f'{arm}-{seconds:g}s-{seed}'
    cleared(run, own_settings(arm, seconds, seed, ruler))
    cpu = time.process_time()
    train_run('flow_matching', ruler.data.name, seconds=seconds, seed=seed, out=run, quiet=True, save_every=1e6,
              resume=(run/'config.json').exists(), changes=dict(skip=arm=='ours'))
    cpu,model = time.process_time()-cpu,Model(run)
    took = json.loads((run/'train.json').read_text(encoding='utf-8'))
    c = model.config
    return ruler.row(model.draw, seed)|dict(
        method='flow matching'+(' with the closed-form skip' if arm=='ours' else ''), seed=seed, params=took['params'],
        images=took['images'], steps=took['steps'], train_seconds=took['seconds'], cpu_seconds=cpu,
        nfe=model.den.calls(c), guidance=c['guidance'], batch=c['batch'], widths=c['widths'], precision_mode=c['precision'])

def peer_row(name:str, seconds:float, ruler:Ruler, say, n:int=200)->dict:
    "Train and measure a published recipe"
    peer = PEERS[name]()
    took = train_peer(peer, ruler.data, seconds, say=say)
    row = ruler.row(partial(draw_peer, peer, ruler.data), n=n)
    return row|took|dict(method=name, sampler=peer.steps, seed=0, bar='reached' if bar_reached([row]) else 'not reached')

def digits(
    stamp:dict,       # chapter, command, date, hardware, versions, seeds
    path:Path,        # results file
    budgets=None,     # arm -> seconds; default BUDGETS
    seeds=(0,1,2),    # of ours
    peers=tuple(PEERS),
    peer_seconds:float=240.,
    data=None,        # default mnist
    say=print,
):
    "All arms, one after the other in turns; what is finished is kept in runs/bench and reused"
    small = scale()=='smoke'
    ruler,work = Ruler(data or load('mnist'), 40 if small else 1000),Path('runs')/'bench'
    budgets = budgets or BUDGETS
    res = stamp|dict(bar=BAR, protocol=ruler.about())
    same = {k:stamp.get(k) for k in ('scale','hardware','versions')}|dict(data=ruler.data.name, source=ruler.data.source, n=ruler.n)
    def keep(name, make, **made_with):
        "The row of an earlier call of the same scale, settings, version and machine, or a new one"
        from t2i_course.cli import alike
        file,made_with = work/f'{name}.json',same|made_with
        try: old = json.loads(file.read_text(encoding='utf-8'))
        except (OSError, ValueError): old = {}
        if not alike(old.get('made_with') or {}, made_with):
            old = dict(made_with=made_with, row=make())
            work.mkdir(parents=True, exist_ok=True)
            write_json(file, old)
        return old['row']
    for arm in budgets: res[arm] = {}
    for seconds in sorted({s for v in budgets.values() for s in v}):
        for seed in seeds:
            for arm in (a for a,v in budgets.items() if seconds in v):
                row = keep(f'{arm}-{seconds:g}-{seed}', partial(own_row, arm, seconds, seed, ruler, work),
                           config=own_settings(arm, seconds, seed, ruler)|dict(versions=None))|dict(data=ruler.data.name)
                say(f"{arm} {seconds:g} s, seed {seed}: {100*row['accuracy']:.1f}%, {row['fd_floors']:.2f} floors, "
                    f"recall {row['recall']:.2f}, broken {100*row['broken']:.1f}%")
                res[arm].setdefault(f'{seconds:g}', []).append(row)
                write_json(path, res)
    for arm in budgets: res[arm] = {k:summary(v) for k,v in res[arm].items()}
    res['time_to_bar'] = {k:time_to_bar(res[k]) for k in budgets}
    for name in peers:
        row = keep(f'{name}-{peer_seconds:g}', partial(peer_row, name, peer_seconds, ruler, say, 20 if small else 200), seconds=peer_seconds)
        row['data'] = ruler.data.name
        say(f"{name} {peer_seconds:g} s: {100*row['accuracy']:.1f}%, {row['fd_floors']:.0f} floors, "
            f"{row['steps_per_second']:.2f} steps a second, bar {row['bar']}")
        res.setdefault('peers', {})[name] = row
        res.setdefault('equal_size', {})[name] = keep(f'speed-{name}', partial(equal_size, name, 2 if small else 5))
        write_json(path, res)
    say('share of the convolution peak ...')
    from t2i_course.flow.flow_matching import recipe_for
    config = recipe_for(ruler.data, 'smoke' if small else 'demo', 60)
    res['roofline'] = keep('roofline', lambda: roofline(config, ruler.data, 4 if small else 30), config=config)
    write_json(path, res)
    say(f'wrote {path}')

# ---- t2i bench speed ----
def wait(device): # GPUs work ahead of the program
    if device=='cuda': torch.cuda.synchronize()

def matmul_peak(
    device:str,
    dtype,        # torch.float32 or torch.bfloat16
    side:int=None,# of the matrices; default 2048 on a CPU (256 at smoke scale), 8192 on a GPU
    rounds:int=8,
)->float:         # FLOP/s
    "The fastest product of two square matrices that was seen"
    n = side or (8192 if device!='cpu' else 256 if scale()=='smoke' else 2048)
    a,b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    def run(): (a@b); wait(device)
    return 2*n**3/min(in_turns({0:run}, rounds)[0])

def stepper(
    net,          # called as run(net, x) -> (b c h w)
    run,
    x,            # (b c h w) noised pictures
    bf16:bool,    # autocast, or float32
    train:bool,   # a training step with fused AdamW, or only the forward pass
):                # a function without arguments
    "One step of a network: the loss is the same for both libraries"
    device = x.device.type
    opt = torch.optim.AdamW(net.parameters(), 1e-5, fused=True) if train else None
    def forward():
        with torch.autocast(device, torch.bfloat16, enabled=bf16): return run(net, x).float()
    def step():
        if train:
            opt.zero_grad(set_to_none=True)
            F.mse_loss(forward(), x).backward()
            opt.step()
        else:
            with torch.no_grad(): forward()
        wait(device)
    return step

def memory_of(net, run, x, bf16:bool)->int:
    "Bytes that a training step keeps for its backward pass, weights left out; on a GPU the peak that was allocated"
    device = x.device.type
    if device=='cuda':
        torch.cuda.reset_peak_memory_stats()
        stepper(net, run, x, bf16, True)()
        return torch.cuda.max_memory_allocated()
    from t2i_course.capstone.report_card import kept_bytes
    with torch.autocast(device, torch.bfloat16, enabled=bf16): return kept_bytes(net, lambda: run(net, x))

def race(
    nets:dict,  # name -> network, ours first
    runs:dict,  # name -> run(net, x)
    x,          # (b c h w) the same pictures for all
    macs:dict,  # name -> multiply-adds of one picture
    rounds:int=12,
)->dict:
    "Training and drawing steps of two networks in turns: seconds, ratios with their range, share of the matmul peak, memory"
    device,out = x.device.type,dict(batch=len(x), params={k:count(n) for k,n in nets.items()}, multiply_adds=macs)
    kinds = dict(fp32=torch.float32, bf16=torch.bfloat16)
    (ours,*others),peak = nets,{p:matmul_peak(device, kinds[p]) for p in precisions(device)}
    for precision in precisions(device):
        for kind in ('train','draw'):
            steps = {k:stepper(n, runs[k], x, precision=='bf16', kind=='train') for k,n in nets.items()}
            took = {k:[] for k in steps}
            for i in range(rounds+2):
                for k,f in steps.items():
                    start = time.perf_counter(); f()
                    if i>1: took[k].append(time.perf_counter()-start)
            passes = 3 if kind=='train' else 1
            flops = {k:passes*2*macs[k]*len(x)/median(v) for k,v in took.items()}
            ratios = {k:sorted(b/a for a,b in zip(took[ours], took[k])) for k in others}
            out[f'{precision} {kind}'] = dict(
                seconds={k:median(v) for k,v in took.items()}, images_per_second={k:len(x)/median(v) for k,v in took.items()},
                times_faster={k:dict(median=median(r), low=r[0], high=r[-1]) for k,r in ratios.items()},
                share_of_peak={k:v/peak[precision] for k,v in flops.items()})
        out[f'{precision} memory'] = {k:memory_of(n, runs[k], x, precision=='bf16') for k,n in nets.items()}
    return out|dict(matmul_peak=peak)|left_out(device)

def unets(device:str, batch:int):
    "Our U-Net and diffusers' at about equal parameters and multiply-adds (28 x 28 digits); diffusers' in both layouts of memory"
    torch.manual_seed(0)
    label = torch.zeros(batch, 4, 28, 28, device=device)
    net = UNet(1, 96, d_emb=128, **TWINS['diffusers']).to(device, memory_format=torch.channels_last)
    theirs = Unit2().unet.to(device)
    last = Unit2().unet.to(device, memory_format=torch.channels_last)
    t,cond = torch.rand(batch, device=device),bare_cond(batch).to(device)
    step = (1000*t).long()
    def ask(n, x): return n(torch.cat([x, label], 1), step).sample
    runs = dict(ours=lambda n, x: n(x, t, cond), diffusers=ask,
                diffusers_channels_last=lambda n, x: n(torch.cat([x, label], 1).contiguous(memory_format=torch.channels_last), step).sample)
    return dict(ours=net, diffusers=theirs, diffusers_channels_last=last),runs,torch.randn(batch, 1, 28, 28, device=device)

def dits(device:str, batch:int, width:int=384, depth:int=12, size:int=16):
    "The same DiT twice, with the same weights: ours and diffusers' (latents of 4 channels, patch 2)"
    from diffusers import DiTTransformer2DModel
    from t2i_course.transformer.dit import from_diffusers
    torch.manual_seed(0)
    heads = width//(72 if width==1152 else 64)
    theirs = DiTTransformer2DModel(num_attention_heads=heads, attention_head_dim=width//heads, in_channels=4, out_channels=8, num_layers=depth,
                                   sample_size=size, patch_size=2, num_embeds_ada_norm=1000)
    weights = theirs.state_dict()
    for k,v in weights.items(): # the published start has an output of 0: both would agree on nothing
        if v.is_floating_point() and 'pos_embed.pos' not in k: v.copy_(torch.randn_like(v)*.02 if v.ndim>1 else v)
    first = {k.split('.', 2)[2]:v for k,v in weights.items() if k.startswith('transformer_blocks.0.') and '.emb.' in k}
    for k,v in weights.items():
        if '.emb.' in k: v.copy_(first[k.split('.', 2)[2]])
    ours = from_diffusers(dict(theirs.config), weights).to(device)
    theirs = theirs.to(device).train()
    step,label = torch.randint(0, 1000, (batch,), device=device),torch.randint(0, 1000, (batch,), device=device)
    ids = label[:,None]
    cond = Cond(torch.zeros(batch, 1, 1, device=device), torch.zeros(batch, 1, device=device), ids>=0, ids)
    runs = dict(ours=lambda n, x: n(x, (step+1)/1000, cond)[:,:4],
                diffusers=lambda n, x: n(x, timestep=step, class_labels=label).sample[:,:4])
    return dict(ours=ours, diffusers=theirs),runs,torch.randn(batch, 4, size, size, device=device)

def speed(
    stamp:dict, # chapter, command, date, hardware, versions
    path:Path,  # results file
    device:str='cpu',
    say=print,
):
    "U-Net and DiT of this course beside diffusers' classes; on a GPU also the published sizes with torch.compile"
    small,res = scale()=='smoke',stamp|dict(device=device, threads=torch.get_num_threads())
    rounds,batch = (2, 4) if small else (12, 64)
    pairs = dict(unet=lambda: unets(device, batch), dit=lambda: dits(device, batch//2, **(dict(width=64, depth=2) if small else {})))
    if device=='cuda':
        for k,shape,n in (('B', (768, 12), 256), ('XL', (1152, 28), 64)):
            pairs[f'DiT-{k}/2'] = partial(dits, device, n, *shape, size=32)
    for k,why in left_out(device).items(): say(f'{k} {why}')
    for name,make in pairs.items():
        nets,runs,x = make()
        with torch.no_grad():
            for n in nets.values(): n.eval()
            macs = {k:multiply_adds(partial(runs[k], n, x))//len(x) for k,n in nets.items()}
            far = (runs['ours'](nets['ours'], x)-runs['diffusers'](nets['diffusers'], x)).abs().max().item() if name!='unet' else None
            for n in nets.values(): n.train()
        if device=='cuda' and 'DiT-' in name: nets['ours'].compile(); nets['diffusers'].compile()
        res[name] = race(nets, runs, x, macs, rounds)|dict(apart=far)
        for k,v in res[name].items():
            if not isinstance(v, dict) or 'times_faster' not in v: continue
            ratios = ', '.join(f"{t['median']:.2f} times as fast as {r} ({t['low']:.2f} to {t['high']:.2f})" for r,t in v['times_faster'].items())
            say(f"{name} {k}: {ratios}; {v['images_per_second']['ours']:.0f} images a second, {v['share_of_peak']['ours']:.0%} of the matmul peak")
        write_json(path, res)
    say(f'wrote {path}')
