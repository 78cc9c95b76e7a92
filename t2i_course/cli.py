"""The `t2i` command: train, sample, eval, run, data, bench, report, doctor, demo."""
import argparse, errno, json, math, os, platform, sys, time
from collections import Counter
from datetime import date
from importlib import import_module, metadata
from pathlib import Path
import numpy as np
import torch
from t2i_course.core.data import CourseError, Draws, load, results_path, scale as current_scale, split_words
from t2i_course.core.ema import state_for
from t2i_course.core.training import ALONE, bf16_pays, feed, pick_device, train
from t2i_course.runs import (Stopped, config_hash, cut_log, follow, load_tensors, read_config, save_tensors,
                             write_json, write_whole)
from t2i_course.runs import resume as take_up

def at(part, *names)->dict: return {name:f't2i_course.{part}.{name}' for name in names}

RECIPES = (dict(gan='t2i_course.gan.adversarial') | at('gan', 'stylegan2', 'biggan', 'text_gan')
           | at('codec', 'vae', 'vqvae', 'vqvae2', 'dvae') | at('diffusion', 'ddpm') | at('transformer', 'dit') | at('flow', 'flow_matching')
           | at('ar', 'pixelcnn', 'dalle', 'parti', 'cm3leon'))
CHAPTERS = ({RECIPES[k].split('.')[-1]:RECIPES[k] for k in RECIPES} | at('core', 'metrics')
            | at('diffusion', 'schedules', 'samplers', 'preconditioning', 'guidance', 'terminal_snr')
            | at('scale', 'mixed_precision', 'fsdp', 'pipeline', 'recipes') | at('capstone', 'report_card'))
DATA = 'digits, painted, painted2, mnist, fashion, cifar10 or a folder'
# the clock when neither --images nor --seconds is given
IMAGES = dict(smoke=2_048, demo=100_000, full=100_000_000)
PROMPTS = ['a bold red seven leaning left on pink', 'a thin green three on black',
           'a bold purple nine on white', 'a blue four leaning right on gray',
           'a bold orange six on black', 'a thin red two on white',
           'a bold yellow zero leaning right on gray', 'a thin purple five on pink',
           # from here on: pairs of digit and ink never trained on
           'a bold blue zero on white', 'a bold green eight on pink',
           'a red six leaning left on black', 'a bold purple seven on white']

# options of t2i sample: lowest value, highest value, a whole number?
OPTIONS = dict(steps=(1,1000,True), guidance=(0,50,False), temperature=(0,10,False), truncation=(0,10,False),
               candidates=(1,1000,True))
KEYS = dict(steps='sample_steps') # where the config calls an option by another name

def say(text=''):
    "A line on standard error"
    print(text, file=sys.stderr, flush=True)

def module(name:str, table:dict=RECIPES):
    "The module of a recipe or chapter"
    if name not in table: raise CourseError(f"there is no '{name}': choose {', '.join(table)}")
    return import_module(table[name])

def between(value, low, high, name:str, whole:bool=False):
    "A number in its range, or a sentence that says the range"
    if value is None: return None
    if isinstance(value, float) and math.isnan(value) or not low<=value<=high:
        kind = 'a whole number ' if whole else ''
        raise CourseError(f"{name} must be {kind}from {low:g} to {high:g}; got {value:g}")
    return value

def open_data(
    name,      # a data set, a folder of captioned images, or a folder made by t2i prepare
    codec=None,# for shards of latents: the run of the codec that made them
):
    "Any data of the course; shards read like pictures"
    if Path(name).is_dir():
        from t2i_course.scale.recipes import Shards, is_shards
        if is_shards(name): return Shards(name, codec and Model(codec).den.codec)
    if codec: raise CourseError(f'--codec is for shards of latents; {name} is not a folder made by t2i prepare')
    return load(name)

def installed()->str:
    "The version of the installed package, or 'source'"
    try: return metadata.version('t2i_course')
    except metadata.PackageNotFoundError: return 'source'

def versions()->dict:
    "What a result was made with"
    return dict(python=platform.python_version(), torch=torch.__version__, t2i_course=installed())

def hardware()->str:
    "The GPU's name, or the processor's and its cores"
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    name,info = platform.processor() or platform.machine(),Path('/proc/cpuinfo')
    if info.exists():
        names = (l.split(':')[1].strip() for l in info.read_text().splitlines() if l.startswith('model name'))
        name = next(names, name)
    return f'{name}, {os.cpu_count()} cores'

def command()->str:
    "The command that is running"
    return ' '.join(['t2i', *sys.argv[1:]]) if Path(sys.argv[0]).name in ('t2i','cli.py') else 'python'

# ---- train ----
def settings(recipe, data, scale, seconds, images, seed, precision, changes=None, codec=None)->dict:
    "The config of a new run: everything needed to make the same model again"
    mod,ds = module(recipe),open_data(data, codec)
    if hasattr(mod, 'recipe_for'): config = mod.recipe_for(ds, scale, seconds)
    else: config = mod.recipe(ds.shape[0], ds.words, ds.size, scale)
    if images is None and seconds is None: images = IMAGES[scale]
    if precision=='auto': precision = 'bf16' if bf16_pays(pick_device()) else 'fp32'
    if codec: config |= dict(codec=str(Path(codec).resolve()), clamp=4.) # whitened latents: variance 1, not [-1,1]
    return config|(changes or {})|dict(
        data=str(Path(data).resolve()) if Path(data).is_dir() else data,
        source=ds.source, shape=list(ds.shape), scale=scale,
        images=images, seconds=seconds, seed=seed, precision=precision,
        threads=torch.get_num_threads(), versions=versions(), hardware=hardware())

def make_folder(out)->Path:
    "Make a folder and try to write there"
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out/'.try').touch(); (out/'.try').unlink()
    except OSError as e:
        raise CourseError(f'{out} cannot be written ({e.strerror}). Choose another --out.') from e
    return out

