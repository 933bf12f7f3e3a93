"""What is read out of a GPU's first minutes, on made-up ones: the tables, what is wrong before what is slow, and any part of it missing."""

from __future__ import annotations

import collections
import json
import random
import re
from pathlib import Path

import bench_ceilings
import bench_floors
import bench_models
import bench_shapes
import hopper_candidates
import instruction_mix
import pytest
import read_gpu
from sparge_kernels import config

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {shape.name: shape for shape in bench_shapes.MODELS}
CALLS = ("Flux 1024 px", "Mochi 22k", "Wan 14B 75k", "HunyuanVideo 118k")
LONGEST = SHAPES["HunyuanVideo 118k"]
GHZ = {"sm_90": 1.6, "sm_89": 2.5, "sm_80": 1.4}
PROCESSORS = {"sm_90": 132, "sm_89": 128, "sm_80": 108}


def spread(median, width=0.01):
    return {"median": median, "low": median * (1 - width), "high": median * (1 + width), "min": median * 0.9, "max": median * 1.1, "runs": 10}


def tiles(shape, density, keys):
    return density * -(-shape.s_q // 128) * -(-shape.s_k // 64) * shape.heads * 64 / keys


def attention_ms(shape, density, arch, pv, cycles):
    keys = 128 if (arch, pv) == ("sm_90", "fp8") else 64
    return tiles(shape, density, keys) * cycles / PROCESSORS[arch] / GHZ[arch] / 1e6


def speed_rows(shape, arch, forms):
    """As bench.measure makes them; `forms`: form of P and V -> cycles a tile."""
    base = {
        "call": shape.name, "s_q": shape.s_q, "s_k": shape.s_k, "heads": shape.heads, "kv_heads": shape.key_heads, "dim": shape.dim,
        "batch": 1, "note": "", "error": 0.1,
    }  # fmt: skip
    rows = [
        {
            **base, "what": "sdpa cudnn", "topk": None, "density": 1.0, "ms": spread(200.0), "tflops": 600.0, "error_same_blocks": None,
            "kernels": {}, "outside": None, "speedup": {"sdpa cudnn": 1.0},
        }
    ]  # fmt: skip
    for topk in (1.0, 0.5, 0.25):
        for pv, cycles in forms.items():
            kernels = {"sparge_statistics": 0.3, "sparge_prepass": 0.9, "sparge_select": 0.8}
            kernel = "sparge_attention_sm90" if (arch, pv) == ("sm_90", "fp8") else "sparge_attention_mma"
            kernels[kernel] = attention_ms(shape, topk, arch, pv, cycles)
            whole = sum(kernels.values()) + 0.05  # between the launches
            rows.append({
                **base, "what": f"sparge {pv}", "topk": topk, "density": topk, "ms": spread(whole), "tflops": 1.0, "error_same_blocks": 0.02,
                "kernels": kernels, "outside": 1 - kernels[kernel] / whole, "speedup": {"sdpa cudnn": 3.0},
            })  # fmt: skip
    return rows


def candidate_rows(cycles):
    """As bench_hopper.rows_of makes them; `cycles`: label -> cycles a tile."""
    rows = []
    for dim in (128, 64):
        shape = bench_shapes.Shape(f"119,056, D {dim}", 119056, 119056, 24, dim)
        for topk in (0.5, 0.25):
            for label, taken in {**cycles, "mma int8": 3000}.items():
                ms = tiles(shape, topk, 128) * taken / PROCESSORS["sm_90"] / GHZ["sm_90"] / 1e6
                rows.append({
                    "call": shape.name, "tokens": shape.s_q, "heads": 24, "dim": dim, "topk": topk, "density": topk, "what": label, "ms": spread(ms),
                    "tflops": 1.0, "error": 0.02,
                })  # fmt: skip
    return rows


def ceiling_rows(arch):
    per_cycle = {"exponentials": 15.5, "bulk copies of 8 KB from L2": 40.0, "16-byte copies from L2": 50.0}
    rows = []
    for ceiling in bench_ceilings.ceilings_for(arch):
        wide = 2 * bench_floors.DATASHEET[arch].get(ceiling.name, 1000) * 0.9
        cycle = per_cycle.get(ceiling.name, wide)
        row = {"name": ceiling.name, "unit": ceiling.unit, "rate": cycle * PROCESSORS[arch] * GHZ[arch] / 1e3, "per_cycle": cycle, "ghz": GHZ[arch]}
        rows.append({**row, "ms": spread(12.0)})
    for name, unit, rate in (
        (bench_ceilings.MEMORY, "TB/s", 4.0), (bench_ceilings.LAUNCH, "us", 2.0), (bench_ceilings.CALL_ON_HOST, "us", 31.0),
        (bench_ceilings.LAUNCH_ON_HOST, "us", 3.0),
    ):  # fmt: skip
        rows.append({"name": name, "unit": unit, "rate": rate, "per_cycle": None, "ghz": None, "ms": None})
    return rows


def model_result(key):
    figures = {"seconds": spread(3.0), "main_seconds": 1.8, "memory_gib": 60.0, "tflops": 500.0}
    dense = {**figures, "kernel": "cudnn", "attention_seconds": 2.1, "attention_share": 0.7}
    part = {
        **figures, "seconds": spread(2.0), "main_seconds": 0.8, "topk": 0.5, "ratio": 1.5, "main_ratio": 2.25, "density": 0.5, "pv_skipped": 0.1,
        "sparse_calls": 40, "dense_calls": 40, "reasons": {"cross attention": 40},
    }  # fmt: skip
    row = {
        "model": key,
        "title": f"{key} at full size",
        "tokens": 75600,
        "layers": 40,
        "heads": 40,
        "head_dim": 128,
        "parameters": 14e9,
        "clocks": {},
    }
    return {"rows": [{**row, "dense": dense, "sparse": [part]}], "skipped": []}


def step(result, status="ok", reason=None, log=()):
    return {"status": status, "seconds": 12.5, "reason": reason, "log": list(log), "result": result}


SHIPPED = "n128 s4 ones / n128 s6 ones"
FORMS = {"sm_90": {"fp8": 1600, "int8": 4000}, "sm_89": {"int8": 2600, "fp16": 6000}, "sm_80": {"int8": 1900, "fp16": 1800}}


def made_up(arch="sm_90", forms=None, candidates=None):
    """A run in which everything went well."""
    checks = [{"name": f"call {i}", "error": 0.01, "bound": 0.03} for i in range(3)]
    ran = {"checks": checks, "kernels": 14, "of": 14, "missing": []}
    steps = {f"packaged {pv}": step(ran) for pv in config.forms(arch)} | {"ptx sm_80": step(ran), "2^31": step({"checks": checks})}
    for call in CALLS:
        steps[f"speed {call}"] = step({"rows": speed_rows(SHAPES[call], arch, forms or FORMS[arch]), "skipped": []})
    if arch == "sm_90":
        cycles = candidates or {SHIPPED: 1600, "n128 s4 / n128 s6": 1650, "n192 s3 ones / n192 s4 ones": 1700}
        needs = {str(dim): {"registers": 168, "local": 0, "shared": 200_000} for dim in (64, 128)}
        steps |= {f"candidate {label}": step({"checks": checks, "resources": needs, "remarks": []}) for label in cycles}
        steps["candidates"] = step({"rows": candidate_rows(cycles), "skipped": []})
    steps["sanitizer probe"] = step(None)
    steps |= {f"sanitizer {tool}": step({"errors": 0, "calls": 40, "lines": []}) for tool in ("memcheck", "synccheck", "racecheck", "initcheck")}
    skipped = [{"call": "Mochi 22k", "what": "flash_attn 3", "reason": "not installed"}]
    steps["peer flash_attn 3"] = step({"rows": speed_rows(SHAPES["Mochi 22k"], arch, {})[:1], "skipped": skipped})
    steps |= {f"model {key}": step(model_result(key)) for key in ("wan14b", "flux")}
    steps["ceilings"] = step({"rows": ceiling_rows(arch)})
    machine = {
        "gpu": "Made-up GPU", "multiprocessors": PROCESSORS[arch], "capability": f"{arch[3]}.{arch[4]}", "memory_gib": 139.0, "driver_cuda": 13.0,
        "nvidia_smi": {"driver_version": "580", "power.limit": "700 W", "clocks.sm": "345 MHz", "clocks.max.sm": "1980 MHz"}, "host": "a CPU",
        "python": "3.12", "torch": "2.13", "torch_cuda": "13.0", "sparge_kernels": "0.1", "commit": "abc",
    }  # fmt: skip
    result = {
        "program": "gpu", "date": "2026-01-01", "commit": "abc", "data": "normal random data", "machine": machine, "started": "12:00",
        "seconds": 600.0, "steps": steps,
    }  # fmt: skip
    return json.loads(json.dumps(result))


def entries(result):
    """The numbered list."""
    return re.findall(r"^\d+\. (.*)$", read_gpu.report(result).split("## What to change next")[1], re.MULTILINE)


def entry(result, start):
    found = [text for text in entries(result) if text.startswith(start)]
    assert len(found) == 1, entries(result)
    return found[0]


def saved(text):
    told = re.search(r"at most ([\d.,]+) ms \(", text)
    return float(told[1].replace(",", "")) if told else None


# ---- floors and predictions


def test_the_readme_holds_what_the_program_prints(capsys):
    assert read_gpu.main(["--predictions"]) == 0
    printed, readme = capsys.readouterr().out, (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    for table in (bench_floors.hopper_table(), bench_floors.versions_table()):
        assert table in printed and table in readme
    assert bench_floors.portable_table() in printed


def test_floors_of_hoppers_tile():
    tile = bench_floors.tile_of("sm_90", 128, "fp8")
    assert (tile.keys, tile.flop, tile.nbytes) == (128, 4.0 * 128 * 128 * 128, 2 * 128 * 128)
    known = bench_floors.floors(tile, bench_floors.rates("sm_90"))
    assert known == {"products": 128 * 128 * (128 + 136) / 4096, "special functions": 66 * 256 / 16, "issue": 2 * 518, "L2": None}
    rows = [{"name": "wgmma s8, operands in shared memory", "per_cycle": 4096.0}, {"name": "exponentials", "per_cycle": 8.0}]
    rows += [
        {"name": "bulk copies of 8 KB from L2", "per_cycle": 64.0},
        {"name": "16-byte copies from L2", "per_cycle": 1.0},
        {"name": "no", "reason": ""},
    ]
    seen = bench_floors.floors(tile, bench_floors.rates("sm_90", rows))
    assert seen == {"products": 128**3 / 2048 + 128 * 128 * 136 / 4096, "special functions": 66 * 256 / 8, "issue": 1036, "L2": 32768 / 64}


@pytest.mark.parametrize("arch", [arch for arch in config.SHIPPED if arch != "sm_90"])
def test_floors_of_the_portable_tile(arch):
    names = {ceiling.name for ceiling in bench_ceilings.ceilings_for(arch)}
    for pv in config.forms(arch):
        for dim, keys in ((128, 64), (64, 128)):
            tile = bench_floors.tile_of(arch, dim, pv)
            assert tile.keys == keys and {name for name, _ in tile.products} | {tile.copies, "exponentials"} <= names
            assert config.MMA.shared(dim, pv) == config.STAGES * tile.nbytes
            least = bench_floors.floors(tile, bench_floors.rates(arch))
            assert least["issue"] == 2 * bench_floors.INSTRUCTIONS[arch, pv][dim] and least["L2"] is None
    if arch in bench_floors.DATASHEET:
        by_form = {pv: bench_floors.floors(bench_floors.tile_of(arch, 128, pv), bench_floors.rates(arch))["products"] for pv in config.forms(arch)}
        assert by_form["int8"] == 2 * 128 * 64 * 128 / bench_floors.DATASHEET[arch]["mma s8 x s8"] and min(by_form.values()) == by_form["int8"]


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_what_runs_without_a_datasheet_has_no_floor_of_products(arch):
    assert bench_floors.floors(bench_floors.tile_of(arch, 128, "int8"), bench_floors.rates(arch))["products"] is None


def test_names_of_ceilings_are_those_that_are_measured():
    names = {ceiling.name for ceiling in bench_ceilings.CEILINGS}
    assert {name for rates in bench_floors.DATASHEET.values() for name in rates} <= names
    assert {bench_floors.tile_of("sm_90", 64, pv).copies for pv in ("fp8", "int8")} | {"mma fp16", "exponentials"} <= names


def test_the_bytes_of_the_prepass_are_those_of_its_source():
    text = (ROOT / "kernels" / "cuda" / "src" / "prepass.cuh").read_text(encoding="utf-8")
    told = float(re.search(r"in all ([\d.]+);", text)[1])
    row = {"batch": 2, "heads": 3, "kv_heads": 3, "s_q": 100, "s_k": 100, "dim": 128}
    assert bench_floors.prepass_bytes(row, "int8") == told * 2 * 3 * 100 * 128
    assert bench_floors.prepass_bytes(row, "fp16") == (told + 1) * 2 * 3 * 100 * 128


def test_every_version_is_a_candidate():
    for dim in config.DIMS:
        labels = [version.label(dim) for version in bench_floors.VERSIONS]
        assert labels[0] == hopper_candidates.label(config.HOPPER_CONFIG[dim]) and len(set(labels)) == len(labels)
        assert set(labels) <= {hopper_candidates.label(chosen) for chosen in hopper_candidates.candidates(dim)}


LISTING = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], [R2] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R3], [R4] ;
.L_x_1:
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1], [R2] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R3], [R4] ;
.L_x_2:
{scores}
        /*0050*/               @P1 BRA `(.L_x_4) ;
{maxima}
        /*0060*/               @P2 BRA `(.L_x_5) ;
