"""The `t2i` command: train, sample, eval, run, data, bench, report, doctor, demo."""
import argparse, errno, json, math, os, platform, shlex, shutil, sys, time
from collections import Counter
from contextlib import contextmanager
from datetime import date
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
import numpy as np
import torch
from t2i_course.core.data import Draws, results_path, scale as current_scale, split_words
from t2i_course.core.files import CourseError, between, load_tensors, save_tensors, say, write_json, write_whole
from t2i_course.core.sources import is_path, load
from t2i_course.core.ema import state_for
from t2i_course.core.training import ALONE, feed, has_bf16, pick_device, spent, train
from t2i_course.core.guards import Stopped, one_writer, same_threads, undisturbed
from t2i_course.core.runs import (belongs, codec_place, codec_run, config_hash, cut_log, follow, model_hash,
                                  read_config, seen_from)
from t2i_course.run.arms import code_version, make_arms, put
from t2i_course.core.runs import resume as take_up

def at(part, *names)->dict: return {name:f't2i_course.{part}.{name}' for name in names}

RECIPES = (dict(gan='t2i_course.gan.adversarial') | at('gan', 'stylegan2', 'biggan', 'text_gan')
           | at('codec', 'vae', 'vqvae', 'vqvae2', 'dvae') | at('diffusion', 'ddpm') | at('transformer', 'dit') | at('flow', 'flow_matching')
           | at('ar', 'pixelcnn', 'dalle', 'parti', 'cm3leon'))
CHAPTERS = ({RECIPES[k].split('.')[-1]:RECIPES[k] for k in RECIPES} | at('core', 'metrics')
            | at('diffusion', 'schedules', 'samplers', 'preconditioning', 'guidance', 'terminal_snr')
            | at('scale', 'mixed_precision', 'fsdp', 'pipeline', 'recipes') | at('capstone', 'report_card'))
DATA = 'digits, painted, painted2, mnist, fashion, cifar10 or a folder as ./FOLDER'
SIZE = "side of a folder's pictures, which are cropped to their central square and resized (default 32)"
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

def module(name:str, table:dict=RECIPES):
    "The module of a recipe or chapter"
    if name not in table: raise CourseError(f"there is no '{name}': choose {', '.join(table)}")
    return import_module(table[name])

def open_data(
    name,      # a data set, a folder of captioned images, or a folder made by t2i prepare
    codec=None,# for shards of latents: the run of the codec that made them
    size=None, # side of a folder's pictures; default 32
):
    "Any data of the course; shards read like pictures"
    if not codec: return load(name, size)
    from t2i_course.core.shards import Shards, is_shards
    if not is_path(name) or not is_shards(name):
        raise CourseError(f'--codec is for shards of latents; {name} is not a folder made by t2i prepare')
    return Shards(Path(name).expanduser(), Model(codec).den.codec)

def place(data)->str:
    "What a config calls its data: the name of a data set, or the whole path of a folder"
    return str(Path(data).expanduser().resolve()) if is_path(data) else data

def say_size(ds):
    "How a folder's pictures were cut, where its own size was not theirs"
    if hasattr(ds, 'crop'): say(ds.crop)

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
        lines = info.read_text(encoding='utf-8', errors='replace').splitlines()
        names = (l.split(':')[1].strip() for l in lines if l.startswith('model name'))
        name = next(names, name)
    return f'{name}, {os.cpu_count()} cores'

def in_hardware(
    precision:str, # fp32, bf16 or fp16
    device:str,
)->bool:
    "Does the device compute in this precision? If not, it emulates it, many times more slowly than float32"
    if precision=='fp32': return True
    return has_bf16(device) if precision=='bf16' else not device.startswith('cpu')

_typed = [] # the command line that `main` is at work on

def command(
    call='', # where Python calls: the function with its arguments
)->str:
    "The command that is running, as it was typed; or the call, where no command is"
    if not _typed: return f'python: {call}'
    as_module = Path(sys.argv[0]).name=='__main__.py'
    return shlex.join([*(('python','-m','t2i_course') if as_module else ('t2i',)), *_typed[-1]])

# ---- train ----
@undisturbed() # opening a codec makes its first weights
def settings(recipe, data, scale, seconds, images, seed, precision, changes=None, codec=None, size=None, ds=None)->dict:
    "The config of a new run: everything needed to make the same model again"
    mod = module(recipe)
    if codec and getattr(mod, 'PICTURES', False):
        raise CourseError(f'{recipe} learns from pictures and the shards in {data} hold latents: give it the data set itself, or take a '
                          'recipe that draws latents, such as ddpm, dit or flow_matching')
    ds = ds or open_data(data, codec, size)
    say_size(ds)
    if hasattr(mod, 'recipe_for'): config = mod.recipe_for(ds, scale, None if images else seconds)
    else: config = mod.recipe(ds.shape[0], ds.words, ds.size, scale)
    if config.get('skip') and ds.shape[1]*ds.shape[2]>64*64: # its fit grows with the third power of the number of pixels
        say(f'pictures of {ds.shape[2]} x {ds.shape[1]} are too large for the closed-form head start: training begins without it')
        config['skip'] = False
    if images is None and seconds is None: images = IMAGES[scale]
    if precision=='auto': precision = 'bf16' if has_bf16(pick_device()) else 'fp32'
    if codec: config |= dict(codec=str(Path(codec).resolve()), codec_model=model_hash(codec), clamp=4.) # whitened latents: variance 1, not [-1,1]
    return config|(changes or {})|dict(
        data=place(data), size=ds.shape[1] if hasattr(ds, 'crop') else None, fingerprint=ds.fingerprint,
        source=ds.source, shape=list(ds.shape), scale=scale,
        images=images, seconds=seconds, seed=seed, precision=precision,
        threads=torch.get_num_threads(), versions=versions(), hardware=hardware(), bf16_units=has_bf16(pick_device()))

def make_folder(out)->Path:
    "Make a folder and try to write there"
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out/'.try').touch(); (out/'.try').unlink()
    except OSError as e:
        raise CourseError(f'{out} cannot be written ({e.strerror}). Choose another --out.') from e
    return out