def train_run(
    recipe='flow_matching',# see RECIPES
    data='painted',        # name of a data set, or a folder
    scale=None,            # smoke, demo or full; default T2I_SCALE, else demo
    seconds=None,          # wall time of training, fitting a skip included
    images=None,           # or images seen: the clock that makes a run repeatable
    seed=0,                # of every random number
    out=None,              # run folder; default runs/RECIPE-DATA-SEED
    resume=False,          # go on with the run in `out`
    precision='auto',      # auto, fp32, bf16 or fp16
    quiet=False,           # no progress bar
    save_every=20.,        # seconds between checkpoints
    changes=None,          # entries of the recipe to replace in a new run
    codec=None,            # data of latents: the run of the codec that made them
    shard=None,            # ddp or fsdp, under torchrun: how the processes share the work
    **outside,             # what comes from outside the network, see `fit_run`
)->Path:                   # the run folder
    "Train a recipe; leaves config.json, model.safetensors, a checkpoint and log.jsonl"
    if seconds and images: raise CourseError('give either --seconds or --images, not both')
    between(seconds, 1e-3, 1e8, '--seconds')
    between(images, 1, 1e12, '--images', whole=True)
    between(seed, 0, 2**62, '--seed', whole=True)
    out,ranks = Path(out or f'runs/{recipe}-{Path(data).name}-{seed}'),sharers(shard)
    if ranks.rank: # process 0 has written it, or has stopped with a sentence
        ranks.wait()
        config = read_config(out)
    elif (out/'config.json').exists():
        if not resume:
            raise CourseError(f'{out} already holds a run: go on with it by --resume, '
                              'or choose another --out')
        config = read_config(out)
        for name,value in (('images',images),('seconds',seconds)):
            if value and value!=config[name]:
                clock = 'images' if config['images'] else 'seconds'
                raise CourseError(f'{out} was started with --{clock} {config[clock]}; '
                                  f'resume without --{name}, or train into another folder')
    else:
        if resume: say(f'{out} holds no run yet: starting from the beginning')
        config = settings(recipe, data, scale or current_scale(), seconds, images, seed, precision, changes, codec)
        write_json(make_folder(out)/'config.json', config)
    if ranks.rank==0: ranks.wait()
    fit_run(out, config, quiet, save_every, ranks, shard, **outside)
    ranks.close()
    return out

def sharers(
    shard=None, # ddp, fsdp or None
)->object:      # a scale.fsdp.Ranks, or Alone
    "The processes that torchrun has started, or this one alone"
    n = int(os.environ.get('WORLD_SIZE', 1))
    if shard is None:
        if n>1: raise CourseError(f'torchrun has started {n} processes: say how they share the work, --shard ddp or --shard fsdp')
        return ALONE
    if 'RANK' not in os.environ:
        raise CourseError(f'--shard {shard} needs processes: torchrun --nproc-per-node 2 -m t2i_course train ... --shard {shard}')
    from t2i_course.scale.fsdp import Ranks
    return Ranks()

def fit_run(
    out:Path,           # run folder
    config:dict,        # everything that makes the run what it is
    quiet:bool=False,   # no progress bar
    save_every:float=20.,# seconds between checkpoints
    ranks=ALONE,      # the processes that share the work
    shard:str=None,     # ddp or fsdp
    checkpointing:bool=False,# compute activations again instead of keeping them
    compiled:bool=False,# torch.compile, block by block
    accumulate:int=1,   # micro-batches a step
):
    "The training itself: what the model becomes is in the config, how the work is done in the other arguments"
    device,ds = pick_device(),open_data(config['data'], config.get('codec'))
    if ranks.size==1: torch.set_num_threads(min(config['threads'], os.cpu_count() or 1))
    torch.manual_seed(config['seed'])
    tok,den = module(config['recipe']).build(config)
    den.net.to(device); den.to(device)
    called = den.net
    if shard or checkpointing or compiled:
        if not callable(den.loss):
            raise CourseError(f"{config['recipe']} trains in turns, each with weights of its own: --shard, --checkpointing "
                              'and --compile are for recipes with one loss, such as ddpm, flow_matching or dit')
        from t2i_course.scale.fsdp import parallelize
        called = parallelize(den.net, shard or 'none', config['precision'], checkpointing, compiled, ranks if shard else None)
    state = state_for(den, config, config['precision'])
    den.net = called
    saved = take_up(state, out, config, shard is not None)
    if saved is not None:
        if finished(out, state, config):
            return say(f'{out} is trained to the end already: nothing was changed') if ranks.rank==0 else None
        if ranks.rank==0: say(f'going on at {state.images:,} images')
    if ranks.rank==0: cut_log(out, state.step)
    if ranks.rank==0 and saved is None: expect(ds, config)
    head_start(state, ds, tok, den, config, saved, ranks)
    tables = den.skip.tables if getattr(den, 'skip', None) is not None else {}
    records = train(state, den.loss, feed(ds, tok), images=config['images'], seconds=config['seconds'], accumulate=accumulate,
                    batch=config['batch'], seed=config['seed'], clip=config.get('clip', 1.), ranks=ranks)
    bar = progress_bar(state, config, quiet or ranks.rank)
    with open(out/'log.jsonl' if ranks.rank==0 else os.devnull, 'a') as log:
        for r in follow(state, records, out, config, tables, save_every, ranks, shard is not None):
            if shard and not quiet and r.step==1: say(share_line(state, ranks))
            bar(r)
            if r.step%20==0: print(log_line(r), file=log, flush=True)
    bar(None)
    write_model(out, state, tables, config, getattr(den, 'artist', den.net), ranks)

def share_line(state, ranks)->str:
    "What this process holds of the run"
    from t2i_course.scale.fsdp import held
    parts = ', '.join(f'{k} {v/2**20:.2f} MB' for k,v in held(state).items())
    return f'process {ranks.rank} of {ranks.size} holds: {parts}'

def finished(out:Path, state, config:dict)->bool:
    "Is the model of a run written and whole, and its budget used?"
    left = state.images<config['images'] if config['images'] else state.seconds<config['seconds']
    if left or not (out/'model.safetensors').exists(): return False
    try: load_tensors(out/'model.safetensors')
    except CourseError:
        say(f"{out/'model.safetensors'} is damaged: writing it again from the checkpoint")
        return False
    return (out/'train.json').exists()

# Below 20 pictures a caption a model meets single pictures, not a kind of picture (as in `pairs_of`: fewer than 20 say little).
# Copies come with passes: of 759 drawings with a caption each, flow matching gave back 2% after 32 (tests/drawings.py), so
# a hundred is where to begin to look for them. A word in one caption alone cannot be told from the rest of its picture.
FEW_PICTURES,MANY_PASSES = 20,100

