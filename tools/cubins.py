"""Builds the packaged binaries: the variants that kernels/config.py packages for every architecture, and the manifest that describes them.

    python setup.py cubins                        all of config.SHIPPED, with the pinned NVRTC
    python setup.py cubins --arch sm_89,sm_120    only these; the others stay as they are
    python setup.py cubins --nvcc                 with the nvcc on PATH, to compare compilers
    python setup.py cubins --check                builds elsewhere, names the packaged files that differ, writes nothing

Compilations are edges of a ninja graph, one process each. The same sources and the same compiler give the same bytes on every Linux machine. Binaries
are stored compressed with zlib: lzma makes them a third smaller, but a Python that was built without liblzma has no such module, and one without zlib
could not have installed anything.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sparge_kernels import config
from sparge_kernels.config import Variant
from sparge_kernels.cuda import nvrtc

FOLDER = Path(nvrtc.__file__).resolve().parent
NVRTC_PACKAGE, NVRTC_VERSION = "nvidia-cuda-nvrtc-cu12", "12.8.93"
"""The compiler of the packaged binaries. Its binaries for sm_80 to sm_90 have the older form that drivers since 12.0 read; later ones' do not."""

MOST_FILES, MOST_BYTES = 80, 2_300_000
"""Bounds on what is packaged."""


class BuildError(RuntimeError):
    """The build cannot go on; the message says what to do."""


# ---- compilers -----------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tool:
    """A compiler.

    Attributes
    ----------
    about : tuple of (str, str)
        What the manifest says of it.
    depends : tuple of Path
        Files whose change makes everything stale.
    command : callable
        (program, folder of the sources, output) -> command line.
    logs : bool
        Whether the command also writes what the compiler said, beside the output: `log_of` it.
    """

    about: tuple[tuple[str, str], ...]
    depends: tuple[Path, ...]
    command: Callable[[nvrtc.Program, Path, Path], list[str]]
    logs: bool


def log_of(out: Path) -> Path:
    """Where a command writes the log of the compilation whose output is `out`."""
    return out.with_suffix(".log")


