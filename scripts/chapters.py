"""Each chapter's README.md in nbs/ says what the chapter holds. The words stand there; the list of notebooks below them is made here.

    python scripts/chapters.py    # write the lists anew
"""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
MARK = '<!-- made by scripts/chapters.py from the notebooks -->'


def chapters() -> list[Path]:
    "Folders of nbs/ in reading order, and nbs/ itself for what all share."
    return [*sorted((p for p in NBS.iterdir() if re.match(r'\d+_', p.name)), key=lambda p: int(p.name.partition('_')[0])), NBS]


def notebooks(chapter: Path) -> list[Path]:
    return sorted(p for p in chapter.glob('*.ipynb') if p.name != 'index.ipynb')


def about(notebook: Path) -> tuple[str, str, str]:
    "Title, line below it, and module of a notebook"
    text = [''.join(cell['source']) for cell in json.loads(notebook.read_text())['cells'][:3]]
    found = re.search(r'^# (.+?)\n+> (.+?)(?:\n\n|\Z)', '\n\n'.join(t for t in text if not t.startswith('#|')), re.S)
    if not found: raise ValueError(f'{notebook}: begins with no title and no line `> ...` below it')
    module = re.search(r'#\| default_exp ([\w.]+)', text[0])
    return found[1], ' '.join(found[2].split()).rstrip('.'), module[1].removesuffix('__init__').rstrip('.') if module else ''


def page(chapter: Path) -> str:
    "The chapter's README.md: what stands above the mark, and the list below it."
    rows = []
    for notebook in notebooks(chapter):
        title, line, module = about(notebook)
        rows.append(f'| [{title}]({notebook.name}) | {line} | {"" if not module and notebook.stem != "package" else f"`srl_pose.{module}`".replace(".`", "`")} |')
    words = (chapter / 'README.md').read_text().partition(MARK)[0].rstrip()
    return '\n'.join([words, '', MARK, '', '| notebook | what it is about | module |', '|---|---|---|', *rows, ''])


if __name__ == '__main__':
    for chapter in chapters(): (chapter / 'README.md').write_text(page(chapter))