@same_threads()
def train_run(
    recipe=None,           # see RECIPES; default flow_matching
    data=None,             # name of a data set, or a folder as ./FOLDER; default painted
    scale=None,            # smoke, demo or full; default T2I_SCALE, else demo
    seconds=None,          # wall time of training, fitting a skip included
    images=None,           # or images seen: the clock that makes a run repeatable; with both, whichever is used up first
    seed=None,             # of every random number; default 0
    out=None,              # run folder; default runs/RECIPE-DATA-SEED
    resume=False,          # go on with the run in `out`: what is given must be what it was started with
    precision=None,        # auto, fp32, bf16 or fp16; default auto
    quiet=False,           # no progress bar
    save_every=20.,        # seconds between checkpoints
    changes=None,          # entries of the recipe to replace in a new run
    codec=None,            # data of latents: the run of the codec that made them
    size=None,             # side of a folder's pictures, which are cropped and resized; default 32
    shard=None,            # ddp or fsdp, under torchrun: how the processes share the work
    **outside,             # what comes from outside the network, see `fit_run`
)->Path:                   # the run folder
    "Train a recipe; leaves config.json, model.safetensors, a checkpoint and log.jsonl"
    between(seconds, 1e-3, 1e8, '--seconds')
    between(images, 1, 1e12, '--images', whole=True)
    between(seed, 0, 2**62, '--seed', whole=True)
    given = dict(recipe=recipe, data=data, scale=scale, seconds=seconds, images=images, seed=seed, precision=precision,
                 changes=changes, codec=codec, size=size)
    out = Path(out or default_run(recipe, data, seed))
    ranks = sharers(shard, out)
    if ranks.rank: # process 0 has written the config, or has stopped with a sentence
        ranks.wait()
        fit_run(out, read_config(out), quiet, save_every, ranks, shard, **outside)
    else:
        with run_folder(out, resume, given) as (config,ds):
            ranks.wait()
            fit_run(out, config, quiet, save_every, ranks, shard, ds=ds, **outside)
    ranks.close()
    return out

def default_run(recipe, data, seed)->str:
    "runs/RECIPE-DATA-SEED, without what a file name cannot hold"
    name = Path(place(data or 'painted')).name
    name = ''.join('_' if c in '<>:"|?*' else c for c in str(name))
    return f"runs/{recipe or 'flow_matching'}-{name}-{seed or 0}"

@contextmanager
def run_folder(out:Path, resume:bool, given:dict):
    "The settings of a new run, or of the one to go on with, and its pictures where they were opened; inside, nobody else writes there"
    def holds(): return (out/'config.json').exists()
    taken = CourseError(f'{out} already holds a run: go on with it by --resume, or choose another --out')
    if holds():
        if not resume: raise taken
        config,ds = None,None
    else:
        if resume: say(f'{out} holds no run yet: starting from the beginning')
        new = given|{k:given[k] if given[k] is not None else v for k,v in USUAL.items()}
        module(new['recipe']) # before pictures are read
        ds = open_data(new['data'], new['codec'], new['size'])
        config = settings(**new|dict(scale=new['scale'] or current_scale()), ds=ds)
        if config.get('codec'): config['codec'] = seen_from(out, config['codec'])
        make_folder(out)
    with one_writer(out):
        if config is None: config = same_run(out, given)
        elif holds(): # another process was faster
            if not resume: raise taken
            config,ds = same_run(out, given),None
        else: write_json(out/'config.json', config)
        yield config,ds

USUAL = dict(recipe='flow_matching', data='painted', seed=0, precision='auto') # of a new run, where nothing is said

def same_run(
    out:Path,   # a run folder
    given:dict, # option -> value, None where it was not given
)->dict:        # its settings
    "What is given at --resume has to be what the run was started with; only the places of folders may change"
    config = read_config(out)
    if given['recipe'] not in (None, config['recipe']):
        raise CourseError(f"{out} is a run of {config['recipe']}, not of {given['recipe']}: resume with {config['recipe']}, "
                          'or train into another folder')
    def refuse(name, old):
        raise CourseError(f'{out} was started with {old}; resume without --{name}, or train into another folder')
    for name,value in given.items():
        if value is None or name in ('recipe','data','codec') or (name, value)==('precision','auto'): continue
        if name=='changes':
            for k,v in json.loads(json.dumps(value)).items():
                if config.get(k)==v: continue
                raise CourseError(f'{out} was started with {k} = {config.get(k)}, not {v}: train into another folder')
        elif name in ('images','seconds') and value!=config[name]:
            refuse(name, ' '.join(f'--{k} {config[k]}' for k in ('images','seconds') if config[k]))
        elif name in config and value!=config[name]:
            refuse(name, f'--{name} {config[name]}' if config[name] is not None else f'no --{name}')
    moved = {k:v for k,v in dict(codec=moved_codec(out, config, given['codec'], refuse)).items() if v}
    moved |= {k:v for k,v in dict(data=moved_data(out, config|moved, given['data'], refuse)).items() if v}
    if moved:
        config |= moved
        write_json(out/'config.json', config)
        say(f"{out/'config.json'}: new place of {', '.join(moved)} written down")
    return config

def moved_data(out:Path, config:dict, data, refuse)->str:
    "The new place of a folder, where it holds the same pictures; None when it has not moved"
    old = config['data']
    if data is None or place(data)==old: return None
    if not is_path(old) or not is_path(data): refuse('data', f'--data {old}')
    if not config.get('fingerprint'):
        raise CourseError(f'{out} does not say which pictures it was started with, because an earlier version made it: put the folder back to {old}')
    if open_data(data, codec_place(out, config), config.get('size')).fingerprint!=config['fingerprint']:
        raise CourseError(f'{out} was started with other pictures or captions than those in {data}: name the folder that holds them, '
                          'or train into another folder')
    return place(data)

def moved_codec(out:Path, config:dict, codec, refuse)->str:
    "The new place of the codec's run, where it holds the same codec; None when it has not moved"
    old = codec_place(out, config)
    if codec is None or old==Path(codec).resolve(): return None
    if old is None: refuse('codec', 'no --codec')
    if config.get('codec_model')!=model_hash(codec): refuse('codec', f'--codec {old}')
    return seen_from(out, codec)

