"""Bad input gets one clear sentence and leaves nothing half done; an interrupted run loses nothing."""
import errno, json, multiprocessing, os, random, signal, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from PIL import Image
from t2i_course import cli
from t2i_course.run.progress import progress_bar
from t2i_course.run.sample import sample_run
from t2i_course.run import fit as command
from t2i_course.run.train import train_run
from t2i_course.core import files
from t2i_course.core.files import CourseError

def refused(capsys, *args):
    "Run t2i; it must fail with one sentence, the last line, and no traceback. Returns the sentence"
    code = cli.main([str(a) for a in args])
    err = capsys.readouterr().err.strip()
    *notes,last = err.splitlines()
    assert code==2 and 'Traceback' not in err
    assert last.startswith('t2i: ') and not any(n.startswith('t2i: ') for n in notes), err
    assert all('skipped' in n or 'downloading' in n for n in notes), err
    return last

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A small trained run on the digits"
    out = tmp_path_factory.mktemp('run')/'r'
    train_run('flow_matching', 'digits', scale='smoke', images=96, out=out, precision='fp32', quiet=True)
    return out

@pytest.fixture
def copy(run, tmp_path):
    import shutil
    return Path(shutil.copytree(run, tmp_path/'copy'))

def folder(path, good=6, captions=True):
    path.mkdir(parents=True)
    for i in range(good):
        Image.new('RGB', (40, 32), (40*i, 99, 0)).save(path/f'{i}.png')
        if captions: (path/f'{i}.txt').write_text(f'a picture number {i}')
    return path

# ---- refused with a sentence ----
@pytest.mark.parametrize('option, value', [('--guidance', 99), ('--guidance', -1), ('--guidance', 'nan'),
                                           ('--steps', 0), ('--steps', 5000)])
def test_sampling_out_of_range(run, tmp_path, capsys, option, value):
    out = tmp_path/'a.png'
    assert 'from' in refused(capsys, 'sample', run, '--prompt', 'x', option, value, '--out', out)
    assert not out.exists()

@pytest.mark.parametrize('option, value', [('--seconds', 0), ('--seconds', -3), ('--images', 0),
                                           ('--seconds', 'nan')])
def test_training_out_of_range(tmp_path, capsys, option, value):
    refused(capsys, 'train', 'flow_matching', '--data', 'digits', option, value, '--out', tmp_path/'r')
    assert not (tmp_path/'r').exists()

@pytest.mark.parametrize('args', [('train', 'ddpm', '--seconds', 'long'),
                                  ('train', 'ddpm', '--scale', 'huge'), ('paint',), ()])
def test_unreadable_arguments(capsys, args): assert '--help' in refused(capsys, *args)

def test_unknown_names(tmp_path, capsys):
    assert 'flow_matching' in refused(capsys, 'train', 'gandalf', '--out', tmp_path/'r')
    assert 'painted' in refused(capsys, 'train', 'ddpm', '--data', 'nowhere', '--out', tmp_path/'r')
    assert not (tmp_path/'r').exists()

def test_output_type(run, tmp_path, capsys):
    assert '.npz' in refused(capsys, 'sample', run, '--prompt', 'x', '--out', tmp_path/'a.jpg')
    assert not list(tmp_path.iterdir())

def test_caption_files(run, tmp_path, capsys):
    out,f = tmp_path/'a.npz',tmp_path/'c.txt'
    assert 'does not exist' in refused(capsys, 'sample', run, '--captions', f, '--out', out)
    f.write_text('')
    assert 'empty' in refused(capsys, 'sample', run, '--captions', f, '--out', out)
    f.write_bytes('eine rote sieben für mich'.encode('latin-1'))
    assert 'UTF-8' in refused(capsys, 'sample', run, '--captions', f, '--out', out)
    f.write_bytes('a seven'.encode('utf-16'))
    assert 'UTF-8' in refused(capsys, 'sample', run, '--captions', f, '--out', out)
    assert not out.exists()

def test_not_a_run(tmp_path, capsys):
    new = tmp_path/'new'
    assert 't2i train' in refused(capsys, 'sample', tmp_path, '--prompt', 'x', '--out', new/'a.png')
    assert not new.exists()
    assert 't2i train' in refused(capsys, 'eval', tmp_path/'nowhere')
    (tmp_path/'config.json').write_text('{"name": "of another program"}')
    assert 'lacks' in refused(capsys, 'sample', tmp_path, '--prompt', 'x', '--out', tmp_path/'a.png')

