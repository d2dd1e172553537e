"""Shared by all benchmarks: interleaved measurements, tables of ratios, the machine, result files.

    python bench/tables.py          # write the results to bench/README.md, each table from one processor
"""
import csv, datetime, hashlib, json, operator, os, platform, re, statistics, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTIAL = HERE/'results'/'.partial'  # values of unfinished tables

# ---- Measuring

def interleave(table, contenders, rounds, warmup=0, settings=None, save_progress=True, pass_round=False):
    """Measure the contenders in alternation (A B A B …); returns {contender: list of values}.

    Each value is written to disk at once, so the same command resumes after an interruption, but only on the same
    machine and with the same settings.

    contenders: {name: function, or (function, its maximum number of rounds)}; returns a number or other JSON value
    warmup: uncounted rounds at the start of this process
    pass_round: call the functions with the number of the round"""
    contenders = {k: v if isinstance(v, tuple) else (v, rounds) for k, v in contenders.items()}
    n_rounds = {k: min(rounds, n) for k, (_, n) in contenders.items()}
    progress, start = Progress(table, {'rounds': n_rounds} | (settings or {}), save_progress), time.monotonic()
    values = {k: progress.values.get(k, []) for k in contenders}
    for k in range(-warmup, max(n_rounds.values())):
        for name, (run, _) in contenders.items():
            n_done = len(values[name])
            if not (n_done < n_rounds[name] if k < 0 else n_done == k < n_rounds[name]): continue
            round_start = time.monotonic()
            value = run(k) if pass_round else run()
            seconds = time.monotonic() - round_start
            if k >= 0: progress.add(name, value, seconds)
            log(f'{table}: {name}{", warmup"*(k < 0)}: {shorten(value)} ({seconds:.0f} s)')
            values[name] = progress.values.get(name, [])
    minutes = (time.monotonic() - start)/60
    log(f'{table}: {minutes:.1f} minutes in this process, {progress.seconds/60:.1f} minutes of counted rounds')
    return values

def log(line): print(line, file=sys.stderr, flush=True)

def shorten(value): return f'{value:.4g}' if isinstance(value, float) else json.dumps(value)[:200]

def progress_path(table): return PARTIAL/f"{re.sub(r'[^a-z0-9]+', '-', table.lower()).strip('-')}.json"

def code_id():
    "Hash of the measured code and of the benchmarks"
    files = sorted([*HERE.glob('*.py'), *HERE.parent.glob('imgexp/*.py')])
    return hashlib.sha256(b''.join(f.read_bytes() for f in files)).hexdigest()[:12]

def discard_progress(table):
    "Delete the single values of a table whose rows are saved"
    progress_path(table).unlink(missing_ok=True)

class Progress:
    "Values of an unfinished table, {contender: list}, saved to a file until `discard_progress`"
    def __init__(self, table, settings, save=True):
        self.path = progress_path(table)
        self.save, self.values, self.seconds = save, {}, 0.
        conditions = {k: v for k, v in machine('cpu').items() if k != 'date'} | {'table': table, 'code': code_id()}
        self.about = json.loads(json.dumps(conditions | settings))
        if not save or not self.path.exists(): return
        saved = json.loads(self.path.read_text())
        if changed := [k for k in self.about if saved['about'].get(k) != self.about[k]]:
            changes = '; '.join(f"{k} was {saved['about'].get(k)} and is {self.about[k]}" for k in changed)
            sys.exit(f'bench: {self.path} was measured under other conditions ({changes}): delete it to measure the '
                     'whole table again')
        self.values, self.seconds = saved['values'], saved['seconds']
        log(f'{table}: resuming {self.path} with {sum(map(len, self.values.values()))} values')

    def add(self, name, value, seconds):
        self.values.setdefault(name, []).append(value)
        self.seconds += seconds
        if not self.save: return
        PARTIAL.mkdir(parents=True, exist_ok=True)
        temp = self.path.with_suffix('.part')
        temp.write_text(json.dumps({'about': self.about, 'seconds': self.seconds, 'values': self.values}))
        temp.replace(self.path)

# ---- Rows

def compare(table, values, targets, inverse=False):
    """Yield a row per contender: median, minimum, maximum of its values and of their ratios to the first contender's.

    values: {contender: list}; ratios are taken round by round, or to the first one's median if the numbers differ
    targets: {contender: 'ratio <= 1.05'}
    inverse: the ratios are the first contender's value over this one's"""
    first = next(iter(values.values()))
    for name, measured in values.items():
        base = first if len(measured) == len(first) else [statistics.median(first)]*len(measured)
        ratios = [a/b if inverse else b/a for a, b in zip(base, measured)]
        median = statistics.median(ratios)
        yield _row(table, name, measured, targets, ratio=median, ratio_min=min(ratios), ratio_max=max(ratios))

def summarize(table, values, targets):
    "Yield a row per name: median, minimum and maximum of its values, without ratios"
    for name, measured in values.items():
        yield _row(table, name, measured, targets, ratio='', ratio_min='', ratio_max='')