def missing_folder(out:Path, config:dict)->CourseError:
    "A sentence, when the pictures of a run are not where they were; None when they are"
    if not is_path(config['data']) or Path(config['data']).exists(): return None
    return CourseError(f"the pictures of {out} were in {config['data']}, which is not there: if the folder was moved, write down its new "
                       f'place with: t2i train --resume --out {out} --data FOLDER')

def run_data(out:Path, config:dict):
    "The pictures of a run, and are they still the same?"
    lost = missing_folder(out, config)
    if lost: raise lost
    ds = open_data(config['data'], codec_run(out, config), config.get('size'))
    return ds,config.get('fingerprint') in (None, ds.fingerprint)

def sharers(
    shard=None, # ddp, fsdp or None
    out=None,   # run folder
)->object:      # a scale.fsdp.Ranks, or Alone
    "The processes that torchrun has started, or this one alone"
    n = int(os.environ.get('WORLD_SIZE', 1))
    if shard is None:
        if n>1: raise CourseError(f'torchrun has started {n} processes: say how they share the work, --shard ddp or --shard fsdp')
        if not any(Path(out).glob('checkpoint-*')): return ALONE
        from t2i_course.scale.fsdp import One
        return One() # several processes have begun the run
    if 'RANK' not in os.environ:
        raise CourseError(f'--shard {shard} needs processes: torchrun --nproc-per-node 2 -m t2i_course train ... --shard {shard}')
    from t2i_course.scale.fsdp import Ranks
    return Ranks(minutes=30) # process 0 may have a large folder to read before the others see the config

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
    ds=None,            # the run's pictures, where they are open already
):
    "The training itself: what the model becomes is in the config, how the work is done in the other arguments"
    device,(ds,same) = pick_device(),(ds,True) if ds else run_data(out, config)
    if not same:
        raise CourseError(f"the pictures or captions in {config['data']} are not those that {out} was started with: some were added, "
                          'removed or changed. Put them back, or train into another folder.')
    if ranks.rank==0 and not in_hardware(config['precision'], device):
        say(f"no units for {config['precision']} here: it is emulated, many times more slowly than fp32")
    if ranks.size==1: torch.set_num_threads(min(config['threads'], os.cpu_count() or 1))
    with undisturbed():
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
    saved = take_up(state, out, config, ranks)
    if saved is not None:
        if finished(out, state, config):
            return say(f'{out} is trained to the end already: nothing was changed') if ranks.rank==0 else None
        if ranks.rank==0: say(f'going on at {state.images:,} images')
    if ranks.rank==0: cut_log(out, state.step)
    if ranks.rank==0 and saved is None: expect(ds, config['images'])
    head_start(state, ds, tok, den, config, saved, ranks, quiet)
    tables = den.skip.tables if getattr(den, 'skip', None) is not None else {}
    records = train(state, den.loss, feed(ds, tok), images=config['images'], seconds=config['seconds'], accumulate=accumulate,
                    batch=config['batch'], seed=config['seed'], clip=config.get('clip', 1.), ranks=ranks)
    bar = progress_bar(state, config, quiet or ranks.rank)
    with open(out/'log.jsonl' if ranks.rank==0 else os.devnull, 'a', encoding='utf-8') as log:
        for r in follow(state, records, out, config, tables, save_every, ranks):
            if shard and not quiet and r.step==1: say(share_line(state, ranks), everyone=True)
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
    if spent(state, config['images'], config['seconds'])<1 or not (out/'model.safetensors').exists(): return False
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
    n=None,      # training pictures, where some have several captions
)->str:          # '' where there are enough pictures
    "What to expect from so many pictures, in two sentences"
    words,n,different = Counter(w for c in set(texts) for w in set(split_words(c))),n or len(texts),len(set(texts))
    if n/different>=FEW_PICTURES: return ''
    once,passes = sum(k==1 for k in words.values()),images and images/n
    each = 'each caption names about one picture' if n/different<2 else f'each caption names about {n/different:.0f} pictures'
    what = (f'{n:,} training pictures with {different:,} different captions and {len(words):,} words, {once:,} of them in one caption '
            f'alone: {each}. ')
    if passes is None: what += f'Every {n:,} images are a pass through them. After about {MANY_PASSES} passes, expect '
    else:
        what += f'{images:,} images are {passes:{",.0f" if passes>=10 else ".2g"}} passes through them. '
        what += 'Expect ' if passes>=MANY_PASSES else f'With more than {MANY_PASSES}, expect '
    return what+('drawings of training captions to be copies of their pictures, and new captions to work only as far as '
                 'their words came in several captions. t2i eval counts the copies.')

def expect(
    ds,          # the pictures
    images=None, # that training will see, where it is known
):
    "Say before training what to expect from a folder of few pictures"
    texts = getattr(ds, 'texts', None)
    line = expectation(texts['train'], images, len(ds.x['train'])) if texts else ''
    if line: say(line)

def head_start(state, ds, tok, den, config:dict, saved:dict, ranks=ALONE, quiet=False):
    "Fit the closed-form skip, or take it from the checkpoint; its time counts as training"
    if getattr(den, 'skip', None) is None: return
    if saved:
        den.skip.tables = {k:v.to(state.device) for k,v in saved.items()}
        return
    from t2i_course.diffusion.preconditioning import fit_skip
    if ranks.rank==0 and not quiet: say(f"fitting the closed form to {config['fit_images']:,} pictures ...")
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
    "A tqdm bar on standard error: images, seconds, or with two clocks the share of the one that is ahead"
    if quiet: return lambda r: None
    from tqdm import tqdm
    images,seconds = config['images'],config['seconds']
    count = 'progress' if images and seconds else 'images' if images else 'seconds'
    total = 1 if count=='progress' else images or seconds
    done = spent(state, images, seconds) if count=='progress' else getattr(state, count)
    unit = dict(images='{n:.0f}/{total:.0f} img ', seconds='{n:.0f}/{total:.0f} s ', progress='')[count]
    bar = tqdm(total=total, initial=min(done, total), bar_format='{l_bar}{bar}| '+unit+'[{elapsed}<{remaining}{postfix}]',
               mininterval=.5, file=sys.stderr) # a head start may take longer than a short clock
    recent = []
    def show(r):
        if r is None: return bar.close()
        recent.append(r.loss); del recent[:-50]
        seen = f'{r.images:,} images, ' if count=='progress' else ''
        bar.set_postfix_str(f'{seen}loss {sum(recent)/len(recent):.3f}', refresh=False)
        bar.update(max(0, min(total, getattr(r, count))-bar.n))
    return show

