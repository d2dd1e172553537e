"Write what is derived from the tables of parameters: the parameters cells of the notebooks, and imgexp/experiments.json; part of `make export`."
import json, subprocess, sys
from readme import ROOT

_CELLS = '''import json
from imgexp.experiments import EXPERIMENTS, experiment_declarations, find_experiment
from imgexp.curve_folder import CurveParams
from imgexp.deploy_params import DeployParams
from imgexp.explain_params import ExplainParams
from imgexp.look import LookParams
from imgexp.population import PopulationParams
from imgexp.search_params import SearchParams
from imgexp.phase_plans import PhaseParams
from imgexp.zoo_params import ZooParams
tables = {'01k_look': LookParams, '30_curves': CurveParams, '40_snapshots': PopulationParams, '42_search': SearchParams, '50_zoo': ZooParams, '60_phases': PhaseParams, '70_explain': ExplainParams, '71_deploy': DeployParams} | {n: find_experiment(n).cell_params for n in EXPERIMENTS}
print(json.dumps([{n: table.cell() for n, table in tables.items()}, experiment_declarations()]))'''

def derived():
    "{notebook: its parameters cell}, and the content of experiments.json; told by a process of its own: torch is not imported beside TensorFlow."
    done = subprocess.run([sys.executable, '-c', _CELLS], capture_output=True, text=True)
    if done.returncode: raise RuntimeError('the tables of parameters cannot be read:\n' + done.stderr.strip())
    return json.loads(done.stdout.splitlines()[-1])

def stale(root=ROOT):
    "{path: the text that the tables give} of notebooks and experiments.json, where it is another one."
    cells, declarations = derived()
    path, text = root/'imgexp/experiments.json', json.dumps(declarations, indent=0, ensure_ascii=False) + '\n'
    out = {path: text} if not path.exists() or path.read_text(encoding='utf-8') != text else {}
    for notebook, source in cells.items():
        path = root/'nbs'/f'{notebook}.ipynb'
        content = json.loads(path.read_text(encoding='utf-8'))
        cell = next(c for c in content['cells'] if 'parameters' in c['metadata'].get('tags', []))
        if ''.join(cell['source']) == source: continue
        cell['source'] = source.splitlines(keepends=True)
        out[path] = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + '\n'
    return out

if __name__ == '__main__':
    for _ in range(2):  # the parameters of 30_curves come from experiments.json
        for path, text in stale().items():
            path.write_text(text, encoding='utf-8')
            print(f'wrote the parameters in {path.relative_to(ROOT)}', file=sys.stderr)
