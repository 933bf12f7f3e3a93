"""kernels/environment.py: every variable, and that no other module reads one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sparge_kernels import environment


@pytest.mark.parametrize(
    "platform, variables, expected",
    [
        ("linux", {}, "{home}/.cache/sparge_kernels"),
        ("linux", {"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere/sparge_kernels"),
        ("darwin", {}, "{home}/Library/Caches/sparge_kernels"),
        ("win32", {"LOCALAPPDATA": "/users/me/AppData/Local"}, "/users/me/AppData/Local/sparge_kernels"),
        ("win32", {}, "{home}/AppData/Local/sparge_kernels"),
        ("linux", {"SPARGE_CACHE_DIR": "/mine"}, "/mine"),
        ("win32", {"SPARGE_CACHE_DIR": "~/mine", "LOCALAPPDATA": "/users"}, "{home}/mine"),
    ],
)
def test_cache_dir(monkeypatch, tmp_path, platform, variables, expected):
    for name in ("SPARGE_CACHE_DIR", "LOCALAPPDATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.cache_dir(platform) == Path(expected.format(home=tmp_path))


def test_cache_dir_without_a_home(monkeypatch):
    for name in ("SPARGE_CACHE_DIR", "LOCALAPPDATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(environment.Path, "home", homeless)
    assert [environment.cache_dir(platform) for platform in ("linux", "darwin", "win32")] == [None] * 3


def test_pv(monkeypatch):
    monkeypatch.delenv("SPARGE_PV", raising=False)
    assert environment.pv() is None
    for value in ("int8", "fp8", "fp16"):
        monkeypatch.setenv("SPARGE_PV", value)
        assert environment.pv() == value
    monkeypatch.setenv("SPARGE_PV", "FP8")
    with pytest.raises(ValueError, match="SPARGE_PV must be one of int8, fp8, fp16, got 'FP8'; correct it or unset it"):
        environment.pv()


def test_environment_variables_live_in_one_module():
    folder = Path(environment.__file__).parent
    users = {p.relative_to(folder).as_posix() for p in folder.rglob("*.py") if re.search(r"os\.(environ|getenv)", p.read_text(encoding="utf-8"))}
    assert users == {"environment.py"}
    assert set(re.findall(r'"(SPARGE_\w+)"', Path(environment.__file__).read_text(encoding="utf-8"))) == {
        "SPARGE_CACHE_DIR",
        "SPARGE_LOG",
        "SPARGE_PV",
    }
