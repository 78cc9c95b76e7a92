"""Run folders: who writes there, what a run remembers of itself, and what it leaves untouched in its surroundings."""
import ast, contextlib, errno, io, json, os, re, shutil, signal, stat, subprocess, sys, threading, types
from pathlib import Path
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from t2i_course import cli
from t2i_course.core.files import make_folder, say, CourseError
from t2i_course.run.demo import claim_demo_folder, demo
from t2i_course.run.measure import eval_run
from t2i_course.run.sample import options_of_all, typed
from t2i_course.run.settings import settings
from t2i_course.run.sheets import SHEET, write_sheet
from t2i_course.run.stamp import versions
from t2i_course.run.train import train_run
from t2i_course.core import files, guards, runfiles, runs
from t2i_course.core.data import scale
from t2i_course.core.sources import load
from tree import modules

SMALL = ('--scale', 'smoke', '--images', '64', '--precision', 'fp32', '--quiet')

def t2i(*args): return cli.main([str(a) for a in args])

def refused(capsys, *args):
    "It must fail with one sentence and no traceback. Returns the sentence"
    capsys.readouterr()
    code,err = t2i(*args),capsys.readouterr().err.strip()
    assert code==2 and 'Traceback' not in err, err
    assert [l.startswith('t2i: ') for l in err.splitlines()].count(True)==1, err
    return err.splitlines()[-1]

def contents(folder): return {p.relative_to(folder).as_posix():p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}

def pictures(folder, n=12, words='eine schöne rote Fläche für Jürgen'):
    folder.mkdir(parents=True)
    for i in range(n):
        Image.new('RGB', (32, 32), (20*i, 99, 0)).save(folder/f'{i}.png')
        (folder/f'{i}.txt').write_text(f'{words} {i}', encoding='utf-8')
    return folder

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A small trained run on the digits"
    out = tmp_path_factory.mktemp('run')/'r'
    assert t2i('train', 'ddpm', '--data', 'digits', *SMALL, '--out', out)==0
    return out

@pytest.fixture
def copy(run, tmp_path): return Path(shutil.copytree(run, tmp_path/'copy'))

