"Real processes for tests: `imgexp …` forked from a process that has imported everything once, and papermill."
import json, os, signal, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT/'nbs/03_train.ipynb'
SLOW = 240  # seconds after which a loaded machine is called stuck

_SERVER = '''
import atexit, json, os, signal, sys, threading
import imgexp.cli, imgexp.train, matplotlib.figure, matplotlib.backends.backend_agg, pandas
def reap(*_):
    while True:
        try: pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError: return
        if pid == 0: return
        part = f'{where}/{pid}.part'  # its own: another child may end while this is written
        with open(part, 'w') as f: f.write(str(os.waitstatus_to_exitcode(status)))
        os.rename(part, numbers.pop(pid))
where, numbers = sys.argv[1], {}
signal.signal(signal.SIGCHLD, reap)
print('ready', flush=True)
for line in sys.stdin:
    job = json.loads(line)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    pid = os.fork()
    if pid: numbers[pid] = job['rc']
    else: signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    if pid:
        print(pid, flush=True)
        continue
    os.setsid(); os.chdir(job['cwd'])
    for fd, name, mode in ((0, os.devnull, os.O_RDONLY), (1, job['out'], os.O_WRONLY), (2, job['err'], os.O_WRONLY)):
        os.dup2(os.open(name, mode | os.O_CREAT | (os.O_TRUNC if fd else 0)), fd)
    os.environ.clear(); os.environ.update(job['env'])
    sys.argv = ['imgexp', *job['args']]
    exec(job['before'])
    code = imgexp.cli.main()
    threading._shutdown(); atexit._run_exitfuncs()  # as python does; taking torch apart module by module costs 2 s
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)
'''

def until(condition, what, seconds=SLOW, every=0.05):
    "Poll until `condition()` is true, and give it back."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found: return found
        time.sleep(every)
    raise AssertionError(f'waited {seconds} s in vain for: {what}')

def gone(pid):
    "Whether a process has ended (a zombie has)."
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] in 'ZX'
    except OSError: return True

def kill(pid, number=signal.SIGKILL):
    try: os.kill(pid, number)
    except ProcessLookupError: pass

def last_line(text): return ([l.strip() for l in text.splitlines() if l.strip()] or [''])[-1]

def environment(root, **more):
    "For a child process: runs below `root`, one thread (the same bits on every machine load), no tracking."
    drop = ('PYTHONPATH', 'WANDB_API_KEY')
    return {k: v for k, v in os.environ.items() if k not in drop} | {
        'IMGEXP_ROOT': str(root), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'COLUMNS': '200'} | more

class Job:
    "A started process: pid, exit status, what it wrote so far."
    def __init__(self, pid, out, err, status): self.pid, self._out, self._err, self._status = pid, out, err, status
    @property
    def out(self): return self._out.read_text(errors='replace') if self._out.exists() else ''
    @property
    def err(self): return self._err.read_text(errors='replace') if self._err.exists() else ''
    def ended(self): return self._status() is not None
    def send(self, number): kill(self.pid, number)
    def wait(self, seconds=SLOW):
        until(self.ended, f'process {self.pid} to end; it wrote: {self.out[-500:]} {self.err[-500:]}', seconds)
        return self._status()

class Launcher:
    "Starts jobs, and ends those that are left at the end."
    def __init__(self, folder):
        self.folder, self.jobs, self.server = Path(folder), [], None

    def _begin(self):
        "The process that has imported everything; started when it is first needed"
        command = [sys.executable, '-c', _SERVER, str(self.folder)]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       env=environment(self.folder), cwd=self.folder)
        assert self.server.stdout.readline().strip() == 'ready'

    def imgexp(self, *args, root, cwd=None, before='', **env):
        "Start `imgexp args`; `before` is Python that runs in that process first. Returns at once."
        if self.server is None: self._begin()
        n = len(self.jobs)
        out, err, rc = (self.folder/f'{n}.{kind}' for kind in ('out', 'err', 'rc'))
        job = dict(args=[str(a) for a in args], cwd=str(cwd or root), env=environment(root, **env), before=before,
                   out=str(out), err=str(err), rc=str(rc))
        self.server.stdin.write(json.dumps(job) + '\n'); self.server.stdin.flush()
        pid = int(self.server.stdout.readline())
        return self._keep(Job(pid, out, err, lambda: int(rc.read_text()) if rc.exists() else None))

    def papermill(self, *args, root, notebook=TRAIN, **env):
        "Start `papermill nbs/03_train.ipynb out.ipynb args` in `root`. Returns at once."
        return self.python('-m', 'papermill', notebook, f'out{len(self.jobs)}.ipynb', '--start-timeout', '300', *args, root=root, **env)

    def python(self, *args, root, **env):
        "Start `python args` in `root`. Returns at once."
        out, err = (self.folder/f'{len(self.jobs)}.{kind}' for kind in ('out', 'err'))
        with open(out, 'w') as o, open(err, 'w') as e:
            process = subprocess.Popen([sys.executable, *map(str, args)], cwd=root, env=environment(root, **env), stdout=o, stderr=e,
                                       stdin=subprocess.DEVNULL, start_new_session=True)
        return self._keep(Job(process.pid, out, err, process.poll))

    def _keep(self, job):
        self.jobs.append(job)
        return job

    def close(self):
        for job in self.jobs:
            if not job.ended(): kill(job.pid)
        if self.server:
            self.server.stdin.close()
            self.server.wait(30)
