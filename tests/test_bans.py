"""Nothing in this repository deserialises into code or runs strings: no pickle and its kin, no torch.load, no eval, no shell."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("llmos", "services", "kernels", "bench", "scripts", "tests")
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "jsonpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__"}  # as bare names: `model.eval()` and `re.compile()` are other things
DOTTED = {
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "torch.serialization.load",
    "pandas.read_pickle",
    "pd.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "numpy.load",
    "np.load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "builtins.eval",
    "builtins.exec",
    "runpy.run_path",
    "runpy.run_module",
    "jinja2.Environment",
    "jinja2.Template",
    "jinja2.nativetypes.NativeEnvironment",
    "multiprocessing.Pipe",
    "multiprocessing.Queue",
}
ATTRIBUTES = {"recv_pyobj", "send_pyobj", "recv_serialized"}
KEYWORDS = {"allow_pickle", "trust_remote_code", "shell"}  # forbidden unless literally False


def findings(source):
    """(line, what) for everything banned in a source text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name) for name in names if name in DOTTED or node.module.split(".")[0] in MODULES]
        elif isinstance(node, ast.Attribute):
            if ast.unparse(node) in DOTTED or node.attr in ATTRIBUTES:
                found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                found.append((node.lineno, node.func.id))
            found += [
                (node.lineno, word.arg) for word in node.keywords if word.arg in KEYWORDS and not is_false(word.value)
            ]
    return found


def is_false(node):
    return isinstance(node, ast.Constant) and node.value is False


def sources():
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_nothing_banned_is_used():
    bad = [
        f"{path.relative_to(ROOT)}:{line}: {what}" for path in sources() for line, what in findings(path.read_text())
    ]
    assert bad == []
    assert len(sources()) > 50


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import pickle", 1),
        ("import os, dill.source", 1),
        ("from cloudpickle import dumps, loads", 2),
        ("def f():\n    import marshal", 1),
        ("torch.load(path)", 1),
        ("from torch import load", 1),
        ("from jinja2 import Environment", 1),
        ("from jinja2.sandbox import ImmutableSandboxedEnvironment", 0),
        ("yaml.load(text)", 1),
        ("yaml.safe_load(text)", 0),
        ("eval('1')", 1),
        ("exec(code)", 1),
        ("model.eval()", 0),
        ("re.compile('x')", 0),
        ("socket.recv_pyobj()", 1),
        ("np.load(f, allow_pickle=True)", 2),
        ("AutoConfig.from_pretrained(p, trust_remote_code=True)", 1),
        ("AutoConfig.from_pretrained(p, trust_remote_code=flag)", 1),
        ("AutoConfig.from_pretrained(p, trust_remote_code=False)", 0),
        ("subprocess.run('ls', shell=True)", 1),
        ("subprocess.getoutput('ls')", 1),
        ("from torch.jit import load", 1),
        ("from jinja2 import Template", 1),
        ("template.Environment", 0),
        ("text = 'import pickle'", 0),
    ],
)
def test_the_gate_itself(source, count):
    assert len(findings(source)) == count
