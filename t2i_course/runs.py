"""Run folders: what a training run leaves on disk, saved whole or not at all, and taken up again exactly."""
import ast, errno, hashlib, json, math, os, random, signal, threading, time
from contextlib import contextmanager
from fractions import Fraction
from importlib.util import find_spec, resolve_name
from pathlib import Path
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from t2i_course.core.data import CourseError, is_path, not_written
from t2i_course.core.training import ALONE
try: import fcntl
except ImportError: fcntl = None # Windows, which has msvcrt in its place

def write_whole(
    path,  # where to
    write, # write(temporary path)
):
    "Write beside the target, flush, put in place: a full disk or a power cut leaves the old file whole"
    path = Path(path)
    # cut, because a name may be as long as the file system allows; the thread, because two may write into one folder
    tmp = path.with_name(f'.{path.name[:40]}.{os.getpid()}-{threading.get_ident()%10**6}.part')
    try:
        write(tmp)
        with open(tmp, 'r+b') as f: os.fsync(f.fileno()) # Windows flushes only what is open for writing
        put_in_place(tmp, path)
    except CourseError: raise
    except Exception as e: raise CourseError(f'{not_written(path, e)} What was saved before is untouched.') from e
    finally:
        try: tmp.unlink(missing_ok=True)
        except OSError: pass # what went wrong before is what has to be told

def put_in_place(
    tmp,  # a whole file
    path, # its place
):
    "Replace; on Windows it is tried again for some seconds, because whoever reads the old file holds it"
    for wait in (.05, .1, .2, .4, .8, 1.6, 0):
        try: return os.replace(tmp, path)
        except PermissionError:
            if os.name!='nt' or not wait: raise
            time.sleep(wait)

def write_json(
    path,  # where to
    value, # anything that JSON can hold
):
    "JSON for people, written whole"
    text = json.dumps(value, indent=1, ensure_ascii=False)+'\n'
    write_whole(path, lambda p: p.write_bytes(text.encode())) # the same bytes in every locale and system

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
    # safetensors' own writer leaves its files to their owner alone, and a scratch file when it is killed
    write_whole(path, lambda p: p.write_bytes(save(tensors, metadata=header)))

def load_tensors(
    path, # a file made by `save_tensors`
)->tuple: # tensors, note
    "Read and check the hash; raises CourseError when the file is cut short or changed"
    path = Path(path)
    if not path.is_file(): raise CourseError(f'{path} does not exist')
    try:
        with safe_open(path, 'pt') as f:
            # copies: the file stays open while one of its own tensors lives, and Windows replaces no open file
            tensors,header = {k:f.get_tensor(k).clone() for k in f.keys()},f.metadata() or {}
        note = json.loads(header.get('note', '{}'))
    except Exception as e:
        raise CourseError(f'{path} cannot be read ({e}): it is damaged or cut short. '
                          'Delete it, or take it from a backup.') from e
    sha256 = note.pop('sha256', header.get('sha256')) # earlier files have it as an entry of its own
    if sha256!=digest(tensors, json.dumps(note, sort_keys=True)):
        raise CourseError(f'{path} is not as it was saved (its hash differs): it was changed '
                          'or damaged. Delete it, or take it from a backup.')
    return tensors,note

def model_hash(
    run, # run folder
)->str:  # sha256 of its model, as the file says
    "What a run that builds on this one remembers of it"
    path = Path(run)/'model.safetensors'
    if not path.is_file():
        raise CourseError(f'{run} has no trained model: finish it with t2i train --resume --out {run}, or put it back')
    try:
        with safe_open(path, 'pt') as f: header = f.metadata() or {}
        return json.loads(header.get('note', '{}')).get('sha256') or header.get('sha256')
    except Exception as e: raise CourseError(f'{path} cannot be read ({e}): it is damaged. Take it from a backup.') from e

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
    "Ties checkpoints and models to the settings they were made with; where folders lie does not matter, they may be moved"
    config = {k:v for k,v in config.items() if k!='codec' and not (k=='data' and is_path(v))}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]

def belongs(
    note:dict,   # of a checkpoint or model
    config:dict, # settings of a run
)->bool:
    "Was it made with these settings? The hash of earlier versions held the places of folders too"
    whole = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    return note.get('config') in (config_hash(config), whole)

def codec_place(
    run,         # run folder
    config:dict, # its settings
)->Path:         # run folder of the codec that it was trained with; None when there is none
    "Written down as seen from the run, so that both can be moved together"
    if not config.get('codec'): return None
    path = Path(config['codec']) # earlier versions wrote the whole path
    return path if path.is_absolute() else Path(os.path.normpath(Path(run).resolve()/path))

def codec_run(
    run,         # run folder
    config:dict, # its settings
)->Path:         # run folder of its codec, None when there is none
    "The same, and still the codec that the run was trained with"
    path = codec_place(run, config)
    if path is None: return None
    if not (path/'config.json').is_file():
        raise CourseError(f'{run} uses the codec of {path}, which is not there: put it back, move both together, '
                          f'or write down its new place with: t2i train --resume --out {run} --codec RUN')
    if config.get('codec_model') not in (None, model_hash(path)):
        raise CourseError(f'{run} was trained with another codec than the one that is now in {path} '
                          '(the hash of its model differs): put the old one back, or train again')
    return path