# ---- sample and eval ----
@contextmanager
def counting(
    n:int,       # pictures in all
    what:str,    # what is done with them
    quiet=False, # show nothing
):               # yields each(k): k more are done
    "A bar on standard error for what takes longer than two seconds"
    from tqdm import tqdm
    with tqdm(total=n, desc=what, unit='img', delay=2, mininterval=.5, disable=quiet, file=sys.stderr) as bar:
        yield bar.update

class Model:
    "A trained run, ready to draw"
    def __init__(self,
        run,       # run folder
        data=None, # where its pictures lie now, if their folder was moved
    ):
        self.run,self.config = Path(run),read_config(run)
        if data:
            old = self.config['data']
            if not is_path(old): raise CourseError(f'{run} was trained on {old}: leave --data out')
            if not is_path(data): raise CourseError(f"--data names the new place of a folder: write it as ./{data}")
        path = self.run/'model.safetensors'
        if not path.exists():
            raise CourseError(f'{run} is not trained to the end yet: '
                              f'go on with t2i train --resume --out {run}')
        tensors,note = load_tensors(path)
        if not belongs(note, self.config):
            raise CourseError(f'{path} belongs to other settings than {run}/config.json. '
                              'Train again into another folder.')
        if data: self.config['data'] = place(data)
        self.module,self.device = module(self.config['recipe']),pick_device()
        try:
            with undisturbed(): self.tok,self.den = self.module.build(self.config)
        except CourseError as e: raise missing_folder(self.run, self.config) or e
        own = lambda p: {k[len(p):]:v for k,v in tensors.items() if k.startswith(p)}
        self.den.net.load_state_dict(own('net.'))
        self.den.net.to(self.device).eval()
        if getattr(self.den, 'skip', None) is not None: self.den.skip.tables = own('skip.')
        self.den.to(self.device)
        codec = codec_run(self.run, self.config)
        self.codec = Model(codec).den.codec if codec else None

    def draw(self,
        captions,       # n texts; '' draws without condition
        seed=0,         # of the noise
        steps=None,     # network evaluations; default the recipe's
        guidance=None,  # scale; default the recipe's; 0 draws as if the captions were empty
        each=None,      # each(k) hears of every k pictures that are drawn
        **others,       # further options of the recipe, see OPTIONS
    )->torch.Tensor:    # (n c h w) in [-1,1]
        "Pictures of captions; the noise of a picture depends on the seed and its place alone"
        c,given = self.config,dict(others, steps=steps, guidance=guidance)
        c = c|{KEYS.get(k, k):v for k,v in self.asked(given).items()}
        if c.get('guidance')==0: # outside the guidance interval, in retrieval and in the choice among candidates too
            captions,c = ['']*len(captions),c|dict(guidance=self.config['guidance'] or 1.)
        low = torch.float16 if c['precision']=='fp16' else torch.bfloat16
        draw = self.den.painter(self.tok, c)
        with torch.autocast(torch.device(self.device).type, low, enabled=c['precision']!='fp32' and in_hardware(c['precision'], self.device)):
            x = draw(captions, seed, each)
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
    quiet=False,    # no progress bar
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
    with counting(len(texts), 'drawing', quiet) as each:
        return to_bytes(m.draw(texts, seed, steps, guidance, each, **others)),texts

def eval_run(
    run,          # run folder
    n=1000,       # drawings
    seed=0,       # of captions and noise
    quiet=False,  # print nothing, show no progress
    data=None,    # where its pictures lie now, if their folder was moved
)->dict:          # the row
    "The measured row of a run; written to metrics.json in its folder"
    from t2i_course.core.metrics import evaluate
    m,call = Model(run, data),f'eval_run({str(run)!r}, n={n}, seed={seed})'
    c,t = m.config,json.loads((m.run/'train.json').read_text(encoding='utf-8'))
    data,same = run_data(m.run, c)
    if not same: say(f"the pictures or captions in {c['data']} are not those that {run} was trained on: compared with what is there now")
    if not quiet: say(f'measuring {m.run}: reading real pictures to compare with ...')
    def draw(captions, seed):
        with counting(len(captions), 'drawing', quiet) as each: return m.draw(captions, seed, each=each)
    row = evaluate(draw, data.whole() if hasattr(data, 'whole') else data, n=n, seed=seed, n_trained=n//5)|dict(
        recipe=c['recipe'], params=t['params'], params_trained=t.get('params_trained', t['params']),
        images=t['images'], train_seconds=t['seconds'], steps=t['steps'], train_seed=c['seed'],
        nfe=m.den.calls(c), **{k:c[KEYS.get(k, k)] for k in m.den.options if k!='steps'},
        precision_mode=c['precision'], source=c['source'], hardware=hardware(), bf16_units=has_bf16(pick_device()), versions=versions(),
        date=str(date.today()), command=command(call))
    write_json(m.run/'metrics.json', row)
    if not quiet: print(row_text(row))
    return row

def margin(
    share, # 0..1, of n independent pictures
    n,     # pictures
)->float:  # half the width of the 95% interval
    "How far a share can be off by the luck of the draw: Wilson's interval, which is not empty at 0 or 1"
    z = 1.96
    return z*math.sqrt(share*(1-share)/n+(z/(2*n))**2)/(1+z*z/n)

COPIES = .2 # unseen real pictures come so near in one case of a hundred; twenty times that is no chance even with 40 drawings

