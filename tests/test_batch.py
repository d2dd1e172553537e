"Batches as real processes: killed, stopped, repeated; no run twice, nothing lost."
import json, os, signal, time
from pathlib import Path

import nbformat, pandas as pd, pytest
from launch import SLOW, environment, gone, kill, last_line, until
from pictures import CLASSES, tree

pytestmark = pytest.mark.usefixtures('project')

SLOW_JOB = '''
import os, signal, time
from pathlib import Path
def work(name, seconds=0, deaths=0):
    "Takes so long; kills its own process the first `deaths` times"
    with open('began', 'a') as f: f.write(f'{name}\\n')
    if open('began').read().split().count(name) <= deaths: os.kill(os.getpid(), signal.SIGKILL)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end: time.sleep(0.02)
    except KeyboardInterrupt:
        Path(f'{name}.stopped').touch()
        raise
    return name
'''

@pytest.fixture
def jobs(project, monkeypatch):
    "Makes jobs of a module that workers find in the working folder"
    from imgexp.batch import Job
    monkeypatch.chdir(project)
    (project/'slow_job.py').write_text(SLOW_JOB)
    return lambda *many: [Job('slow_job:work', values, values['name']) for values in many]

def began(): return Path('began').read_text().split() if Path('began').exists() else []

def test_results_come_in_order(jobs):
    from imgexp.batch import run
    found = run(jobs(dict(name='a', seconds=0.5), dict(name='b'), dict(name='c')), n=2)
    assert [r.value for r in found] == ['a', 'b', 'c'] and {r.state for r in found} == {'done'}

def test_a_worker_that_dies_is_replaced(jobs):
    from imgexp.batch import run
    found = run(jobs(dict(name='a', deaths=2), dict(name='b', deaths=3), dict(name='c')), n=2)
    assert [r.state for r in found] == ['done', 'failed', 'done']
    assert found[1].error.startswith('its process was killed by SIGKILL')
    assert began().count('a') == 3 and began().count('b') == 3

def test_workers_go_when_the_parent_is_killed(launcher, jobs, project):
    "They stop as if asked to: a training would write a checkpoint."
    jobs()
    code = 'import sys; sys.path.insert(0, "."); from imgexp.batch import Job, run; run([Job("slow_job:work", dict(name=n, seconds=60)) for n in "ab"], n=2)'
    job = launcher.python('-c', code, root=project)
    until(lambda: len(began()) == 2, 'both jobs to begin')
    job.send(signal.SIGKILL)
    until(lambda: all(Path(f'{n}.stopped').exists() for n in 'ab'), 'the workers to stop')