def seen_from(
    run,  # run folder
    path, # another folder
)->str:   # the way there
    "The path of a folder as seen from a run"
    path = Path(path).resolve()
    try: return Path(os.path.relpath(path, Path(run).resolve())).as_posix()
    except ValueError: return str(path) # on another drive

# ---- one writer ----
_held = {} # run folder -> open lock file, thread, how often it was taken

def _forget_locks(): # a forked child has the locks of its parent, and would keep them when the parent dies
    for f,*_ in _held.values(): os.close(f)
    _held.clear()
if hasattr(os, 'register_at_fork'): os.register_at_fork(after_in_child=_forget_locks)

def _try_lock(f:int)->bool: # a lock of the system: it goes when the process goes, however it ends
    try:
        if fcntl: fcntl.flock(f, fcntl.LOCK_EX|fcntl.LOCK_NB)
        else:
            import msvcrt
            msvcrt.locking(f, msvcrt.LK_NBLCK, 1)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK): return False
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL): raise
    return True # some network folders know no locks: then there is nobody to ask

def _open_lock(path:Path)->int: # the locked file; None when another holds it
    while True:
        f = os.open(path, os.O_RDWR|os.O_CREAT, 0o666)
        if not _try_lock(f):
            os.close(f)
            return None
        try:
            if os.path.samestat(os.fstat(f), path.stat()): return f
        except OSError: pass
        os.close(f) # it was taken away between opening and locking: once more

@contextmanager
def one_writer(
    run, # an existing folder
):
    "Inside, nobody else writes into the run folder; a second process, or thread, is refused with a sentence"
    run,me = Path(run).resolve(),threading.get_ident()
    path,(f,who,times) = run/'.lock',_held.get(run, (None, None, 0))
    if f is None or who!=me:
        try: f,times = _open_lock(path),0
        except OSError as e: raise not_written(path, e) from e
        if f is None:
            raise CourseError(f'{run} is being written by another t2i, which is still running: '
                              'wait until it has ended, stop it, or choose another --out')
    _held[run] = f,me,times+1
    try: yield
    finally:
        _held[run] = f,me,times
        if not times:
            del _held[run]
            try: # Windows takes no open file away, others none that is not locked any more
                if fcntl: path.unlink(missing_ok=True)
                os.close(f)
                if not fcntl: path.unlink(missing_ok=True)
            except OSError: pass # another has it open already

# ---- a guest in somebody's process ----
_making = threading.RLock()

@contextmanager
def undisturbed():
    "Random numbers of torch, numpy and Python are afterwards what they were: the process may be a notebook. One thread at a time"
    with _making:
        cuda = torch.cuda.is_available() and 'LOCAL_RANK' not in os.environ # a process of torchrun is nobody's notebook
        mps = torch.backends.mps.is_available()
        kept = torch.get_rng_state(),cuda and torch.cuda.get_rng_state(),mps and torch.mps.get_rng_state()
        numbers,words = np.random.get_state(),random.getstate()
        try: yield
        finally:
            torch.set_rng_state(kept[0])
            if cuda: torch.cuda.set_rng_state(kept[1])
            if mps: torch.mps.set_rng_state(kept[2])
            np.random.set_state(numbers); random.setstate(words)

@contextmanager
def same_threads():
    "The number of threads that torch uses is afterwards what it was"
    n = torch.get_num_threads()
    try: yield
    finally:
        if torch.get_num_threads()!=n: torch.set_num_threads(n)

class Stopped(Exception):
    "Ctrl-C or SIGTERM asked the run to stop"

@contextmanager
def asked_to_stop():
    "Yields a function that says whether Ctrl-C or SIGTERM came; the second Ctrl-C stops at once"
    if threading.current_thread() is not threading.main_thread(): # signals belong to the main thread, whoever runs there
        yield lambda: False
        return
    seen,keys = [],(signal.SIGINT, getattr(signal, 'SIGBREAK', signal.SIGINT)) # Ctrl-Break is a key of Windows
    def note(signum, frame):
        if signum in keys and signum in seen: raise KeyboardInterrupt # a launcher may send SIGTERM twice
        seen.append(signum)
    old = {s:signal.signal(s, note) for s in {*keys, signal.SIGTERM}}
    try: yield lambda: bool(seen)
    finally:
        for s,h in old.items(): signal.signal(s, signal.SIG_DFL if h is None else h) # None: it was not set in Python

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
    if not int(os.environ.get('RANK', 0)): # under torchrun one process tidies up, before it writes
        for part in Path(run).glob('.*.part'): part.unlink(missing_ok=True)
    if any(Path(run).glob('checkpoint-*')): # written by processes together; any number of them can read it, one as well
        from t2i_course.scale.fsdp import load_sharded
        return load_sharded(state, run, dict(config=config_hash(config)))
    if not path.exists(): return None
    if sharded: raise CourseError(f'{path} was written by a single process: go on without torchrun, or train into another folder.')
    tensors,note = load_tensors(path)
    if not belongs(note, config):
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
    lines = path.read_bytes().splitlines(keepends=True) # closed before it is replaced
    write_whole(path, lambda p: p.write_bytes(b''.join(l for l in lines if keeps(l))))

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