def row_text(row:dict)->str:
    "A row for people"
    pc = lambda v: f'{100*v:.1f}%'
    def counted(o): return f"{pc(o['all'])} +- {100*margin(o['all'], o['n']):.1f} ({o['n']:,} captions)" if 'n' in o else pc(o['all'])
    out = []
    if 'obedience' in row:
        o = row['obedience']
        parts = {k:v for k,v in o.items() if k not in ('all','ceiling','chance','n') and isinstance(v, float)}
        out += [f"pictures that show all their caption demands: {counted(o)}   "
                f"(judge on unseen real pictures {pc(o['ceiling'])}, on shuffled captions {pc(o['chance'])})",
                '  by attribute: '+'  '.join(f'{k} {pc(v)}' for k,v in parts.items())]
    if 'heldout' in row: out += [f"  digit x ink pairs never seen in training: {counted(row['heldout'])}"]
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
# what a run consists of. The config goes last: what is left of an interruption is still known as a run
FILES = ('model.safetensors','train.json','metrics.json','samples.png','log.jsonl','checkpoint.safetensors','config.json')

def clear_run(
    out:Path, # a folder that holds a run which may go
):
    "Take the files of a run away, and nothing else"
    for part in out.glob('.*.part'): part.unlink(missing_ok=True)
    for folder in out.glob('checkpoint-*'):
        if folder.is_dir(): shutil.rmtree(folder)
    for name in FILES: (out/name).unlink(missing_ok=True)

@contextmanager
def claim_demo_folder(
    out:Path, # where the demo wants to write
):
    "An earlier demo is cleared away, a stranger's files never; inside, nobody else writes there"
    with one_writer(make_folder(out)):
        found = [n for n in FILES if (out/n).exists()]+[p.name for p in out.glob('checkpoint-*')]
        try: config = read_config(out) if 'config.json' in found else {}
        except CourseError: config = {}
        # earlier versions left no mark; the folder that is the demo's own by name is known all the same
        usual = (config.get('recipe'), config.get('data'))==('flow_matching', 'painted')
        own = config.get('demo') or out==Path('runs/demo') and usual
        if found and not own:
            raise CourseError(f"{out} holds {', '.join(found)}, which t2i demo did not make: choose another --out, "
                              'or take them away yourself')
        if found: clear_run(out)
        yield

# a fast machine sees so many pictures in half a minute; a slow one stops at the limit and measures fewer drawings
CLOCK = dict(smoke=dict(images=1_024, seconds=60., n=64), demo=dict(images=40_000, seconds=150., n=1000))
CLOCK['full'] = CLOCK['demo']
PATIENCE = 45. # seconds that the demo's drawings for measuring may take

def demo(
    seconds=None,   # time limit of training; default 150
    out='runs/demo',# run folder; an earlier demo that it holds is replaced
    images=None,    # pictures to train on; default 40,000
)->dict:            # the measured row
    "Train on painted digits, draw typed prompts, measure: a minute on a fast machine, at most four on a slow one"
    with claim_demo_folder(Path(out)): return make_demo(seconds, Path(out), images)

def make_demo(seconds, out:Path, images)->dict:
    "The demo, in a folder that is its own"
    clock,began = CLOCK[current_scale()],time.perf_counter()
    images,seconds = images or clock['images'],seconds or clock['seconds']
    print(f'Training a text-to-image model on {images:,} painted digits, for {seconds:g} seconds at most '
          '(flow matching with a closed-form head start) ...', flush=True)
    train_run('flow_matching', 'painted', seconds=seconds, images=images, out=out, changes=dict(demo=True))
    print(clock_text(json.loads((out/'train.json').read_text(encoding='utf-8')), images, seconds), flush=True)
    model = Model(out)
    model.draw(PROMPTS[:1]) # warm
    start = time.perf_counter()
    x,texts = sample_run(model, PROMPTS)
    each = (time.perf_counter()-start)/len(texts)
    write_sheet(out/'samples.png', x, texts,
                'what the model drew (last four: digit and ink never seen together in training)')
    n = judged(each, clock['n'])
    fewer = f" (not {clock['n']:,}, because drawing is slow here)" if n<clock['n'] else ''
    print(f'Measuring with {n:,} captions and handwriting it never saw{fewer} ...', flush=True)
    row = eval_run(out, n=n)|dict(demo_seconds=time.perf_counter()-began)
    write_json(out/'metrics.json', row)
    print(f"""
all of it took {row['demo_seconds']:.0f} s
pictures   {out/'samples.png'}
numbers    {out/'metrics.json'}
model      {out/'model.safetensors'}
draw your own: t2i sample {out} --prompt "a thin blue four on pink" --out four.png
What to open next (make lab): nbs/00_start/01_tour.ipynb, then the parts of this model:
  captions and pictures 01_core/01_data, text encoder 01_core/02_conditioning, training 01_core/03_training,
  metrics 01_core/05_metrics, network and guidance 04_diffusion/01_ddpm, the head start 04_diffusion/04_preconditioning,
  the method itself 06_flow/01_flow_matching""")
    return row

def clock_text(
    found:dict, # train.json: images, seconds
    images,     # planned
    seconds,    # the limit
)->str:
    "Which of the two clocks ended the training"
    seen,took = found['images'],found['seconds']
    rate = f"{seen:,} pictures in {took:.0f} s, {seen/took:,.0f} a second"
    if seen>=images: return f'Trained on {rate}: all that were planned.'
    return (f'Trained on {rate}: the time limit of {seconds:g} s came before the planned {images:,} pictures. '
            'On a faster or less busy machine the model would draw better after the same time.')