def expectation(
    texts,       # captions of the training pictures
    images=None, # images that training will see; None where the clock is in seconds
)->str:          # '' where there are enough pictures
    "What to expect from so many pictures, in two sentences"
    words,n,different = Counter(w for c in set(texts) for w in set(split_words(c))),len(texts),len(set(texts))
    if n/different>=FEW_PICTURES: return ''
    once,passes = sum(k==1 for k in words.values()),images and images/n
    each = 'each caption names about one picture' if n/different<2 else f'each caption names about {n/different:.0f} pictures'
    what = (f'{n:,} training pictures with {different:,} different captions and {len(words):,} words, {once:,} of them in one caption '
            f'alone: {each}. ')
    if passes is None: what += f'Every {n:,} images are a pass through them; after {MANY_PASSES} passes or so e'
    else: what += f'{images:,} images are {passes:,.3g} passes through them'+(': e' if passes>=MANY_PASSES else
                  f'; with more than {MANY_PASSES} e')
    return what+('xpect drawings of training captions to be copies of their pictures, and new captions to work only as far as '
                 'their words came in several captions. t2i eval counts the copies.')

def expect(ds, config:dict):
    "Say before training what to expect from a folder of few pictures"
    texts = getattr(ds, 'texts', None)
    line = expectation(texts['train'], config['images']) if texts else ''
    if line: say(line)

def head_start(state, ds, tok, den, config:dict, saved:dict, ranks=ALONE):
    "Fit the closed-form skip, or take it from the checkpoint; its time counts as training"
    if getattr(den, 'skip', None) is None: return
    if saved:
        den.skip.tables = {k:v.to(state.device) for k,v in saved.items()}
        return
    from t2i_course.diffusion.preconditioning import fit_skip
    start = time.perf_counter()
    fit_skip(den, ds, tok, config['fit_images'], config['seed'])
    ranks.same(den.skip.tables) # each process has fitted it; the last bit may differ from one to the other
    state.seconds += ranks.first(time.perf_counter()-start)

def log_line(r)->str:
    "A record as a line of log.jsonl"
    return json.dumps(dict(step=r.step, images=r.images, seconds=round(r.seconds, 2), loss=round(r.loss, 5)))

def write_model(out:Path, state, tables:dict, config:dict, artist, ranks=ALONE):
    "The averaged weights last: where model.safetensors is, the run is complete"
    shadow = {k:ranks.whole(v) for k,v in state.ema.shadow.items()} # together, before process 0 goes on alone
    if ranks.rank: return
    params,trained = (sum(p.numel() for p in m.parameters()) for m in (artist, state.net)) # a GAN draws with half of it
    write_json(out/'train.json', dict(images=state.images, seconds=state.seconds, steps=state.step,
                                      params=params, params_trained=trained, date=str(date.today())))
    tensors = {f'net.{k}':v for k,v in shadow.items()}
    tensors |= {f'skip.{k}':v for k,v in tables.items()}
    save_tensors(out/'model.safetensors', tensors, config=config_hash(config))

def progress_bar(state, config, quiet):
    "A tqdm bar over images or seconds on standard error"
    if quiet: return lambda r: None
    from tqdm import tqdm
    count = 'images' if config['images'] else 'seconds'
    unit = dict(images='img', seconds='s')[count]
    shape = '{l_bar}{bar}| {n:.0f}/{total:.0f} '+unit+' [{elapsed}<{remaining}{postfix}]'
    start = min(getattr(state, count), config[count]) # a head start may take longer than a short clock
    bar = tqdm(total=config[count], initial=start, unit=unit, unit_scale=count=='images', bar_format=shape,
               mininterval=.5, file=sys.stderr)
    recent = []
    def show(r):
        if r is None: return bar.close()
        recent.append(r.loss); del recent[:-50]
        bar.set_postfix_str(f'loss {sum(recent)/len(recent):.3f}', refresh=False)
        bar.update(max(0, min(bar.total, getattr(r, count))-bar.n))
    return show

# ---- sample and eval ----
class Model:
    "A trained run, ready to draw"
    def __init__(self,
        run, # run folder
    ):
        self.run,self.config = Path(run),read_config(run)
        path = self.run/'model.safetensors'
        if not path.exists():
            raise CourseError(f'{run} is not trained to the end yet: '
                              f'go on with t2i train --resume --out {run}')
        tensors,note = load_tensors(path)
        if note.get('config')!=config_hash(self.config):
            raise CourseError(f'{path} belongs to other settings than {run}/config.json. '
                              'Train again into another folder.')
        self.module,self.device = module(self.config['recipe']),pick_device()
        self.tok,self.den = self.module.build(self.config)
        own = lambda p: {k[len(p):]:v for k,v in tensors.items() if k.startswith(p)}
        self.den.net.load_state_dict(own('net.'))
        self.den.net.to(self.device).eval()
        if getattr(self.den, 'skip', None) is not None: self.den.skip.tables = own('skip.')
        self.den.to(self.device)
        self.codec = Model(self.config['codec']).den.codec if self.config.get('codec') else None

    def draw(self,
        captions,       # n texts; '' draws without condition
        seed=0,         # of the noise
        steps=None,     # network evaluations; default the recipe's
        guidance=None,  # scale; default the recipe's
        **others,       # further options of the recipe, see OPTIONS
    )->torch.Tensor:    # (n c h w) in [-1,1]
        "Pictures of captions; the noise of a picture depends on the seed and its place alone"
        c,given = self.config,dict(others, steps=steps, guidance=guidance)
        c = c|{KEYS.get(k, k):v for k,v in self.asked(given).items()}
        low = torch.float16 if c['precision']=='fp16' else torch.bfloat16
        draw = self.den.painter(self.tok, c)
        with torch.autocast(torch.device(self.device).type, low, enabled=c['precision']!='fp32'):
            x = draw(captions, seed)
        if self.codec is not None:
            with torch.no_grad(): x = torch.cat([self.codec.decode(z.to(self.device)).cpu() for z in x.float().split(250)])
        return x.clamp(-1, 1)

    def asked(self,
        given:dict, # option -> value, None where it was not given
    )->dict:        # those that this recipe has a use for
        "Check the ranges; say which options are left aside"
        given = {k:between(v, *OPTIONS[k][:2], f'--{k.replace("_", "-")}', whole=OPTIONS[k][2]) for k,v in given.items() if v is not None}
        idle = [f'--{k.replace("_", "-")}' for k in given if k not in self.den.options]
        if idle: say(f"{self.config['recipe']} has no use for {', '.join(idle)}: left aside")
        return {k:v for k,v in given.items() if k in self.den.options}