def test_truncated_model(copy, tmp_path, capsys):
    p = copy/'model.safetensors'
    p.write_bytes(p.read_bytes()[:-100])
    assert 'damaged' in refused(capsys, 'sample', copy, '--prompt', 'x', '--out', tmp_path/'a.png')

def test_tampered_model(copy, tmp_path, capsys):
    p = copy/'model.safetensors'
    b = bytearray(p.read_bytes()); b[-10] ^= 1
    p.write_bytes(b)
    assert 'hash' in refused(capsys, 'sample', copy, '--prompt', 'x', '--out', tmp_path/'a.png')

def test_checkpoint_of_another_config(copy, capsys):
    config = json.loads((copy/'config.json').read_text())
    (copy/'config.json').write_text(json.dumps(config|dict(lr=.5)))
    assert 'other settings' in refused(capsys, 'train', '--resume', '--out', copy)
    assert 'other settings' in refused(capsys, 'sample', copy, '--prompt', 'x', '--out', copy/'a.png')

def test_truncated_checkpoint(copy, capsys):
    p = copy/'checkpoint.safetensors'
    p.write_bytes(p.read_bytes()[:1000])
    assert 'damaged' in refused(capsys, 'train', '--resume', '--out', copy)

def test_run_is_not_overwritten(copy, capsys):
    before = (copy/'model.safetensors').read_bytes()
    assert '--resume' in refused(capsys, 'train', 'flow_matching', '--data', 'digits', '--out', copy)
    assert (copy/'model.safetensors').read_bytes()==before

def test_resume_with_other_settings(copy, capsys):
    before = {p.name:p.read_bytes() for p in copy.iterdir()}
    assert 'run of flow_matching' in refused(capsys, 'train', 'ddpm', '--resume', '--out', copy)
    assert '--images 96' in refused(capsys, 'train', '--resume', '--seconds', 3, '--out', copy)
    assert {p.name:p.read_bytes() for p in copy.iterdir()}==before

def test_empty_report(tmp_path, capsys): assert 't2i run' in refused(capsys, 'report', tmp_path)

def test_unwritable_out(run, tmp_path, capsys):
    (tmp_path/'file').write_text('')
    assert '--out' in refused(capsys, 'train', 'flow_matching', '--data', 'digits', '--images', 64,
                              '--out', tmp_path/'file'/'r')