def elsewhere(*commands, **env):
    "Several commands in a process of its own, with another environment"
    home = str(Path(cli.__file__).parents[1])
    code = 'import json, sys; from t2i_course.cli import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))'
    env = os.environ|dict(PYTHONPATH=home, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')|env
    return subprocess.run([sys.executable, '-c', code, json.dumps([list(map(str, c)) for c in commands])], env=env, capture_output=True, timeout=300)

# ---- a guest in somebody's process ----
def test_two_threads_train_the_same_run_as_one_alone(run, tmp_path):
    "No signal handlers there, and nobody takes the other's random numbers"
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    lost = []
    def train(out):
        try: train_run('ddpm', 'digits', scale='smoke', images=64, precision='fp32', out=out, quiet=True)
        except BaseException as e: lost.append(e)
    threads = [threading.Thread(target=train, args=(tmp_path/str(i),)) for i in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not lost
    for i in range(2): assert (tmp_path/str(i)/'model.safetensors').read_bytes()==(run/'model.safetensors').read_bytes()
    assert before==[signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

def test_handlers_that_python_did_not_set_are_no_obstacle(monkeypatch):
    real,given = signal.signal,[]
    monkeypatch.setattr(signal, 'signal', lambda s,h: (given.append(h), real(s, h), None)[2]) # as if C code had set them
    with guards.asked_to_stop(): pass
    assert given[-2:]==[signal.SIG_DFL]*2
    for s,h in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)): real(s, h)

def test_matplotlib_keeps_its_backend_and_settings(run, tmp_path):
    import matplotlib
    def state(): return {k:dict.__getitem__(matplotlib.rcParams, k) for k in matplotlib.rcParams}
    before,named = state(),os.environ.get('MPLBACKEND')
    assert t2i('sample', run, '--prompt', 'a handwritten two', '--steps', 2, '--out', tmp_path/'a.png')==0
    assert state()==before and os.environ.get('MPLBACKEND')==named

# ---- any locale, any backend ----
def calls_without_encoding(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.Call): continue
        name = getattr(node.func, 'id', getattr(node.func, 'attr', ''))
        owner = getattr(getattr(node.func, 'value', None), 'id', '')
        words = {k.arg:k.value for k in node.keywords}
        texts = [a.value for a in (*node.args, *words.values()) if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if name in ('run','Popen','check_output') and 'text' in words and 'encoding' not in words: yield node.lineno
        if name=='read_text' and not node.args and 'encoding' not in words: yield node.lineno
        if name=='write_text' and len(node.args)<2 and 'encoding' not in words: yield node.lineno
        if name in ('open','fdopen') and owner not in ('os','Image','tarfile') and 'encoding' not in words:
            if not any('b' in t and set(t)<=set('rwaxb+') for t in texts): yield node.lineno

def test_every_text_file_is_opened_as_utf8(tmp_path):
    bad = tmp_path/'bad.py'
    bad.write_text("open('a')\nopen('a', 'w')\np.read_text()\np.write_text('b')\nrun([], text=True)\np.open()\n", encoding='utf-8')
    assert list(calls_without_encoding(bad))==[1, 2, 3, 4, 5, 6], 'the test finds what it looks for'
    found = {str(p):list(calls_without_encoding(p)) for p in modules()}
    assert not {k:v for k,v in found.items() if v}

def test_a_locale_that_is_not_utf8(tmp_path):
    "Trains on German captions, goes on, draws and prints them: in the C locale everything that is not said is ASCII"
    data,out = pictures(tmp_path/'german'),tmp_path/'r'
    ascii_only = dict(LC_ALL='C', LANG='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    done = elsewhere(('train', 'ddpm', '--data', data, *SMALL, '--out', out), ('train', '--resume', '--out', out),
                     ('sample', out, '--prompt', 'rote Fläche für 红', '--steps', 2, '--out', tmp_path/'a.npz'), # as from sys.argv
                     ('sample', out, '--prompt', 'rote Fläche für 红'.encode().decode('ascii', 'surrogateescape'), '--steps', 2,
                      '--out', tmp_path/'b.png'), **ascii_only)
    assert done.returncode==0, done.stderr.decode('utf-8', 'replace')
    assert 'Fläche'.lower() in json.loads((out/'config.json').read_text(encoding='utf-8'))['words']
    assert np.load(tmp_path/'a.npz')['captions'].tolist()==['rote Fläche für 红']

def test_what_was_typed_in_utf8_is_read_so(run, tmp_path, monkeypatch, capsys):
    for locale,text in (('latin-1', 'schöne'), ('utf-8', 'schöne 红'), ('ascii', 'schöne')):
        monkeypatch.setattr(os, 'fsencode', lambda t, code=locale: t.encode(code, 'surrogateescape'))
        assert typed(text.encode().decode(locale, 'surrogateescape'))==text
    monkeypatch.setattr(os, 'fsencode', lambda t: t.encode('latin-1', 'surrogateescape'))
    assert typed('schöne')=='schöne', 'typed in the encoding of the locale'
    monkeypatch.undo()
    bad = 'schöne'.encode('latin-1').decode('utf-8', 'surrogateescape')
    assert 'UTF-8' in refused(capsys, 'sample', run, '--prompt', bad, '--out', tmp_path/'a.png')

def test_what_a_stream_cannot_encode_is_written_as_numbers(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, 'stderr', io.TextIOWrapper(raw, encoding='latin-1', errors='strict'))
    say('für 红')
    assert raw.getvalue()=='für \\u7ea2\n'.encode('latin-1')

def test_a_broken_backend_is_nobodys_concern(run, tmp_path):
    done = elsewhere(('sample', run, '--prompt', 'a handwritten two', '--steps', 2, '--out', tmp_path/'a.png'), MPLBACKEND='nonsense')
    assert done.returncode==0, done.stderr.decode()
    assert Image.open(tmp_path/'a.png').size[0]>50

# ---- the cause of a failed write ----
CAUSES = [(OSError(errno.ENOSPC, 'No space left on device'), True), (OSError(errno.EDQUOT, 'Disk quota exceeded'), True),
          (PermissionError(errno.EACCES, 'Permission denied'), False), (OSError(errno.EROFS, 'Read-only file system'), False),
          (OSError(errno.EFBIG, 'File too large'), False), (ValueError("Key backend: 'nonsense' is not valid"), False),
          (RuntimeError(''), False)]

@pytest.mark.parametrize('e, full', CAUSES, ids=lambda v: getattr(v, 'strerror', None) or str(v)[:20])
def test_only_a_full_disk_is_called_full(tmp_path, e, full, capsys, monkeypatch):
    path = tmp_path/'a.json'
    path.write_text('before', encoding='utf-8')
    def fail(p): Path(p).touch(); raise e
    with pytest.raises(CourseError) as told: files.write_whole(path, fail)
    said = str(told.value)
    assert ('space' in said)==full and (getattr(e, 'strerror', None) or type(e).__name__) in said and str(path) in said
    assert contents(tmp_path)=={'a.json':b'before'}
    if isinstance(e, OSError): # and where it happens in the middle of a command
        def doctor(): raise type(e)(e.errno, e.strerror, 'some file')
        monkeypatch.setattr('t2i_course.cli.doctor', doctor)
        said = refused(capsys, 'doctor')
        assert ('space' in said)==full and e.strerror in said

def test_shards_and_latents_tell_the_cause_too(tmp_path, monkeypatch):
    from t2i_course.core.prepare import put
    for e,full in CAUSES[:4]:
        def replace(*args, e=e): raise e
        for write in (put, lambda path, raw: files.write_whole(path, lambda p: p.write_bytes(raw))):
            with monkeypatch.context() as m:
                m.setattr(os, 'replace', replace)
                with pytest.raises(CourseError) as told: write(tmp_path/'a', b'')
            assert ('space' in str(told.value))==full and e.strerror in str(told.value)

@pytest.mark.skipif(os.name=='nt', reason='names are counted in another way')
def test_names_up_to_the_limit(tmp_path):
    files.write_json(tmp_path/('a'*250+'.json'), dict(a=1))
    with pytest.raises(CourseError, match='shorter name'): files.write_json(tmp_path/('a'*251+'.json'), dict(a=1))
    assert [len(n) for n in contents(tmp_path)]==[255]

@pytest.mark.skipif(os.name=='nt', reason='modes are a matter of POSIX')
@pytest.mark.parametrize('mask', [0o022, 0o007])
def test_files_have_the_mode_of_the_umask(tmp_path, mask):
    old = os.umask(mask)
    try:
        assert t2i('train', 'ddpm', '--data', 'digits', *SMALL, '--out', tmp_path/'r')==0
        assert t2i('sample', tmp_path/'r', '--prompt', 'a two', '--steps', 1, '--out', tmp_path/'a.png')==0
        assert t2i('sample', tmp_path/'r', '--prompt', 'a two', '--steps', 1, '--out', tmp_path/'a.npz')==0
        assert t2i('prepare', 'digits', '--images', 20, '--out', tmp_path/'shards', '--quiet')==0
    finally: os.umask(old)
    modes = {p.name:stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob('*') if p.is_file()}
    assert {'model.safetensors','checkpoint.safetensors','config.json','a.png','a.npz','index.json'}<=modes.keys()
    assert set(modes.values())=={0o666&~mask}, modes

def test_files_of_other_libraries_have_it_too(tmp_path):
    from safetensors.torch import save_file
    from t2i_course.scale.pipeline import opened
    save_file(dict(a=torch.ones(2)), tmp_path/'a.safetensors')
    (tmp_path/'b').touch()
    opened(tmp_path)
    assert (tmp_path/'a.safetensors').stat().st_mode==(tmp_path/'b').stat().st_mode and len(contents(tmp_path))==2

@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='looks at what is mapped')
def test_what_is_loaded_holds_no_file_open(tmp_path):
    "Windows does not replace a file that somebody holds"
    files.save_tensors(tmp_path/'a.safetensors', dict(a=torch.ones(9000)))
    kept = files.load_tensors(tmp_path/'a.safetensors')
    assert str(tmp_path) not in Path('/proc/self/maps').read_text() and kept[0]['a'].sum()==9000

def test_replacing_is_tried_again_on_windows(tmp_path, monkeypatch):
    (tmp_path/'new').write_bytes(b'new'); (tmp_path/'old').write_bytes(b'old')
    real,tries = os.replace,[]
    def replace(a, b):
        tries.append(a)
        if len(tries)<3: raise PermissionError(errno.EACCES, 'in use')
        real(a, b)
    names = str(tmp_path/'new'),str(tmp_path/'old')
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', replace)
        with pytest.raises(PermissionError): files.put_in_place(*names)
        m.setattr(files.time, 'sleep', lambda s: None); m.setattr(os, 'name', 'nt')
        files.put_in_place(*names)
    assert len(tries)==3 and (tmp_path/'old').read_bytes()==b'new'

# ---- what a run is ----
@pytest.mark.parametrize('args', [('--data', 'painted'), ('--scale', 'demo'), ('--seed', 3), ('--precision', 'bf16'), ('--images', 65),
                                  ('--seconds', 3), ('--codec', '.')], ids=lambda a: a[0])
def test_options_that_differ_are_refused(copy, capsys, args):
    before = contents(copy)
    said = refused(capsys, 'train', '--resume', '--out', copy, *args)
    assert f'resume without {args[0]}' in said and contents(copy)==before

def test_recipes_and_changes_that_differ_are_refused(copy):
    before = contents(copy)
    with pytest.raises(CourseError, match='run of ddpm, not of dit'): train_run('dit', out=copy, resume=True)
    with pytest.raises(CourseError, match='lr = '): train_run(out=copy, resume=True, changes=dict(lr=.5))
    assert contents(copy)==before

def test_the_same_options_and_none_go_on(copy, capsys, monkeypatch):
    monkeypatch.setenv('T2I_SCALE', 'demo') # what is not given is taken from the run
    before = contents(copy)
    for args in ((), ('ddpm', '--data', 'digits', '--seed', 0, *SMALL), ('--precision', 'auto')):
        assert t2i('train', *args, '--resume', '--out', copy, '--quiet')==0
        assert 'already' in capsys.readouterr().err and contents(copy)==before

@contextlib.contextmanager
def stopped_after(steps, monkeypatch):
    real = runs.follow
    def follow(state, records, run, config, extra=None, every=20., *more):
        for r in real(state, records, run, config, extra, 0., *more):
            yield r
            if r.step>steps: raise guards.Stopped('enough')
    with monkeypatch.context() as m:
        m.setattr('t2i_course.run.fit.follow', follow)
        yield

def test_a_folder_that_moved_can_be_named_anew(tmp_path, capsys, monkeypatch):
    data,out,whole = pictures(tmp_path/'german'),tmp_path/'r',tmp_path/'whole'
    train = ('train', 'ddpm', '--data', data, *SMALL)
    assert t2i(*train, '--out', whole)==0
    with stopped_after(1, monkeypatch): assert t2i(*train, '--out', out)==130
    moved = data.rename(tmp_path/'deutsch')
    for args in (('train', '--resume', '--out', out), ('eval', whole)):
        said = refused(capsys, *args)
        assert str(data) in said and '--data' in said
    other = pictures(tmp_path/'other', words='something else')
    assert 'other pictures' in refused(capsys, 'train', '--resume', '--out', out, '--data', other)
    assert t2i('train', '--resume', '--out', out, '--data', moved, '--quiet')==0
    assert json.loads((out/'config.json').read_text(encoding='utf-8'))['data']=='../deutsch'
    assert (out/'model.safetensors').read_bytes()==(whole/'model.safetensors').read_bytes()
    assert t2i('eval', whole, '--n', 8, '--data', moved)==0
    assert t2i('sample', whole, '--prompt', 'rote', '--steps', 2, '--out', tmp_path/'a.npz')==0

@pytest.mark.parametrize('change', ['added', 'removed', 'another caption', 'repainted'])
def test_pictures_that_changed_are_refused(tmp_path, capsys, monkeypatch, change):
    data,out = pictures(tmp_path/'d'),tmp_path/'r'
    with stopped_after(1, monkeypatch): assert t2i('train', 'ddpm', '--data', data, *SMALL, '--out', out)==130
    if change=='added':
        Image.new('RGB', (32, 32)).save(data/'x.png'); (data/'x.txt').write_text('eine rote', encoding='utf-8')
    if change=='removed': (data/'3.png').unlink(); (data/'3.txt').unlink()
    if change=='another caption': (data/'3.txt').write_text('eine rote', encoding='utf-8')
    if change=='repainted': Image.new('RGB', (32, 32)).save(data/'3.png')
    before = contents(out)
    assert 'added, removed or changed' in refused(capsys, 'train', '--resume', '--out', out)
    assert contents(out)==before

def test_runs_that_use_each_other_move_together(tmp_path, capsys):
    a = tmp_path/'a'
    small = ('--scale', 'smoke', '--precision', 'fp32', '--quiet')
    assert t2i('train', 'vae', '--data', 'digits', '--images', 64, '--out', a/'codec', *small)==0
    assert t2i('prepare', 'digits', '--images', 64, '--codec', a/'codec', '--out', a/'z', '--quiet')==0
    assert t2i('train', 'ddpm', '--data', a/'z', '--codec', a/'codec', '--images', 64, '--out', a/'run', *small)==0
    draw = lambda run, name: t2i('sample', run, '--prompt', 'a two', '--steps', 2, '--out', tmp_path/f'{name}.npz')
    assert draw(a/'run', 'before')==0
    b = a.rename(tmp_path/'b')
    assert draw(b/'run', 'after')==0
    assert np.array_equal(*(np.load(tmp_path/f'{n}.npz')['images'] for n in ('before','after')))
    away = (b/'codec').rename(tmp_path/'away') # the codec alone: named anew
    assert '--use codec=RUN' in refused(capsys, 'sample', b/'run', '--prompt', 'x', '--out', tmp_path/'c.npz')
    assert t2i('train', '--resume', '--out', b/'run', '--data', b/'z', '--codec', away)==0
    assert draw(b/'run', 'again')==0
    config = json.loads((b/'run'/'config.json').read_text(encoding='utf-8'))
    assert config['uses']['codec']['run']=='../../away' and config['data']=='../z'
    assert t2i('train', 'vae', '--data', 'digits', '--images', 64, '--seed', 1, '--out', b/'codec', *small)==0
    assert 'resume without --codec' in refused(capsys, 'train', '--resume', '--out', b/'run', '--codec', b/'codec')
    shutil.rmtree(away); shutil.copytree(b/'codec', away) # another one in its place
    assert 'another codec' in refused(capsys, 'sample', b/'run', '--prompt', 'x', '--out', tmp_path/'c.npz')

def test_the_place_of_a_folder_does_not_matter_to_the_hash(tmp_path):
    config = settings('ddpm', 'digits', 'smoke', None, 64, 0, 'fp32')
    used = dict(codec=dict(run='../c', model='abc'))
    config = config|dict(data='../pictures', uses=used)
    same = dict(config=runfiles.config_hash(config))
    assert runfiles.belongs(same, config|dict(data='/elsewhere', uses=dict(codec=dict(run='/c', model='abc'))))
    for other in (dict(data='digits'), dict(lr=2.), dict(uses=dict(codec=dict(run='../c', model='abd'))), dict(uses={})):
        assert not runfiles.belongs(same, config|other), other

def test_ways_between_folders(tmp_path):
    run = tmp_path/'runs'/'a'
    for folder, way in ((tmp_path/'pictures', '../../pictures'), (run/'inside', './inside'), (tmp_path/'runs'/'b', '../b')):
        assert runfiles.seen_from(run, folder)==way and runfiles.place_of(run, way)==folder.resolve()
    assert runfiles.place_of(run, '/on/another/drive')==Path('/on/another/drive')

# ---- one writer ----
def test_a_second_writer_is_refused(copy, capsys):
    "In one process, too; a thread may take the lock again that it has"
    part = copy/'.checkpoint.safetensors.1-1.part'
    part.touch()
    before,held,done = contents(copy),threading.Event(),threading.Event()
    def hold():
        with guards.one_writer(copy), guards.one_writer(copy):
            held.set(); done.wait(60)
    thread = threading.Thread(target=hold)
    thread.start(); held.wait(60)
    try:
        assert 'still running' in refused(capsys, 'train', '--resume', '--out', copy)
        assert {k:v for k,v in contents(copy).items() if k!='.lock'}==before
    finally: done.set(); thread.join()
    assert '.lock' not in contents(copy)
    assert t2i('train', '--resume', '--out', copy)==0 and not part.exists()

@pytest.mark.skipif(os.name=='nt', reason='forks')
def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    (r,w),(ready,begun) = os.pipe(),os.pipe()
    with guards.one_writer(tmp_path):
        child = os.fork()
        if not child:
            os.write(begun, b'x'); os.read(r, 1); os._exit(0)
        os.read(ready, 1)
        f,me,times = guards._held[tmp_path.resolve()]
        os.close(f) # as if this process had been killed
        guards._held[tmp_path.resolve()] = os.open(os.devnull, os.O_RDONLY),me,times
        again = guards._open_lock(tmp_path/'.lock')
        os.write(w, b'x'); os.waitpid(child, 0)
        for f in (r, w, ready, begun): os.close(f)
        assert again is not None
        os.close(again)

def test_locks_of_windows(tmp_path, monkeypatch):
    "msvcrt in the place of fcntl"
    held = set()
    def locking(f, mode, n):
        key = os.fstat(f).st_ino
        if key in held: raise PermissionError(errno.EACCES, 'in use')
        held.add(key)
    monkeypatch.setitem(sys.modules, 'msvcrt', types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(guards, 'fcntl', None)
    refusals = []
    def second():
        try:
            with guards.one_writer(tmp_path): pass
        except CourseError as e: refusals.append(str(e))
    with guards.one_writer(tmp_path):
        thread = threading.Thread(target=second); thread.start(); thread.join()
    assert len(refusals)==1 and 'still running' in refusals[0] and not contents(tmp_path)

def test_two_may_not_start_the_same_run(tmp_path, monkeypatch, capsys):
    "The one that comes second finds the config of the first, though there was none when it began"
    out,real = tmp_path/'r',make_folder
    def slow(folder):
        real(folder)
        (out/'config.json').write_text('{}', encoding='utf-8')
    monkeypatch.setattr('t2i_course.run.settings.make_folder', slow)
    assert 'already holds a run' in refused(capsys, 'train', 'ddpm', '--data', 'digits', *SMALL, '--out', out)
    assert contents(out)=={'config.json':b'{}'}

def test_preparing_twice_at_once_is_refused(tmp_path, capsys):
    part = tmp_path/'.shard-000000.tar.1.part'
    part.touch()
    held,done = threading.Event(),threading.Event()
    def hold():
        with guards.one_writer(tmp_path): held.set(); done.wait(60)
    thread = threading.Thread(target=hold)
    thread.start(); held.wait(60)
    try: assert 'still running' in refused(capsys, 'prepare', 'digits', '--images', 20, '--out', tmp_path, '--quiet')
    finally: done.set(); thread.join()
    assert part.exists()

# ---- what is replaced, what is kept ----
def test_the_demo_replaces_only_a_demo(copy, tmp_path, capsys):
    x = tmp_path/'x'
    x.mkdir()
    (x/'config.json').write_text('{"architectures": ["of another program"]}', encoding='utf-8')
    (x/'model.safetensors').write_bytes(b'weights of another program')
    y = tmp_path/'y'
    y.mkdir()
    (y/'samples.png').write_bytes(b'a picture')
    for folder in (x, y, copy):
        before = contents(folder)
        said = refused(capsys, 'demo', '--seconds', '1', '--out', folder)
        assert 'choose another --out' in said and contents(folder)==before

def test_a_demo_replaces_a_demo(copy, tmp_path, monkeypatch):
    (copy/'.demo').touch()
    (copy/'notes.txt').write_text('mine', encoding='utf-8')
    with claim_demo_folder(copy): assert set(contents(copy))=={'notes.txt','.lock','.demo'}
    with claim_demo_folder(tmp_path/'new'): assert (tmp_path/'new').is_dir()
    monkeypatch.chdir(tmp_path)
    unmarked = Path('runs/demo') # a run of one's own in the usual place
    unmarked.mkdir(parents=True)
    (unmarked/'config.json').write_text(json.dumps(dict(recipe='flow_matching', data='painted', demo=True)), encoding='utf-8')
    with pytest.raises(CourseError, match='did not make'):
        with claim_demo_folder(unmarked): pass
    assert (unmarked/'config.json').exists()

def test_the_demo_leaves_its_mark(tmp_path, monkeypatch):
    monkeypatch.setenv('T2I_SCALE', 'smoke')
    given = {}
    def train_run(*args, **kwargs):
        given.update(kwargs)
        raise guards.Stopped('enough')
    monkeypatch.setattr('t2i_course.run.demo.train_run', train_run)
    assert t2i('demo', '--out', tmp_path/'d')==130 and given and (tmp_path/'d'/'.demo').exists()

def test_kept_rows_match_or_are_made_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('T2I_SCALE', 'smoke')
    made = []
    def train_run(recipe, data, seconds, seed, out, resume):
        made.append(resume)
        runfiles.write_config(make_folder(out), settings(recipe, data, scale(), seconds, None, seed, 'auto'))
    def eval_run(out, n):
        row = dict(obedience=dict(all=.5), fd=1., fd_floor=1., recall=.5, n=n, versions=versions())
        files.write_json(out/'metrics.json', row)
        return row
    monkeypatch.setattr('t2i_course.run.rows.train_run', train_run); monkeypatch.setattr('t2i_course.run.rows.eval_run', eval_run)
    def bench(): assert t2i('bench', '--seconds', 2, '--seeds', 1, '--out', 'a.json')==0
    folder = Path('runs/rows/flow_matching-painted-2s-0')
    def edit(name, **values):
        old = json.loads((folder/name).read_text(encoding='utf-8'))
        (folder/name).write_text(json.dumps(old|values), encoding='utf-8')
    bench(); assert made==[False]
    bench(); assert made==[False], 'kept'
    old = versions()
    for change in (dict(scale='demo'), dict(lr=9.), dict(seed=5), dict(seconds=3.), dict(hardware='another machine'),
                   dict(versions=old|dict(t2i_course='0.0.1'))):
        edit('config.json', **change)
        made.clear(); bench()
        assert made==[False], change
    for change in (dict(n=8), dict(versions=old|dict(torch='1.0'))): # the run stays, it is measured again
        edit('metrics.json', **change)
        made.clear(); bench()
        assert made==[True], change
    edit('config.json', versions=old|dict(python='3.0'))
    made.clear(); bench(); assert made==[], 'another Python does not matter'
    monkeypatch.setenv('T2I_SCALE', 'demo')
    made.clear(); bench(); assert made==[False]

def test_rows_of_the_digits_match_or_are_made_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('T2I_SCALE', 'smoke')
    made = []
    def own_row(arm, seconds, seed, ruler, work):
        made.append(arm)
        return dict.fromkeys(('accuracy','fd_floors','recall','precision','broken','train_seconds','cpu_seconds','images'), .5)
    monkeypatch.setattr('t2i_course.bench.digits.load', lambda name: load('digits'))
    monkeypatch.setattr('t2i_course.bench.digits.roofline', lambda *args: {})
    monkeypatch.setattr('t2i_course.bench.digits.own_row', own_row)
    def again():
        made.clear()
        assert t2i('bench', 'digits', '--seconds', 1, '--seeds', 1, '--peers', '--out', 'b.json')==0
        return len(made)
    assert again()==2 and again()==0
    file = Path('runs/bench/ours-1-0.json')
    for change in (dict(scale='demo'), dict(n=1), dict(config={})):
        kept = json.loads(file.read_text(encoding='utf-8'))
        kept['made_with'] |= change
        file.write_text(json.dumps(kept), encoding='utf-8')
        assert again()==1, change
    file.write_text('{"accuracy": 1}', encoding='utf-8') # of an earlier version
    assert again()==1

# ---- the command line ----
def test_metrics_name_the_command(copy, monkeypatch):
    def named(): return json.loads((copy/'metrics.json').read_text(encoding='utf-8'))['command']
    run = str(copy)
    for program,start in (('/somewhere/bin/t2i', 't2i'), ('C/t2i.exe', 't2i'), ('/somewhere/t2i_course/__main__.py', 'python -m t2i_course')):
        monkeypatch.setattr(sys, 'argv', [program, 'eval', run, '--n', '8'])
        assert cli.main()==0 and named()==f'{start} eval {run} --n 8'
    eval_run(copy, n=8, quiet=True)
    assert named()==f"python: eval_run({run!r}, n=8, seed=0)"

def test_prompts_add_up(run, tmp_path):
    assert t2i('sample', run, '--prompt', 'a two', '--prompt', 'a six', 'a one', '--steps', 1, '--out', tmp_path/'a.npz')==0
    assert np.load(tmp_path/'a.npz')['captions'].tolist()==['a two', 'a six', 'a one']

@pytest.mark.skipif(os.name=='nt', reason='named pipes lie elsewhere')
@pytest.mark.parametrize('how', ['pipe', '/dev/fd', '-'])
def test_captions_from_a_pipe(run, tmp_path, how, monkeypatch):
    text,name = 'a handwritten two\n'.encode(),how
    if how=='pipe':
        name = tmp_path/'pipe'
        os.mkfifo(name)
        threading.Thread(target=name.write_bytes, args=(text,), daemon=True).start()
    if how=='/dev/fd':
        r,w = os.pipe()
        os.write(w, text); os.close(w)
        name = f'/dev/fd/{r}'
    if how=='-': monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(text), encoding='latin-1'))
    assert t2i('sample', run, '--captions', name, '--steps', 1, '--out', tmp_path/'a.npz')==0
    assert np.load(tmp_path/'a.npz')['captions'].tolist()==['a handwritten two']