def to_bytes(
    x, # (n c h w) in [-1,1]
):     # (n h w c) uint8
    "Pictures as they are stored"
    return ((x+1)*127.5).round().clamp(0,255).to(torch.uint8).permute(0,2,3,1).contiguous().numpy()

def sample_run(
    run,            # run folder, or a Model
    captions,       # texts; '' draws without condition
    per_caption=1,  # pictures of each, one after the other
    steps=None,     # sampler steps; default the recipe's
    guidance=None,  # scale; default the recipe's
    seed=0,         # of the noise
    **others,       # further options, see OPTIONS
)->tuple:           # images uint8 (n h w c), captions
    "Draw captions with a trained run; says what the model could not read"
    between(per_caption, 1, 10_000, '--per-caption', whole=True)
    between(seed, 0, 2**62, '--seed', whole=True)
    m = run if isinstance(run, Model) else Model(run)
    for c in dict.fromkeys(captions):
        for note in m.tok.notes(c): say(note)
        if not c.strip(): say('an empty caption: drawn without condition')
    texts = [c for c in captions for _ in range(per_caption)]
    return to_bytes(m.draw(texts, seed, steps, guidance, **others)),texts

def eval_run(
    run,          # run folder
    n=1000,       # drawings
    seed=0,       # of captions and noise
    quiet=False,  # print nothing
)->dict:          # the row
    "The measured row of a run; written to metrics.json in its folder"
    from t2i_course.core.metrics import evaluate
    m = Model(run)
    c,t = m.config,json.loads((m.run/'train.json').read_text())
    data = open_data(c['data'], c.get('codec'))
    row = evaluate(m.draw, data if m.codec is None else data.origin(), n=n, seed=seed, n_trained=n//5)|dict(
        recipe=c['recipe'], params=t['params'], params_trained=t.get('params_trained', t['params']),
        images=t['images'], train_seconds=t['seconds'], steps=t['steps'], train_seed=c['seed'],
        nfe=m.den.calls(c), **{k:c[KEYS.get(k, k)] for k in m.den.options if k!='steps'},
        precision_mode=c['precision'], source=c['source'], hardware=hardware(), versions=versions(),
        date=str(date.today()), command=command())
    write_json(m.run/'metrics.json', row)
    if not quiet: print(row_text(row))
    return row

COPIES = .2 # unseen real pictures come so near in one case of a hundred; twenty times that is no chance even with 40 drawings

def row_text(row:dict)->str:
    "A row for people"
    pc = lambda v: f'{100*v:.1f}%'
    out = []
    if 'obedience' in row:
        o = row['obedience']
        parts = {k:v for k,v in o.items() if k not in ('all','ceiling','chance','n') and isinstance(v, float)}
        out += [f"pictures that show all their caption demands: {pc(o['all'])}   "
                f"(judge on unseen real pictures {pc(o['ceiling'])}, on shuffled captions {pc(o['chance'])})",
                '  by attribute: '+'  '.join(f'{k} {pc(v)}' for k,v in parts.items())]
    if 'heldout' in row: out += [f"  digit x ink pairs never seen in training: {pc(row['heldout']['all'])}"]
    if 'fd' in row:
        out += [f"Frechet distance {row['fd']:.2f} = {row['fd']/row['fd_floor']:.1f} times the distance "
                f"between two real sets; precision {row['precision']:.2f}, recall {row['recall']:.2f}"]
        sizes = f"{row['n']:,} drawings of test captions"
        if 'n_reference' in row: sizes += f" against {row['n_reference']:,} training pictures; features: {row['features']}"
        out += [f'  {sizes}']
    elif 'note' in row: out += [f"no Frechet distance: {row['note']}"]
    out += [f"nearest-training-picture rate {pc(row['nearest'])} of {row['n']:,} drawings of test captions "
            f"(unseen real pictures {pc(row['nearest_real'])}); "
            f"{row['seconds_per_1000']:.0f} s per 1,000 pictures"]
    if 'nearest_train_captions' in row:
        rate = row['nearest_train_captions']
        told = ': copies. It has learned its pictures by heart' if rate>=COPIES else ''
        out += [f"  {pc(rate)} of {row['n_train_captions']:,} drawings of training captions{told}"]
    return '\n'.join(out)

# ---- demo ----
FILES = ('config.json','checkpoint.safetensors','log.jsonl','train.json','model.safetensors')

def demo(
    seconds=None,   # of training; default 110
    out='runs/demo',# run folder; a run that it holds is replaced
)->dict:            # the measured row
    "Train on painted digits, draw typed prompts, measure"
    out,small = Path(out),current_scale()=='smoke'
    for name in FILES: (out/name).unlink(missing_ok=True)
    seconds = seconds or (5 if small else 110)
    print(f'Training a text-to-image model on painted digits for {seconds:g} seconds '
          '(flow matching with a closed-form head start) ...', flush=True)
    train_run('flow_matching', 'painted', seconds=seconds, out=out)
    x,texts = sample_run(out, PROMPTS)
    write_sheet(out/'samples.png', x, texts,
                'what the model drew (last four: digit and ink never seen together in training)')
    print('Measuring on captions and handwriting it never saw ...', flush=True)
    row = eval_run(out, n=64 if small else 1000, quiet=True)
    print(f"""
{row_text(row)}

pictures   {out/'samples.png'}
numbers    {out/'metrics.json'}
model      {out/'model.safetensors'}
draw your own: t2i sample {out} --prompt "a thin blue four on pink" --out four.png
What to open next (make lab): nbs/00_start/00_tour.ipynb, then the parts of this model:
  captions and pictures 10_data, text encoder 11_conditioning, training 12_training, metrics 14_metrics,
  network and guidance 30_ddpm, the head start 34_preconditioning, the method itself 60_flow_matching""")
    return row

