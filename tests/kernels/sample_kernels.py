"""Two small kernels and their compiler: what the tests of tools/cubins.py build."""

from __future__ import annotations

import dataclasses
import os

import cubins
import pytest
from cubins import BuildError, Built
from sparge_kernels.config import Variant

SAMPLE = """
#include <sample.cuh>
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample_large(float* p, int n) {
  __shared__ float s[100];
  volatile float local[40];
  for (int i = 0; i < 40; i++) local[(i * n) % 40] = p[i] * kFactor;
  s[threadIdx.x % 100] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = s[n] + local[n];
}
extern "C" __global__ void sample_small(float* p, int n) {
  extern __shared__ float d[];
  d[n] = p[n];
  __syncthreads();
  p[n] = d[n + 1];
}
"""
SYMBOLS = ("sample_large", "sample_small")


def sample_variant(declared: int = 256, **changes) -> Variant:
    return dataclasses.replace(Variant("sample", "sample.cu", SYMBOLS, (("SAMPLE_THREADS", declared),), 0, 160), **changes)


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "a folder with spaces" / "src"
    folder.mkdir(parents=True)
    (folder / "sample.cu").write_text(SAMPLE)
    (folder / "sample.cuh").write_text("#pragma once\nconstexpr float kFactor = 2.0f;\n")
    return folder


@pytest.fixture(scope="session")
def tool():
    try:
        return cubins.nvrtc_tool()
    except BuildError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{error}; with CI=true a missing compiler is a failure")
        pytest.skip(str(error))


def compile_sample(tool, sources, work, arch="sm_86", **changes) -> Built:
    (built,) = cubins.compile_all((arch,), work, tool=tool, sources=sources, variants=lambda _: (sample_variant(**changes),))
    return built


ABOUT = (("name", "NVRTC"), ("version", "12.8"))


def small(tool, sources, work, arch="sm_86", name="sample") -> Built:
    """A sample that nothing can be said against."""
    (sources / "sample.cu").write_text(SAMPLE.replace("void sample_small", "void __launch_bounds__(256) sample_small"))
    return compile_sample(tool, sources, work, arch, name=name)