def test_a_sheet_has_a_limit(run, tmp_path, capsys, monkeypatch):
    many = tmp_path/'c.txt'
    many.write_text('a two\n'*(SHEET+1), encoding='utf-8')
    monkeypatch.setattr('t2i_course.run.sample.open_run', None) # nothing is drawn, nothing even loaded
    for how in (('--captions', many), ('--prompt', 'a two', '--per-caption', 3000)):
        said = refused(capsys, 'sample', run, *how, '--out', tmp_path/'a.png')
        assert '.npz' in said and str(SHEET) in said and not (tmp_path/'a.png').exists()
    with pytest.raises(CourseError, match='npz'):
        write_sheet(tmp_path/'a.png', np.zeros((SHEET+1, 8, 8, 1), np.uint8), ['']*(SHEET+1))

OTHERS = { # options of other programs that messages and commands of the package name
    'torchrun': {'--nproc-per-node','--standalone','--no-python','--nnodes','--rdzv-backend','--rdzv-endpoint','--rdzv-id'},
    'sbatch': {'--nodes','--ntasks-per-node','--gpus-per-node','--cpus-per-task','--time','--job-name','--output','--requeue','--signal'},
    'accelerate': {'--data','--out','--resume','--save_every','--processes'}}

def options_named(path):
    "Every --option in a text of a module"
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r'(?<![\w-])--[a-z][\w-]*', node.value)