def write_sheet(
    path,     # a .png file
    x,        # (n h w c) uint8
    texts,    # n captions
    title='', # above the sheet
):
    "A labelled grid of pictures"
    from t2i_course.core.plots import sheet
    x = torch.from_numpy(x).permute(0,3,1,2)/127.5-1
    def write(p): # the ending tells the kind of picture
        png = Path(f'{p}.png')
        try:
            sheet(x, texts, str(png), title=title)
            os.replace(png, p)
        finally: png.unlink(missing_ok=True)
    write_whole(path, write)

def write_npz(
    path,     # a .npz file
    **arrays, # name -> array
):
    "Arrays in one compressed file, written whole"
    def write(p):
        with open(p, 'wb') as f: np.savez_compressed(f, **arrays)
    write_whole(path, write)

# ---- run, bench, report, doctor ----
def put(
    d:dict,  # changed in place
    key:str, # 'a.b.c' stands for d['a']['b']['c']
    value,
):
    "Write under a dotted name"
    *path,last = key.split('.')
    for k in path: d = d.setdefault(k, {})
    d[last] = value

def stamp(chapter:str, seeds)->dict:
    "Who made a result, when, on what"
    return dict(chapter=chapter, command=command(), date=str(date.today()), hardware=hardware(),
                versions=versions(), seeds=list(seeds), scale=current_scale())

def measured_rows(recipe, data, seeds, seconds, work:Path)->dict:
    "Train and measure once a seed; mean and spread of the main numbers"
    rows = []
    for s in seeds:
        out = work/f'{recipe}-{data}-{seconds:g}s-{s}'
        if (out/'metrics.json').exists(): rows.append(json.loads((out/'metrics.json').read_text()))
        else:
            train_run(recipe, data, seconds=seconds, seed=s, out=out, resume=(out/'config.json').exists())
            rows.append(eval_run(out, n=64 if current_scale()=='smoke' else 1000))
    main = dict(obedience=lambda r: r['obedience']['all'], fd_floors=lambda r: r['fd']/r['fd_floor'],
                recall=lambda r: r['recall'])
    if 'heldout' in rows[0]: main['heldout'] = lambda r: r['heldout']['all']
    def summary(values): return dict(mean=sum(values)/len(values), spread=max(values)-min(values))
    return dict(rows=rows, **{k:summary([f(r) for r in rows]) for k,f in main.items()})

def result_file(out, name:str)->Path:
    "The file named by --out, or results/NAME.json; its folder is made"
    path = Path(out) if out else results_path(name)
    make_folder(path.parent)
    return path

def run_chapter(
    chapter,      # 'flow_matching' or '60_flow_matching'
    seeds=(0,1),  # of the runs
    seconds=None, # training time of a row; default 60
    out=None,     # file to write; default results/CHAPTER.json
):
    "The measurements of a chapter; what is done is kept when it is interrupted"
    name = chapter.split('_', 1)[1] if chapter[:2].isdigit() and '_' in chapter else chapter
    if name=='demo': return write_json(result_file(out, 'demo'), stamp('demo', [0])|dict(demo=demo(seconds)))
    mod = module(name, CHAPTERS)
    if name=='metrics': return mod.make_judges(out)
    path = result_file(out, name)
    res = (json.loads(path.read_text()) if path.exists() else {})|stamp(name, seeds)
    if name=='report_card': return report_card(res, path, seeds, seconds)
    seconds = seconds or (3 if current_scale()=='smoke' else 60)
    for data in dict(ddpm=['digits','painted'], dit=['painted'], flow_matching=['painted']).get(name, []):
        put(res, f'row.{data}', measured_rows(name, data, seeds, seconds, Path('runs')/'rows'))
        write_json(path, res)
    for key,value in mod.experiments(current_scale(), seeds):
        say(f'{key}: {value}')
        put(res, key, value)
        write_json(path, res)
    print(f'wrote {path}')

def report_card(
    res:dict,     # what is measured already
    path:Path,    # results/report_card.json
    seeds,        # of the runs
    seconds=None, # training time of each; default 120
):
    "Every recipe that stands for a paradigm, on painted digits with the same clock; pictures of the first seed beside the numbers"
    from t2i_course.capstone.report_card import drawing_flops, experiments, training_memory, variety
    from t2i_course.core.metrics import load_judge
    from t2i_course.core.plots import mosaic
    seconds,drawn = seconds or (3 if current_scale()=='smoke' else 120),{}
    data,judge = load('painted'),load_judge('painted')
    for recipe in RECIPES:
        paradigm = getattr(module(recipe), 'PARADIGM', None)
        if not paradigm: continue
        found = measured_rows(recipe, 'painted', seeds, seconds, Path('runs')/'rows')
        models = [Model(Path('runs')/'rows'/f'{recipe}-painted-{seconds:g}s-{s}') for s in seeds]
        for r,m in zip(found['rows'], models): r['variety'] = variety(m.draw, data, judge, PROMPTS)
        put(res, f'row.{recipe}', found|dict(paradigm=paradigm))
        m = models[0]
        drawn[recipe] = m.draw(PROMPTS)
        put(res, f'row.{recipe}.multiply_adds', drawing_flops(m.den.painter(m.tok, m.config), PROMPTS[:4]))
        put(res, f'row.{recipe}.memory', training_memory(m.den, m.tok, data, m.config['batch'], m.config['precision']))
        put(res, f'row.{recipe}.batch', m.config['batch'])
        write_json(path, res|dict(seconds=seconds, prompts=PROMPTS, pictures=list(drawn)))
    for key,value in experiments(current_scale(), seeds):
        put(res, key, value)
        write_json(path, res|dict(seconds=seconds, prompts=PROMPTS, pictures=list(drawn)))
    from matplotlib.image import imsave
    imsave(path.with_suffix('.png'), mosaic(torch.cat(list(drawn.values())), len(PROMPTS)).numpy())
    print(f'wrote {path}')

