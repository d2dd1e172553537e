"Tests leave no trace: runs go to a temporary folder, and nothing is sent to Weights & Biases."
import os, shutil, subprocess, tempfile
from pathlib import Path
import pytest
from launch import Launcher

_made = None

def pytest_configure(config):
    global _made
    if 'IMGEXP_ROOT' not in os.environ: _made = os.environ['IMGEXP_ROOT'] = tempfile.mkdtemp(prefix='imgexp-test-')
    os.environ.setdefault('WANDB_MODE', 'offline')
    os.environ.setdefault('WANDB_SILENT', 'true')
    os.environ.setdefault('MPLBACKEND', 'agg')

def pytest_unconfigure(config):
    if _made:
        shutil.rmtree(_made, ignore_errors=True)
        os.environ.pop('IMGEXP_ROOT', None)

SLOW = ['test_transfer', 'test_torture', 'test_batch', 'test_sweep', 'test_identity', 'test_kill', 'test_keras_cnn', 'test_sweep_machines', 'test_features']

def pytest_collection_modifyitems(items):
    "The slowest files first, so that no worker is left alone with one of them at the end."
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))

@pytest.fixture(scope='session')
def root():
    "The checkout that holds these tests."
    return Path(__file__).resolve().parent.parent

@pytest.fixture(scope='session')
def launcher(tmp_path_factory):
    "Starts `imgexp …` and papermill as processes of their own."
    launcher = Launcher(tmp_path_factory.mktemp('jobs'))
    yield launcher
    launcher.close()

@pytest.fixture
def project(tmp_path, monkeypatch):
    "An empty project: runs/ and the cache of file contents lie in a folder of this test."
    monkeypatch.setenv('IMGEXP_ROOT', str(tmp_path))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    return tmp_path

class Disk:
    "A small file system in memory."
    def __init__(self, path, megabytes):
        self.path = path
        path.mkdir()
        self._mount('-t', 'tmpfs', '-o', f'size={megabytes}m', 'tmpfs')
    def _mount(self, *args):
        done = subprocess.run(['mount', *args, str(self.path)], capture_output=True, text=True)
        if done.returncode: pytest.skip(f'needs a file system of its own, and mount says: {done.stderr.strip()}')
    def read_only(self): self._mount('-o', 'remount,ro')
    def free(self):
        s = os.statvfs(self.path)
        return s.f_bavail*s.f_frsize
    def fill(self, left):
        "Leave so many bytes."
        with open(self.path/'filler', 'wb') as f: f.write(b'\0'*max(0, self.free() - left))
    def unmount(self): subprocess.run(['umount', '-l', str(self.path)], capture_output=True)

@pytest.fixture
def disk(tmp_path):
    if os.name != 'posix' or os.geteuid() != 0 or not shutil.which('mount'): pytest.skip('mounting a small disk needs root')
    disk = Disk(tmp_path/'disk', 64)
    yield disk
    disk.unmount()
