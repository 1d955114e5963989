"""The documentation site: every notebook with its outputs, the API, the results pages.

    python scripts/site.py build    # notebooks are run that changed since, two at a time; then pages, then mkdocs
    python scripts/site.py check    # every page in a headless browser, at a desktop's and a phone's width
"""
import argparse
import importlib
import inspect
import json
import logging
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / 'outputs' / 'site'
DOCS, HTML, RUN = SITE / 'docs', SITE / 'html', SITE / 'run'
PARTS = {'00': 'The spectral block', '01': 'Attention', '02': 'The network', '03': 'Pictures and keypoints', '04': 'Experiments', '05': 'Training',
         '06': 'Evaluation', '07': 'Results', '08': 'The sample', '09': 'The sample', '10': 'Use', '11': 'Use', '12': 'Use', '13': 'Use', '14': 'Use'}
DIRECTIVE = re.compile(r'^#\|.*\n?', re.M)
CSS = """.md-grid { max-width: 76rem }
.md-typeset table:not([class]) { font-size: .62rem }
.md-typeset table:not([class]) th, .md-typeset table:not([class]) td { min-width: 0; padding: .4em .7em }
.md-typeset pre > code { font-size: .62rem }
.md-content img { background: white }
.MathJax_Display { overflow-x: auto; overflow-y: hidden }
"""
MATHJAX = r"""window.MathJax = {
  messageStyle: 'none', showMathMenu: false,
  tex2jax: { inlineMath: [['\\(', '\\)']], displayMath: [['\\[', '\\]']], processClass: 'arithmatex', ignoreClass: '.*' },
  'HTML-CSS': { availableFonts: ['STIX-Web'], webFont: 'STIX-Web', imageFont: null, linebreaks: { automatic: true } } };
"""


def notebooks() -> list[Path]:
    "In reading order."
    return sorted(p for p in (ROOT / 'nbs').glob('*.ipynb') if p.name != 'index.ipynb')


def title_of(notebook: Path) -> str:
    "Its first heading"
    for cell in json.loads(notebook.read_text())['cells']:
        if found := re.match(r'# (.+)', ''.join(cell['source'])): return found[1].replace('`', '')
    raise ValueError(f'{notebook}: has no heading')


def run(notebook: Path, read: str) -> Path:
    "The executed notebook; run only if it changed, or anything that notebooks read"
    import nbformat
    from nbclient import NotebookClient

    out = RUN / notebook.name
    mark = sha256((read + notebook.read_text()).encode()).hexdigest()
    if out.is_file() and json.loads(out.read_text())['metadata'].get('made_from') == mark: return out
    print(f'running {notebook.name}', flush=True)
    nb = nbformat.read(notebook, 4)
    NotebookClient(nb, timeout=1200, kernel_name='python3', extra_arguments=['--log-level=ERROR'], resources=dict(metadata=dict(path=str(ROOT / 'nbs')))).execute()
    nb.metadata['made_from'] = mark
    out.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, out)
    return out


def linked(text: str) -> str:
    "Links between notebooks become links between pages."
    return re.sub(r'(\]\([^)\s]*?)\.ipynb(#[^)]*)?\)', r'\1.md\2)', text)


def notebook_page(executed: Path, module: str | None) -> None:
    "A notebook as Markdown and pictures, without hidden cells and nbdev's directives."
    import nbformat
    from nbconvert import MarkdownExporter

    nb, cells = nbformat.read(executed, 4), []
    for cell in nb.cells:
        if cell.cell_type == 'code':
            if re.match(r'#\|\s*(hide|default_exp)\b', cell.source): continue
            exported = bool(re.match(r'#\|\s*export', cell.source))
            cell.source = DIRECTIVE.sub('', cell.source).strip()
            if exported and cell.source.startswith(('import ', 'from ')): continue
            cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
        else:
            cell.source = linked(cell.source)
        cells.append(cell)
    if module:
        first = next(i for i, c in enumerate(cells) if c.cell_type == 'markdown')
        cells[first].source += f'\n\nExported to [`srl_pose.{module}`](../api/{module}.md).'
    nb.cells = cells
    text, resources = MarkdownExporter().from_notebook_node(nb, resources=dict(unique_key=executed.stem, output_files_dir=f'{executed.stem}_files'))
    for name, data in resources['outputs'].items():
        (DOCS / 'nbs' / name).parent.mkdir(parents=True, exist_ok=True)
        (DOCS / 'nbs' / name).write_bytes(data)
    (DOCS / 'nbs' / f'{executed.stem}.md').write_text(text)


