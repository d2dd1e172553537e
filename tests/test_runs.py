"A run's directory beside other processes, other machines and other projects."
import json, os, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
import pytest
import imgexp.runs as r
from imgexp.files import write_text
from imgexp.errors import RunBusy
from imgexp.run_table import list_runs, prune_runs, remove_run
from imgexp.runs import Run
from imgexp.start import start_run

P = dict(lr=0.1, track='off')

def imgexp(*args, cwd, **env):
    return subprocess.run([sys.executable, '-m', 'imgexp.cli', *args], cwd=cwd, env=os.environ | env, capture_output=True, text=True)

def status(run, seconds=0, **changes):
    "Rewrite the status of a run, so many seconds ago."
    path = run.dir/'status.json'
    path.write_text(json.dumps(run.status | changes))
    os.utime(path, (time.time() - seconds,)*2)

def checkpoint(run, step=4000):
    folder = run.dir/'checkpoints'/f'step-{step:08d}'
    folder.mkdir(parents=True)
    (folder/'COMMITTED.json').write_text('{}')

def test_folders_of_sweeps_plans_and_the_like_are_not_listed(project, root):
    "Each folder that a module makes in runs/ beside the runs is known to the table of runs; other folders are named there."
    import re
    modules = '\n'.join(f.read_text() for f in (root/'imgexp').glob('*.py'))
    names = {*re.findall(r"runs_dir\(\)/'(\w+)'", modules)}
    assert {'curves', 'phases', 'snapshots', 'store', 'sweeps', 'zoo'} <= names
    run = start_run('demo', P).stop()
    for name in names | {'holiday-photos'}: (project/'runs'/name).mkdir()
    listed = json.loads(imgexp('runs', 'ls', '--json', cwd=project, IMGEXP_ROOT=str(project)).stdout)
    assert [r['run'] for r in listed] == [run.name, 'holiday-photos']
    text = imgexp('runs', 'ls', cwd=project, IMGEXP_ROOT=str(project)).stdout
    assert 'other folders: 1 run\n' in text and 'phases' not in text

# -- who works on a run

@pytest.fixture
def holder(project):
    "A run that another process, which lives, holds."
    run = start_run('demo', P).stop()
    code = f'from imgexp.files import take_lock; l = take_lock({str(run.dir/"lock")!r}); print("held", flush=True); input()'
    process = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'held\n'
    yield run
    process.kill(); process.wait()

def test_a_held_lock_is_life_whatever_host_and_clock_say(holder):
    "A container that got another host name, a suspended laptop: the lock decides."
    status(holder, 7200, state='running', host='renamed', machine='another', beat='2020-01-01T00:00:00+00:00')
    assert holder.state == 'running' and prune_runs() == []
    with pytest.raises(RunBusy): remove_run(holder.name)
    with pytest.raises(RunBusy): start_run('demo', P, wait=0.1)

def test_a_restarted_container_has_another_name_and_continues_at_once(project):
    run = start_run('demo', P).stop()
    status(run, state='running', host='an-earlier-name', pid=1, beat=datetime.now().astimezone().isoformat())  # same machine: its lock is free
    assert run.state == 'died'
    start_run('demo', P, wait=0).finish({})
    assert run.state == 'done' and run.status['host'] == socket.gethostname()

@pytest.mark.parametrize('hours', [-3, 3], ids=['behind', 'ahead'])
def test_clocks_need_not_agree(project, hours):
    "What another machine's clock says does not count; the file system's does."
    run = start_run('demo', P).stop()
    beat = (datetime.now().astimezone() + timedelta(hours=hours)).isoformat()
    status(run, 5, state='running', machine='another', beat=beat)
    assert run.state == 'running'
    status(run, 61, state='running', machine='another', beat=beat)
    assert run.state == 'died'