def bench(
    what='painted',        # painted, digits or speed
    seconds=None,          # training times; painted: 60 180, digits: bench.BUDGETS
    seeds=None,            # of the runs; painted: 0 1, digits: 0 1 2
    peers=None,            # digits: which published recipes to run beside ours
    out=None,              # file to write; default results/bench_WHAT.json
):
    "Quality against training time of the demo's recipe"
    seeds = seeds or ((0,1) if what=='painted' else (0,1,2))
    path,res = result_file(out, f'bench_{what}'),stamp('bench', seeds)
    from t2i_course import bench as clock
    if what=='speed': return clock.speed(res, path, pick_device(), say)
    if what=='digits':
        budgets = dict.fromkeys(clock.BUDGETS, tuple(seconds)) if seconds else None
        peers = clock.PEERS if peers is None else peers
        return clock.digits(res, path, budgets, seeds, tuple(peers), say=say)
    for s in seconds or (60,180):
        put(res, f'after_{s:g}s', measured_rows('flow_matching', what, seeds, s, Path('runs')/'rows'))
        write_json(path, res)
    print(f'wrote {path}')

def found_rows(value):
    "Every measured row inside a result"
    if isinstance(value, dict):
        if {'obedience','recipe'}<=value.keys() or {'accuracy','method'}<=value.keys(): yield value
        else:
            for v in value.values(): yield from found_rows(v)
    elif isinstance(value, list):
        for v in value: yield from found_rows(v)

def report_line(name:str, r:dict, date:str)->str:
    "A measured row as a line of the table"
    held = f"{100*r['heldout']['all']:.1f}%" if 'heldout' in r else '-'
    obeys = f"{100*(r['obedience']['all'] if 'obedience' in r else r['accuracy']):.1f}%"
    floors = r['fd_floors'] if 'fd_floors' in r else r['fd']/r['fd_floor'] if 'fd' in r else None
    far,method = f'{floors:.1f}' if floors is not None else '-',r.get('recipe') or r['method']
    return (f"{name:16} {method[:26]:26} {r['data'][:8]:8} {r['train_seconds']:8.0f} {obeys:>6} {held:>8} "
            f"{far:>8} {r['recall']:6.2f}  {r.get('date', date)}")

def report(
    folder=None, # default results/
    picture=None,# where the figure goes; default report.png in the folder
):
    "The report card, as a table and a figure, and one table of every measured row in results/"
    from t2i_course.capstone.report_card import HEAD, entries, figure, lines, text_table
    folder = Path(folder) if folder else results_path('x').parent
    card = folder/'report_card.json'
    if card.exists():
        try: rows = entries(json.loads(card.read_text(encoding='utf-8')))
        except (ValueError, KeyError, TypeError) as e:
            raise CourseError(f'{card} cannot be read ({e}): make it again with t2i run report_card') from e
        print(text_table(HEAD, lines(rows)), '', sep='\n')
        picture = Path(picture or folder/'report.png')
        make_folder(picture.parent)
        write_whole(picture, lambda p: p.write_bytes(figure(rows).png()))
        print(f'figure: {picture}\n')
    elif picture: raise CourseError(f'{card} is not there: make it with t2i run report_card')
    table = []
    for f in sorted(folder.glob('*.json')):
        try:
            found = json.loads(f.read_text(encoding='utf-8'))
            table += [report_line(f.stem, r, found.get('date', '')) for r in found_rows(found)]
        except (ValueError, KeyError, TypeError) as e:
            say(f'skipped {f}, which t2i did not write ({type(e).__name__}: {e})')
    if not table: raise CourseError(f'{folder} holds no results: make some with t2i run flow_matching')
    print(f"{'file':16} {'method':26} {'data':8} {'train s':>8} {'obeys':>6} {'held-out':>8} "
          f"{'FD/floor':>8} {'recall':>6}  date", *table, sep='\n')

def doctor():
    "What this machine offers, and what is missing"
    from t2i_course.core.metrics import load_judge
    from t2i_course.sources import data_root
    device = pick_device()
    print(f'python {platform.python_version()}, torch {torch.__version__}, {hardware()}, '
          f'device {device}, {torch.get_num_threads()} threads')
    print(f"bfloat16 {'pays' if bf16_pays(device) else 'does not pay'} here (measured just now)")
    try: print(f'data folder: {data_root()}')
    except CourseError as e: print(f'data folder: {e}')
    for p in ('torchvision','diffusers','transformers','scikit-learn','jupyterlab','nbdev','torchmetrics'):
        try: print(f'{p:14} {metadata.version(p)}')
        except metadata.PackageNotFoundError: print(f'{p:14} missing: pip install {p}')
    for name in ('digits','painted','mnist'):
        try:
            load_judge(name)
            print(f'judge {name:8} ok')
        except CourseError as e: print(f'judge {name:8} {e}')

# ---- the command line ----
def read_captions(
    path, # a UTF-8 file, one caption a line
)->list:  # captions; '' draws without condition
    "The captions of a file"
    path = Path(path)
    if not path.is_file(): raise CourseError(f'caption file {path} does not exist: give a UTF-8 text file')
    try: text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as e:
        raise CourseError(f'{path} is not UTF-8 text (byte {e.start}). '
                          'Save it as UTF-8, one caption a line.') from e
    if not text:
        raise CourseError(f'{path} is empty: write one caption a line (a blank line draws without condition)')
    return text.removesuffix('\n').split('\n')

def cmd_train(a):
    "t2i train"
    if a.list:
        for k,v in RECIPES.items(): print(f'{k:15} {import_module(v).__doc__.strip().splitlines()[0]}')
        return
    between(a.save_every, 0, 1e6, '--save-every')
    if a.resume and a.out and (Path(a.out)/'config.json').exists():
        recipe = read_config(a.out)['recipe']
        if a.recipe not in (None, recipe):
            raise CourseError(f'{a.out} is a run of {recipe}, not of {a.recipe}: resume with {recipe}, '
                              'or train into another folder')
        a.recipe = recipe
    if not a.recipe: raise CourseError(f"say which recipe to train: {', '.join(RECIPES)}")
    out = train_run(a.recipe, a.data, a.scale, a.seconds, a.images, a.seed, a.out, a.resume, a.precision,
                    a.quiet, a.save_every, codec=a.codec, shard=a.shard, checkpointing=a.checkpointing, compiled=a.compile,
                    accumulate=between(a.accumulate, 1, 4096, '--accumulate', whole=True))
    if not int(os.environ.get('RANK', 0)): print(f'{out}: trained. Draw with: t2i sample {out} --prompt "..." --out picture.png')