def test_folders_with_nothing_usable(tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    empty = tmp_path/'empty'
    assert str(empty) in refused(capsys, 'train', 'ddpm', '--data', empty, '--out', tmp_path/'r')
    folder(tmp_path/'mute', captions=False)
    assert 'caption' in refused(capsys, 'train', 'ddpm', '--data', tmp_path/'mute', '--out', tmp_path/'r')

def test_data_folder_and_download(tmp_path, capsys, monkeypatch):
    from t2i_course.core import downloads
    getattr(downloads.data_root, 'cache_clear', lambda: None)()
    monkeypatch.setenv('T2I_DATA', str(tmp_path/'missing'))
    assert 'T2I_DATA' in refused(capsys, 'data', 'fashion', '--out', tmp_path/'f.npz')
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('T2I_DATA', str(tmp_path/'file'))
    assert 'T2I_DATA' in refused(capsys, 'data', 'fashion', '--out', tmp_path/'f.npz')
    (tmp_path/'ok').mkdir()
    monkeypatch.setenv('T2I_DATA', str(tmp_path/'ok'))
    from torchvision.datasets import FashionMNIST
    def offline(self): raise OSError('no route to host')
    monkeypatch.setattr(FashionMNIST, 'download', offline)
    assert 'check the network' in refused(capsys, 'data', 'fashion', '--out', tmp_path/'f.npz')
    assert not (tmp_path/'f.npz').exists()

# ---- goes on, and says so ----
def test_corrupt_pictures_are_skipped(tmp_path, capsys):
    d = folder(tmp_path/'d', good=12)
    (d/'bad.png').write_bytes(b'not a picture'); (d/'bad.txt').write_text('broken')
    assert cli.main(['train', 'ddpm', '--data', str(d), '--scale', 'smoke', '--images', '32', '--quiet',
                     '--out', str(tmp_path/'r')])==0
    err = capsys.readouterr().err
    assert 'bad.png' in err and '1' in err

def test_odd_captions(run, tmp_path, capsys):
    f = tmp_path/'c.txt'
    f.write_text('a handwritten 일곱 🙂 seven\n\na handwritten seven '+'seven '*40+'\n', encoding='utf-8')
    assert cli.main(['sample', str(run), '--captions', str(f), '--steps', '2',
                     '--out', str(tmp_path/'a.npz')])==0
    err = capsys.readouterr().err
    assert '일곱' in err and '🙂' in err and 'cut after' in err and 'without condition' in err
    z = np.load(tmp_path/'a.npz')
    assert z['images'].shape==(3,16,16,1) and z['images'].dtype==np.uint8 and z['captions'].dtype.kind=='U'

def test_captions_keep_their_order(run, tmp_path):
    x,texts = sample_run(run, ['a handwritten two', 'a handwritten six'], per_caption=2, steps=2)
    assert texts==['a handwritten two']*2+['a handwritten six']*2 and len(x)==4
    again,_ = sample_run(run, ['a handwritten two', 'a handwritten six'], per_caption=2, steps=2)
    assert (x==again).all()

# ---- nothing is lost ----
def test_the_same_tensors_give_the_same_bytes(tmp_path):
    p,seen = tmp_path/'a.safetensors',set()
    for _ in range(12):
        files.save_tensors(p, dict(b=torch.ones(3), a=torch.zeros(2)), step=1, config='x', images=2)
        seen.add(p.read_bytes())
    assert len(seen)==1 and files.load_tensors(p)[1]==dict(step=1, config='x', images=2)

def test_resume_of_a_finished_run(copy, capsys):
    before = {p.name:p.read_bytes() for p in copy.iterdir()}
    assert cli.main(['train', '--resume', '--quiet', '--out', str(copy)])==0
    assert 'already' in capsys.readouterr().err
    assert {p.name:p.read_bytes() for p in copy.iterdir()}==before

def test_damaged_model_is_written_again(copy, capsys):
    p = copy/'model.safetensors'
    before = p.read_bytes()
    p.write_bytes(before[:-100])
    assert cli.main(['train', '--resume', '--quiet', '--out', str(copy)])==0
    assert 'damaged' in capsys.readouterr().err and p.read_bytes()==before

def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    p = tmp_path/'c.safetensors'
    files.save_tensors(p, dict(a=torch.ones(10)), step=1)
    before = p.read_bytes()
    def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')
    for name in ('fsync','replace'):
        with monkeypatch.context() as m:
            m.setattr(os, name, full)
            with pytest.raises(CourseError, match='space'):
                files.save_tensors(p, dict(a=torch.zeros(10)), step=2)
        assert p.read_bytes()==before and list(tmp_path.iterdir())==[p]

def train_in_child(out, limit=None, training=None):
    "Train or resume in a process of its own; `training` turns 1 with the first step"
    if limit:
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train = command.train
    def noted(*args, **kwargs):
        for r in train(*args, **kwargs):
            if training is not None: training.value = 1
            yield r
    command.train = noted
    torch.set_num_threads(1)
    os._exit(cli.main(['train', 'flow_matching', '--data', 'digits', '--scale', 'smoke', '--images', '4000',
                       '--precision', 'fp32', '--save-every', '.2', '--resume', '--quiet',
                       '--out', str(out)]))

@pytest.fixture(scope='module')
def children():
    "Processes that start with torch already imported"
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['t2i_course.cli', 't2i_course.flow.flow_matching', 'sklearn.datasets',
                               'torch._dynamo'])
    return ctx

