"The values of each distribution and the grids, compared one by one with those of W&B's own package; sweeps_values.py wrote them down."
import json, math
from pathlib import Path

import pytest
from imgexp.errors import InputError
from imgexp.sweep_config import read_parameter, read_space

pytestmark = pytest.mark.fast

NOTED = json.loads(Path(__file__).with_name('sweeps_values.json').read_text())
SHARES = NOTED['shares']
PARAMETERS = [pytest.param(p, id=json.dumps(p['given'])) for p in NOTED['parameters']]
KINDS = {'single_value': 'constant', 'loguniform': 'log_uniform', 'loguniform_v2': 'log_uniform_values', 'inv_loguniform': 'inv_log_uniform', 'inv_loguniform_v2': 'inv_log_uniform_values',
         'quniform': 'q_uniform', 'qloguniform': 'q_log_uniform', 'qloguniform_v2': 'q_log_uniform_values', 'lognormal': 'log_normal', 'qlognormal': 'q_log_normal', 'qnormal': 'q_normal', 'qbeta': 'q_beta'}

def same(a, b): return a == pytest.approx(b, rel=1e-9, abs=1e-12) if isinstance(b, (int, float)) and not isinstance(b, bool) else a is b or a == b

def clipped(p, there):
    "W&B's rounded value inside the range"
    s = p.settings
    if p.distribution == 'q_beta': low, high = 0, 1
    elif 'q' in s and 'min' in s: low, high = (math.exp(s[k]) if p.distribution == 'q_log_uniform' else s[k] for k in ('min', 'max'))
    else: return there
    if isinstance(s['q'], int): low, high = math.ceil(low), math.floor(high)
    return min(max(there, low), high)

@pytest.mark.parametrize('noted', PARAMETERS)
def test_draws(noted):
    "The same value for the same share of the probability; a rounded one is clipped to the range, and is a whole number where W&B's is."
    p = read_parameter('x', noted['given'])
    kind = noted['kind'].removeprefix('param_')
    assert p.distribution == KINDS.get(kind, kind)
    for share, there in list(zip(SHARES, noted['values']))[1:-1]:
        here = p.value(share)
        assert same(here, clipped(p, there)), (share, here, there)
        assert type(here) is type(there) or 'q' not in noted['given'], 'without q whole numbers are ints here, floats there'

ENDS = {'param_categorical', 'param_categorical_w_probabilities', 'param_int_uniform', 'param_normal', 'param_qnormal', 'param_lognormal', 'param_qlognormal'}

@pytest.mark.parametrize('noted', PARAMETERS)
def test_draws_at_the_ends(noted):
    "A share of exactly 0 or 1 gives the first or last value; W&B leaves the range, is infinite, or takes the value at the other end: these kinds, and no others."
    p = read_parameter('x', noted['given'])
    for share, there in (SHARES[0], noted['values'][0]), (SHARES[-1], noted['values'][-1]):
        here = p.value(share)
        assert not isinstance(here, float) or math.isfinite(here)
        if noted['kind'] not in ENDS: assert same(here, clipped(p, there))
    if noted['kind'] == 'param_int_uniform': assert [p.value(0), p.value(1)] == [p.settings['min'], p.settings['max']]

@pytest.mark.parametrize('noted', PARAMETERS)
def test_grids(noted):
    "The same values in the same order; what W&B makes no grid of is refused here too."
    space = read_space({'x': noted['given']})
    if noted['grid'] is None:
        with pytest.raises(InputError, match='a grid needs values|a grid uses each value once'): space.lists()
    else:
        here = space.lists()['x']
        assert here == noted['grid']
        if noted['kind'] != 'param_quniform' or 'q' in noted['given']: assert [type(v) for v in here] == [type(v) for v in noted['grid']], 'without q: ints here'

def test_the_order_of_points():
    "Points come in the order of the file, the last parameter varying fastest; W&B sorts the names first. The points are the same."
    space = read_space({'b': {'values': [1, 2]}, 'a': {'values': [3, 4]}})
    assert [space.point(k) for k in range(4)] == [{'b': b, 'a': a} for b in (1, 2) for a in (3, 4)]

def test_a_range_without_a_multiple_is_refused():
    with pytest.raises(InputError, match='parameter x: there is no whole number from min=0.2 to max=0.8: give a q below 1'):
        read_parameter('x', {'distribution': 'q_uniform', 'min': 0.2, 'max': 0.8})