def cmd_sample(a):
    "t2i sample"
    if (a.prompt is None)==(a.captions is None):
        raise CourseError('say what to draw: either --prompt TEXT ... or --captions FILE')
    ext = Path(a.out).suffix.lower()
    if ext not in ('.png','.npz'): raise CourseError(f"--out must end in .png or .npz; got '{a.out}'")
    between(a.per_caption, 1, 10_000, '--per-caption', whole=True)
    captions = a.prompt if a.prompt is not None else read_captions(a.captions)
    options = {k:getattr(a, k) for k in OPTIONS}
    for k,v in options.items(): between(v, *OPTIONS[k][:2], f'--{k}', whole=OPTIONS[k][2])
    model = Model(a.run)
    make_folder(Path(a.out).parent)
    x,texts = sample_run(model, captions, a.per_caption, seed=a.seed, **options)
    if ext=='.png': write_sheet(a.out, x, texts)
    else: write_npz(a.out, images=x, captions=np.array(texts, dtype=f'U{max(1, max(map(len, texts)))}'))
    print(f"wrote {len(texts)} picture{'s'*(len(texts)!=1)} to {a.out}")

def cmd_eval(a):
    "t2i eval"
    between(a.n, 8, 100_000, '--n', whole=True)
    between(a.seed, 0, 2**62, '--seed', whole=True)
    eval_run(a.run, a.n, a.seed)

def cmd_data(a):
    "t2i data"
    between(a.n, 1, 10_000_000, '--n', whole=True)
    between(a.seed, 0, 2**62, '--seed', whole=True)
    if Path(a.out).suffix.lower()!='.npz': raise CourseError(f"--out must end in .npz; got '{a.out}'")
    ds = load(a.name)
    if a.split not in ds.splits:
        raise CourseError(f"{a.name} has the splits {', '.join(ds.splits)}; got '{a.split}'")
    make_folder(Path(a.out).parent)
    parts = [ds.batch(a.split, Draws(a.seed, i)) for i in torch.arange(a.n).split(1000)]
    arrays = dict(images=np.concatenate([to_bytes(b.x) for b in parts]),
                  captions=np.array([c for b in parts for c in b.captions]))
    for k,values in ds.attributes.items():
        arrays[k] = np.array(values)[torch.cat([b.attrs[k] for b in parts]).numpy()]
        arrays[f'named_{k}'] = torch.cat([b.named[k] for b in parts]).numpy()
    write_npz(a.out, **arrays)
    print(f"wrote {a.n} captioned picture{'s'*(a.n!=1)} ({a.name}, {a.split}) to {a.out}")

def cmd_prepare(a):
    "t2i prepare"
    from tqdm import tqdm
    from t2i_course.scale.recipes import prepare
    between(a.images, 1, 1e12, '--images', whole=True)
    between(a.shard_size, 1, 1e8, '--shard-size', whole=True)
    between(a.seed, 0, 2**62, '--seed', whole=True)
    codec = Model(a.codec).den if a.codec else None
    if codec is not None and not hasattr(codec, 'codec'):
        raise CourseError(f'{a.codec} is a run without a codec: train one with t2i train vae')
    make_folder(a.out)
    with tqdm(total=a.images, unit='img', disable=a.quiet, file=sys.stderr) as bar:
        prepare(open_data(a.data), a.out, a.images, codec and codec.codec, shard_size=a.shard_size, split=a.split, seed=a.seed,
                store=a.store, progress=lambda n: bar.update(n-bar.n))
    print(f'{a.out}: {a.images:,} images in shards. '+
          f'Train on them with: t2i train RECIPE --data {a.out}'+(f' --codec {a.codec}' if a.codec else ''))

def first_seeds(n)->tuple:
    "0, 1, ... n-1"
    return tuple(range(between(n, 1, 100, '--seeds', whole=True)))

def cmd_run(a):
    "t2i run"
    run_chapter(a.chapter, first_seeds(a.seeds), between(a.seconds, .1, 1e6, '--seconds'), a.out)

def cmd_bench(a):
    "t2i bench"
    for s in a.seconds or (): between(s, .1, 1e6, '--seconds')
    bench(a.what, a.seconds, a.seeds and first_seeds(a.seeds), a.peers, a.out)

class Parser(argparse.ArgumentParser):
    "An argument that cannot be read is one sentence too"
    def error(self, message): raise CourseError(f'{message}; see {self.prog} --help')

def add_train(command):
    "Options of t2i train"
    a = command('train', 'train a recipe into a run folder', cmd_train)
    a('recipe', nargs='?', help=', '.join(RECIPES))
    a('--list', action='store_true', help='the recipes')
    a('--data', default='painted', help=f'{DATA} of captioned images (default painted)')
    a('--scale', choices=['smoke','demo','full'],
      help='size of the model and default length (default: T2I_SCALE, else demo)')
    a('--seconds', type=float, metavar='N', help='wall time of training')
    a('--images', type=int, metavar='N', help='images seen: the clock that makes runs repeatable')
    a('--precision', choices=['auto','fp32','bf16','fp16'], default='auto',
      help='auto: bf16 where a short probe shows that it pays')
    a('--seed', type=int, default=0, metavar='N', help='of every random number (default 0)')
    a('--resume', action='store_true', help='go on with the run in --out')
    a('--out', metavar='RUN', help='run folder (default runs/RECIPE-DATA-SEED)')
    a('--save-every', type=float, default=20., metavar='N', help='seconds between checkpoints (default 20)')
    a('--quiet', action='store_true', help='no progress bar')
    a('--codec', metavar='RUN', help='with --data of latents: the vae run that t2i prepare was given')
    a('--shard', choices=['ddp','fsdp'], help='under torchrun: a copy of the model in each process, or a shard of it')
    a('--accumulate', type=int, default=1, metavar='N', help='micro-batches a step (default 1)')
    a('--checkpointing', action='store_true', help='compute activations again in the backward pass instead of keeping them')
    a('--compile', action='store_true', help='torch.compile, block by block')

