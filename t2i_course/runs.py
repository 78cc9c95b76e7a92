"""Run folders: what a training run leaves on disk, saved whole or not at all, and taken up again exactly."""
import ast, hashlib, json, math, os, signal, time
from contextlib import contextmanager
from fractions import Fraction
from importlib.util import find_spec, resolve_name
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from t2i_course.core.data import CourseError
from t2i_course.core.training import ALONE

def write_whole(
    path,  # where to
    write, # write(temporary path)
):
    "Write beside the target, flush, put in place: a full disk or a power cut leaves the old file whole"
    path = Path(path)
    tmp = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        write(tmp)
        with open(tmp, 'rb') as f: os.fsync(f.fileno())
        os.replace(tmp, path)
    except Exception as e: # safetensors reports a full disk with an error of its own
        why = getattr(e, 'strerror', None) or e
        raise CourseError(f'could not write {path} ({why}). Free some space or choose another --out; '
                          'what was saved before is untouched.') from e
    finally:
        tmp.unlink(missing_ok=True)

def write_json(
    path,  # where to
    value, # anything that JSON can hold
):
    "JSON for people, written whole"
    write_whole(path, lambda p: p.write_text(json.dumps(value, indent=1, ensure_ascii=False)+'\n'))

def digest(
    tensors:dict, # name -> tensor
    note:str,     # the JSON saved with them
)->str:           # sha256
    "Hash of every name, shape, type and byte, and of the note"
    h = hashlib.sha256(note.encode())
    for k in sorted(tensors):
        v = tensors[k].detach().cpu().contiguous()
        h.update(f'{k} {tuple(v.shape)} {v.dtype}'.encode())
        h.update(v.view(-1).view(torch.uint8).numpy().tobytes() if v.numel() else b'')
    return h.hexdigest()

def save_tensors(
    path,         # a .safetensors file
    tensors:dict, # name -> tensor
    **note,       # JSON values kept in the file's header
):
    "Tensors, a note and their hash in one safetensors file, written whole"
    tensors = {k:v.detach().cpu().contiguous().clone() for k,v in tensors.items()}
    sha256 = digest(tensors, json.dumps(note, sort_keys=True))
    # one entry alone: safetensors writes several in random order, and the same run would end in other bytes
    header = dict(note=json.dumps(note|dict(sha256=sha256), sort_keys=True))
    write_whole(path, lambda p: save_file(tensors, p, metadata=header))

def load_tensors(
    path, # a file made by `save_tensors`
)->tuple: # tensors, note
    "Read and check the hash; raises CourseError when the file is cut short or changed"
    path = Path(path)
    if not path.is_file(): raise CourseError(f'{path} does not exist')
    try:
        with safe_open(path, 'pt') as f:
            tensors,header = {k:f.get_tensor(k) for k in f.keys()},f.metadata() or {}
        note = json.loads(header.get('note', '{}'))
    except Exception as e:
        raise CourseError(f'{path} cannot be read ({e}): it is damaged or cut short. '
                          'Delete it, or take it from a backup.') from e
    sha256 = note.pop('sha256', header.get('sha256')) # earlier files have it as an entry of its own
    if sha256!=digest(tensors, json.dumps(note, sort_keys=True)):
        raise CourseError(f'{path} is not as it was saved (its hash differs): it was changed '
                          'or damaged. Delete it, or take it from a backup.')
    return tensors,note

# what every config.json says
NEEDED = ('recipe','data','shape','images','seconds','seed','precision','threads')

def read_config(
    run, # a run folder
)->dict: # its config.json
    "The settings of a run; raises CourseError when the folder is not a run"
    path = Path(run)/'config.json'
    if not path.is_file():
        raise CourseError(f'{run} is not a run folder (it has no config.json). '
                          f'Make one with: t2i train flow_matching --out {run}')
    try: config = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e:
        raise CourseError(f'{path} is not valid JSON ({e}). Train again into another folder.') from e
    missing = [k for k in NEEDED if not isinstance(config, dict) or k not in config]
    if missing: raise CourseError(f"{path} lacks {', '.join(missing)}. Train again into another folder.")
    return config

def config_hash(
    config:dict, # settings of a run
)->str:          # 16 hex digits
    "Ties checkpoints and models to the settings they were made with"
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]

class Stopped(Exception):
    "Ctrl-C or SIGTERM asked the run to stop"

