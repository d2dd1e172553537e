"""What the benchmarks share: contenders that take turns, rows of ratios to the first one, the machine, the files of results.

    python bench/tables.py          # write the results into bench/README.md, each table from one processor
"""
import csv, datetime, hashlib, json, operator, os, platform, re, statistics, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTIAL = HERE/'results'/'.partial'  # values of tables that are not finished yet

# ---- Measuring

def in_turn(table, contenders, rounds, warm=0, settings=None, keep=True, numbered=False):
    """{contender: its values}: the contenders take turns (A B A B …). Every value is kept on the disk as soon as it is there, so that the same
    command goes on after an interruption, on the same machine and with the same settings only.

    `contenders`: {name: function, or (function, most rounds of this one)}; a function gives a number, or anything JSON holds.
    `warm`: rounds in this process before the first that counts. `numbered`: functions are told the number of the round."""
    contenders = {k: v if isinstance(v, tuple) else (v, rounds) for k, v in contenders.items()}
    most = {k: min(rounds, n) for k, (_, n) in contenders.items()}
    file, began = Progress(table, {'rounds': most} | (settings or {}), keep), time.monotonic()
    values = {k: file.values.get(k, []) for k in contenders}
    for k in range(-warm, max(most.values())):
        for name, (run, _) in contenders.items():
            if not (len(values[name]) < most[name] if k < 0 else len(values[name]) == k < most[name]): continue
            start = time.monotonic()
            value = run(k) if numbered else run()
            if k >= 0: file.add(name, value, time.monotonic() - start)
            print(f'{table}: {name}{", warming up"*(k < 0)}: {short(value)} ({time.monotonic() - start:.0f} s)', file=sys.stderr, flush=True)
            values[name] = file.values.get(name, [])
    print(f'{table}: {(time.monotonic() - began)/60:.1f} minutes now, {file.seconds/60:.1f} minutes of rounds that count', file=sys.stderr, flush=True)
    return values

def short(value): return f'{value:.4g}' if isinstance(value, float) else json.dumps(value)[:200]

def partial_file(table): return PARTIAL/f"{re.sub(r'[^a-z0-9]+', '-', table.lower()).strip('-')}.json"

def code_id():
    "Hash of the code that is measured, and of what measures it"
    files = sorted([*HERE.glob('*.py'), *HERE.parent.glob('imgexp/*.py')])
    return hashlib.sha256(b''.join(f.read_bytes() for f in files)).hexdigest()[:12]

def forget(table):
    "The rows of a table are saved: delete the values that it was made of"
    partial_file(table).unlink(missing_ok=True)

class Progress:
    "The values of a table that is being measured: {contender: values}; the file is there until `done`"
    def __init__(self, table, settings, keep=True):
        self.path = partial_file(table)
        self.keep, self.values, self.seconds = keep, {}, 0.
        self.about = json.loads(json.dumps({k: v for k, v in machine('cpu').items() if k != 'date'} | {'table': table, 'code': code_id()} | settings))
        if not keep or not self.path.exists(): return
        held = json.loads(self.path.read_text())
        if other := [k for k in self.about if held['about'].get(k) != self.about[k]]:
            told = '; '.join(f"{k} was {held['about'].get(k)} and is {self.about[k]}" for k in other)
            sys.exit(f'bench: {self.path} was begun otherwise ({told}): delete it to measure the whole table anew')
        self.values, self.seconds = held['values'], held['seconds']
        print(f"{table}: going on with {self.path}, {sum(map(len, self.values.values()))} values are there", file=sys.stderr, flush=True)

    def add(self, name, value, seconds):
        self.values.setdefault(name, []).append(value)
        self.seconds += seconds
        if not self.keep: return
        PARTIAL.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix('.part')
        part.write_text(json.dumps({'about': self.about, 'seconds': self.seconds, 'values': self.values}))
        part.replace(self.path)

# ---- Rows

def compare(table, values, targets, over=False):
    """One row a contender: median, min, max of its values, of their ratios to the first's (`over`: first's to its). Ratios are taken round by
    round; where one was measured less often, over the first's median."""
    first = next(iter(values.values()))
    for name, own in values.items():
        base = first if len(own) == len(first) else [statistics.median(first)]*len(own)
        ratios = [a/b if over else b/a for a, b in zip(base, own)]
        middle = statistics.median(ratios)
        yield _row(table, name, own, targets, ratio=middle, ratio_min=min(ratios), ratio_max=max(ratios))

def alone(table, values, targets):
    "One row a name: median, min and max of its values, which are compared with nothing."
    for name, own in values.items(): yield _row(table, name, own, targets, ratio='', ratio_min='', ratio_max='')

def _row(table, name, own, targets, **ratios):
    row = dict(table=table, contender=name, n=len(own), median=statistics.median(own), min=min(own), max=max(own))
    row |= ratios | {'target': targets.get(name, '')}
    return {k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in row.items()} | {'met': met(row)}