@pytest.fixture(scope='module')
def uninterrupted(children, tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')/'r'
    p = children.Process(target=train_in_child, args=(out,)); p.start(); p.join()
    assert p.exitcode==0
    return (out/'model.safetensors').read_bytes()

def test_kill_9_twenty_times(children, uninterrupted, tmp_path):
    "Four kills at any moment from the start on, sixteen once training has begun; a run that ends is compared"
    rng,killed,inside,finished = random.Random(0),0,0,0
    out = tmp_path/'r0'
    while killed<20:
        training = children.RawValue('b', 0)
        p = children.Process(target=train_in_child, args=(out, None, training)); p.start()
        while killed%5 and not training.value and p.exitcode is None: time.sleep(.005)
        p.join(rng.uniform(0, .5))
        if p.exitcode is None:
            os.kill(p.pid, signal.SIGKILL); p.join()
            killed += 1
            inside += training.value and not (out/'model.safetensors').exists()
        else: # trained to the end: the next run starts over, the kills go on counting
            assert p.exitcode==0 and (out/'model.safetensors').read_bytes()==uninterrupted
            finished += 1
            out = tmp_path/f'r{finished}'
    p = children.Process(target=train_in_child, args=(out,)); p.start(); p.join()
    assert p.exitcode==0 and (out/'model.safetensors').read_bytes()==uninterrupted
    assert not list(out.glob('.*.part')) and inside>=12
    steps = [json.loads(l)['step'] for l in (out/'log.jsonl').read_text().splitlines()]
    assert steps==sorted(set(steps))

def test_two_processes_on_one_run(children, uninterrupted, tmp_path, capsys):
    "The second is refused and touches nothing, not even an unfinished file; the lock dies with its process"
    out,training = tmp_path/'r',children.RawValue('b', 0)
    p = children.Process(target=train_in_child, args=(out, None, training)); p.start()
    end = time.monotonic()+60
    while not training.value and time.monotonic()<end: time.sleep(.005)
    os.kill(p.pid, signal.SIGSTOP) # it cannot finish in the meantime
    part = out/'.checkpoint.safetensors.1.part'
    part.touch()
    before = {f.name:f.read_bytes() for f in out.iterdir()}
    try:
        for args in (('train',), ('train', 'flow_matching', '--data', 'digits')):
            assert 'still running' in refused(capsys, *args, '--resume', '--out', out)
        assert 'still running' in refused(capsys, 'demo', '--out', out)
        assert {f.name:f.read_bytes() for f in out.iterdir()}==before and training.value
    finally: os.kill(p.pid, signal.SIGKILL); p.join()
    p = children.Process(target=train_in_child, args=(out,)); p.start(); p.join()
    assert p.exitcode==0 and (out/'model.safetensors').read_bytes()==uninterrupted
    assert not part.exists() and not (out/'.lock').exists()

@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop(children, uninterrupted, tmp_path, how):
    out = tmp_path/'r'
    p = children.Process(target=train_in_child, args=(out,)); p.start()
    while not (out/'checkpoint.safetensors').exists() and p.exitcode is None: time.sleep(.05)
    os.kill(p.pid, how); p.join()
    assert p.exitcode==130 and not (out/'model.safetensors').exists()
    p = children.Process(target=train_in_child, args=(out,)); p.start(); p.join()
    assert p.exitcode==0 and (out/'model.safetensors').read_bytes()==uninterrupted

def test_no_room_for_the_checkpoint(children, tmp_path):
    out = tmp_path/'r'
    p = children.Process(target=train_in_child, args=(out, 100_000)); p.start(); p.join()
    assert p.exitcode==2 and not (out/'checkpoint.safetensors').exists() and not list(out.glob('.*.part'))

def test_head_start_longer_than_the_clock(capsys):
    bar = progress_bar(SimpleNamespace(seconds=4.), None, 2., quiet=False)
    bar(None)
    assert '2/2 s' in capsys.readouterr().err

def test_seconds_clock_keeps_the_used_time(tmp_path):
    out,start = tmp_path/'r',time.perf_counter()
    train_run('ddpm', 'digits', scale='smoke', seconds=1.5, out=out, quiet=True)
    took = time.perf_counter()-start
    done = json.loads((out/'train.json').read_text())
    train_run('ddpm', out=out, resume=True, quiet=True) # nothing left to do
    assert json.loads((out/'train.json').read_text())['images']==done['images'] and 1.5<=done['seconds']<=took


def test_tensors_of_another_network(copy, tmp_path, capsys):
    "The config is the run's own, but the package has another network by now, or other tables"
    from t2i_course.core.files import load_tensors, save_tensors
    p = copy/'model.safetensors'
    tensors,note = load_tensors(p)
    name = next(k for k in tensors if k.startswith('net.'))
    for changed in ({k:v for k,v in tensors.items() if k!=name}, tensors|{name:torch.zeros(3, 7)}, tensors|{'net.more':torch.zeros(2)}):
        save_tensors(p, changed, config=note['config'])
        assert 'belongs to another network' in refused(capsys, 'sample', copy, '--prompt', 'x', '--out', tmp_path/'a.png')
