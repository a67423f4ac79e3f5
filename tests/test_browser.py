"""A learner's first answer, in a real browser: wrong, told why, mended, passed.

JupyterLab serves a copy of the notebooks; headless Chromium opens chapter 1, runs all of it, types
a wrong AddBias, reads the diagnosis from the page, types the right one and reads that it passes.
Skipped, with the reason, where there is no Chromium or no playwright; with COURSE_REQUIRE_BROWSER=1
that is a failure. COURSE_SCREENSHOTS=FOLDER keeps pictures of the wrong answer's check, for the
README: check-light.png and check-dark.png.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from course_utils.exercises import judge, registry
from course_utils.notebooks import code_cells, environment, read

ROOT = Path(__file__).resolve().parents[1]
CHAPTER = ROOT / "notebooks" / "01_autograd.ipynb"
SLUG = "add_bias"
LIMIT = 300  # seconds for what the browser waits for, five times the chapter's budget
WRONG = '''class AddBias(torch.autograd.Function):
    """x + bias for x (..., features) and bias (features,)."""

    @staticmethod
    def forward(ctx, x, bias):
        return x + bias

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, grad_output.reshape(-1, grad_output.shape[-1]).mean(0)'''
# Quiet: no news, no questions, nothing that lies over the notebook.
SETTINGS = {
    "apputils-extension/notification": {
        "checkForUpdates": False,
        "doNotDisturbMode": True,
        "fetchNews": "false",
    },
    "apputils-extension/themes": {"theme": "JupyterLab Light"},
}
# What the page's scripts below start with: the open notebook and its code cells.
PANEL = """
const panel = window.jupyterapp.shell.currentWidget;
const cells = [...panel.content.model.cells];
const find = id => cells.findIndex(cell => cell.id === id);
"""


def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


def _missing() -> str | None:
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed (it is in the extra `test`)"
    if _chromium() is None:
        return "no Chromium or Chrome on this machine (Debian: apt-get install chromium)"
    return None


MISSING = _missing()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        MISSING is not None and os.environ.get("COURSE_REQUIRE_BROWSER") != "1", reason=str(MISSING)
    ),
]


@pytest.fixture
def jupyterlab(tmp_path, empty_record):
    """The address of a JupyterLab of its own: a copy of the notebooks, no user's settings."""
    folder = tmp_path / "course"
    shutil.copytree(CHAPTER.parent, folder / "notebooks")
    settings = tmp_path / "settings" / "@jupyterlab"
    for name, values in SETTINGS.items():
        file = settings / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), "utf-8")
    variables = environment(empty_record)
    for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        variables[f"JUPYTER_{name}"] = str(tmp_path / name)
    variables["JUPYTERLAB_SETTINGS_DIR"] = str(tmp_path / "settings")
    variables["JUPYTERLAB_WORKSPACES_DIR"] = str(tmp_path / "workspaces")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, token = f"http://127.0.0.1:{port}", secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.root_dir={folder}", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += ["--LabApp.expose_app_in_browser=True"]
    log = tmp_path / "jupyterlab.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, cwd=folder, env=variables, stdout=file, stderr=file)
    try:
        _wait_for(f"{address}/api?token={token}", server, log)
        yield f"{address}/lab/tree/notebooks/{CHAPTER.name}?token={token}&reset"
    finally:
        server.terminate()  # it ends its kernels first
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2):
            return
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text('utf-8', 'replace')[-3000:]}")