def judged(
    each:float, # seconds that a drawing takes here
    most:int,   # drawings on a fast machine
)->int:
    "Captions to measure with: half as many again are drawn of held-out pairs, a fifth as many of training captions"
    return max(min(most, 200), min(most, int(PATIENCE/(1.7*each))//100*100))
SHEET = 256 # pictures that can still be told apart, and read, on one sheet

def fits_sheet(n:int):
    "More pictures than a sheet can show are refused, before they are drawn"
    if n<=SHEET: return
    raise CourseError(f'{n:,} pictures do not fit on one sheet, which shows at most {SHEET}: '
                      'take --out pictures.npz, or draw fewer')

def write_sheet(
    path,     # a .png file
    x,        # (n h w c) uint8
    texts,    # n captions
    title='', # above the sheet
):
    "A labelled grid of pictures"
    from t2i_course.core.plots import sheet
    fits_sheet(len(x))
    x = torch.from_numpy(x).permute(0,3,1,2)/127.5-1
    def write(p):
        with open(p, 'wb') as f: sheet(x, texts, f, title=title)
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
def stamp(chapter:str, seeds)->dict:
    "Who made a result, when, on what"
    call = f"bench(seeds={tuple(seeds)})" if chapter=='bench' else f"run_chapter('{chapter}', {tuple(seeds)})"
    return dict(chapter=chapter, command=command(call), date=str(date.today()), hardware=hardware(),
                bf16_units=has_bf16(pick_device()), versions=versions(), seeds=list(seeds), scale=current_scale())

def alike(
    old:dict, # of a run or row that is there
    new:dict, # of the one that is wanted
)->bool:
    "The same settings, and versions of torch and of this package; another Python does not matter"
    def said(c):
        versions = c.get('versions') or {}
        return json.loads(json.dumps(c|dict(versions=[versions.get(k) for k in ('torch','t2i_course')])))
    return said(old)==said(new)

def cleared(
    out:Path,    # a run folder, which need not exist
    wanted:dict, # settings that the run should have
):
    "A run with other settings, of another scale, machine or version, is taken away, so that it is trained anew"
    if not (out/'config.json').exists(): return
    with one_writer(out):
        try: config = read_config(out)
        except CourseError: config = {}
        if alike(config, wanted): return
        say(f'{out} was made with other settings or by another version: it is made anew')
        clear_run(out)

def kept_row(
    out:Path, # a run folder
    n:int,    # drawings of the row that is wanted
)->dict:      # None when there is none
    "The measured row of a run that `cleared` has left standing"
    try: row = json.loads((out/'metrics.json').read_text(encoding='utf-8'))
    except (OSError, ValueError): return None
    same = [(row.get('versions') or {}).get(k)==versions()[k] for k in ('torch','t2i_course')]
    return row if row.get('n')==n and all(same) else None

def measured_rows(recipe, data, seeds, seconds, work:Path)->dict:
    "Train and measure once a seed; mean and spread of the main numbers"
    from t2i_course.core.metrics import at_most
    rows,n = [],at_most(load(data), 64 if current_scale()=='smoke' else 1000)
    for s in seeds:
        out = work/f'{recipe}-{data}-{seconds:g}s-{s}'
        cleared(out, settings(recipe, data, current_scale(), seconds, None, s, 'auto'))
        row = kept_row(out, n)
        if row is None:
            train_run(recipe, data, seconds=seconds, seed=s, out=out, resume=(out/'config.json').exists())
            row = eval_run(out, n=n)
        rows.append(row)
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
    chapter,      # 'flow_matching', or '01_flow_matching' as its notebook is called
    seeds=(0,1),  # of the runs
    seconds=None, # training time of a row; default 60
    out=None,     # file to write; default results/CHAPTER.json
):
    "The measurements of a chapter; finished arms are kept, and skipped by the same code on the same machine"
    name = chapter.split('_', 1)[1] if chapter[:2].isdigit() and '_' in chapter else chapter
    if name=='demo': return demo_row(result_file(out, 'demo'), seconds)
    mod = module(name, CHAPTERS)
    if name=='metrics': return mod.make_judges(out)
    path = result_file(out, name)
    seconds = seconds or (120 if name=='report_card' else 60 if current_scale()!='smoke' else 3)
    rows = dict(ddpm=['digits','painted'], dit=['painted'], flow_matching=['painted']).get(name, [])
    head = stamp(name, seeds)|(dict(seconds=seconds) if rows or name=='report_card' else {})|dict(code=code_version(CHAPTERS[name]))
    if name=='report_card': return report_card(head, path, seeds, seconds)
    arms = [(f'row.{d}', partial(measured_rows, name, d, seeds, seconds, Path('runs')/'rows')) for d in rows]
    make_arms(arms+list(mod.experiments(current_scale(), seeds)), head, path, getattr(mod, 'MAY_AGREE', ()))
    print(f'{path} is complete')

def demo_row(
    path:Path,    # results/demo.json
    seconds=None, # time limit of training
):
    "The demo on this machine; the file keeps a row for machines with bfloat16 units and one for those without"
    try: rows = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    except ValueError as e: raise CourseError(f'{path} cannot be read ({e}): delete it, or choose another --out') from e
    kind = 'with_bf16' if has_bf16(pick_device()) else 'without_bf16'
    write_json(path, rows|stamp('demo', [0])|{kind:demo(seconds)})

def report_card(
    head:dict, # how and when it is made
    path:Path, # results/report_card.json
    seeds,     # of the runs
    seconds,   # training time of each
):
    "Every recipe that stands for a paradigm, on painted digits with the same clock; pictures of the first seed beside the numbers"
    from t2i_course.capstone.report_card import drawing_flops, experiments, training_memory, variety
    from t2i_course.core.metrics import load_judge
    from t2i_course.core.plots import mosaic
    data,judge,work = load('painted'),load_judge('painted'),Path('runs')/'rows'
    def row(recipe, paradigm):
        found = measured_rows(recipe, 'painted', seeds, seconds, work)
        models = [Model(work/f'{recipe}-painted-{seconds:g}s-{s}') for s in seeds]
        for r,m in zip(found['rows'], models): r['variety'] = variety(m.draw, data, judge, PROMPTS)
        m = models[0]
        return found|dict(paradigm=paradigm, multiply_adds=drawing_flops(m.den.painter(m.tok, m.config), PROMPTS[:4]),
                          memory=training_memory(m.den, m.tok, data, m.config['batch'], m.config['precision']), batch=m.config['batch'])
    def drawn(recipe):
        measured_rows(recipe, 'painted', seeds[:1], seconds, work) # trains only if the run is gone
        return Model(work/f'{recipe}-painted-{seconds:g}s-{seeds[0]}').draw(PROMPTS)
    paradigms = {r:p for r in RECIPES if (p := getattr(module(r), 'PARADIGM', None))}
    head = head|dict(code=code_version(CHAPTERS['report_card'], *(RECIPES[r] for r in paradigms)))
    arms = [(f'row.{r}', partial(row, r, p)) for r,p in paradigms.items()]
    make_arms(arms+list(experiments(current_scale(), seeds)), head, path, also=dict(prompts=PROMPTS, pictures=list(paradigms)))
    from PIL import Image
    picture = Image.fromarray(mosaic(torch.cat([drawn(r) for r in paradigms]), len(PROMPTS)).numpy())
    write_whole(path.with_suffix('.png'), lambda p: picture.save(p, 'png'))
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
    from t2i_course.core.downloads import data_root
    device = pick_device()
    print(f'python {platform.python_version()}, torch {torch.__version__}, {hardware()}, '
          f'device {device}, {torch.get_num_threads()} threads')
    print(f"bfloat16 units: {'yes, runs train with bf16' if has_bf16(device) else 'no, runs train with fp32'}")
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
    path, # a UTF-8 file, one caption a line; a pipe is read as well, - is standard input
)->list:  # captions; '' draws without condition
    "The captions of a file"
    piped,path = str(path)=='-',Path(path)
    if not piped and (not path.exists() or path.is_dir()):
        raise CourseError(f'caption file {path} {"is a folder" if path.is_dir() else "does not exist"}: give a UTF-8 text file')
    raw = sys.stdin.buffer.read() if piped else path.read_bytes()
    try: text = raw.decode('utf-8-sig').replace('\r\n', '\n').replace('\r', '\n')
    except UnicodeDecodeError as e:
        raise CourseError(f'{path} is not UTF-8 text (byte {e.start}). '
                          'Save it as UTF-8, one caption a line.') from e
    if not text:
        raise CourseError(f'{path} is empty: write one caption a line (a blank line draws without condition)')
    return text.removesuffix('\n').split('\n')

