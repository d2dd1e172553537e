"What the benchmarks share: rows of ratios to the first contender, the machine, the file of results, the printed table."
import csv, datetime, operator, os, platform, statistics

def compare(table, values, targets, over=False):
    "One row a contender: median, min, max of its values, of their ratios to the first's (`over`: first's to its)."
    first = next(iter(values.values()))
    for name, own in values.items():
        ratios = [b/a if over else a/b for a, b in zip(own, first)]
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