def met(row):
    "'yes' or 'no'; '' without a target"
    if not row['target']: return ''
    key, sign, limit = row['target'].split()
    holds = {'<=': operator.le, '<': operator.lt, '>=': operator.ge, '>': operator.gt}[sign]
    return 'yes' if holds(row[key], float(limit)) else 'no'

def machine(device):
    "What the numbers depend on; nothing that names the machine."
    import torch
    try: cpu = next(line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name'))
    except (OSError, StopIteration): cpu = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return dict(device=torch.cuda.get_device_name() if device == 'cuda' else device, cpu=cpu, cores=cores,
                threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__,
                date=datetime.date.today().isoformat())

# ---- Files

def save(rows, path, tables):
    "Put `rows` into the file, in place of those of the same tables on the same device and processor; sorted by `tables`."
    def key(r): return r['table'], r['device'], r['cpu']
    new = {*map(key, rows)}
    old = list(csv.DictReader(path.open())) if path.exists() else []
    rows = [r for r in old if key(r) not in new] + rows
    rows.sort(key=lambda r: (list(tables).index(r['table']) if r['table'] in tables else len(tables), key(r)))
    path.parent.mkdir(exist_ok=True)
    with path.open('w', newline='') as f:
        out = csv.DictWriter(f, list(rows[-1]), restval='', lineterminator='\n')
        out.writeheader(); out.writerows(rows)

def show(rows):
    columns = ['table', 'contender', 'n', 'median', 'min', 'max', 'ratio', 'ratio_min', 'ratio_max', 'target', 'met']
    cells = [columns] + [[str(r[c]) for c in columns] for r in rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(columns))]
    for r in cells: print('  '.join(c.ljust(w) for c, w in zip(r, widths)).rstrip())

# ---- bench/README.md

FILES = {'transfer': 'transfer.csv', 'data': 'data.csv', 'train': 'train.csv', 'sweep': 'sweep.csv', 'budget': 'budget.csv'}
BEGIN, END = '<!-- results: made by `python bench/tables.py` -->', '<!-- end of results -->'

def newest(rows):
    "Of each table the rows of one processor: of that on which it was measured last"
    tables = {}
    for r in rows: tables.setdefault(r['table'], {}).setdefault((r['device'], r['cpu']), []).append(r)
    return {name: max(by.values(), key=lambda own: max(r['date'] for r in own)) for name, by in tables.items()}

def markdown(name, rows):
    "A table of results; every row from the same processor"
    about = {k: {r[k] for r in rows} for k in ('device', 'cpu', 'cores', 'threads')}
    assert all(len(v) == 1 for v in about.values()), f'{name}: rows of several machines: {about}'
    device, cpu, cores, threads = (v.pop() for v in about.values())
    where = cpu if device == 'cpu' else f'{device}, {cpu}'
    lines = [f'**{name}** ({where}, {cores} cores, {threads} threads, {max(r["date"] for r in rows)})', '',
             '| contender | n | median | min to max | ratio | min to max | target | met |', '|---|---|---|---|---|---|---|---|']
    for r in rows:
        ratio = (r['ratio'], f"{r['ratio_min']} to {r['ratio_max']}"*bool(r['ratio_min']))
        lines.append('| ' + ' | '.join([r['contender'], r['n'], r['median'], f"{r['min']} to {r['max']}", *ratio, r['target'], r['met']]) + ' |')
    return '\n'.join(lines)

def killed():
    "What results/torture.csv says, a line for each processor, kind of data and number of threads"
    rows = list(csv.DictReader((HERE/'results'/'torture.csv').open()))
    groups = {}
    for r in rows: groups.setdefault((r['cpu'], r['data'], r['threads']), []).append(r)
    lines = ['| processor | data | threads | features | kills | of them into the writing of a file | equal bit for bit |', '|---|---|---|---|---|---|---|']
    for (cpu, data, threads), own in groups.items():
        kills, inside = (sum(int(r[k]) for r in own) for k in ('kills', 'inside_writing'))
        lines.append(f"| {cpu} | {data} | {threads} | {len(own)} | {kills} | {inside} | {sum(r['equal'] == 'yes' for r in own)} of {len(own)} |")
    return '\n'.join(lines)

def readme():
    "bench/README.md with the results that the files hold"
    text = (HERE/'README.md').read_text()
    parts = []
    for script, name in FILES.items():
        parts.append(f'### {script}.py')
        parts += [markdown(table, rows) for table, rows in newest(csv.DictReader((HERE/'results'/name).open())).items()]
    parts += ['### tests/torture.py', killed()]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f'{before}{BEGIN}\n\n' + '\n\n'.join(parts) + f'\n\n{END}{after}'

if __name__ == '__main__': (HERE/'README.md').write_text(readme())