def module_of(notebook: Path) -> str | None:
    "The module that it is exported to"
    found = re.search(r'#\| default_exp (\w+)', notebook.read_text())
    return found and found[1]


def api_page(module: str, notebook: Path) -> None:
    "Everything public of a module, with what its comments say of each argument."
    from nbdev.showdoc import BasicMarkdownRenderer, show_doc

    m = importlib.import_module(f'srl_pose.{module}')
    text = [f'# srl_pose.{module}\n\n{inspect.getdoc(m) or ""}\n\nSource: [{notebook.stem}](../nbs/{notebook.stem}.md)\n']
    for name in m.__all__:
        thing = getattr(m, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            page = show_doc(thing, renderer=BasicMarkdownRenderer)._repr_markdown_()
            text.append(re.sub(r'^---\s*### .*', f'## {name}', page.strip(), count=1))
            for method, value in sorted(vars(thing).items()) if inspect.isclass(thing) else ():
                if method.startswith('_') or not (inspect.isfunction(value) or isinstance(value, classmethod)) or not inspect.getdoc(getattr(thing, method)): continue
                page = show_doc(getattr(thing, method), renderer=BasicMarkdownRenderer, name=f'{name}.{method}')._repr_markdown_()
                text.append(re.sub(r'^---\s*### .*', f'### {name}.{method}', page.strip(), count=1))
        else:
            shown = repr(thing)
            text.append(f'## {name}\n\n```python\n{name} = {shown if len(shown) < 300 else shown[:300] + " ..."}\n```\n')
    (DOCS / 'api' / f'{module}.md').write_text('\n\n'.join(text))


def results_pages() -> list[dict]:
    "Copies of the committed pages, with a navigation over them"
    nav = []
    for page in sorted((ROOT / 'results').rglob('*.md')):
        target = DOCS / page.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(linked(page.read_text()))
        title = re.match(r'# (.+)', page.read_text())
        nav.append({title[1] if title else page.stem: str(target.relative_to(DOCS))})
    for picture in [*(ROOT / 'results').rglob('*.png'), *(ROOT / 'results').rglob('*.csv'), *(ROOT / 'results').rglob('*.json')]:
        target = DOCS / picture.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    return nav


def build(only: str | None = None) -> None:
    "All pages, then the site. Fails on a broken link, or a notebook that fails."
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    chosen = [n for n in notebooks() if not only or re.match(only, n.name)]
    known = ('srl_pose/*.py', 'results/**/*.json', 'results/**/*.csv', 'results/**/*.md', 'experiments/*.yaml', 'params.yaml')
    read = ''.join(p.read_text() for pattern in known for p in sorted(ROOT.glob(pattern)))
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    with ThreadPoolExecutor(os.cpu_count()) as pool: executed = list(pool.map(lambda n: run(n, read), chosen))
    shutil.rmtree(DOCS, ignore_errors=True)
    for folder in ('nbs', 'api'): (DOCS / folder).mkdir(parents=True)
    parts, api = {}, []
    for notebook, done in zip(chosen, executed):
        module = module_of(notebook)
        notebook_page(done, module)
        parts.setdefault(PARTS[notebook.name[:2]], []).append({title_of(notebook): f'nbs/{notebook.stem}.md'})
        if module:
            api_page(module, notebook)
            api.append({module: f'api/{module}.md'})
    for name in ('README.md', 'CONTRIBUTING.md'): (DOCS / name).write_text(linked((ROOT / name).read_text()))
    for name in ('LICENSE', 'CITATION.cff', 'README_files', 'experiments'):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, DOCS / name)
    import jupyter_server_mathjax
    shutil.copytree(Path(jupyter_server_mathjax.__file__).parent / 'static', DOCS / 'MathJax', dirs_exist_ok=True)
    (DOCS / 'site.css').write_text(CSS)
    (DOCS / 'mathjax.js').write_text(MATHJAX)
    nav = [{'Start': 'README.md'}, *({part: pages} for part, pages in parts.items()), {'Results pages': results_pages()}, {'API': api},
           {'Contributing': 'CONTRIBUTING.md'}]
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s %(message)s')
    config = load_config(str(ROOT / 'mkdocs.yml'), nav=nav, docs_dir=str(DOCS), site_dir=str(HTML), strict=True)
    build_site(config)
    print(f'{len(list(HTML.rglob("*.html")))} pages: {HTML}/index.html')


