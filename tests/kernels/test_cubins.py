"""tools/cubins.py on small kernels: what is read of a binary, when it is compiled again, what is written and checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import cubins
import pytest
from cubins import BuildError
from sample_kernels import ABOUT, SYMBOLS, compile_sample, sample_variant, small
from sparge_kernels import config
from sparge_kernels.cuda import nvrtc

# ---- inspect and complaints ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", config.CHECKED)
def test_inspect_reads_what_the_assembler_says(tool, sources, monkeypatch, arch):
    monkeypatch.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, "--ptxas-options=-v"))
    compiled = nvrtc.open_library(cubins.pinned_nvrtc()).compile(nvrtc.program("sample.cu", arch, (("SAMPLE_THREADS", 96),), sources))
    found = cubins.inspect(compiled.code)
    for name, threads in (("sample_large", 96), ("sample_small", 1024)):
        (part,) = re.findall(rf"Function properties for {name}\n(.*?)Compile time", compiled.log, re.S)
        said = [re.search(pattern, part) for pattern in (r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes stack frame")]
        assert dataclasses.astuple(found[name]) == (threads, *(int(m.group(1)) if m else 0 for m in said))
    assert (found["sample_large"].shared, found["sample_large"].local) == (400, 160)
    assert set(found) == set(SYMBOLS)


@pytest.mark.parametrize("data", [b"", b"MZ" + bytes(100), b"\x7fELF\x02\x01" + bytes(100)], ids=["empty", "no ELF", "not CUDA's"])
def test_inspect_refuses_what_is_no_binary(data):
    with pytest.raises(BuildError, match="not a CUDA binary"):
        cubins.inspect(data)


def test_complaints_are_sentences(tool, sources, tmp_path):
    good = compile_sample(tool, sources, tmp_path / "work")
    (small,) = cubins.complaints(good)
    assert small == "sample_small in sample for sm_86 is declared for 1024 threads, expected 256"
    stingy = dataclasses.replace(good, variant=sample_variant(spill_bound=159))
    assert "sample_large in sample for sm_86 uses 160 bytes of local memory per thread, at most 159 allowed" in cubins.complaints(stingy)
    renamed = dataclasses.replace(good, variant=sample_variant(symbols=("sample_large",)))
    assert "sample for sm_86 has the kernels ['sample_large', 'sample_small'], expected ['sample_large']" in cubins.complaints(renamed)


# ---- the graph -----------------------------------------------------------------------------------------------------------------------------------


def test_same_bytes_in_another_folder(tool, sources, tmp_path):
    here = compile_sample(tool, sources, tmp_path / "work")
    (tmp_path / "elsewhere").mkdir()
    there = Path(shutil.copytree(sources, tmp_path / "elsewhere" / "other"))
    for file in there.iterdir():  # as git on Windows may check them out
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    again = compile_sample(tool, there, tmp_path / "elsewhere" / "work")
    assert again.code == here.code and again.program.digest == here.program.digest


def test_only_what_changed_is_compiled_again(tool, sources, tmp_path):
    work, file = tmp_path / "work", tmp_path / "work" / "sm_86" / "sample.cubin"
    first = compile_sample(tool, sources, work)
    before = file.stat().st_mtime_ns
    assert compile_sample(tool, sources, work).code == first.code and file.stat().st_mtime_ns == before
    assert compile_sample(tool, sources, work, declared=64).code != first.code  # the command is another
    compile_sample(tool, sources, work)
    header = sources / "sample.cuh"
    header.write_text(header.read_text().replace("2.0f", "3.0f"))
    changed = compile_sample(tool, sources, work)
    assert changed.code != first.code and changed.program.digest != first.program.digest


def test_a_compiler_error_stops_the_build_with_file_and_line(tool, sources, tmp_path):
    (sources / "sample.cuh").write_text("constexpr float kFactor = nothing;\n")
    with pytest.raises(BuildError, match=r"(?s)refused sample.cu for sm_86: sample.cuh\(1\): error: identifier \"nothing\" is undefined"):
        compile_sample(tool, sources, tmp_path / "work")


# ---- what is written -----------------------------------------------------------------------------------------------------------------------------


def test_write_is_deterministic_and_describes_each_file(tool, sources, tmp_path):
    built = [small(tool, sources, tmp_path / "work", arch) for arch in ("sm_120", "sm_86")]
    told = cubins.write(built, tmp_path / "one", about=ABOUT)
    assert cubins.write(built[::-1], tmp_path / "two", about=ABOUT) == told == json.loads((tmp_path / "one" / "manifest.json").read_text())
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert [f.as_posix() for f in files] == ["cubins/sm_120/sample.cubin.z", "cubins/sm_86/sample.cubin.z", "manifest.json"]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    assert list(told["cubins"]) == ["sm_86", "sm_120"] and told["compiler"] == dict(ABOUT)
    entry = told["cubins"]["sm_86"]["sample"]
    assert zlib.decompress((tmp_path / "one" / "cubins" / entry["file"]).read_bytes()) == built[1].code
    assert entry["sha256"] == hashlib.sha256(built[1].code).hexdigest() and entry["source_sha256"] == built[1].program.digest
    assert entry["arch"] == "sm_86"
    assert {k: sorted(v) for k, v in entry["symbols"].items()} == {k: ["local", "registers", "shared", "threads"] for k in SYMBOLS}
    assert entry["symbols"]["sample_large"]["local"] == 160


def test_write_leaves_alone_what_another_zlib_packed_and_mends_what_is_damaged(tool, sources, tmp_path):
    built = small(tool, sources, tmp_path / "work")
    cubins.write([built], tmp_path, about=ABOUT)
    file = tmp_path / "cubins" / "sm_86" / "sample.cubin.z"
    good = file.read_bytes()
    other = zlib.compress(built.code, 1)
    file.write_bytes(other)
    cubins.write([built], tmp_path, about=ABOUT)
    assert file.read_bytes() == other != good
    file.write_bytes(good[:-5])
    cubins.write([built], tmp_path, about=ABOUT)
    assert file.read_bytes() == good


def test_write_keeps_other_archs_and_drops_what_is_named_no_more(tool, sources, tmp_path):
    built = [small(tool, sources, tmp_path / "work", arch) for arch in ("sm_80", "sm_86")]
    before = cubins.write(built, tmp_path, about=ABOUT)
    renamed = small(tool, sources, tmp_path / "work", "sm_86", "renamed")
    told = cubins.write([renamed], tmp_path, about=ABOUT, keep=("sm_80",))
    assert told["cubins"]["sm_80"] == before["cubins"]["sm_80"] and list(told["cubins"]["sm_86"]) == ["renamed"]
    files = sorted(p.relative_to(tmp_path / "cubins").as_posix() for p in (tmp_path / "cubins").rglob("*.z"))
    assert files == ["sm_80/sample.cubin.z", "sm_86/renamed.cubin.z"]
    cubins.write([renamed], tmp_path, about=ABOUT)
    assert not (tmp_path / "cubins" / "sm_80").exists()
    with pytest.raises(BuildError, match="the binaries that would stay were built by .*12.8.*, not by .*13.0.*; build all of them"):
        cubins.write([built[0]], tmp_path, about=(("name", "NVRTC"), ("version", "13.0")), keep=("sm_86",))


def test_write_refuses_broken_bounds_and_too_much(tool, sources, tmp_path, monkeypatch):
    good = small(tool, sources, tmp_path / "work")
    bad = dataclasses.replace(good, variant=sample_variant(spill_bound=0))
    with pytest.raises(BuildError, match="uses 160 bytes of local memory per thread, at most 0 allowed"):
        cubins.write([bad], tmp_path / "out", about=ABOUT)
    for limit in ("MOST_FILES", "MOST_BYTES"):
        with monkeypatch.context() as patch, pytest.raises(BuildError, match="1 files of [0-9]+ bytes in all are too much to package"):
            patch.setattr(cubins, limit, 0)
            cubins.write([good], tmp_path / "out", about=ABOUT)
    assert not (tmp_path / "out").exists()


def test_the_manifest_names_the_commit_that_changed_the_sources_last(tool, sources, tmp_path, monkeypatch):
    def git(*words: str) -> str:
        who = ("-c", "user.name=one", "-c", "user.email=one@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *words], cwd=repository, capture_output=True, text=True, check=True).stdout.strip()

    repository = sources.parent
    assert cubins.origin(sources) == {"commit": None, "dirty": True}, "there is no repository"
    for module in (config, nvrtc):
        shutil.copy(module.__file__, repository)
        monkeypatch.setattr(module, "__file__", str(repository / Path(module.__file__).name))
    git("init", "-q"), git("add", "."), git("commit", "-qm", "all")
    commit = git("rev-parse", "HEAD")
    assert cubins.origin(sources) == {"commit": commit, "dirty": False}
    (repository / "other.txt").write_text("unrelated")
    assert cubins.origin(sources) == {"commit": commit, "dirty": False}
    git("add", "."), git("commit", "-qm", "unrelated")
    assert cubins.origin(sources) == {"commit": commit, "dirty": False}
    for file in (sources / "sample.cuh", repository / "config.py", repository / "nvrtc.py"):
        text = file.read_text()
        file.write_text(text + "\n")
        assert cubins.origin(sources) == {"commit": commit, "dirty": True}, file.name
        file.write_text(text)
    (sources / "new.cuh").write_text("\n")
    assert cubins.origin(sources) == {"commit": commit, "dirty": True}
    git("add", "."), git("commit", "-qm", "new")
    assert cubins.origin(sources) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    told = cubins.write([small(tool, sources, tmp_path / "work")], tmp_path / "out", about=ABOUT, sources=cubins.origin(sources))
    assert told["sources"] == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_check_names_what_differs_and_writes_nothing(tool, sources, tmp_path, monkeypatch):
    folder, name = tmp_path / "package", "sm_86/sample.cubin.z"
    file, manifest_file, header = folder / "cubins" / name, folder / "manifest.json", sources / "sample.cuh"
    monkeypatch.setattr(config, "packaged", lambda arch: (sample_variant(),))
    cubins.write([small(tool, sources, tmp_path / "work")], folder, about=tool.about)
    good, manifest_text, header_text = file.read_bytes(), manifest_file.read_text(), header.read_text()

    def differs() -> list[str]:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        found = cubins.check(("sm_86",), folder=folder, sources=sources)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return found

    header.write_text(f"// a comment\n{header_text}")
    manifest_file.write_text(manifest_text.replace('"commit": null', '"commit": "of another day"'))
    file.write_bytes(zlib.compress(zlib.decompress(good), 1))
    assert differs() == []
    header.write_text(header_text.replace("2.0f", "3.0f"))
    assert differs() == [f"{name} is not what the compiler gives for the sources", f"{name} is not as manifest.json describes it"]
    header.write_text(header_text)
    manifest_file.write_text(manifest_text.replace("12.8", "13.0").replace('"registers": ', '"registers": 1'))
    (file.parent / "other.cubin.z").write_bytes(good)
    file.write_bytes(good[:-5])
    wrong = differs()
    assert re.fullmatch("manifest.json names the compiler .*13.0.*, this one is .*12.8.*", wrong[0])
    assert re.fullmatch(rf"{name} cannot be read \(.*incomplete.*\)", wrong[1])
    assert wrong[2:] == [f"{name} is not as manifest.json describes it", "sm_86/other.cubin.z is there, but is not packaged"]
    manifest_file.write_text(manifest_text.replace('"sample"', '"renamed"'))
    file.unlink()
    wrong = differs()
    assert re.fullmatch(rf"{name} cannot be read \(.*No such file.*\)", wrong[0])
    assert wrong[1:3] == [f"{name} is not as manifest.json describes it", f"{name} is in manifest.json, but is not packaged"]
    manifest_file.unlink()
    (sentence,) = differs()
    assert re.fullmatch(r"manifest.json cannot be read \(.*\)", sentence)
