"Write the parameters cells of the experiments' notebooks from their tables of parameters."
import json, sys
from pathlib import Path
from readme import ROOT

def cells(root=ROOT):
    "{path of a notebook: its content with the parameters cell that its table gives}, for all experiments."
    from imgexp.experiments import EXPERIMENTS, find_experiment
    out = {}
    for notebook in EXPERIMENTS:
        path, source = root/'nbs'/f'{notebook}.ipynb', find_experiment(notebook).cell_params.cell()
        content = json.loads(path.read_text(encoding='utf-8'))
        cell = next(c for c in content['cells'] if 'parameters' in c['metadata'].get('tags', []))
        cell['source'] = source.splitlines(keepends=True)
        out[path] = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + '\n'
    return out

if __name__ == '__main__':
    changed = [p for p, text in cells().items() if p.read_text(encoding='utf-8') != text]
    if '--check' in sys.argv and changed:
        sys.exit('\n'.join(f'imgexp: the parameters cell of {p.relative_to(ROOT)} is not what its table says (mend: make export)' for p in changed))
    for p in changed: p.write_text(cells()[p], encoding='utf-8')
