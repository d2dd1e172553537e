"""Zoos: rows an hour beside the usual script and papermill; two zoos, and what predictors of accuracy make of their weights.

    python bench/zoo.py speed path/to/shared      # 12 ResNet-18 on clothing, five ways; 40 minutes on two cores
    python bench/zoo.py small path/to/shared      # 300 small CNNs on three classes of Fashion-MNIST each; resumable, two hours
    python bench/zoo.py resnet18 path/to/shared   # 40 ResNet-18 on three classes of tiny40 each; resumable, two hours

`path/to/shared` has data/clothing, data/fashion-mnist and data/tiny40. `small` and `resnet18` write the table of the zoo
(`results/zoo-….csv`) and the scores of predictors (`results/zoo-…-scores.csv`); runs go to runs/. See bench/README.md.
"""
import argparse, csv, json, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

from tables import log, machine

HERE = Path(__file__).resolve().parent
RESULTS = HERE/'results'

def write(path, rows):
    with path.open('w', newline='') as f:
        writer = csv.DictWriter(f, [*rows[0]], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

# ---- Rows an hour

SPEED = dict(arch='resnet18', size=64, models=12, max_epoch='4', batch_sizes='32', precision='fp32', track='off', seed=1, head_init='normal', augment='crop-flip')

def in_process(folder, values, jobs):
    "`imgexp zoo run`"
    from imgexp.zoo_images import zoo_classes
    from imgexp.zoo_params import ZooParams
    from imgexp.zoo_table import plan_zoo
    p = ZooParams.check(values)
    zoo = plan_zoo(folder/'sweep.csv', p, zoo_classes(p))
    done = subprocess.run([sys.executable, '-m', 'imgexp.cli', 'zoo', 'run', str(zoo.path), '--jobs', str(jobs), '--json'], capture_output=True, text=True)
    rows = json.loads(done.stdout)
    assert all(r['status'] == 'done' for r in rows), done.stderr
    return sum(r['test_top1'] for r in rows)/len(rows)

def drawn(values):
    "Rows of the zoo"
    from imgexp.zoo_images import zoo_classes
    from imgexp.zoo_params import ZooParams, draw_row
    p = ZooParams.check(values)
    return [draw_row(p, k, zoo_classes(p)) for k in range(p.models)]

def usual(folder, values):
    top1 = []
    for k, row in enumerate(drawn(values)):
        command = [sys.executable, str(HERE/'usual_zoo.py'), values['data'], str(folder/str(k)), '--classes', row['classes']]
        for option, value in (('seed', row['seed']), ('epochs', row['max_epoch']), ('early', row['early_epoch']), ('batch-size', row['batch_size']),
                              ('lr', row['learning_rate']), ('weight-decay', row['weight_decay']), ('optimizer', row['optimizer'])):
            command += [f'--{option}', str(value)]
        top1.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)['test_top1'])
    return sum(top1)/len(top1)

def papermill(folder, values):
    from imgexp.runs import Run
    for k, row in enumerate(drawn(values)):
        p = dict(data=values['data'], arch='resnet18', size=64, classes=row['classes'], seed=row['seed'], epochs=row['max_epoch'], lr=row['learning_rate'], optimizer=row['optimizer'],
                 batch_size=row['batch_size'], weight_decay=row['weight_decay'], keep_weights=f"0,{row['early_epoch']},{row['max_epoch']}", keep_best=1, resplit='70/15/15', states=True,
                 schedule='constant', precision=values['precision'], track='off')
        options = [o for name, v in p.items() for o in ('-p' if not isinstance(v, str) else '-r', name, str(v))]
        subprocess.run([sys.executable, '-m', 'papermill', str(HERE.parent/'nbs/03_train.ipynb'), str(folder/f'{k}.ipynb'), *options], capture_output=True, text=True, check=True)
    runs = [Run(d.parent) for d in (folder/'runs').glob('2*/metrics.json')]
    return sum(r.metrics['test']['top1']['value'] for r in runs)/len(runs)