def test_a_run_that_was_taken_over_is_left_alone(project):
    "A machine that wakes up after another one took its run over writes nothing, and says who has it."
    run = start_run('demo', P)
    run.log(dict(epoch=1, step=10))
    status(run, host='other-box', pid=7, owner='another')
    before = (run.dir/'history.csv').read_text(), (run.dir/'status.json').read_text()
    with pytest.raises(RunBusy, match='taken over by process 7 on other-box'): run.log(dict(epoch=2, step=20))
    with pytest.raises(RunBusy): run.finish({})
    run.fail('it ends')
    assert before == ((run.dir/'history.csv').read_text(), (run.dir/'status.json').read_text()) and not run.open

def test_containers_with_the_same_process_number(project, monkeypatch):
    "In two containers both are process 1: temporary names do not depend on it."
    monkeypatch.setattr(os, 'getpid', lambda: 1)
    path, texts = project/'shared.json', [f'{{"writer": "{k}"}}'.ljust(20_000) for k in range(4)]
    def write(text):
        for _ in range(25): write_text(path, text)
    with ThreadPoolExecutor(4) as pool: list(pool.map(write, texts))
    assert path.read_text() in texts and [p.name for p in project.iterdir()] == ['shared.json']

def test_a_start_on_another_machine_is_not_cleared_away(project):
    "A run that is being made elsewhere keeps its unfinished directory; what a killed process left goes."
    folder = project/'runs'
    for name, age in (('.new-1', 5), ('.new-2', 3600)):
        (folder/name).mkdir(parents=True)
        os.utime(folder/name, (time.time() - age,)*2)
    start_run('demo', P).finish({})
    assert (folder/'.new-1').exists() and not (folder/'.new-2').exists()

# -- attempts

def test_each_attempt_is_recorded_and_a_change_is_told(project, monkeypatch, capsys):
    "Threads, processor, versions and commit of every attempt; what ends bit-exactness is said when the run continues."
    real = r.environment
    def env(**own): monkeypatch.setattr(r, 'environment', lambda: real() | dict(threads=2, processes=1) | own)
    env()
    run = start_run('demo', P).stop()
    start_run('demo', P).stop()
    assert capsys.readouterr().err == '' and run.changes() == {}
    packages = real()['packages']
    env(threads=1, packages=packages | {'numpy': '1.0'})
    start_run('demo', P).stop()
    told = capsys.readouterr().err
    assert 'not be bit-identical' in told and 'threads 2 before, 1 now' in told and f"numpy {packages['numpy']} before, 1.0 now" in told
    assert [a['threads'] for a in run.attempts] == [2, 2, 1]
    assert [a['packages']['numpy'] for a in run.attempts] == [packages['numpy'], packages['numpy'], '1.0']
    assert run.attempts[2]['packages']['pandas'] == packages['pandas'] and {'started', 'git', 'machine', 'cpu'} <= run.attempts[1].keys()
    assert imgexp('runs', 'show', run.name, cwd=project).stdout.count('not exact: threads 2 → 2 → 1') == 1

def test_what_auto_meant_stays_with_the_run(project):
    start_run('demo', P, resolved={'precision': 'bf16'}).stop()
    again = start_run('demo', P, resolved={'precision': 'fp32'})
    assert again.resolved == {'precision': 'bf16'} and Run(again.dir).resolved == {'precision': 'bf16'}
    again.finish({})

def test_images_left_out_are_not_reused_by_one_that_stops_at_them(project):
    p = P | {'bad': 'skip', 'resume': 'reuse'}
    run = start_run('demo', p)
    run.finish({'skipped': {'a.jpg': 'is cut short'}})
    assert start_run('demo', p).name == run.name
    other = start_run('demo', p | {'bad': 'stop'})
    other.stop()
    assert other.name != run.name

# -- clearing up

@pytest.fixture
def two(tmp_path):
    "Two projects with a run of the same name in each, and a newer run in the first."
    made = []
    for name in ('p1', 'p2'):
        run = start_run('demo', P, root=tmp_path/name)
        run.finish({})
        target = run.dir.with_name('20260101-000000-demo-00000000')
        run.dir.rename(target)
        made.append(target)
    newer = start_run('demo', P | {'lr': 0.2}, root=tmp_path/'p1')
    newer.finish({})
    return *made, newer.dir