def test_every_option_that_a_message_names_exists():
    commands = typer.main.get_command(cli.app).commands
    exist = {o for c in commands.values() for p in c.params for o in p.opts}|{f"--{k.replace('_', '-')}" for k in options_of_all()}
    found = {o:p.name for p in modules() if p.name!='cli.py' for o in options_named(p)}
    assert '--peers' in found and not set(found)-exist-set().union(*OTHERS.values())-{'--help'}
    named = set(options_named(Path(cli.__file__)))
    assert '--resume' in named and not named-exist-set().union(*OTHERS.values())-{'--help'}

def test_refusals_name_what_differs(copy, tmp_path, capsys):
    assert t2i('train', '--resume', '--size', 64, '--out', copy)==2
    assert 'was started with no --size' in capsys.readouterr().err
    both = tmp_path/'both'
    train_run('ddpm', 'digits', scale='smoke', images=64, seconds=600, out=both, quiet=True)
    assert t2i('train', '--resume', '--seconds', 5, '--out', both)==2
    assert '--images 64 --seconds 600' in capsys.readouterr().err

def test_a_new_place_is_a_path(tmp_path, capsys):
    out = tmp_path/'r'
    train_run('ddpm', str(pictures(tmp_path/'pictures')), scale='smoke', images=64, out=out, quiet=True)
    assert t2i('eval', out, '--data', 'digits')==2
    assert './digits' in capsys.readouterr().err

def test_demo_leaves_the_unfinished_files_of_others(tmp_path, monkeypatch):
    part = tmp_path/'.film.mp4.part'
    part.write_bytes(b'half')
    monkeypatch.setattr('t2i_course.run.demo.make_demo', lambda *a: None)
    demo(out=tmp_path)
    assert part.read_bytes()==b'half'
