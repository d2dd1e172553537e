"""Values of W&B's own package `sweeps`, which test_sweep_values.py compares with ours. It needs numpy below 2, so an environment of its own:

    python3.11 -m venv ENV && ENV/bin/pip install sweeps==0.3.0 'numpy<2' && ENV/bin/python tests/sweeps_values.py

writes tests/sweeps_values.json: for each parameter the kind that W&B takes it for, its values at fixed shares of the probability, and its grid, or null where W&B refuses one.
"""
import importlib.metadata, json
from pathlib import Path

SHARES = [0, 0.001, 0.01, 0.07, 0.13, 0.19, 0.26, 0.31, 0.37, 0.43, 0.49, 0.51, 0.57, 0.63, 0.69, 0.74, 0.81, 0.87, 0.93, 0.99, 0.999, 1]

def of(kind, **settings): return {'distribution': kind} | settings

CASES = [
    {'value': 0.1}, of('constant', value='adam'), {'values': [16, 32, 64]}, {'values': [1, 1.0, 2, 2]}, of('categorical', values=['a', 'b', True, None]),
    {'values': ['a', 'b', 'c'], 'probabilities': [0.2, 0.5, 0.3]}, of('categorical_w_probabilities', values=[1, 2], probabilities=[0.9, 0.1]),
    {'min': 1, 'max': 7}, of('int_uniform', min=-3, max=3), {'min': 0.0, 'max': 1}, {'min': 1, 'max': 2.5}, of('uniform', min=-2, max=3),
    of('q_uniform', min=1, max=10, q=4), of('q_uniform', min=1, max=11, q=4), of('q_uniform', min=0, max=10, q=5), of('q_uniform', min=0, max=6), of('q_uniform', min=10, max=100, q=8),
    of('q_uniform', min=0.0, max=1.0, q=0.1), of('q_uniform', min=0.1, max=0.55, q=0.15), of('q_uniform', min=1, max=4, q=0.5),
    of('log_uniform', min=-5, max=2), of('log_uniform_values', min=1e-5, max=1e-1), of('inv_log_uniform', min=-3, max=1), of('inv_log_uniform_values', min=0.01, max=1),
    of('q_log_uniform', min=-2, max=5, q=1), of('q_log_uniform', min=0, max=3), of('q_log_uniform', min=-1, max=2, q=0.5), of('q_log_uniform_values', min=3, max=300, q=16), of('q_log_uniform_values', min=0.1, max=10, q=0.25),
    of('normal'), of('normal', mu=3, sigma=2.5), of('q_normal', mu=10, sigma=30, q=7), of('q_normal', sigma=2), of('log_normal'), of('log_normal', mu=1, sigma=0.5),
    of('q_log_normal', mu=2, sigma=1, q=3), of('q_log_normal', q=0.2), of('beta'), of('beta', a=2, b=5), of('q_beta', a=2, b=2, q=0.1), of('q_beta', a=5, b=1, q=0.6)]

def measured(given):
    import numpy as np
    from sweeps.grid_search import grid_search_next_runs
    from sweeps.params import HyperParameter
    p = HyperParameter('x', given)
    def plain(v): return v.item() if isinstance(v, (np.generic, np.ndarray)) else v
    def grid():
        config = {'method': 'grid', 'parameters': {'x': given}}
        if p.type == HyperParameter.CONSTANT: return [p.value]  # W&B keeps it out of the points
        try: runs = grid_search_next_runs([], config, n=1000)
        except ValueError: return None
        return [r.config['x']['value'] for r in runs if r]
    return {'given': given, 'kind': p.type, 'values': [plain(p.ppf(float(s))) for s in SHARES], 'grid': grid()}

if __name__ == '__main__':
    found = {'sweeps': importlib.metadata.version('sweeps'), 'shares': SHARES, 'parameters': [measured(c) for c in CASES]}
    lines = ',\n'.join(json.dumps(p) for p in found.pop('parameters'))
    Path(__file__).with_suffix('.json').write_text(json.dumps(found)[:-1] + ', "parameters": [\n' + lines + ']}\n')
