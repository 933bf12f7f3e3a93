"""The digest of a kernel is over what is compiled: every change of it is seen, and none of comments and blank space."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sample_kernels import SAMPLE
from sparge_kernels.cuda import nvrtc

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels" / "cuda"


def test_digest_sees_everything_that_decides_the_bytes(sources, monkeypatch):
    def digest(arch="sm_86", defines=(("A", 1), ("B", 2))):
        return nvrtc.program("sample.cu", arch, defines, sources).digest

    seen = {digest(), digest("sm_89"), digest(defines=(("A", 1), ("B", 3))), digest(defines=(("A", 1),)), digest(defines=(("A", 12), ("B", 2)))}
    seen.add(digest(defines=(("A=1-DB", 2),)))  # the same letters in other parts
    (sources / "sample.cu").write_text(SAMPLE + "int more;\n")
    seen.add(digest())
    (sources / "sample.cuh").write_text("int another_header;\n")
    seen.add(digest())
    monkeypatch.setattr(nvrtc, "FLAGS", nvrtc.FLAGS[:-1])
    seen.add(digest())
    assert len(seen) == 9
    (sources / "unrelated.cuh").write_text("\n")
    assert digest() in seen


TEXT = r"""
#pragma once
#define PAIR(a, b) \
  a, b
__device__ void f(int x) {
  asm volatile("mov.u32 %0, 1; // not  a comment" : "=r"(x));
  g("/* nor \" this */", '"', x / 2);
}
"""
SAME = {
    "a comment in a line of its own": ("#pragma once\n", '#pragma once\n// "one\n'),
    "a comment behind code": ("x / 2);\n", "x / 2);  // isn't it\n"),
    "a comment within a line": ("(int x)", '(int /* an "x */ x)'),
    "a comment of many lines": ("#pragma once\n", "/* one\n * two // three\n */\n#pragma once\n"),
    "a comment that a backslash continues": ("#pragma once\n", "// one \\\n two \\\n three\n#pragma once\n"),
    "a comment in a macro": ("b) \\\n", "b) /* c */ \\\n"),
    "blank lines": ("\n__device__", "\n\n \n__device__"),
    "indentation": ("  g(", "\tg("),
    "blanks at the end": ("once\n", "once  \n"),
    "a backslash further on": ("b) \\\n", "b)         \\\n"),
}
OTHER = {
    "a name": ("f(int", "h(int"),
    "a number": ("x / 2", "x / 3"),
    "an operator": ("x / 2", "x // 2"),
    "a comment that was code": ("  g(", "  // g("),
    "a definition": ("a, b)", "b, a)"),
    "a definition's end": ("b) \\\n", "b)\n"),
    "a blank in a string": ("mov.u32 %0", "mov.u32  %0"),
    "what a string says of comments": ("not  a comment", "not a comment"),
    "the other marks of a comment in a string": ("/* nor", "/ * nor"),
    "a quoted quote": ("'\"'", "'x'"),
    "a directive": ("#pragma once\n", ""),
    "a line's end": ("once\n", "once "),
    "a blank between two names": ("__device__ void", "__device__void"),
}


@pytest.mark.parametrize("change", [*SAME, *OTHER])
def test_digest_is_of_what_is_compiled(tmp_path, change):
    def digest(text: str) -> str:
        (tmp_path / "text.cu").write_text(text)
        return nvrtc.program("text.cu", "sm_86", (), tmp_path).digest

    old, new = (SAME | OTHER)[change]
    assert TEXT.count(old) == 1
    assert (digest(TEXT) == digest(TEXT.replace(old, new))) == (change in SAME)


def test_the_sources_hold_nothing_that_the_digest_would_misread():
    for file in sorted((FOLDER / "src").glob("*.cuh")):
        text = nvrtc.bare(file.read_text(encoding="utf-8"))
        assert not re.search(r"__(?:LINE|FILE|TIME|DATE|TIMESTAMP)__|\bassert\b|R\"|'", text), file.name
        assert "//" not in text and "/*" not in text and not re.search(r"(?m)^\s|\s$|\\$", text), file.name