def add_sample(command):
    "Options of t2i sample"
    a = command('sample', 'draw captions with a trained run', cmd_sample)
    a('run', help='run folder')
    a('--prompt', nargs='+', metavar='TEXT', help='captions')
    a('--captions', metavar='FILE',
      help='UTF-8 file, one caption a line; a blank line draws without condition')
    a('--per-caption', type=int, default=1, metavar='N', help='pictures of each caption (default 1)')
    a('--steps', type=int, metavar='N', help="sampler steps (default the recipe's)")
    a('--guidance', type=float, metavar='W', help="guidance scale; 1 = none (default the recipe's)")
    a('--temperature', type=float, metavar='X', help='autoregressive recipes: of the softmax over codes')
    a('--candidates', type=int, metavar='N', help='autoregressive recipes: draw N, keep the one that fits best')
    a('--truncation', type=float, metavar='X', help='GAN recipes: how far from the mean latents may lie')
    a('--seed', type=int, default=0, metavar='N', help='of the noise (default 0)')
    a('--out', required=True, metavar='FILE',
      help='picture.png (a labelled sheet) or pictures.npz (images, captions)')

def add_rest(command):
    "Options of the commands around training and sampling"
    a = command('eval', 'measure a run: obedience, Frechet distance, recall, copying', cmd_eval)
    a('run', help='run folder')
    a('--n', type=int, default=1000, metavar='N', help='drawings (default 1000)')
    a('--seed', type=int, default=0, metavar='N', help='of captions and noise (default 0)')
    a = command('run', 'make the measurements of a chapter (results/CHAPTER.json)', cmd_run)
    a('chapter', help=', '.join(('demo',*CHAPTERS)))
    a('--seeds', type=int, default=2, metavar='N', help='how many (default 2)')
    a('--seconds', type=float, metavar='N', help='training time of a row (default 60)')
    a('--out', metavar='FILE', help='file to write')
    a = command('data', 'write captioned pictures of a data set to a file', cmd_data)
    a('name', help=DATA)
    a('--split', default='train', help='train, test, or painted: heldout (default train)')
    a('--n', type=int, default=1000, metavar='N', help='pictures (default 1000)')
    a('--seed', type=int, default=0, metavar='N', help='of every random number (default 0)')
    a('--out', required=True, metavar='FILE', help='file.npz')
    a = command('prepare', 'write captioned pictures, or their latents, to shards that training reads by index', cmd_prepare)
    a('data', help=DATA)
    a('--images', type=int, required=True, metavar='N', help='how many')
    a('--out', required=True, metavar='FOLDER', help='of the shards; prepare again to go on after an interruption')
    a('--split', default='train', help='train, test, or painted: heldout (default train)')
    a('--shard-size', type=int, default=4096, metavar='N', help='images a shard (default 4096)')
    a('--codec', metavar='RUN', help='a trained vae run: store its latents instead of pictures')
    a('--store', choices=['float32','float16','uint8'], default='float32', help='how numbers are kept (default float32, which is exact)')
    a('--seed', type=int, default=0, metavar='N', help='of the pictures (default 0)')
    a('--quiet', action='store_true', help='no progress bar')
    a = command('bench', 'quality against training time (results/bench_painted.json, bench_digits.json, bench_speed.json)', cmd_bench)
    a('what', nargs='?', choices=['painted','digits','speed'], default='painted',
      help='painted digits, MNIST beside two published recipes (about an hour), or steps of U-Net and DiT beside diffusers; default painted')
    a('--seconds', type=float, nargs='+', metavar='N', help='training times (default painted 60 180, digits 2.5 to 240)')
    a('--seeds', type=int, metavar='N', help='how many (default painted 2, digits 3)')
    a('--peers', nargs='*', choices=['diffusers','torchcfm'], help='digits: which of the published recipes (default both)')
    a('--out', metavar='FILE', help='file to write')
    a = command('report', 'the report card and one table of all results', lambda a: report(a.folder, a.figure))
    a('folder', nargs='?', help='default: results/')
    a('--figure', metavar='FILE', help='where the figure goes (default report.png beside the results)')
    command('doctor', 'what this machine offers and what is missing', lambda a: doctor())

def parser()->Parser:
    "All commands of t2i"
    p = Parser('t2i', description='Train, sample and measure the text-to-image models of t2i_course.',
               epilog='Start with: t2i demo', allow_abbrev=False)
    sub = p.add_subparsers(title='commands', metavar='COMMAND', required=True)
    def command(name, text, run):
        q = sub.add_parser(name, help=text, description=text[0].upper()+text[1:]+'.', allow_abbrev=False)
        q.set_defaults(do=run)
        return q.add_argument
    a = command('demo', 'train on painted digits for two minutes, draw, measure',
                lambda a: demo(between(a.seconds, .1, 1e6, '--seconds'), a.out))
    a('--seconds', type=float, metavar='N', help='training time (default 110)')
    a('--out', default='runs/demo', metavar='RUN', help='run folder (default runs/demo)')
    add_train(command)
    add_sample(command)
    add_rest(command)
    return p

def lost(e:RuntimeError)->bool:
    "Does this error say that another process is gone?"
    return any(w in str(e).lower() for w in ('connection', 'peer', 'timed out', 'nccl', 'socket', 'gloo'))

def main(argv=None)->int:
    "Entry point; a mistake of the user is one sentence and exit code 2"
    try:
        a = parser().parse_args(argv)
        a.do(a)
    except CourseError as e: say(f't2i: {e}'); return 2
    except Stopped as e: say(f'\nt2i: {e}'); return 130
    except KeyboardInterrupt: say('\nt2i: stopped'); return 130
    except BrokenPipeError: return 1
    except RuntimeError as e: # gloo and NCCL report a lost process in many words
        if int(os.environ.get('WORLD_SIZE', 1))==1 or not lost(e): raise
        say(f"t2i: process {os.environ['RANK']} has lost another one ({str(e).splitlines()[0][:120]}). "
            'Go on from the last checkpoint: the same command with --resume.')
        return 3
    except OSError as e: # a disk that fills up while a line is logged, a file without the right to read it
        if not e.filename and e.errno!=errno.ENOSPC: raise
        what = f'{e.strerror}: {e.filename}' if e.filename else e.strerror
        say(f't2i: {what}. Check the path, its permissions and the free space.')
        return 2
    return 0

if __name__=='__main__': sys.exit(main())