@contextmanager
def asked_to_stop():
    "Yields a function that says whether Ctrl-C or SIGTERM came; the second Ctrl-C stops at once"
    seen = []
    def note(signum, frame):
        if signum==signal.SIGINT and signal.SIGINT in seen: raise KeyboardInterrupt # a launcher may send SIGTERM twice
        seen.append(signum)
    old = {s:signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try: yield lambda: bool(seen)
    finally:
        for s,h in old.items(): signal.signal(s, h)

def follow(
    state,          # a State of core.training
    records,        # the generator `train(state, ...)`
    run,            # run folder
    config:dict,    # settings of the run; a checkpoint of another config is refused
    extra:dict=None,# further tensors to keep with the run (a fitted skip)
    every:float=20.,# seconds between checkpoints
    ranks=ALONE,  # the processes that share the work: they save together
    sharded:bool=False, # each process writes what it holds, in a folder
):                  # yields the records
    "Train with a safety net: checkpoints as time passes, on Ctrl-C, on SIGTERM and at the end"
    run = Path(run)
    def save():
        if sharded:
            from t2i_course.scale.fsdp import save_sharded
            return save_sharded(state, run, dict(config=config_hash(config)), extra)
        tensors = state.tensors()|{f'extra.{k}':v for k,v in (extra or {}).items()}
        save_tensors(run/'checkpoint.safetensors', tensors, config=config_hash(config), **state.numbers())
    last = time.monotonic()
    with asked_to_stop() as stop:
        for r in records:
            yield r
            asked,late = ranks.sum(stop(), ranks.rank==0 and time.monotonic()-last>every)
            if asked:
                save()
                raise Stopped(f'stopped at {r.images:,} images and saved; go on with --resume')
            if late: save(); last = time.monotonic()
        save()

def resume(
    state,       # a fresh State of the same network
    run,         # run folder
    config:dict, # settings of the run
    sharded:bool=False, # the state is shared among processes
)->dict:         # the extra tensors; None when there is no checkpoint yet
    "Load the last checkpoint into the state; clears away what a killed process left half-written"
    path = Path(run)/'checkpoint.safetensors'
    for part in Path(run).glob('.*.part'): part.unlink(missing_ok=True)
    if any(Path(run).glob('checkpoint-*')): # written by processes together; any number of them can read it, one as well
        from t2i_course.scale.fsdp import load_sharded
        return load_sharded(state, run, dict(config=config_hash(config)))
    if not path.exists(): return None
    if sharded: raise CourseError(f'{path} was written by a single process: go on without torchrun, or train into another folder.')
    tensors,note = load_tensors(path)
    if note.get('config')!=config_hash(config):
        raise CourseError(f'{path} belongs to a run with other settings. Resume with the settings in '
                          f'{run}/config.json, or train into another folder.')
    try: state.load(tensors, note)
    except (KeyError, RuntimeError, ValueError) as e:
        why = str(e).splitlines()[0]
        raise CourseError(f'{path} belongs to another network ({why}). Train into another folder.') from e
    return {k[6:]:v for k,v in tensors.items() if k.startswith('extra.')}

def cut_log(
    run,      # run folder
    step:int, # of the checkpoint that training goes on from
):
    "Drop the lines of log.jsonl that a resumed run will write again, and one cut short by a kill"
    path = Path(run)/'log.jsonl'
    if not path.exists(): return
    def keeps(line):
        try: return json.loads(line)['step']<=step
        except (ValueError, KeyError, TypeError): return False
    write_whole(path, lambda p: p.write_text(''.join(l for l in path.open() if keeps(l))))

# ---- the arms of a chapter's sweep, see `t2i run` ----
def code_version(
    *modules, # dotted names of modules of the package
)->str:       # changes when their numbers may change
    "Hash of the code of modules and of all they import from the package, without comments, and of the judges"
    top,seen,todo = modules[0].split('.')[0],{},list(modules)
    while todo:
        name = todo.pop()
        if name in seen or (spec := find_spec(name)) is None: continue
        tree = ast.parse(Path(spec.origin).read_text(encoding='utf-8'))
        seen[name] = ast.dump(tree)
        here = name if spec.submodule_search_locations else name.rpartition('.')[0]
        for n in ast.walk(tree):
            if isinstance(n, ast.Import): todo += [a.name for a in n.names if a.name.split('.')[0]==top]
            if not isinstance(n, ast.ImportFrom): continue
            source = resolve_name('.'*n.level+(n.module or ''), here) if n.level else n.module
            if source.split('.')[0]!=top: continue
            todo += [source]+[f'{source}.{a.name}' for a in n.names if find_spec(source).submodule_search_locations]
    h = hashlib.sha256(json.dumps(seen, sort_keys=True).encode())
    for p in sorted(Path(find_spec(top).origin).parent.glob('weights/*.json')): h.update(p.read_bytes())
    return h.hexdigest()[:12]

def value_at(
    d:dict,  # nested
    key:str, # 'a.b.c' stands for d['a']['b']['c']
):           # the value; None when there is none
    for k in key.split('.'): d = d.get(k) if isinstance(d, dict) else None
    return d

def kept_arms(
    path,      # results file
    head:dict, # what it says now of its making
    keys,      # of the arms
)->dict:       # key -> value
    "What was finished by the same code, with the same scale and seeds, on the same machine: one file never mixes two"
    if not Path(path).exists(): return {}
    try: old = json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError as e: raise CourseError(f'{path} cannot be read ({e}): delete it, or choose another --out') from e
    if any(old.get(k)!=v for k,v in head.items() if k not in ('command','date')): return {}
    return {k:v for k in keys if (v := value_at(old, k)) is not None}

def measured_numbers(
    value, # of an arm
    at='', # where in the arm
)->dict:   # place -> number
    "Numbers that only a measurement gives: no times, nothing of six digits or less, no ratio of small counts"
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {p:x for k,v in items if k!='fd_floor' and 'seconds' not in str(k)
                for p,x in measured_numbers(v, f'{at}.{k}').items()}
    if not isinstance(value, float) or not math.isfinite(value) or float(f'{value:.6g}')==value: return {}
    return {} if abs(Fraction(value).limit_denominator(1000)-Fraction(value))<1e-9 else {at:value}

def twin(
    key:str,   # of an arm
    value,     # of this arm
    done:dict, # key -> value of the others
    equal=(),  # sweeps whose arms may agree
)->str:        # of another arm with the very same numbers; None when there is none
    "Arms of one sweep differ in one word of their keys; the entries of a list are arms as well"
    if key.split('.')[0] in equal: return None
    own = measured_numbers(value)
    def siblings(other):
        a,b = key.split('.'),other.split('.')
        return len(a)==len(b) and sum(x!=y for x,y in zip(a, b))==1
    for other,v in done.items():
        if own and siblings(other) and measured_numbers(v)==own: return other
    entries = [measured_numbers(v) for v in value if isinstance(v, dict)] if isinstance(value, list) else []
    return next((f'{key}, entry {i}' for i,e in enumerate(entries) if e and e in entries[i+1:]), None)