def test_rm_by_path_deletes_what_the_path_names(two, tmp_path):
    mine, theirs, newer = two
    done = imgexp('runs', 'rm', f'../p2/runs/{theirs.name}', '--yes', cwd=tmp_path/'p1', IMGEXP_ROOT='')
    assert done.returncode == 0 and mine.exists() and newer.exists() and not theirs.exists(), done.stderr

def test_rm_of_the_folder_where_one_stands(two, tmp_path):
    mine, theirs, newer = two
    done = imgexp('runs', 'rm', '.', '--yes', cwd=theirs, IMGEXP_ROOT=str(tmp_path/'p1'))
    assert done.returncode == 0 and mine.exists() and newer.exists() and not theirs.exists(), done.stderr

def test_rm_asks_with_whole_paths(two, tmp_path):
    mine, theirs, _ = two
    done = subprocess.run([sys.executable, '-m', 'imgexp.cli', 'runs', 'rm', f'../p2/runs/{theirs.name}', mine.name], cwd=tmp_path/'p1',
                          env=os.environ | {'IMGEXP_ROOT': ''}, input='n\n', capture_output=True, text=True)
    assert done.returncode and str(theirs) in done.stderr and str(mine) in done.stderr and mine.exists() and theirs.exists()

@pytest.mark.parametrize('name', ['', '.', '..', './', 'photos/'])
def test_rm_refuses_what_is_no_run(two, tmp_path, name):
    "Nothing is deleted, and nothing else is taken for it."
    (tmp_path/'p1'/'photos').mkdir()
    (tmp_path/'p1'/'photos'/'params.json').write_text('{"temperature": 1}')
    done = imgexp('runs', 'rm', name, '--yes', cwd=tmp_path/'p1', IMGEXP_ROOT='')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and all(d.exists() for d in two), done.stderr
    assert (tmp_path/'p1'/'photos').exists()

def test_prune_leaves_what_can_be_continued(project):
    "Runs without an epoch go, but not those with a checkpoint, nor those that another machine may still be working on."
    def make(lr): return start_run('demo', P | {'lr': lr}).stop()
    empty, stopped, asleep, lost, gone = map(make, (1., 2., 3., 4., 5.))
    checkpoint(stopped); checkpoint(lost)
    status(asleep, 120, state='running', machine='another')
    status(lost, 10*24*3600, state='running', machine='another')
    status(gone, 2*24*3600, state='running', machine='another')
    assert sorted(prune_runs()) == sorted([empty.name, gone.name])
    done = imgexp('runs', 'prune', '--yes', cwd=project)
    assert done.returncode == 0 and {d.name for d in (project/'runs').iterdir() if d.name[0] != '.'} == {stopped.name, asleep.name, lost.name}
    remove_run(stopped.name)  # named, it goes
    assert not stopped.dir.exists()

def test_the_table_of_two_experiments(project):
    "A parameter that only one of them has is no difference between its runs."
    for lr in (0.1, 0.3): start_run('demo', P | {'lr': lr, 'clip': 0.}).stop()
    start_run('other', {'lr': 0.1, 'head': 'mlp'}).stop()
    table = list_runs()
    assert 'lr' in table and not {'clip', 'head'} & {*table.columns}

def test_the_table_beside_a_training(project):
    "Checkpoints come and go while the table is made."
    run, done = start_run('demo', P), threading.Event()
    def train():
        folder = run.dir/'checkpoints'
        while not done.is_set():
            for k in range(20):
                d = folder/f'step-{k:08d}'
                d.mkdir(parents=True, exist_ok=True)
                for name in 'abc': (d/name).write_bytes(b'x')
            for d in folder.iterdir():
                for f in d.iterdir(): f.unlink()
                d.rmdir()
    thread = threading.Thread(target=train)
    thread.start()
    try: tables = [list_runs() for _ in range(100)]
    finally:
        done.set(); thread.join()
    assert all(list(t.index) == [run.name] for t in tables)
    run.finish({})