class Quiet(SimpleHTTPRequestHandler):
    "A server of files that does not tell of each"

    def log_message(self, *args): pass


def check() -> int:
    "Open every page in a headless browser. What is broken is printed; the number of such things is returned."
    from playwright.sync_api import sync_playwright

    browser_file = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(HTML)))
    Thread(target=server.serve_forever, daemon=True).start()
    address, wrong, anchors, links, formulas, pictures = f'http://127.0.0.1:{server.server_port}', [], {}, [], 0, 0
    pages = sorted(p.relative_to(HTML).as_posix() for p in HTML.rglob('*.html') if 'MathJax' not in p.parts)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_file, args=['--no-sandbox'])
        for width, height in ((1280, 900), (390, 844)):
            page, here = browser.new_page(viewport=dict(width=width, height=height)), ['']
            page.on('requestfailed', lambda r: 'ABORTED' in (r.failure or '') or r.url == 'about:blank' or wrong.append(f'{here[0]}: {r.url} failed'))  # left for the next page
            page.on('response', lambda r: r.status >= 400 and wrong.append(f'{here[0]}: {r.url} gives {r.status}'))
            page.on('request', lambda r: r.url.startswith((address, 'data:', 'blob:', 'about:')) or wrong.append(f'{here[0]}: loads {r.url} from elsewhere'))
            page.on('pageerror', lambda e: wrong.append(f'{here[0]}: {e}'))
            for name in pages:
                here[0] = f'{name} at {width}'
                page.goto(f'{address}/{name}', wait_until='load')
                page.wait_for_function('!document.querySelector(".arithmatex") || (window.MathJax && MathJax.Hub && !MathJax.Hub.queue.pending && '
                                       'document.querySelectorAll(".arithmatex").length <= document.querySelectorAll(".arithmatex .MathJax").length)',
                                       timeout=30_000)
                found = page.evaluate('''() => ({
                    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
                    links: [...document.querySelectorAll('a[href]')].map(e => e.href),
                    pictures: [...document.images].map(e => [e.src, e.complete && e.naturalWidth > 0]),
                    formulas: document.querySelectorAll('.arithmatex').length,
                    errors: document.querySelectorAll('.merror, .MathJax_Error').length,
                    raw: [...document.querySelectorAll('article p, article li, article td')].map(e => { e = e.cloneNode(true); e.querySelectorAll('code, .arithmatex').forEach(c => c.remove()); return e.textContent })
                        .filter(t => /\\\\\\(|\\\\\\[|\\$[^$]+\\$/.test(t)),
                    wide: document.documentElement.scrollWidth - innerWidth })''')
                wrong += [f'{here[0]}: picture {src} is missing' for src, good in found['pictures'] if not good]
                wrong += [f'{here[0]}: formula left as text: {t[:80]}' for t in found['raw']]
                if found['errors']: wrong.append(f'{here[0]}: {found["errors"]} formulas with errors')
                if found['wide'] > 0: wrong.append(f'{here[0]}: {found["wide"]} pixels wider than the screen')
                if width > 1000:
                    anchors[name], formulas, pictures = set(found['ids']), formulas + found['formulas'], pictures + len(found['pictures'])
                    links += [(name, link.removeprefix(f'{address}/')) for link in found['links'] if link.startswith(address)]
            page.close()
        page = browser.new_page()
        page.goto(f'{address}/index.html')
        page.fill('input[name=query]', 'orthogonal')
        try:
            page.wait_for_selector('.md-search-result__item', timeout=10_000, state='attached')
        except Exception:
            wrong.append('search: finds nothing for "orthogonal"')
        browser.close()
    server.shutdown()
    for page, link in links:
        file, _, anchor = link.partition('#')
        file = file.partition('?')[0] or 'index.html'
        if file in anchors:
            if anchor and anchor not in anchors[file] and not anchor.startswith('__'): wrong.append(f'{page}: {link}: there is no such place')
        elif not (HTML / file).is_file():
            wrong.append(f'{page}: {link}: there is no such page')
    print(*dict.fromkeys(wrong), sep='\n')
    print(f'{len(pages)} pages, {len(links)} links, {pictures} pictures, {formulas} formulas, 2 widths; wrong: {len(set(wrong))}')
    return len(set(wrong))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='The documentation site.')
    parser.add_argument('what', choices=('build', 'check'))
    parser.add_argument('--only', help='regular expression of notebook names: a part of the site, to try')
    options = parser.parse_args()
    sys.exit(build(options.only) or 0 if options.what == 'build' else min(check(), 1))