def typed(
    text:str, # an argument, as Python has decoded it by the locale
)->str:
    "A caption that was typed in UTF-8, whatever the locale says"
    try: text = os.fsencode(text).decode('utf-8')
    except UnicodeError: pass # it was typed in the encoding of the locale
    if any('\ud800'<=c<='\udfff' for c in text):
        raise CourseError(f"the caption '{text}' is not UTF-8: type it so, or write it to a UTF-8 file for --captions")
    return text

def cmd_train(a):
    "t2i train"
    if a.list:
        for k,v in RECIPES.items(): print(f'{k:15} {import_module(v).__doc__.strip().splitlines()[0]}')
        return
    between(a.save_every, 0, 1e6, '--save-every')
    known = a.resume and a.out and (Path(a.out)/'config.json').exists() # the run knows its recipe
    if not (a.recipe or known): raise CourseError(f"say which recipe to train: {', '.join(RECIPES)}")
    out = train_run(a.recipe, a.data, a.scale, a.seconds, a.images, a.seed, a.out, a.resume, a.precision,
                    a.quiet, a.save_every, codec=a.codec, size=a.size, shard=a.shard, checkpointing=a.checkpointing, compiled=a.compile,
                    accumulate=between(a.accumulate, 1, 4096, '--accumulate', whole=True))
    if not int(os.environ.get('RANK', 0)): print(f'{out}: trained. Draw with: t2i sample {out} --prompt "..." --out picture.png')

def cmd_sample(a):
    "t2i sample"
    if (a.prompt is None)==(a.captions is None):
        raise CourseError('say what to draw: either --prompt TEXT ... or --captions FILE')
    ext = Path(a.out).suffix.lower()
    if ext not in ('.png','.npz'): raise CourseError(f"--out must end in .png or .npz; got '{a.out}'")
    between(a.per_caption, 1, 10_000, '--per-caption', whole=True)
    captions = [typed(p) for p in a.prompt] if a.prompt is not None else read_captions(a.captions)
    if ext=='.png': fits_sheet(len(captions)*a.per_caption)
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
    eval_run(a.run, a.n, a.seed, data=a.data)

def cmd_data(a):
    "t2i data"
    between(a.n, 1, 10_000_000, '--n', whole=True)
    between(a.seed, 0, 2**62, '--seed', whole=True)
    if Path(a.out).suffix.lower()!='.npz': raise CourseError(f"--out must end in .npz; got '{a.out}'")
    ds = load(a.name, a.size)
    say_size(ds)
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
    from t2i_course.core.prepare import prepare
    between(a.images, 1, 1e12, '--images', whole=True)
    between(a.shard_size, 1, 1e8, '--shard-size', whole=True)
    between(a.seed, 0, 2**62, '--seed', whole=True)
    codec = Model(a.codec).den if a.codec else None
    if codec is not None and not hasattr(codec, 'codec'):
        raise CourseError(f'{a.codec} is a run without a codec: train one with t2i train vae')
    ds = open_data(a.data, size=a.size)
    say_size(ds)
    expect(ds)
    make_folder(a.out)
    with one_writer(a.out), tqdm(total=a.images, unit='img', disable=a.quiet, file=sys.stderr) as bar:
        prepare(ds, a.out, a.images, codec and codec.codec, shard_size=a.shard_size, split=a.split, seed=a.seed,
                store=a.store, progress=lambda n: bar.update(n-bar.n))
    there = a.out if is_path(a.out) else f'./{a.out}'
    print(f'{a.out}: {a.images:,} images in shards. '+
          f'Train on them with: t2i train RECIPE --data {there}'+(f' --codec {a.codec}' if a.codec else ''))

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
    a('--data', help=f'{DATA}, of captioned images (default painted); with --resume: the new place of a folder that was moved')
    a('--scale', choices=['smoke','demo','full'],
      help='size of the model and default length (default: T2I_SCALE, else demo)')
    a('--seconds', type=float, metavar='N', help='wall time of training')
    a('--images', type=int, metavar='N', help='images seen: the clock that makes runs repeatable; with --seconds, whichever is first')
    a('--precision', choices=['auto','fp32','bf16','fp16'],
      help='auto, the default: bf16 where the processor or GPU has units for it, else fp32')
    a('--seed', type=int, metavar='N', help='of every random number (default 0)')
    a('--resume', action='store_true', help='go on with the run in --out; other options may be left out, and may not differ')
    a('--out', metavar='RUN', help='run folder (default runs/RECIPE-DATA-SEED)')
    a('--save-every', type=float, default=20., metavar='N', help='seconds between checkpoints (default 20)')
    a('--quiet', action='store_true', help='no progress bar')
    a('--size', type=int, metavar='N', help=SIZE)
    a('--codec', metavar='RUN', help='with --data of latents: the vae run that t2i prepare was given')
    a('--shard', choices=['ddp','fsdp'], help='under torchrun: a copy of the model in each process, or a shard of it')
    a('--accumulate', type=int, default=1, metavar='N', help='micro-batches a step (default 1)')
    a('--checkpointing', action='store_true', help='compute activations again in the backward pass instead of keeping them')
    a('--compile', action='store_true', help='torch.compile, block by block')