def speed(shared, rounds):
    from imgexp.learner import choose_precision
    values = SPEED | dict(data=str(shared/'data/clothing/train'))
    contenders = {'usual script, a process for each row, fp32': lambda f: usual(f, values),
                  'papermill of 03_train, fp32': lambda f: papermill(f, values),
                  'imgexp zoo run --jobs 1, fp32': lambda f: in_process(f, values, 1),
                  'imgexp zoo run --jobs 2, fp32': lambda f: in_process(f, values, 2)}
    if choose_precision('auto', 'cpu') == 'bf16':
        contenders['imgexp zoo run --jobs 1, bf16'] = lambda f: in_process(f, values | {'precision': 'bf16'}, 1)
        contenders['imgexp zoo run --jobs 2, bf16'] = lambda f: in_process(f, values | {'precision': 'bf16'}, 2)
    seconds, top1 = {}, {}
    for _ in range(rounds):
        for name, contender in contenders.items():
            with tempfile.TemporaryDirectory() as folder:
                os.environ |= {'IMGEXP_ROOT': folder, 'XDG_CACHE_HOME': folder}
                start = time.perf_counter()
                top1[name] = contender(Path(folder))
                seconds.setdefault(name, []).append(time.perf_counter() - start)
            log(f'{name}: {seconds[name][-1]:.0f} s, mean test top-1 {top1[name]:.3f}')
    import statistics
    base = statistics.median(next(iter(seconds.values())))
    for name, s in seconds.items():
        m = statistics.median(s)
        yield dict(contender=name, rows=12, seconds=round(m, 1), low=round(min(s), 1), high=round(max(s), 1), rounds=len(s), rows_per_hour=round(12*3600/m),
                   against_usual=round(base/m, 2), mean_test_top1=round(top1[name], 4), **machine('cpu'))

# ---- Two zoos

ZOOS = {'small': dict(data='fashion-mnist', arch='small_cnn', size=28, models=300, rows_per_subset=3, max_epoch='2-8', batch_sizes='32,64,128', learning_rate_adam='0.0001-0.01',
                      learning_rate_sgd='0.001-0.3', seed=0, track='off'),
        'resnet18': dict(data='tiny40', arch='resnet18', size=64, models=40, max_epoch='4-10', batch_sizes='32,64', seed=0, track='off')}

def make(name, shared, jobs):
    "The zoo, trained and exported"
    from imgexp.start import runs_dir
    from imgexp.zoo_export import export_zoo
    from imgexp.zoo_images import zoo_classes
    from imgexp.zoo_params import ZooParams
    from imgexp.zoo_runs import run_zoo
    from imgexp.zoo_table import find_zoo, plan_zoo
    p = ZooParams.check(ZOOS[name] | dict(data=str(shared/'data'/ZOOS[name]['data'])))
    path = runs_dir()/'zoo'/name/'sweep.csv'
    zoo = find_zoo(path) if path.is_file() else plan_zoo(path, p, zoo_classes(p))
    states = run_zoo(zoo, jobs, quiet=True, say=log)
    out = zoo.dir/'export'
    if out.exists(): shutil.rmtree(out)
    return zoo, states, export_zoo(zoo, out)

def zoo(name, shared, jobs):
    import pandas as pd
    from imgexp.weight_predictors import compare_predictors
    zoo, states, out = make(name, shared, jobs)
    write(RESULTS/f'zoo-{name}.csv', [{**zoo.inputs[k], **{c: s[c] for c in ('status', 'epoch', 'valid_top1', 'test_top1')}, **machine('cpu')} for k, s in states.items()])
    scores = pd.concat([compare_predictors(out, initial).assign(states='all' if initial else 'trained') for initial in (True, False)]).round(4)
    log(scores.to_string())
    write(RESULTS/f'zoo-{name}-scores.csv', [dict(r, **machine('cpu')) for r in scores.to_dict('records')])

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['speed', *ZOOS])
    parser.add_argument('shared', help='folder with data/')
    parser.add_argument('--jobs', type=int, default=2, help='rows trained at once (%(default)s)')
    parser.add_argument('--rounds', type=int, default=1, help='of speed (%(default)s)')
    args = parser.parse_args()
    shared = Path(args.shared).absolute()
    if args.what == 'speed': return write(RESULTS/'zoo-speed.csv', [*speed(shared, args.rounds)])
    zoo(args.what, shared, args.jobs)

if __name__ == '__main__': main()
