"""The code in README.md and docs/: its blocks, and the commands that bash makes of them.

A block's mark is the comment before it::

    <!-- not run: why -->       commands are parsed, but not run; Python is compiled, but not run
    <!-- file: NAME -->         a file that later blocks of the page use
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
# The plan of the house has drawings and no commands.
_WITHOUT_COMMANDS = ("architecture",)
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if page.stem not in _WITHOUT_COMMANDS
]
SHELL, PYTHON = ("", "bash", "sh", "shell", "console"), ("python",)
IGNORED = ("text", "yaml", "json", "toml", "mermaid", "markdown")
PROGRAMS = ("python", "torchrun", "pip", "make", "sbatch", "kw")
SCRIPTS = ("prepare_coco.sh", "prepare_imagenet.sh", "train.sh")
ENVIRONMENT = ("NODES", "RENDEZVOUS", "PROCESSES", "JOB", "OPTIONS", "RESTARTS")
_MARK = re.compile(r"<!--\s*(not run|file):\s*(.+?)\s*-->", re.S)
# What a page leaves open, and what stands for it here.
PLACEHOLDERS = {
    "CONFIG": "configs/demo/kw_resnet18_1x.yaml",
    "CONFIG_A": "configs/demo/resnet18.yaml",
    "CONFIG_B": "configs/demo/kw_resnet18_1x.yaml",
    "RUN": "work_dirs/kw_resnet18_1x",
    "CHECKPOINT": "work_dirs/kw_resnet18_1x/last.pth",
    "work_dirs/.../best.pth": "work_dirs/mask_rcnn_kw_resnet50_1x/best.pth",
}


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: the file.
        line: its first line there.
        language: what the fence says; empty for an indented block.
        code: the text.
        mark: ``"not run"``, ``"file"`` or ``""``.
        what: the reason, or the file's name.
    """

    page: Path
    line: int
    language: str
    code: str
    mark: str = ""
    what: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return not self.mark


def read_blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    blocks, mark = [], ("", "")
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "html_block":
            found = _MARK.search(token.content)
            mark = (found[1], found[2]) if found else ("", "")
        elif token.type in ("fence", "code_block"):
            assert token.map is not None
            language = token.info.split()[0] if token.info.strip() else ""
            if not language.startswith("{"):  # a directive of the site's
                line = token.map[0] + 1 + (token.type == "fence")
                blocks.append(Block(page, line, language, token.content, *mark))
            mark = ("", "")
        elif token.type.endswith("_open"):
            mark = ("", "")
    return blocks


@dataclass(frozen=True)
class Command:
    """One command of a shell block, as bash starts it.

    Attributes:
        block: where it stands.
        words: program and arguments; a placeholder is replaced.
        variables: environment that the line itself sets, of :data:`ENVIRONMENT`.
    """

    block: Block
    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()


class Recorder:
    """A folder in which bash runs blocks with every program replaced by one that notes its call.

    Quotes, globs, braces, variables and continued lines are thus bash's own business.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / ".calls"
        shutil.copytree(ROOT / "configs", folder / "configs")
        note = (
            "#!/bin/bash\n"
            f"for name in {' '.join(ENVIRONMENT)}; do\n"
            '    [[ -n ${!name:-} ]] && printf "%s=%s\\0" "$name" "${!name}" >>"$CALLS"\n'
            "done\n"
            'printf "%s\\0" -- "$0" "$@" "" >>"$CALLS"\n'
        )
        for name in (*(f"bin/{p}" for p in PROGRAMS), *(f"scripts/{s}" for s in SCRIPTS)):
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(note)
            file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def commands(self, block: Block) -> list[Command]:
        """The calls that a shell block makes.

        Raises:
            AssertionError: bash does not read it, or it starts something unknown.
        """
        self.calls.write_bytes(b"")
        bash = shutil.which("bash")
        assert bash is not None
        done = subprocess.run(
            [bash, "-eu", "-c", block.code],
            cwd=self.folder,
            env={"PATH": str(self.folder / "bin"), "CALLS": str(self.calls)},
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert done.returncode == 0, (
            f"{block.place}: {done.stderr.strip()}\nmark the block if it is not to be run: "
            "<!-- not run: why -->"
        )
        found = []
        for call in self.calls.read_text().split("\0\0"):
            if call:
                before, _, rest = f"\0{call}".partition("\0--\0")
                program, *words = rest.split("\0")
                variables = tuple(
                    (name, value)
                    for name, _, value in (v.partition("=") for v in before.split("\0"))
                    if name
                )
                program = program.removeprefix(f"{self.folder / 'bin'}{os.sep}")
                words = [PLACEHOLDERS.get(word, word) for word in words]
                found.append(Command(block, (program, *words), variables))
        return found

    def write(self, block: Block) -> None:
        """Write a block that is a file."""
        file = self.folder / block.what
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.code)
