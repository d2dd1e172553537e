"Are the notebooks clean, and are imgexp/, the parameters cells and README.md what they say? Looks at a copy, changes nothing here."
import os, shutil, subprocess, sys
from pathlib import Path
from tempfile import TemporaryDirectory
from params_cells import stale
from readme import ROOT, readme

_REMAKE = 'from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; nbdev_clean(); nbdev_export()'

def remade(root=ROOT):
    "What cleaning and exporting make of the notebooks in `root`: {path: bytes} of nbs/*.ipynb and imgexp/*.py."
    with TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        (tmp/'imgexp').mkdir()
        shutil.copy(root/'settings.ini', tmp)
        shutil.copytree(root/'nbs', tmp/'nbs', ignore=shutil.ignore_patterns('.*', 'images', '_quarto.yml'))
        env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PYTHONPATH')}
        done = subprocess.run([sys.executable, '-c', _REMAKE], cwd=tmp, env=env, capture_output=True, text=True)
        if done.returncode: raise RuntimeError('the notebooks cannot be exported:\n' + done.stderr.strip())
        return {str(p.relative_to(tmp)): p.read_bytes() for p in files(tmp)}

def files(root): return sorted([*root.glob('nbs/*.ipynb'), *root.glob('imgexp/**/*.py')])

def differences(root=ROOT):
    "One line for each file that is not what the notebooks say, with the command that mends it; empty when all is well."
    here, there = {str(p.relative_to(root)): p.read_bytes() for p in files(root)}, remade(root)
    lines = []
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) == there.get(name): continue
        if name not in there: lines.append(f'{name} is exported by no notebook (mend: delete it, then make export)')
        elif name in here and name.endswith('.ipynb'): lines.append(f'{name} is not clean (mend: make export)')
        else: lines.append(f'{name} is not what its notebook exports (mend: make export)')
    if not any(line.startswith('imgexp/') for line in lines):  # else the tables of parameters are not those of the notebooks
        lines += [f'{p.relative_to(root)} does not have the parameters of their tables (mend: make export)' for p in stale(root)]
    for name, content in readme(root).items():
        path = root/name
        if not path.exists() or path.read_bytes() != content:
            lines.append(f'{name} is not what nbs/index.ipynb says (mend: make readme)')
    return lines

if __name__ == '__main__':
    try: lines = differences()
    except (RuntimeError, ValueError, OSError) as e: sys.exit(f'imgexp: {e}')
    if lines: sys.exit('\n'.join(f'imgexp: {line}' for line in lines))
    print('imgexp: notebooks are clean; imgexp/, parameters cells and README.md are up to date')