.L_x_3:
{powers}
{values}
        /*0070*/               @P3 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_4:
{edges}
        /*0090*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*00a0*/                   BRA `(.L_x_1) ;
"""


def test_the_instructions_of_a_tile_are_those_of_the_usual_way():
    lines = lambda word, count: "\n".join(f"        /*0100*/                   {word} R0, R1 ;" for _ in range(count))  # noqa: E731
    text = LISTING.format(
        scores=lines("IMMA.16832.S8.S8", 32), maxima=lines("IMNMX", 30), powers=lines("MUFU.EX2", 34), values=lines("IMMA.16832.U8.S8", 32),
        edges=lines("FMNMX", 5),
    )  # fmt: skip
    counted = collections.Counter(map(instruction_mix.operation, instruction_mix.tile_of(instruction_mix.blocks_of(text))))
    assert counted == {"IMMA": 64, "IMNMX": 30, "MUFU": 34, "LDGSTS": 2, "BRA": 4}


# ---- all is well


@pytest.mark.parametrize("arch", GHZ)
def test_a_run_in_which_all_went_well(arch, tmp_path, capsys):
    result = made_up(arch)
    file = tmp_path / "made-up-gpu.json"
    file.write_text(json.dumps(result))
    assert read_gpu.main([str(file)]) == 0
    printed = capsys.readouterr().out
    count = len(result["steps"])
    assert f"\n{count} of {count} steps ok.\n" in printed
    titles = ["Speed", "Peers", "Attention, cycles a tile", *(["Candidates", "Predictions"] if arch == "sm_90" else []), "Models", "Ceilings"]
    assert re.findall(r"^## (.*)$", printed, re.MULTILINE) == [*titles, "What to change next"]
    assert not [text for text in entries(result) if "**" in text or read_gpu._UNKNOWN in text]
    assert bench_models.LEGEND in printed and "- Mochi 22k, flash_attn 3: not installed" in printed
    gains = [0.0 if "none is faster" in text else saved(text) for text in entries(result)]
    known = gains[:-2]
    assert None not in known and known == sorted(known, reverse=True)
    assert gains[-2:] == [None, None] and all("full size" in text for text in entries(result)[-2:])


def test_what_attention_takes_against_what_it_must():
    told = entry(made_up(), "Attention kernel")
    ms = attention_ms(LONGEST, 0.5, "sm_90", "fp8", 1600)
    largest = 1056 / 0.9  # the products at nine tenths of the datasheet's rate
    assert "1,600 cycles a tile of 128 x 128 at 1.600 GHz (as the ceilings held it)" in told and "1,400 were predicted (1.14 x)" in told
    assert "floors: products 1,173, special functions 1,090, issue 1,036, L2 819;" in told
    assert saved(told) == pytest.approx(ms * (1 - largest / 1600), rel=5e-3) and told.endswith("kernels/cuda/src/attention_sm90.cuh.")
    told = entry(made_up("sm_89"), "Attention kernel")
    assert "2,600 cycles a tile of 128 x 64 at 2.500 GHz" in told and "nothing was predicted" in told and "attention_mma.cuh" in told


def test_the_datasheet_stands_in_for_ceilings_and_says_so():
    result = made_up()
    del result["steps"]["ceilings"]
    told = entry(result, "Attention kernel")
    assert "at 1.980 GHz (the highest that nvidia-smi names" in told and "products 1,056 (datasheet), special functions 1,056 (datasheet)" in told
    assert "L2 not measured" in told and f"{1600 * 1.98 / 1.6:,.0f} cycles" in told
    for start in ("Statistics", "Selection", "A call on the host"):
        assert "not measured" in entry(result, start) and saved(entry(result, start)) is None
    del result["machine"]["nvidia_smi"]["clocks.max.sm"]
    assert "cycles a tile: not measured" in entry(result, "Attention kernel")


def test_before_and_between_the_launches():
    result = made_up()
    moved = 11.5 * LONGEST.s_q * 24 * 128
    assert saved(entry(result, "Statistics")) == pytest.approx(1.2 - moved / 4e9, rel=0.01)
    rate = next(row["rate"] for row in ceiling_rows("sm_90") if row["name"] == "mma fp16")
    products = 2.0 * 24 * 4 * 931 * 1861 * 128 * 6 / rate / 1e9
    assert saved(entry(result, "Selection")) == pytest.approx(0.8 - products, abs=0.01) and "which is assumed" in entry(result, "Selection")
    assert saved(entry(result, "Between the 4 launches")) == pytest.approx(0.05, rel=0.02)
    assert "4 empty launches take 0.008 ms" in entry(result, "Between the 4 launches")
    assert "31 us, the shortest one, Flux 1024 px at topk 0.25" in entry(result, "A call on the host")
    assert not any(text.startswith("Order of the query blocks") for text in entries(result))
    for row in result["steps"]["speed HunyuanVideo 118k"]["result"]["rows"]:
        row["kernels"] and row["kernels"].update(sparge_sequence=0.04)
    assert saved(entry(result, "Order of the query blocks")) == 0.04


def test_what_is_left_of_whole_models():
    told = entry(made_up(), "wan14b at full size")
    assert "70% of the dense call of 3 s" in told and "at topk 0.5 40% of 2 s (1.50 x dense); 1.67 x as fast at most" in told


# ---- better ways


def test_a_candidate_that_is_faster():
    faster = {SHIPPED: 1600, "n128 s4 / n128 s6": 1400, "n192 s3 ones / n192 s4 ones": 1590}
    told = entry(made_up(candidates=faster), "Candidates, D 128")
    assert "n128 s4 takes" in told and "the shipped n128 s4 ones" in told and "1.14 x as fast" in told
    assert saved(told) == pytest.approx(attention_ms(LONGEST, 0.5, "sm_90", "fp8", 1600) * 200 / 1600, rel=5e-3)
    told = entry(made_up(candidates=faster), "Candidates, D 64")
    assert "n128 s6 takes" in told and saved(told) is None and "not measured" in told
    within = {**faster, "n128 s4 / n128 s6": 1590}  # less than the spread
    for dim in config.DIMS:
        assert "none is faster beyond the spread" in entry(made_up(candidates=within), f"Candidates, D {dim}")
    printed = read_gpu.report(made_up(candidates=faster))
    assert "128: 1,400 cycles for 128 x 128, 1.14 x as fast as shipped; 64: 1,400 cycles" in printed
    assert "| overlap with P V in halves, no turns | slower: more instructions, 8 bytes of spill | not measured |" in printed


def test_another_form_of_p_and_v_that_is_faster():
    told = entry(made_up("sm_80"), "Forms of P and V")
    own, other = (attention_ms(LONGEST, 0.5, "sm_80", pv, cycles) + 2.05 for pv, cycles in FORMS["sm_80"].items())
    assert "fp16 takes" in told and saved(told) == pytest.approx(own - other, rel=0.02) and "its error 0.02 against 0.02" in told
    assert "none is faster than fp8" in entry(made_up("sm_90"), "Forms of P and V")
    alone = made_up("sm_90", forms={"fp8": 1600})
    assert "none is faster than fp8" in entry(alone, "Forms") and "attention alone, 119,056, D 128" in entry(alone, "Forms")
    for row in alone["steps"]["candidates"]["result"]["rows"]:
        row["ms"] = spread(1.0) if row["what"] == "mma int8" else row["ms"]
    assert saved(entry(alone, "Forms")) == pytest.approx(attention_ms(LONGEST, 0.5, "sm_90", "fp8", 1600) - 1.0, rel=0.01)
    assert "not measured beside it" in entry(made_up("sm_89", forms={"int8": 2600}), "Other forms")


# ---- what went wrong


def test_what_is_wrong_comes_first():
    result = made_up()
    steps = result["steps"]
    steps["packaged fp8"] = step(
        {"checks": [{"name": "GQA", "error": 0.5, "bound": 0.05}], "kernels": 14, "of": 14, "missing": []}, "wrong", "GQA is off"
    )
    steps["candidate n128 s4 / n128 s6"] = step(None, "hang", "no end within 60 s", ["compiling", "check of 300 tokens"])
    steps["speed Mochi 22k"] = step(None, "crash", None, ["segmentation fault", ""])
    steps["2^31"]["result"]["checks"][0] = {"name": "119,056 tokens", "error": float("nan"), "bound": 0.02}  # called ok all the same
    steps["packaged int8"]["result"] = {"checks": [], "kernels": 12, "of": 14, "missing": ["attention_mma_d64_int8", "select_d64"]}
    steps["sanitizer racecheck"]["result"] = {"errors": 2, "calls": 40, "lines": ["hazard in sparge_select", "more"]}
    steps["peer flash_attn 3"] = step(None, "wrong", "import fails")
    steps["model flux"] = step(None, "no time", "the ten minutes are over")
    steps["candidates"]["result"]["skipped"] = [{"call": "x", "what": "n128 s4, topk 0.5", "reason": "WRONG: off by 0.2"}]
    listed = entries(result)
    found = [text.split(": ")[:2] for text in listed if text.startswith("**")]
    wrong = ["packaged fp8", "packaged int8", "2^31", "candidates", "sanitizer racecheck"]
    others = [["**crash**", "speed Mochi 22k"], ["**hang**", "candidate n128 s4 / n128 s6"], ["**wrong**", "peer flash_attn 3"]]
    assert sorted(found[: len(wrong)]) == sorted(["**wrong**", name] for name in wrong) and found[len(wrong) :] == others
    assert listed[: len(found)] == [text for text in listed if text.startswith("**")]
    assert "fp8: 1 of 1 checks failed: GQA (error 0.5, at most 0.05). Look at kernels/cuda/src" in entry(result, "**wrong**: packaged fp8")
    assert "12 of 14 kernels ran, not attention_mma_d64_int8, select_d64." in entry(result, "**wrong**: packaged int8")
    assert "(error nan, at most 0.02)" in entry(result, "**wrong**: 2^31")
    assert "2 errors in 40 calls: hazard in sparge_select / more." in entry(result, "**wrong**: sanitizer racecheck")
    assert "segmentation fault. Look at kernels/backends/cuda.py" in entry(result, "**crash**")
    assert "n128 s4, topk 0.5: WRONG: off by 0.2" in entry(result, "**wrong**: candidates")
    first = next(line for line in read_gpu.report(result).splitlines() if "steps ok" in line)
    left = len(steps) - 5
    assert first == (
        f"{left} of {len(steps)} steps ok; wrong: packaged fp8, peer flash_attn 3; crash: speed Mochi 22k; "
        "hang: candidate n128 s4 / n128 s6; no time: model flux."
    )
    assert "flux at full size" not in read_gpu.report(result)


def test_no_speed_is_told_of_what_went_wrong():
    result = made_up()
    result["steps"]["speed HunyuanVideo 118k"]["status"] = "wrong"
    printed = read_gpu.report(result)
    assert "| HunyuanVideo 118k |" not in printed and "Gains are those of Wan 14B 75k at topk 0.5 with sparge fp8" in printed
    for name in ("candidates", "peer flash_attn 3"):  # whose rows are of contenders that are right
        result["steps"][name]["status"] = "wrong"
    assert "\n## Candidates\n" in read_gpu.report(result) and "\n## Peers\n" in read_gpu.report(result)
    result["steps"]["speed HunyuanVideo 118k"]["status"] = "hang"  # after these rows were written
    assert "Gains are those of HunyuanVideo 118k" in read_gpu.report(result)


@pytest.mark.parametrize("status", read_gpu.BROKEN + read_gpu.LEFT_OUT)
def test_a_run_in_which_nothing_went_well(status):
    result = made_up()
    for name in result["steps"]:
        result["steps"][name] = step(None, status, "because")
    count, printed, listed = len(result["steps"]), read_gpu.report(result), entries(result)
    assert f"0 of {count} steps ok; {status}: packaged int8, " in printed and "No speed of a call was measured." in printed
    broken = [text for text in listed if text.startswith(f"**{status}**")]
    assert len(broken) == (count if status in read_gpu.BROKEN else 0)
    assert all(read_gpu._UNKNOWN in text for text in listed[len(broken) :]) and len(listed) > len(broken)
    assert re.findall(r"^## (.*)$", printed, re.MULTILINE) == ["What to change next"]


# ---- parts of it


@pytest.mark.parametrize("arch", GHZ)
def test_any_step_may_be_missing(arch):
    whole = made_up(arch)
    names = list(whole["steps"])
    chosen = random.Random(0)
    subsets = [[name for name in names if name != left_out] for left_out in names] + [[name] for name in names] + [[]]
    subsets += [chosen.sample(names, chosen.randrange(len(names))) for _ in range(60)]
    for subset in subsets:
        printed = read_gpu.report({**whole, "steps": {name: whole["steps"][name] for name in subset}})
        assert f"{len(subset)} of {len(subset)} steps ok." in printed and "1. " in printed


@pytest.mark.parametrize("arch", GHZ)
def test_any_step_may_have_any_end(arch):
    chosen = random.Random(1)
    for _ in range(60):
        result = made_up(arch)
        for name, one in result["steps"].items():
            status = chosen.choice((*["ok"] * 8, *read_gpu.BROKEN, *read_gpu.LEFT_OUT))
            if status != "ok":
                result["steps"][name] = step(chosen.choice((None, one["result"])), status, chosen.choice((None, "why | so\nit is")))
            elif chosen.random() < 0.2:
                one["result"] = None
        good = sum(one["status"] == "ok" for one in result["steps"].values())
        assert f"{good} of {len(result['steps'])} steps ok" in read_gpu.report(result)


def test_rows_without_what_may_be_missing():
    result = made_up()
    ceilings = result["steps"]["ceilings"]["result"]["rows"]
    for i, row in enumerate(ceilings):
        changed = [*ceilings[:i], {"name": row["name"], "reason": "refused"}, *ceilings[i + 1 :]]
        printed = read_gpu.report({**result, "steps": {**result["steps"], "ceilings": step({"rows": changed})}})
        assert f"- not measured: {row['name']}: refused" in printed
    for row in result["steps"]["model wan14b"]["result"]["rows"]:
        row["sparse"][0]["main_seconds"] = None
    assert "what is left of it: not measured" in entry(result, "wan14b at full size")
    for machine in ({}, {**result["machine"], "capability": "12.1"}, {**result["machine"], "nvidia_smi": {}}):
        assert "steps ok" in read_gpu.report({**result, "machine": machine})
    assert read_gpu.report({})


def test_arguments(capsys):
    with pytest.raises(SystemExit):
        read_gpu.main([])
    assert "a JSON must be named, or --predictions given" in capsys.readouterr().err
