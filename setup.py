"""What setup.cfg cannot say: a built package has the configurations, as ``kw/configs``."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigs(build_py):
    def run(self) -> None:
        if not self.editable_mode:
            # Of an earlier build, with what was deleted since: pypa/setuptools#1871
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib, "kw", "configs"))


setup(cmdclass={"build_py": WithConfigs})