def add_sample(command):
    "Options of t2i sample"
    a = command('sample', 'draw captions with a trained run', cmd_sample)
    a('run', help='run folder')
    a('--prompt', nargs='+', action='extend', metavar='TEXT', help='captions; may be given several times')
    a('--captions', metavar='FILE',
      help='UTF-8 file or pipe (- is standard input), one caption a line; a blank line draws without condition')
    a('--per-caption', type=int, default=1, metavar='N', help='pictures of each caption (default 1)')
    a('--steps', type=int, metavar='N', help="sampler steps (default the recipe's)")
    a('--guidance', type=float, metavar='W', help="guidance scale; 1 = none, 0 = the empty caption (default the recipe's)")
    a('--temperature', type=float, metavar='X', help='autoregressive recipes: of the softmax over codes')
    a('--candidates', type=int, metavar='N', help='autoregressive recipes: draw N, keep the one that fits best')
    a('--truncation', type=float, metavar='X', help='GAN recipes: how far from the mean latents may lie')
    a('--seed', type=int, default=0, metavar='N', help='of the noise (default 0)')
    a('--out', required=True, metavar='FILE',
      help=f'picture.png (a labelled sheet of at most {SHEET}) or pictures.npz (images, captions)')

def add_rest(command):
    "Options of the commands around training and sampling"
    a = command('eval', 'measure a run: obedience, Frechet distance, recall, copying', cmd_eval)
    a('run', help='run folder')
    a('--n', type=int, default=1000, metavar='N', help='drawings (default 1000)')
    a('--seed', type=int, default=0, metavar='N', help='of captions and noise (default 0)')
    a('--data', metavar='FOLDER', help='the new place of its pictures, if their folder was moved')
    a = command('run', 'make the measurements of a chapter (results/CHAPTER.json); again: go on with the first that is missing', cmd_run)
    a('chapter', help=', '.join(('demo',*CHAPTERS)))
    a('--seeds', type=int, default=2, metavar='N', help='how many (default 2)')
    a('--seconds', type=float, metavar='N', help='training time of a row (default 60)')
    a('--out', metavar='FILE', help='file to write')
    a = command('data', 'write captioned pictures of a data set to a file', cmd_data)
    a('name', help=DATA)
    a('--split', default='train', help='train, test, or painted: heldout (default train)')
    a('--n', type=int, default=1000, metavar='N', help='pictures (default 1000)')
    a('--seed', type=int, default=0, metavar='N', help='of every random number (default 0)')
    a('--size', type=int, metavar='N', help=SIZE)
    a('--out', required=True, metavar='FILE', help='file.npz')
    a = command('prepare', 'write captioned pictures, or their latents, to shards that training reads by index', cmd_prepare)
    a('data', help=DATA)
    a('--images', type=int, required=True, metavar='N', help='how many')
    a('--size', type=int, metavar='N', help=SIZE)
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
    a = command('demo', 'train on painted digits, draw, measure: a minute on a fast machine, at most four on a slow one',
                lambda a: demo(between(a.seconds, .1, 1e6, '--seconds'), a.out, between(a.images, 1, 1e12, '--images', whole=True)))
    a('--images', type=int, metavar='N', help='pictures to train on (default 40000)')
    a('--seconds', type=float, metavar='N', help='time limit of training (default 150)')
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
    for stream in (sys.stdout, sys.stderr): # captions may hold letters that the terminal has no code for
        if hasattr(stream, 'reconfigure'): stream.reconfigure(errors='backslashreplace')
    _typed.append([str(v) for v in (sys.argv[1:] if argv is None else argv)])
    try:
        a = parser().parse_args(argv)
        a.do(a)
    except CourseError as e: say(f't2i: {e}', everyone=True); return 2
    except Stopped as e: say(f'\nt2i: {e}', everyone=True); return 130
    except KeyboardInterrupt: say('\nt2i: stopped', everyone=True); return 130
    except BrokenPipeError: return 1
    except RuntimeError as e: # gloo and NCCL report a lost process in many words
        if int(os.environ.get('WORLD_SIZE', 1))==1 or not lost(e): raise
        say(f"t2i: process {os.environ['RANK']} has lost another one ({str(e).splitlines()[0][:120]}). "
            'Go on from the last checkpoint: the same command with --resume.', everyone=True)
        return 3
    except OSError as e: # a disk that fills up while a line is logged, a file without the right to read it
        if not e.filename and e.errno not in (errno.ENOSPC, getattr(errno, 'EDQUOT', errno.ENOSPC)): raise
        what = f'{e.strerror}: {e.filename}' if e.filename else e.strerror
        full = e.errno in (errno.ENOSPC, getattr(errno, 'EDQUOT', errno.ENOSPC))
        say(f"t2i: {what}. {'Free some space.' if full else 'Check the path and its permissions.'}", everyone=True)
        return 2
    finally: _typed.pop()
    return 0

if __name__=='__main__': sys.exit(main())