def pinned_nvrtc() -> Path | None:
    """The library inside the pinned package, if it is installed here."""
    try:
        package = importlib.metadata.distribution(NVRTC_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    if package.version != NVRTC_VERSION:
        return None
    names = [f for f in package.files or () if re.fullmatch(r"libnvrtc\.so\.\d+|nvrtc64_\d+_0\.dll", f.name)]
    return Path(package.locate_file(names[0])).resolve() if names else None


def nvrtc_tool(library: Path | None = None) -> Tool:
    """An NVRTC: the pinned one, or the one at `library`, whose binaries are for the machine at hand and not for the package."""
    pinned = pinned_nvrtc()
    about = (("package", f"{NVRTC_PACKAGE} {NVRTC_VERSION}"),) if library in (None, pinned) else ()
    library = library or pinned
    if library is None:
        raise BuildError(f"the compiler {NVRTC_PACKAGE} {NVRTC_VERSION} is not installed; run pip install {NVRTC_PACKAGE}=={NVRTC_VERSION} ninja")
    worker = Path(nvrtc.__file__).resolve()

    def command(program: nvrtc.Program, folder: Path, out: Path) -> list[str]:
        defines = [part for name, value in program.defines for part in ("--define", f"{name}={value}")]
        return [sys.executable, "-I", str(worker), "--library", str(library), "--folder", str(folder), "--source", program.name,
                "--arch", program.arch, *defines, "--out", str(out), "--log", str(log_of(out))]  # fmt: skip

    return Tool((("name", "NVRTC"), ("version", nvrtc.open_library(library).version), *about), (library, worker), command, logs=True)


def nvcc_tool() -> Tool:
    """The nvcc on PATH."""
    path = shutil.which("nvcc")
    if path is None:
        raise BuildError("there is no nvcc on PATH; add it, or leave out --nvcc")
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", said).group(1)

    def command(program: nvrtc.Program, folder: Path, out: Path) -> list[str]:
        defines = [f"-D{name}={value}" for name, value in program.defines]
        return [path, "-cubin", "-std=c++17", "--expt-relaxed-constexpr", f"-arch={program.arch}", "-I", str(folder), *defines,
                "-x", "cu", str(folder / program.name), "-o", str(out)]  # fmt: skip

    return Tool((("name", "nvcc"), ("version", version)), (Path(path),), command, logs=False)


# ---- the graph -----------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """One compiled variant.

    Attributes
    ----------
    arch : str
        Whose devices it is for.
    variant : Variant
    program : nvrtc.Program
        For `arch`, or for the variant's exact one.
    code : bytes
    log : str
        What the compiler said; "" where it said nothing, and with nvcc, whose words are not kept.
    """

    arch: str
    variant: Variant
    program: nvrtc.Program
    code: bytes
    log: str


def compile_all(
    archs: tuple[str, ...],
    work: Path,
    *,
    tool: Tool,
    sources: Path = nvrtc.SOURCES,
    variants: Callable[[str], tuple[Variant, ...]] = config.variants,
    jobs: int | None = None,
) -> list[Built]:
    """Compiles every variant for every one of `archs` inside the folder `work`, where a later call finds what has not changed since.

    Parameters
    ----------
    archs : tuple of str
    work : Path
        Made when it does not exist; holds build.ninja, the raw binaries and the compiler's logs.
    tool : Tool
    sources : Path
        Folder of the device sources.
    variants : callable
        arch -> variants.
    jobs : int, optional
        Processes at a time; by default ninja's own choice.

    Raises
    ------
    BuildError
        With the compiler's words.
    """

    def outputs(out: Path) -> tuple[Path, ...]:
        return (out, log_of(out)) if tool.logs else (out,)

    sources, work = sources.resolve(), work.resolve()
    listed = [(arch, variant) for arch in archs for variant in variants(arch)]
    edges = [(arch, variant, nvrtc.program(variant.source, variant.target(arch), variant.defines, sources)) for arch, variant in listed]
    files = [work / arch / f"{variant.name}.cubin" for arch, variant, _ in edges]
    lines = ["ninja_required_version = 1.8", "rule compile", "  command = $line", "  description = $what", ""]
    for (_, variant, program), out in zip(edges, files, strict=True):
        out.parent.mkdir(parents=True, exist_ok=True)
        needs = [*(sources / name for name, _ in program.files), *tool.depends]
        lines += [
            f"build {' '.join(map(_path, outputs(out)))}: compile | {' '.join(map(_path, needs))}",
            f"  line = {_command(tool.command(program, sources, out))}",
            f"  what = {variant.name} for {program.arch}",
        ]
    (work / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = subprocess.run([*_ninja(), "-C", str(work), *([f"-j{jobs}"] if jobs else [])], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise BuildError(f"ninja stopped in {work}:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")
    logs = [log_of(out).read_text(encoding="utf-8") if tool.logs else "" for out in files]
    return [Built(*edge, out.read_bytes(), log) for edge, out, log in zip(edges, files, logs, strict=True)]


def _ninja() -> list[str]:
    try:
        importlib.metadata.distribution("ninja")
    except importlib.metadata.PackageNotFoundError:
        path = shutil.which("ninja")
        if path is None:
            raise BuildError("ninja is not installed; run pip install ninja") from None
        return [path]
    return [sys.executable, "-m", "ninja"]


def _command(words: list[str]) -> str:
    return (subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)).replace("$", "$$")


def _path(path: Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))


# ---- what a binary needs -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, out of its binary.

    Attributes
    ----------
    threads : int
        The most threads per CTA that it may be launched with.
    registers : int
        Per thread.
    shared : int
        Bytes of static shared memory.
    local : int
        Bytes of local memory per thread: arrays that are indexed, and registers spilled.
    """

    threads: int
    registers: int
    shared: int
    local: int


# A binary is a little-endian 64-bit ELF file. Its section .nv.info tells of all kernels, .nv.info.NAME of one. Both are lists of attributes: format,
# kind, then a 16-bit value, which for format 4 is the length of what follows. In .nv.info that is a symbol's number and a figure.
_REGISTERS, _FRAME, _MOST_THREADS = 0x2F, 0x11, 0x05
# From sm_90 on the hardware keeps the first KB of a CTA's shared memory to itself; the section counts it in.
_RESERVED = 1024


def inspect(code: bytes) -> dict[str, Resources]:
    """The kernels of a binary by symbol.

    Raises
    ------
    BuildError
        When `code` is not a CUDA binary as this knows them.
    """
    if code[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", code, 18)[0] != 190:
        raise BuildError("this is not a CUDA binary")
    (table,) = struct.unpack_from("<Q", code, 40)
    size, count, names_at = struct.unpack_from("<HHH", code, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", code, table + i * size) for i in range(count)]
    sections = {_string(code, headers[names_at][4], h[0]): h for h in headers}
    body = {name: code[h[4] : h[4] + h[5]] for name, h in sections.items()}
    names = [_string(body[".strtab"], 0, struct.unpack_from("<I", body[".symtab"], at)[0]) for at in range(0, len(body[".symtab"]), 24)]
    figures = {_REGISTERS: {}, _FRAME: {}}
    for kind, data in _attributes(body[".nv.info"]):
        if kind in figures:
            symbol, figure = struct.unpack("<II", data)
            figures[kind][names[symbol]] = figure
    found = {}
    for name in (n.removeprefix(".text.") for n in sections if n.startswith(".text.")):
        threads = [struct.unpack_from("<I", data)[0] for kind, data in _attributes(body[f".nv.info.{name}"]) if kind == _MOST_THREADS]
        shared = sections[f".nv.shared.{name}"][5] if f".nv.shared.{name}" in sections else 0
        if ".nv.shared.reserved.0" in sections and shared:
            shared -= _RESERVED
        found[name] = Resources(threads[0] if threads else 1024, figures[_REGISTERS][name], shared, figures[_FRAME].get(name, 0))
    return found


def _string(data: bytes, start: int, offset: int) -> str:
    return data[start + offset : data.index(b"\0", start + offset)].decode()


def _attributes(data: bytes):
    at = 0
    while at < len(data):
        form, kind, value = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == 4:
            yield kind, data[at : at + value]
            at += value


def remarks(log: str) -> tuple[str, ...]:
    """The lines of `nvrtc.Compiled.log` that the assembler has numbered C75..: what it did to Hopper's matrix products because the code does not keep
    their rules. It put waits between them, or ran one after the other, which costs more than any other choice, and succeeds without a warning.
    """
    return tuple(line.strip() for line in log.splitlines() if "(C75" in line)


def complaints(built: Built) -> list[str]:
    """What is wrong with a compiled variant: a sentence for everything that is not as `Variant` says.

    Registers need no bound of their own: the declared number of threads is one for the compiler, which spills rather than break it. What the
    assembler remarks on Hopper's products is known of NVRTC's binaries only.
    """
    found, variant = inspect(built.code), built.variant
    where = f"{variant.name} for {built.program.arch}"
    wrong = []
    if set(found) != set(variant.symbols):
        wrong.append(f"{where} has the kernels {sorted(found)}, expected {sorted(variant.symbols)}")
    for symbol, needs in found.items():
        if needs.threads != variant.threads:
            wrong.append(f"{symbol} in {where} is declared for {needs.threads} threads, expected {variant.threads}")
        if needs.local > variant.spill_bound:
            wrong.append(f"{symbol} in {where} uses {needs.local} bytes of local memory per thread, at most {variant.spill_bound} allowed")
    for remark in remarks(built.log):
        wrong.append(
            f"{where}: the assembler has changed the matrix products, which no packaged binary may need ({remark}); name every register "
            "that a product reads or writes in the wgmma_fence before it, and every sum in the wgmma_wait after it"
        )
    return wrong


# ---- the package ---------------------------------------------------------------------------------------------------------------------------------


def describe(built: Built) -> dict:
    """The manifest's entry for a compiled variant."""
    return {
        "file": f"{built.arch}/{built.variant.name}.cubin.z",
        "arch": built.program.arch,
        "sha256": hashlib.sha256(built.code).hexdigest(),
        "source_sha256": built.program.digest,
        "symbols": {name: asdict(needs) for name, needs in sorted(inspect(built.code).items())},
    }


def origin(sources: Path = nvrtc.SOURCES) -> dict:
    """What the manifest says of where the sources come from.

    Returns
    -------
    dict
        `commit`: the last one that changed what decides the bytes (device sources, variants, the compiler's options), so that a build of the same
        sources says the same whatever was committed after it; None where git or its history is missing. `dirty`: whether some of that is not
        committed.
    """
    paths = [str(path) for path in (sources, Path(config.__file__), Path(nvrtc.__file__))]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(sources), *words, "--", *paths], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("log", "-1", "--format=%H") or None, "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": True}


def write(found: list[Built], folder: Path, *, about: tuple[tuple[str, str], ...], sources: dict | None = None, keep: tuple[str, ...] = ()) -> dict:
    """Writes `folder`/cubins and `folder`/manifest.json, and removes the files that the manifest no longer names.

    A file whose content is the same stays untouched: not every zlib packs alike. Checksums are therefore of the unpacked content.

    Parameters
    ----------
    found : list of Built
    folder : Path
    about : tuple of (str, str)
        The compiler.
    sources : dict, optional
        What `origin` says of them.
    keep : tuple of str
        Architectures whose entries in the manifest at hand stay.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    BuildError
        A bound is broken; nothing has been written then.
    """
    wrong = [sentence for built in found for sentence in complaints(built)]
    if wrong:
        raise BuildError("\n".join(wrong))
    manifest_file = folder / "manifest.json"
    entries = {}
    if keep:
        before = json.loads(manifest_file.read_text(encoding="utf-8"))
        if before["compiler"] != dict(about):
            raise BuildError(f"the binaries that would stay were built by {before['compiler']}, not by {dict(about)}; build all of them")
        entries = {arch: e for arch, e in before["cubins"].items() if arch in keep}
    packed = {}
    for built in found:
        entry = describe(built)
        entries.setdefault(built.arch, {})[built.variant.name] = entry
        packed[folder / "cubins" / entry["file"]] = built.code
    manifest = {
        "compiler": dict(about),
        "sources": sources or {"commit": None, "dirty": True},
        "cubins": {arch: dict(sorted(entries[arch].items())) for arch in sorted(entries, key=config.number)},
    }
    named = {folder / "cubins" / entry["file"] for e in entries.values() for entry in e.values()}
    data = {path: _packed(path, packed.get(path)) for path in named}
    total = sum(map(len, data.values()))
    if len(named) > MOST_FILES or total > MOST_BYTES:
        raise BuildError(f"{len(named)} files of {total} bytes in all are too much to package, at most {MOST_FILES} and {MOST_BYTES}")
    for path, content in data.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != content:
            path.write_bytes(content)
    for path in sorted((folder / "cubins").rglob("*"), reverse=True):
        if path.is_file() and path not in named:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    manifest_file.write_bytes((json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def _packed(path: Path, code: bytes | None) -> bytes:
    """The file's content for `code`; what is there now when that says the same, or when `code` is None."""
    if path.is_file():
        there = path.read_bytes()
        if code is None:
            return there
        try:
            if zlib.decompress(there) == code:
                return there
        except zlib.error:
            pass  # a damaged file is written anew
    return zlib.compress(code, 9)


def build(archs: tuple[str, ...] = config.SHIPPED, *, nvcc: bool = False, folder: Path = FOLDER, work: Path, sources: Path = nvrtc.SOURCES) -> dict:
    """Compiles for `archs` and writes what is packaged; see `compile_all` and `write`.

    Raises
    ------
    BuildError
    """
    found, tool = _compile(archs, work, nvcc, sources)
    keep = tuple(arch for arch in config.SHIPPED if arch not in archs)
    return write(found, folder, about=tool.about, sources=origin(sources), keep=keep)


def check(archs: tuple[str, ...] = config.SHIPPED, *, nvcc: bool = False, folder: Path = FOLDER, sources: Path = nvrtc.SOURCES) -> list[str]:
    """Compiles for `archs` in a temporary folder and compares with what is packaged in `folder`, byte for byte; writes nothing there.

    The commit that the manifest names is not compared: the bytes and digests say what the sources are.

    Returns
    -------
    list of str
        A sentence for everything that differs, which begins with the file's name; empty when all is the same.

    Raises
    ------
    BuildError
    """
    with tempfile.TemporaryDirectory() as work:
        found, tool = _compile(archs, Path(work), nvcc, sources)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        entries, compiler = {arch: manifest["cubins"].get(arch, {}) for arch in archs}, manifest["compiler"]
    except (OSError, ValueError, KeyError) as error:
        return [f"manifest.json cannot be read ({error})"]
    wrong = [] if compiler == dict(tool.about) else [f"manifest.json names the compiler {compiler}, this one is {dict(tool.about)}"]
    expected = [(built, describe(built)) for built in found]
    for built, entry in expected:
        try:
            same = zlib.decompress((folder / "cubins" / entry["file"]).read_bytes()) == built.code
            wrong += [] if same else [f"{entry['file']} is not what the compiler gives for the sources"]
        except (OSError, zlib.error) as error:
            wrong.append(f"{entry['file']} cannot be read ({error})")
        if entries[built.arch].pop(built.variant.name, None) != entry:
            wrong.append(f"{entry['file']} is not as manifest.json describes it")
    wrong += [f"{entry['file']} is in manifest.json, but is not packaged" for left in entries.values() for entry in left.values()]
    there = {f"{arch}/{file.name}" for arch in archs for file in (folder / "cubins" / arch).glob("*")}
    return wrong + [f"{name} is there, but is not packaged" for name in sorted(there - {entry["file"] for _, entry in expected})]


def _compile(archs: tuple[str, ...], work: Path, nvcc: bool, sources: Path) -> tuple[list[Built], Tool]:
    unknown = [arch for arch in archs if arch not in config.SHIPPED]
    if unknown:
        raise BuildError(f"no binaries are shipped for {', '.join(unknown)}; choose from {', '.join(config.SHIPPED)}")
    tool = nvcc_tool() if nvcc else nvrtc_tool()
    return compile_all(archs, work / ("nvcc" if nvcc else "nvrtc"), tool=tool, sources=sources, variants=config.packaged), tool