class Lab:
    """The open notebook in the page, by the ids of its cells."""

    def __init__(self, page) -> None:
        self.page = page

    def open(self, address: str) -> None:
        self.page.goto(address)
        self.page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext")
        # Run All before the kernel is there opens a dialog that asks for one.
        self.page.evaluate(
            f"""async () => {{ {PANEL}
                await panel.context.ready;
                await panel.sessionContext.ready;
                await panel.sessionContext.session.kernel.info;
            }}"""
        )

    def command(self, name: str, **arguments) -> None:
        self.page.evaluate(
            "([name, args]) => { window.jupyterapp.commands.execute(name, args); }",
            [name, arguments],
        )

    def counts(self) -> list[int | None]:
        return self.page.evaluate(
            f"""() => {{ {PANEL}
                return cells.filter(c => c.type === "code").map(c => c.executionCount);
            }}"""
        )

    def errors(self) -> list[str]:
        return self.page.evaluate(
            f"""() => {{ {PANEL}
                const outputs = cells.filter(c => c.type === "code")
                    .flatMap(c => c.outputs.toJSON().map(o => [c.id, o]));
                return outputs.filter(([_, o]) => o.output_type === "error")
                    .map(([id, o]) => `${{id}}: ${{o.ename}}: ${{o.evalue}}`);
            }}"""
        )

    def run_all(self) -> None:
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.page.wait_for_function(
            f"""() => {{ {PANEL}
                const code = cells.filter(c => c.type === "code");
                const failed = c => c.outputs.toJSON().some(o => o.output_type === "error");
                return panel.sessionContext.session?.kernel?.status === "idle" &&
                    (code.some(failed) || code.every(c => c.executionState === "idle" &&
                        c.executionCount));
            }}""",
            polling=200,
        )

    def cell(self, name: str):
        """A cell's element, brought into view: JupyterLab draws only what is seen."""
        index = self.page.evaluate(
            f"""async id => {{ {PANEL}
                panel.content.activeCellIndex = find(id);
                await panel.content.scrollToItem(find(id), "center");
                return find(id);
            }}""",
            name,
        )
        element = self.page.locator(f'.jp-Cell[data-windowed-list-index="{index}"]')
        element.wait_for()
        return element

    def type_into(self, name: str, source: str) -> None:
        """As a learner does: click, select all, write."""
        self.cell(name).locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+A")
        self.page.keyboard.insert_text(source)
        written = self.page.evaluate(
            f"id => {{ {PANEL} return cells[find(id)].sharedModel.source; }}", name
        )
        assert written == source

    def run(self, name: str) -> str:
        """Shift-Enter in a cell; what its output area then shows on the page."""
        before = max(count or 0 for count in self.counts())
        self.cell(name).locator(".cm-content").click()
        self.page.keyboard.press("Shift+Enter")
        self.page.wait_for_function(
            f"""([id, before]) => {{ {PANEL}
                return cells[find(id)].executionCount > before &&
                    panel.sessionContext.session?.kernel?.status === "idle";
            }}""",
            arg=[name, before],
            polling=100,
        )
        return _words(self.cell(name).locator(".jp-OutputArea").inner_text())


def _words(text: str) -> str:
    """Without what the page changes: line ends, and the marks of code."""
    return " ".join(text.replace("`", "").split())


def test_wrong_answer_is_named_and_the_mended_one_passes(jupyterlab, empty_record):
    assert MISSING is None, f"COURSE_REQUIRE_BROWSER=1, and {MISSING}"
    import torch
    from playwright.sync_api import sync_playwright

    exercise = registry()[SLUG]
    space = {"__name__": "__main__", "torch": torch}
    exec(WRONG, space)
    verdict = judge(SLUG, space["AddBias"])
    assert verdict.misconception is not None, verdict.message
    known = {m.slug: m.message for m in exercise.misconceptions}
    message = known[verdict.misconception]
    names = [cell.id for cell in code_cells(read(CHAPTER))]
    answer = next(c.id for c in code_cells(read(CHAPTER)) if c.metadata.get("exercise") == SLUG)
    check = names[names.index(answer) + 1]
    pictures = os.environ.get("COURSE_SCREENSHOTS")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=_chromium(),
            args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync"],
        )
        page = browser.new_page(
            viewport={"width": 1100, "height": 1000}, device_scale_factor=2 if pictures else 1
        )
        page.set_default_timeout(LIMIT * 1000)
        lab = Lab(page)
        lab.open(jupyterlab)
        lab.run_all()
        assert lab.errors() == []
        assert lab.counts() == list(range(1, len(names) + 1))

        lab.type_into(answer, WRONG)
        lab.run(answer)
        shown = lab.run(check)
        assert _words(message) in shown
        assert f"{SLUG}: not right yet" in shown
        if pictures:
            _take_pictures(lab, check, Path(pictures))

        lab.type_into(answer, inspect.getsource(exercise.reference).rstrip("\n"))
        lab.run(answer)
        shown = lab.run(check)
        assert f"{SLUG}: passed" in shown
        assert _words(message) not in shown
        assert lab.errors() == []
        browser.close()
    entries = [json.loads(line) for line in (empty_record / "record.jsonl").open(encoding="utf-8")]
    entry = next(entry for entry in entries if entry.get("slug") == SLUG)
    assert (entry["state"], entry["misconceptions"]) == ("passed", [verdict.misconception])


def _take_pictures(lab: Lab, name: str, folder: Path) -> None:
    """The check cell with the named mistake, in JupyterLab's light theme and in its dark one."""
    folder.mkdir(parents=True, exist_ok=True)
    lab.page.add_style_tag(content=".jp-Toolbar, .jp-Collapser { visibility: hidden }")
    for theme in ("Dark", "Light"):
        lab.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        lab.page.wait_for_selector(
            f'body[data-jp-theme-name="JupyterLab {theme}"]', state="attached"
        )
        lab.page.wait_for_timeout(1000)  # the new style sheet is loaded after the name is set
        lab.cell(name).screenshot(path=folder / f"check-{theme.lower()}.png")