def _row(table, name, measured, targets, **ratios):
    row = dict(table=table, contender=name, n=len(measured), median=statistics.median(measured), min=min(measured),
               max=max(measured))
    row |= ratios | {'target': targets.get(name, '')}
    return {k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in row.items()} | {'met': met(row)}

def met(row):
    "Whether a row meets its target, 'yes' or 'no'; '' without a target"
    if not row['target']: return ''
    column, sign, limit = row['target'].split()
    comparison = {'<=': operator.le, '<': operator.lt, '>=': operator.ge, '>': operator.gt}[sign]
    return 'yes' if comparison(row[column], float(limit)) else 'no'

def machine(device):
    "Hardware and versions that the numbers depend on, without anything that identifies the machine"
    import torch
    try: cpu = next(line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name'))
    except (OSError, StopIteration): cpu = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return dict(device=torch.cuda.get_device_name() if device == 'cuda' else device, cpu=cpu, cores=cores,
                threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__,
                date=datetime.date.today().isoformat())

# ---- Files

def save(rows, path, tables):
    "Write `rows`, sorted by `tables`; they replace those of the same tables, device and processor"
    def key(r): return r['table'], r['device'], r['cpu']
    replaced = {*map(key, rows)}
    old = list(csv.DictReader(path.open())) if path.exists() else []
    rows = [r for r in old if key(r) not in replaced] + rows
    rows.sort(key=lambda r: (list(tables).index(r['table']) if r['table'] in tables else len(tables), key(r)))
    path.parent.mkdir(exist_ok=True)
    with path.open('w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[-1]), restval='', lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

def show(rows):
    "Print rows as an aligned table"
    columns = ['table', 'contender', 'n', 'median', 'min', 'max', 'ratio', 'ratio_min', 'ratio_max', 'target', 'met']
    cells = [columns] + [[str(r[c]) for c in columns] for r in rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(columns))]
    for r in cells: print('  '.join(c.ljust(w) for c, w in zip(r, widths)).rstrip())

# ---- bench/README.md

FILES = {'transfer': 'transfer.csv', 'data': 'data.csv', 'train': 'train.csv', 'sweep': 'sweep.csv',
         'budget': 'budget.csv'}
BEGIN, END = '<!-- results: made by `python bench/tables.py` -->', '<!-- end of results -->'

def newest(rows):
    "{table: its rows from the processor on which it was measured last}"
    tables = {}
    for r in rows: tables.setdefault(r['table'], {}).setdefault((r['device'], r['cpu']), []).append(r)
    def last_date(rows): return max(r['date'] for r in rows)
    return {name: max(by_processor.values(), key=last_date) for name, by_processor in tables.items()}

def markdown(name, rows):
    "A table of results in Markdown; all rows come from the same processor"
    machines = {k: {r[k] for r in rows} for k in ('device', 'cpu', 'cores', 'threads')}
    assert all(len(v) == 1 for v in machines.values()), f'{name}: rows of several machines: {machines}'
    device, cpu, cores, threads = (v.pop() for v in machines.values())
    hardware = cpu if device == 'cpu' else f'{device}, {cpu}'
    date = max(r['date'] for r in rows)
    lines = [f'**{name}** ({hardware}, {cores} cores, {threads} threads, {date})', '',
             '| contender | n | median | min to max | ratio | min to max | target | met |',
             '|---|---|---|---|---|---|---|---|']
    for r in rows:
        ratio = (r['ratio'], f"{r['ratio_min']} to {r['ratio_max']}"*bool(r['ratio_min']))
        cells = [r['contender'], r['n'], r['median'], f"{r['min']} to {r['max']}", *ratio, r['target'], r['met']]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)

def torture_summary():
    "Summary of results/torture.csv: a line per processor, kind of data and number of threads"
    rows = list(csv.DictReader((HERE/'results'/'torture.csv').open()))
    groups = {}
    for r in rows: groups.setdefault((r['cpu'], r['data'], r['threads']), []).append(r)
    lines = ['| processor | data | threads | features | kills | while a file was written | bit-identical results |',
             '|---|---|---|---|---|---|---|']
    for (cpu, data, threads), rows in groups.items():
        kills, inside = (sum(int(r[k]) for r in rows) for k in ('kills', 'inside_writing'))
        equal = sum(r['equal'] == 'yes' for r in rows)
        lines.append(f'| {cpu} | {data} | {threads} | {len(rows)} | {kills} | {inside} | {equal} of {len(rows)} |')
    return '\n'.join(lines)

def readme():
    "bench/README.md with the current results"
    text = (HERE/'README.md').read_text()
    sections = []
    for script, name in FILES.items():
        sections.append(f'### {script}.py')
        tables = newest(csv.DictReader((HERE/'results'/name).open()))
        sections += [markdown(table, rows) for table, rows in tables.items()]
    sections += ['### tests/torture.py', torture_summary()]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f'{before}{BEGIN}\n\n' + '\n\n'.join(sections) + f'\n\n{END}{after}'

if __name__ == '__main__': (HERE/'README.md').write_text(readme())
