"""What the text of a device source says to the digest and to compilers alike."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sparge_kernels import config
from sparge_kernels.cuda import nvrtc
from sparge_kernels.cuda.loader import Loader, NoBinary, Places


def test_names_in_brackets_are_no_comments():
    texts = ["#include <a//b>\nx", "#include <a//c>\nx", "# include <a  /*b*/>\nx", "#include <a /*b*/>\nx"]
    assert len(set(map(nvrtc.bare, texts))) == len(texts)
    assert nvrtc.bare("#include  <a>  // b\n\nx") == nvrtc.bare("#include  <a>\nx")


@pytest.mark.parametrize("line", ["// one \\ ", "// one \\\t", "#define ONE 1 \\  ", "/* one \\ "], ids=repr)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=repr)
def test_a_backslash_before_blanks_at_the_end_of_a_line_is_refused(tmp_path, line, end):
    """Some compilers take the next line for a part of this one, even of a comment, and some do not: no digest is right for both."""
    (tmp_path / "one.cuh").write_bytes(b"#include <two.cuh>\n")
    (tmp_path / "two.cuh").write_bytes(f"int a;{end}{line}{end}int b; /* */{end}".encode())
    with pytest.raises(ValueError, match=r"^two\.cuh must have no blank after the backslash that ends a line, got one in line 2; delete it$"):
        nvrtc.program("one.cuh", "sm_86", (), tmp_path)
    (tmp_path / "two.cuh").write_bytes(f"int a;{end}{line.rstrip()}{end}int b; /* */{end}".encode())
    nvrtc.program("one.cuh", "sm_86", (), tmp_path)


def test_the_loader_tells_of_a_source_that_is_refused(tmp_path):
    source = tmp_path / "src" / "select.cuh"
    source.parent.mkdir()
    source.write_text("int a; \\ \n")

    class Compiler:
        version, path = "12.8", "libnvrtc.so"

        def archs(self):
            return ("sm_86",)

    variant = next(v for v in config.variants("sm_86") if v.source == "select.cuh")
    with pytest.raises(NoBinary, match=re.escape("the device sources cannot be read (select.cuh must have no blank after the backslash")):
        Loader(Places(tmp_path, Path(tmp_path / "cache"), lambda: iter([Compiler()]))).find("sm_86", variant)
