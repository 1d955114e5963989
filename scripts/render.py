"""Run notebooks and keep what they draw and print, so that figures show wherever a notebook is looked at.

    python scripts/render.py             # every notebook whose code changed since it was rendered
    python scripts/render.py --all       # every notebook
    python scripts/render.py 1_blocks    # those whose path begins so
    python scripts/render.py --check 1_blocks/01_why    # run, and compare with what is kept: exit status 1 if it differs

What differs from run to run (timings, say) is not kept: such a cell has the line `#| output: false`.
"""
import argparse
import base64
import io
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
NUMBER = re.compile(r'-?\d+\.?\d*(?:e[-+]?\d+)?')


def notebooks() -> list[Path]:
    "All that are read as they are: not the index, which becomes README.md, and not the stages, which DVC runs."
    return sorted(p for p in NBS.rglob('*.ipynb') if p.parent.name != 'stages' and p.name != 'index.ipynb' and '.ipynb_checkpoints' not in p.parts)


def code_of(notebook) -> str:
    "Digest of its code; prose may change without running it again"
    return sha256('\0'.join(c.source for c in notebook.cells if c.cell_type == 'code').encode()).hexdigest()[:16]


def small_png(png: str) -> str:
    "The same picture with at most 256 colours: half the bytes"
    image, out = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB'), io.BytesIO()
    image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(out, 'png', optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def kept(cell) -> list:
    "The outputs of a cell that are worth keeping"
    if re.search(r'^#\|\s*output:\s*false', cell.source, re.MULTILINE): return []
    outputs = []
    for output in cell.outputs:
        if output.get('name') == 'stderr': continue
        if 'data' in output:
            data = {kind: value for kind, value in output.data.items() if kind in ('image/png', 'text/html', 'text/markdown', 'text/plain')}
            if 'image/png' in data: data = {'image/png': small_png(data['image/png']), 'text/plain': 'a figure'}
            output = nbformat.v4.new_output('display_data', data=data)  # one kind for all: results have numbers that change
        outputs.append(output)
    return outputs


def run(path: Path):
    "The notebook with the outputs that are kept"
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=1200, kernel_name='python3', extra_arguments=['--log-level=ERROR'],
                   resources=dict(metadata=dict(path=str(path.parent)))).execute()
    for cell in notebook.cells:
        if cell.cell_type != 'code': continue
        cell.outputs, cell.execution_count, cell.metadata = kept(cell), None, {}
    kernel = notebook.metadata.get('kernelspec', {})
    notebook.metadata = dict(kernelspec=kernel, rendered=code_of(notebook))
    return notebook


def render(path: Path) -> None:
    notebook = json.loads(json.dumps(run(path)))
    for cell in notebook['cells']:  # multi-line text as lists of lines, as Jupyter and nbdev write it
        cell['source'] = cell['source'].splitlines(True)
        for output in cell.get('outputs', []):
            if 'text' in output: output['text'] = output['text'].splitlines(True)
            for kind in output.get('data', {}):
                if kind != 'image/png': output['data'][kind] = output['data'][kind].splitlines(True)
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + '\n')


def same_text(a: str, b: str) -> bool:
    "Equal but for numbers that another processor rounds otherwise"
    if NUMBER.sub('#', a) != NUMBER.sub('#', b): return False
    return np.allclose([float(x) for x in NUMBER.findall(a)], [float(x) for x in NUMBER.findall(b)], rtol=0.02, atol=0.02)


def same_picture(a: str, b: str) -> bool:
    "Of one size, and clearly different in fewer than 3 of 1000 pixels"
    a, b = (np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB'), int) for png in (a, b))
    return a.shape == b.shape and (np.abs(a - b).max(-1) > 40).mean() < 0.003


def differences(path: Path) -> list[str]:
    "What a run gives that is not what the notebook shows"
    found, was, now = [], nbformat.read(path, 4), run(path)
    for number, (a, b) in enumerate(zip(was.cells, now.cells, strict=True)):
        if a.cell_type != 'code': continue
        pair = [[(kind, ''.join(value)) for o in cell.outputs for kind, value in ({'text': o.text} if 'text' in o else o.data).items()] for cell in (a, b)]
        same = [k for k, _ in pair[0]] == [k for k, _ in pair[1]] and all(
            same_picture(x, y) if kind == 'image/png' else same_text(x, y) for (kind, x), (_, y) in zip(*pair, strict=True))
        if not same: found.append(f'{path.relative_to(NBS)}: cell {number} shows something else now')
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description='Run notebooks and keep what they show.')
    parser.add_argument('names', nargs='*', help='beginnings of paths below nbs/, such as 1_blocks or 2_pose/03')
    parser.add_argument('--all', action='store_true', help='also those whose code has not changed')
    parser.add_argument('--check', action='store_true', help='change nothing; compare with what is kept')
    options = parser.parse_args()
    chosen = [p for p in notebooks() if not options.names or any(str(p.relative_to(NBS)).startswith(name) for name in options.names)]
    if not options.all and not options.names:
        chosen = [p for p in chosen if (nb := nbformat.read(p, 4)).metadata.get('rendered') != code_of(nb)]
    os.environ.setdefault('OMP_NUM_THREADS', '1')

    def work(path):
        print(f'{"checking" if options.check else "running"} {path.relative_to(NBS)}', flush=True)
        return differences(path) if options.check else render(path)

    with ThreadPoolExecutor(2) as pool: wrong = [line for lines in pool.map(work, chosen) for line in lines or ()]
    print(*wrong, sep='\n')
    return bool(wrong)


if __name__ == '__main__':
    sys.exit(main())
